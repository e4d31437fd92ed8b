//! The state in which a boot protocol hands the boot CPU to the kernel.

use doppel_memory::{GuestRam, HOLE_START};
use doppel_x86::{Cpu, Cr0, Cr4, Dtr, Efer, Gpr, Rflags, Seg, Segment};

use super::BootError;
use super::image::place;

/// Where the GDT of the entry state is.
pub const GDT_AT: u64 = 0x5000;
/// Where the identity page tables of the 64-bit entry are: PML4, PDPT, four page directories.
pub const PAGE_TABLES_AT: u64 = 0x9000;

/// `__BOOT_CS` and `__BOOT_DS` of the Linux boot protocol; PVH leaves the selectors open.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// What EAX says: the kernel was loaded by Multiboot.
const MULTIBOOT_LOADER: u64 = 0x2bad_b002;

const FLAT_LIMIT: u32 = u32::MAX;
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const TSS_BUSY: u32 = 0x008b;

/// How the boot CPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux boot protocol: long mode, paging on, RSI points to `boot_params`.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Address of `boot_params`.
        params: u64,
    },
    /// 32-bit Linux boot protocol: protected mode, paging off, ESI points to `boot_params`.
    Linux32 {
        /// First instruction.
        eip: u32,
        /// Address of `boot_params`.
        params: u32,
    },
    /// Multiboot 1: 32-bit protected mode, paging off, EAX tells so, EBX points to the information.
    Multiboot {
        /// First instruction.
        eip: u32,
        /// Address of the information structure.
        info: u32,
    },
    /// Xen PVH: 32-bit protected mode, paging off, EBX points to the start info.
    Pvh {
        /// First instruction.
        eip: u32,
        /// Address of `hvm_start_info`.
        start_info: u32,
    },
}

impl Entry {
    /// Writes the tables that the state refers to.
    pub fn place_tables(&self, ram: &GuestRam) -> Result<(), BootError> {
        place(ram, GDT_AT, &self.gdt())?;
        match self {
            Entry::Linux64 { .. } => place_identity_map(ram),
            _ => Ok(()),
        }
    }

    /// Puts a CPU that was just reset into the state.
    pub fn apply(&self, cpu: &mut Cpu) {
        self.apply_segments(cpu);
        cpu.set_firmware_mtrrs(HOLE_START);
        cpu.rflags = Rflags::ONE;
        cpu.gpr = [0; 16];
        match *self {
            Entry::Linux64 { rip, params } => {
                cpu.cr4 = Cr4::PAE;
                cpu.cr3 = PAGE_TABLES_AT;
                cpu.efer = Efer::LME | Efer::LMA;
                cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::PG;
                cpu.rip = rip;
                cpu.gpr[Gpr::Rsi as usize] = params;
            }
            Entry::Linux32 { eip, params } => enter_protected(cpu, eip, Gpr::Rsi, params),
            Entry::Multiboot { eip, info } => {
                enter_protected(cpu, eip, Gpr::Rbx, info);
                cpu.gpr[Gpr::Rax as usize] = MULTIBOOT_LOADER;
            }
            Entry::Pvh { eip, start_info } => enter_protected(cpu, eip, Gpr::Rbx, start_info),
        }
        cpu.flush_tlb(true);
    }

    fn apply_segments(&self, cpu: &mut Cpu) {
        let flat = |selector, attributes| Segment {
            base: 0,
            limit: FLAT_LIMIT,
            attributes,
            selector,
        };
        cpu.seg = [flat(DATA_SELECTOR, DATA); 6];
        cpu.seg[Seg::Cs as usize] = flat(CODE_SELECTOR, self.code());
        cpu.tr = Segment {
            base: 0,
            limit: 0x67,
            attributes: TSS_BUSY,
            selector: TSS_SELECTOR,
        };
        cpu.cpl = 0;
        cpu.gdtr = Dtr {
            base: GDT_AT,
            limit: self.gdt().len() as u16 - 1,
        };
        cpu.idtr = Dtr::default();
    }

    fn code(&self) -> u32 {
        match self {
            Entry::Linux64 { .. } => CODE64,
            _ => CODE32,
        }
    }

    fn gdt(&self) -> [u8; 0x30] {
        let mut gdt = [0; 0x30];
        for (selector, attributes) in [(CODE_SELECTOR, self.code()), (DATA_SELECTOR, DATA)] {
            let at = usize::from(selector);
            gdt[at..at + 8].copy_from_slice(&flat_descriptor(attributes).to_le_bytes());
        }
        let tss = 0x67 | u64::from(TSS_BUSY) << 40;
        gdt[0x20..0x28].copy_from_slice(&tss.to_le_bytes());
        gdt
    }
}

/// Protected mode without paging, with a pointer in `register` and zeros in the others.
fn enter_protected(cpu: &mut Cpu, eip: u32, register: Gpr, pointer: u32) {
    cpu.cr4 = Cr4::empty();
    cpu.efer = Efer::empty();
    cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE;
    cpu.rip = eip.into();
    cpu.gpr[register as usize] = pointer.into();
}

/// A descriptor of base 0 and the highest limit (Intel SDM vol. 3A, figure 3-8).
fn flat_descriptor(attributes: u32) -> u64 {
    0x000f_0000_0000_ffff | u64::from(attributes) << 40
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn place_identity_map(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let table = |i: u64| PAGE_TABLES_AT + i * 0x1000;
    let put = |gpa: u64, entry: u64| place(ram, gpa, &entry.to_le_bytes());
    put(table(0), table(1) | PRESENT_WRITABLE)?;
    for i in 0..4 {
        put(table(1) + i * 8, table(2 + i) | PRESENT_WRITABLE)?;
    }
    for i in 0..4 * 512 {
        put(table(2) + i * 8, i << 21 | LARGE | PRESENT_WRITABLE)?;
    }
    Ok(())
}
