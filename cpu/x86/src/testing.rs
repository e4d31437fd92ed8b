//! For unit tests: a bus that records, a processor model that is the same on every host, and machines in some mode.

use std::sync::Arc;

use doppel_memory::GuestRam;

use crate::segment::{flat, flat_attributes};
use crate::{Bus, Cpu, CpuidLeaf, CpuidModel, Cr0, Cr4, Dtr, Efer, Seg, Segment};

/// Two ports and a few registers that remember.
#[derive(Default)]
pub(crate) struct TestBus {
    pub written: Vec<(u16, u8, u32)>,
    pub port_value: u32,
    pub nmi: bool,
    pub interrupt: Option<u8>,
    pub cr8: u64,
    pub apic_base: u64,
    pub calls: Vec<String>,
    /// FERR# as it was told, and IGNNE#.
    pub numeric_errors: Vec<bool>,
    pub ignores_numeric_errors: bool,
}

impl Bus for TestBus {
    fn port_read(&mut self, _port: u16, size: u8) -> u32 {
        self.port_value & (u32::MAX >> (32 - 8 * u32::from(size)))
    }
    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.written.push((port, size, value));
    }
    fn mmio_read(&mut self, _gpa: u64, size: u8) -> u64 {
        u64::MAX >> (64 - 8 * u32::from(size))
    }
    fn mmio_write(&mut self, _gpa: u64, _size: u8, _value: u64) {}
    fn apic_msr_read(&mut self, msr: u32) -> Option<u64> {
        (msr == 0x1b).then_some(self.apic_base)
    }
    fn apic_msr_write(&mut self, msr: u32, value: u64, _tsc_now: u64) -> Option<()> {
        (msr == 0x1b).then(|| self.apic_base = value)
    }
    fn cr8(&mut self) -> u64 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u64) {
        self.cr8 = value;
    }
    fn interrupt_pending(&mut self) -> bool {
        self.interrupt.is_some()
    }
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        self.interrupt.take()
    }
    fn numeric_error(&mut self, error: bool) -> bool {
        self.numeric_errors.push(error);
        self.ignores_numeric_errors
    }
    fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }
    fn nmi_ends(&mut self) {
        self.calls.push("nmi ends".to_owned());
    }
    fn spinning(&mut self) {
        self.calls.push("spinning".to_owned());
    }
    fn wake(&mut self, id: u32) {
        self.calls.push(format!("wake {id}"));
    }
    fn send_ipis(&mut self, ids: u128, first: u32, icr: u32) -> u64 {
        self.calls
            .push(format!("ipis {ids:#x} from {first}: {icr:#x}"));
        1
    }
}

/// A processor with every feature bit set, of a vendor.
pub(crate) fn host_leaf(vendor: &[u8; 12], leaf: u32, subleaf: u32) -> CpuidLeaf {
    let word =
        |n: usize| u32::from_le_bytes([vendor[n], vendor[n + 1], vendor[n + 2], vendor[n + 3]]);
    let name = |eax| CpuidLeaf {
        eax,
        ebx: word(0),
        edx: word(4),
        ecx: word(8),
    };
    let all = CpuidLeaf {
        eax: u32::MAX,
        ebx: u32::MAX,
        ecx: u32::MAX,
        edx: u32::MAX,
    };
    match (leaf, subleaf) {
        (0, _) => name(0x20),
        (0x8000_0000, _) => name(0x8000_0026),
        (1, _) => CpuidLeaf {
            eax: 0x00a1_0f11,
            ..all
        },
        (4 | 0x8000_001d, 0..=3) => CpuidLeaf {
            eax: 0x0c00_c100 | [0x21, 0x22, 0x43, 0x63][subleaf as usize],
            ebx: 0x01c0_003f,
            ecx: 0x3f,
            edx: 0,
        },
        (4 | 0x8000_001d, _) => CpuidLeaf::default(),
        (0xd, 0) => CpuidLeaf {
            eax: 0x602e7,
            ebx: 0x240,
            ecx: 0x2b00,
            edx: 0,
        },
        (0xd, 2) => component(0x100, 0x240),
        (0xd, 5) => component(0x40, 0x440),
        (0xd, 6) => component(0x200, 0x480),
        (0xd, 7) => component(0x400, 0x680),
        (0xd, 9) => component(8, 0xa80),
        (0x8000_0008, _) => CpuidLeaf { eax: 0x3030, ..all },
        _ => all,
    }
}

fn component(size: u32, offset: u32) -> CpuidLeaf {
    CpuidLeaf {
        eax: size,
        ebx: offset,
        ..CpuidLeaf::default()
    }
}

pub(crate) const INTEL: &[u8; 12] = b"GenuineIntel";
pub(crate) const AMD: &[u8; 12] = b"AuthenticAMD";
pub(crate) const TSC_HZ: u64 = 2_500_000_000;

pub(crate) fn model(vendor: &'static [u8; 12], cpus: u32) -> CpuidModel {
    let read = |leaf, subleaf| host_leaf(vendor, leaf, subleaf);
    CpuidModel::from_host(&read, 0xe7, TSC_HZ, cpus)
}

/// A CPU in its reset state with 2 MiB of RAM.
pub(crate) fn reset(vendor: &'static [u8; 12]) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(2 << 20).expect("RAM"));
    Cpu::with_model(0, ram, Arc::new(model(vendor, 1)))
}

pub(crate) const PML4: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x5000;
pub(crate) const IDT: u64 = 0x6000;
pub(crate) const TSS: u64 = 0x8000;
/// Top of the kernel's and the user's stack, and of IST 1.
pub(crate) const STACK: u64 = 0x2_0000;
pub(crate) const USER_STACK: u64 = 0x3_0000;
pub(crate) const IST1: u64 = 0x4_0000;

pub(crate) const KERNEL_CS: u16 = 0x10;
pub(crate) const KERNEL_DS: u16 = 0x18;
pub(crate) const USER_CS32: u16 = 0x23;
pub(crate) const USER_DS: u16 = 0x2b;
pub(crate) const USER_CS: u16 = 0x33;
pub(crate) const TSS_SELECTOR: u16 = 0x40;

/// Stores in guest RAM.
pub(crate) fn put<T: doppel_memory::Word>(cpu: &Cpu, gpa: u64, v: T) {
    cpu.ram.store(gpa, v).expect("RAM");
}

pub(crate) fn get(cpu: &Cpu, gpa: u64) -> u64 {
    cpu.ram.load(gpa).expect("RAM")
}

/// Writes the GDT: kernel code and data, user 32-bit code, data, 64-bit code (Linux's order), an available TSS.
fn write_gdt(cpu: &Cpu, kernel_code: u64) {
    let flat = |attributes: u64| 0x000f_0000_0000_ffff | attributes << 40;
    for (selector, descriptor) in [
        (KERNEL_CS, flat(kernel_code)),
        (KERNEL_DS, flat(0xc093)),
        (USER_CS32, flat(0xc0fb)),
        (USER_DS, flat(0xc0f3)),
        (USER_CS, flat(0xa0fb)),
        (TSS_SELECTOR, 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40),
    ] {
        put(cpu, GDT + u64::from(selector & !7), descriptor);
    }
}

/// Long mode at CPL 0: 2 MiB identity mapped for user and kernel, IDT all absent, RSP0 = [`STACK`], IST 1.
pub(crate) fn long_mode(vendor: &'static [u8; 12]) -> Box<Cpu> {
    let mut cpu = reset(vendor);
    put(&cpu, PML4, 0x2007u64);
    put(&cpu, 0x2000, 0x3007u64);
    put(&cpu, 0x3000, 0x87u64);
    write_gdt(&cpu, 0xa09b);
    put(&cpu, TSS + 4, STACK);
    put(&cpu, TSS + 0x24, IST1);
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::WP | Cr0::NE | Cr0::ET;
    cpu.cr4 = Cr4::PAE | Cr4::PGE;
    cpu.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE;
    cpu.cr3 = PML4;
    cpu.gdtr = Dtr {
        base: GDT,
        limit: 0x4f,
    };
    cpu.idtr = Dtr {
        base: IDT,
        limit: 0xfff,
    };
    cpu.seg = [flat(KERNEL_DS, flat_attributes::DATA, 0); 6];
    cpu.seg[Seg::Cs as usize] = flat(KERNEL_CS, flat_attributes::CODE64, 0);
    cpu.tr = Segment {
        base: TSS,
        limit: 0x67,
        attributes: 0x8b,
        selector: TSS_SELECTOR,
    };
    cpu.rip = 0x1_0000;
    cpu.gpr[4] = STACK - 0x100;
    cpu
}

/// Puts a CPU in long mode to user mode.
pub(crate) fn to_user(cpu: &mut Cpu) {
    cpu.seg = [flat(USER_DS, flat_attributes::DATA, 3); 6];
    cpu.seg[Seg::Cs as usize] = flat(USER_CS, flat_attributes::CODE64, 3);
    cpu.cpl = 3;
    cpu.gpr[4] = USER_STACK;
    cpu.rflags = crate::Rflags::ONE | crate::Rflags::IF;
}

/// A 64-bit gate: `kind` 0xe (interrupt) or 0xf (trap).
pub(crate) fn gate(cpu: &Cpu, vector: u8, handler: u64, kind: u64, ist: u64, dpl: u64) {
    let at = IDT + 16 * u64::from(vector);
    let low = (handler & 0xffff)
        | u64::from(KERNEL_CS) << 16
        | ist << 32
        | (0x80 | kind | dpl << 5) << 40
        | (handler >> 16 & 0xffff) << 48;
    put(cpu, at, low);
    put(cpu, at + 8, handler >> 32);
}

/// 32-bit protected mode at CPL 0, paging off, with the same GDT (32-bit kernel code) and a 32-bit TSS.
pub(crate) fn protected_mode() -> Box<Cpu> {
    let mut cpu = reset(INTEL);
    write_gdt(&cpu, 0xc09b);
    put(&cpu, TSS + 4, STACK as u32);
    put(&cpu, TSS + 8, u32::from(KERNEL_DS));
    cpu.cr0 = Cr0::PE | Cr0::NE | Cr0::ET;
    cpu.gdtr = Dtr {
        base: GDT,
        limit: 0x7f,
    };
    cpu.idtr = Dtr {
        base: IDT,
        limit: 0x7ff,
    };
    cpu.seg = [flat(KERNEL_DS, flat_attributes::DATA, 0); 6];
    cpu.seg[Seg::Cs as usize] = flat(KERNEL_CS, flat_attributes::CODE32, 0);
    cpu.tr = Segment {
        base: TSS,
        limit: 0x67,
        attributes: 0x8b,
        selector: TSS_SELECTOR,
    };
    cpu.rip = 0x1_0000;
    cpu.gpr[4] = STACK - 0x100;
    cpu
}

/// A 32-bit gate of any type.
pub(crate) fn gate32(cpu: &Cpu, vector: u8, selector: u16, handler: u64, kind: u64, dpl: u64) {
    let low = (handler & 0xffff)
        | u64::from(selector) << 16
        | (0x80 | kind | dpl << 5) << 40
        | (handler >> 16 & 0xffff) << 48;
    put(cpu, IDT + 8 * u64::from(vector), low);
}
