//! Instructions that tell of the machine's state, or change it, without a trap in user mode (Robin and Irvine, 2000): what the bare
//! processor does with each, and that a guest gets the architecture's answer from its own state, on both engines.
//!
//! Where the host has UMIP, its kernel steps in for some of them: they then trap on the processor, but the program
//! sees no more of it than before.

use doppel_fuzz::guest::{Ended, GDT, Kind, kernel_linear, run_code};
use doppel_fuzz::layout::{CODE, DATA, UD2};
use doppel_fuzz::native_unsafe::{Native, exclusive, supported};
use doppel_fuzz::random::Random;
use doppel_fuzz::state::{Ending, Outcome, State};
use doppel_fuzz::xsave::XsaveLayout;
use doppel_x86::{Bus, Cpu, CpuidModel, Cr0, Cr4, EmptyBus, Gpr, Rflags, Seg, Segment};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const INVALID_OPCODE: u8 = 6;
const GENERAL_PROTECTION: u8 = 13;
const IF: u64 = Rflags::IF.bits();
const ZF: u64 = 1 << 6;
/// A selector of the guest's own: data that user code may read but not write, with an odd limit.
const SELECTOR: u16 = 0x53;
const LIMIT: u32 = 0x12345;

type Assemble = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn assemble(f: Assemble, end: &[u8]) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    let mut code = a.assemble(CODE.base).unwrap();
    code.extend(end);
    code
}

/// Runs it on the bare processor in user mode; the outcome, or `None` where the host cannot.
fn bare(f: Assemble) -> Option<Outcome> {
    if !supported() {
        eprintln!("SKIPPED: no bare processor here");
        return None;
    }
    let mut native = Native::new(XsaveLayout::new(CpuidModel::host(1).xcr0())).unwrap();
    let mut state = State::random(&mut Random::of(1, 1, 0));
    state.rip = CODE.base;
    let stack = state.gpr[4];
    state.gpr = [0; 16];
    state.gpr[4] = stack;
    state.gpr[7] = DATA.base;
    Some(native.run(&state, &assemble(f, &UD2)))
}

/// The bare processor lets it pass: the program comes to its end.
fn bare_passes(f: Assemble) -> Option<Outcome> {
    let o = bare(f)?;
    assert_eq!(vector(&o), INVALID_OPCODE, "{:?}", o.ending);
    Some(o)
}

/// The bare processor traps it.
fn bare_traps(f: Assemble) {
    if let Some(o) = bare(f) {
        assert_eq!(vector(&o), GENERAL_PROTECTION, "{:?}", o.ending);
    }
}

fn vector(o: &Outcome) -> u8 {
    match o.ending {
        Ending::Exception { vector, .. } => vector,
        e => panic!("{e:?}"),
    }
}

fn own_segment(cpu: &mut Cpu) {
    let limit = u64::from(LIMIT);
    let descriptor = limit & 0xffff | (limit >> 16) << 48 | 0xf1 << 40;
    cpu.ram
        .store(GDT + u64::from(SELECTOR & !7), descriptor)
        .unwrap();
    cpu.gdtr.limit = 0x5f;
}

const KINDS: [Kind; 3] = [Kind::Interpret, Kind::Translate, Kind::Direct];

/// Runs it in a guest on each engine at a privilege, and hands what came of it to `check`.
fn guest_with(
    cpl: u8,
    f: Assemble,
    bus: &mut dyn Bus,
    prepare: fn(&mut Cpu),
    check: impl Fn(&Ended),
) {
    let end: &[u8] = if cpl == 0 { &[0xf4] } else { &UD2 };
    let code = assemble(f, end);
    let _alone = exclusive();
    for kind in KINDS {
        let all = |cpu: &mut Cpu| {
            own_segment(cpu);
            cpu.gpr[Gpr::Rdi as usize] = DATA.base;
            cpu.rflags |= Rflags::IF;
            prepare(cpu);
        };
        let ended = run_code(kind, cpl, &code, bus, all).unwrap();
        println!("{kind:?} at CPL {cpl}");
        check(&ended.expect("it ends"));
    }
}

fn guest(cpl: u8, f: Assemble, prepare: fn(&mut Cpu), check: impl Fn(&Ended)) {
    guest_with(cpl, f, &mut EmptyBus, prepare, check);
}

fn nothing(_: &mut Cpu) {}

/// It came to the end of the program.
fn passed(e: &Ended) {
    assert!(
        matches!(e.exception, None | Some((INVALID_OPCODE, 0))),
        "{:?}",
        e.exception
    );
}

fn general_protection(e: &Ended) {
    assert_eq!(e.exception, Some((GENERAL_PROTECTION, 0)));
}

fn rax_of(e: &Ended) -> u64 {
    passed(e);
    e.gpr[0]
}

fn table_of(data: &[u8]) -> (u16, u64) {
    let limit = u16::from_le_bytes([data[0], data[1]]);
    (limit, u64::from_le_bytes(data[2..10].try_into().unwrap()))
}

#[test]
fn sgdt_and_sidt_store_the_guests_tables() {
    let sgdt: Assemble = |a| a.sgdt(ptr(rdi));
    let sidt: Assemble = |a| a.sidt(ptr(rdi));
    let ours = (0x5f, kernel_linear(GDT));
    for f in [sgdt, sidt] {
        if let Some(o) = bare_passes(f) {
            // Not the guest's: the host's, or what its kernel shows instead.
            assert_ne!(table_of(&o.memory.0[1]), ours);
        }
    }
    for cpl in [0, 3] {
        guest(cpl, sgdt, nothing, |e| {
            passed(e);
            assert_eq!(table_of(&e.data), ours);
        });
        guest(cpl, sidt, nothing, |e| {
            passed(e);
            assert_eq!(table_of(&e.data), (0x1ff, kernel_linear(GDT + 0x1000)));
        });
    }
}

#[test]
fn sldt_str_and_smsw_read_the_guests_registers() {
    let sldt: Assemble = |a| a.sldt(rax);
    let str: Assemble = |a| a.str(rax);
    let smsw: Assemble = |a| a.smsw(rax);
    let prepare = |cpu: &mut Cpu| {
        cpu.ldtr.selector = 0x58;
        cpu.cr0.remove(Cr0::AM);
    };
    for (f, ours) in [(sldt, 0x58), (str, 0x40)] {
        if let Some(o) = bare(f) {
            // Some kernels leave these two to UMIP.
            assert!([INVALID_OPCODE, GENERAL_PROTECTION].contains(&vector(&o)));
        }
        for cpl in [0, 3] {
            guest(cpl, f, prepare, |e| assert_eq!(rax_of(e), ours));
        }
    }
    bare_passes(smsw);
    let ours = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::PG;
    for cpl in [0, 3] {
        guest(cpl, smsw, prepare, |e| assert_eq!(rax_of(e), ours.bits()));
    }
}

#[test]
fn umip_of_the_guest_forbids_them_to_its_users() {
    let all: [Assemble; 5] = [
        |a| a.sgdt(ptr(rdi)),
        |a| a.sidt(ptr(rdi)),
        |a| a.sldt(rax),
        |a| a.str(rax),
        |a| a.smsw(rax),
    ];
    for f in all {
        guest(3, f, |cpu| cpu.cr4 |= Cr4::UMIP, general_protection);
        guest(0, f, |cpu| cpu.cr4 |= Cr4::UMIP, passed);
    }
}

#[test]
fn lar_lsl_verr_and_verw_look_into_the_guests_table() {
    let lsl: Assemble = |a| {
        a.mov(ecx, u32::from(SELECTOR))?;
        a.lsl(rax, rcx)
    };
    let lar: Assemble = |a| {
        a.mov(ecx, u32::from(SELECTOR))?;
        a.lar(rax, rcx)
    };
    let verr: Assemble = |a| {
        a.mov(ecx, u32::from(SELECTOR))?;
        a.verr(cx)
    };
    let verw: Assemble = |a| {
        a.mov(ecx, u32::from(SELECTOR))?;
        a.verw(cx)
    };
    if let Some(o) = bare_passes(lsl) {
        assert_ne!(
            o.gpr[0],
            u64::from(LIMIT),
            "the host's table, not the guest's"
        );
    }
    for f in [lar, verr, verw] {
        bare_passes(f);
    }
    for cpl in [0, 3] {
        guest(cpl, lsl, nothing, |e| {
            assert_eq!((rax_of(e), e.flags & ZF), (u64::from(LIMIT), ZF));
        });
        guest(cpl, lar, nothing, |e| {
            assert_eq!((rax_of(e), e.flags & ZF), (0x1f100, ZF));
        });
        guest(cpl, verr, nothing, |e| {
            passed(e);
            assert_eq!(e.flags & ZF, ZF);
        });
        guest(cpl, verw, nothing, |e| {
            passed(e);
            assert_eq!(e.flags & ZF, 0);
        });
    }
}

#[test]
fn popf_changes_the_guests_interrupt_flag_where_it_may() {
    let f: Assemble = |a| {
        a.push(2)?;
        a.popfq()
    };
    // The bare processor ignores it, and says nothing: this is why a kernel cannot run unprivileged as it is.
    if let Some(o) = bare_passes(f) {
        assert_eq!(o.flags & IF, IF);
    }
    guest(0, f, nothing, |e| assert_eq!(e.flags & IF, 0));
    guest(3, f, nothing, |e| assert_eq!(e.flags & IF, IF));
    let trusted = |cpu: &mut Cpu| cpu.rflags |= Rflags::IOPL;
    guest(3, f, trusted, |e| assert_eq!(e.flags & IF, 0));
}

#[test]
fn pushf_shows_the_guests_interrupt_flag() {
    let f: Assemble = |a| {
        a.pushfq()?;
        a.pop(rax)
    };
    if let Some(o) = bare_passes(f) {
        assert_eq!(o.gpr[0] & IF, IF, "a host that runs takes interrupts");
    }
    let masked = |cpu: &mut Cpu| cpu.rflags.remove(Rflags::IF);
    for cpl in [0, 3] {
        guest(cpl, f, masked, |e| assert_eq!(rax_of(e) & IF, 0));
        guest(cpl, f, nothing, |e| assert_eq!(rax_of(e) & IF, IF));
    }
}

#[test]
fn cli_and_sti_change_the_guests_interrupt_flag_or_fault() {
    let cli: Assemble = |a| a.cli();
    let sti: Assemble = |a| {
        a.sti()?;
        a.nop()
    };
    bare_traps(cli);
    bare_traps(sti);
    let masked = |cpu: &mut Cpu| cpu.rflags.remove(Rflags::IF);
    let trusted = |cpu: &mut Cpu| cpu.rflags |= Rflags::IOPL;
    guest(0, cli, nothing, |e| assert_eq!(e.flags & IF, 0));
    guest(0, sti, masked, |e| assert_eq!(e.flags & IF, IF));
    guest(3, cli, nothing, general_protection);
    guest(3, sti, nothing, general_protection);
    guest(3, cli, trusted, |e| {
        passed(e);
        assert_eq!(e.flags & IF, 0);
    });
}

#[test]
fn cpuid_describes_the_guests_processor() {
    let leaf1: Assemble = |a| {
        a.mov(eax, 1)?;
        a.cpuid()
    };
    let hypervisor: Assemble = |a| {
        a.mov(eax, 0x4000_0000)?;
        a.cpuid()
    };
    bare_passes(leaf1);
    bare_passes(hypervisor);
    let model = CpuidModel::host(1);
    const OSXSAVE: u64 = 1 << 27;
    for cpl in [0, 3] {
        guest(cpl, leaf1, nothing, |e| {
            assert_eq!(rax_of(e), u64::from(model.signature()));
            assert_eq!(e.gpr[1] & OSXSAVE != 0, model.has_xsave());
        });
        guest(
            cpl,
            leaf1,
            |cpu| cpu.cr4.remove(Cr4::OSXSAVE),
            |e| {
                passed(e);
                assert_eq!(e.gpr[1] & OSXSAVE, 0, "follows the guest's CR4");
            },
        );
        guest(cpl, hypervisor, nothing, |e| {
            passed(e);
            let name: Vec<u8> = [3, 1, 2]
                .iter()
                .flat_map(|n| (e.gpr[*n] as u32).to_le_bytes())
                .collect();
            assert_eq!(name, b"KVMKVMKVM\0\0\0");
        });
    }
}

#[test]
fn rdtsc_reads_the_guests_clock() {
    let f: Assemble = |a| {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)
    };
    let host = bare_passes(f).map(|o| o.gpr[0]);
    for cpl in [0, 3] {
        guest(cpl, f, nothing, |e| {
            let second = CpuidModel::host(1).tsc_hz();
            let (guest, host) = (rax_of(e), doppel_x86::host_tsc());
            let lately = |ticks: u64| ticks < 60 * second;
            // The processor reads the host's clock where user code is executed directly.
            assert!(
                lately(guest) || lately(host - guest),
                "a machine that has just begun"
            );
        });
        guest(
            cpl,
            f,
            |cpu| cpu.tsc_offset = cpu.tsc_offset.wrapping_add(1 << 60),
            |e| {
                assert_eq!(rax_of(e) >> 60, 1, "not the host's {host:?}");
            },
        );
    }
    guest(3, f, |cpu| cpu.cr4 |= Cr4::TSD, general_protection);
    guest(0, f, |cpu| cpu.cr4 |= Cr4::TSD, passed);
}

#[test]
fn rdtscp_and_rdpid_read_the_guests_processor_number() {
    const NUMBER: u64 = 0x1234_5678;
    let rdtscp: Assemble = |a| {
        a.rdtscp()?;
        a.mov(rax, rcx)
    };
    let rdpid: Assemble = |a| a.rdpid(rax);
    let numbered = |cpu: &mut Cpu| cpu.msr.tsc_aux = NUMBER;
    for f in [rdtscp, rdpid] {
        if let Some(o) = bare(f)
            && vector(&o) == INVALID_OPCODE
        {
            assert_ne!(o.gpr[0], NUMBER, "the host's");
        }
        for cpl in [0, 3] {
            guest(cpl, f, numbered, |e| assert_eq!(rax_of(e), NUMBER));
        }
    }
}

#[test]
fn xgetbv_reads_the_guests_xcr0() {
    let f: Assemble = |a| {
        a.xor(ecx, ecx)?;
        a.xgetbv()
    };
    if let Some(o) = bare_passes(f) {
        assert_ne!(o.gpr[0] & 2, 0, "a host has SSE switched on");
    }
    for cpl in [0, 3] {
        guest(cpl, f, |cpu| cpu.xcr0 = 1, |e| assert_eq!(rax_of(e), 1));
        let off = |cpu: &mut Cpu| cpu.cr4.remove(Cr4::OSXSAVE);
        guest(cpl, f, off, |e| {
            assert_eq!(e.exception.map(|x| x.0), Some(INVALID_OPCODE));
            assert_eq!(e.gpr[0], 0);
        });
    }
}

#[test]
fn segment_bases_are_the_guests_though_the_engine_uses_gs() {
    let read: Assemble = |a| {
        a.rdfsbase(rax)?;
        a.rdgsbase(rdx)
    };
    let write: Assemble = |a| {
        a.mov(rcx, DATA.base + 0x100)?;
        a.wrgsbase(rcx)?;
        a.mov(rcx, 0x7788_u64)?;
        a.mov(qword_ptr(8).gs(), rcx)?;
        a.mov(rcx, qword_ptr(DATA.base as i32 + 0x108))?;
        a.rdgsbase(rax)
    };
    bare_passes(read);
    let set = |cpu: &mut Cpu| {
        cpu.seg[Seg::Fs as usize].base = 0x1111_2222;
        cpu.seg[Seg::Gs as usize].base = 0x3333_4444;
    };
    for cpl in [0, 3] {
        guest(cpl, read, set, |e| {
            assert_eq!((rax_of(e), e.gpr[2]), (0x1111_2222, 0x3333_4444));
        });
        guest(cpl, write, nothing, |e| {
            assert_eq!((rax_of(e), e.gpr[1]), (DATA.base + 0x100, 0x7788));
        });
        let off = |cpu: &mut Cpu| cpu.cr4.remove(Cr4::FSGSBASE);
        guest(cpl, read, off, |e| {
            assert_eq!(e.exception.map(|x| x.0), Some(INVALID_OPCODE));
            assert_eq!(e.gpr[0], 0);
        });
    }
}

/// Remembers what was written to ports.
#[derive(Default)]
struct Ports(Vec<(u16, u8, u32)>);

impl Bus for Ports {
    fn port_read(&mut self, port: u16, _: u8) -> u32 {
        u32::from(port) ^ 0xa5
    }
    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.0.push((port, size, value));
    }
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}

#[test]
fn in_and_out_reach_the_guests_devices_or_fault() {
    let f: Assemble = |a| {
        a.in_(al, 0x60)?;
        a.out(0x80, al)
    };
    bare_traps(f);
    let trusted = |cpu: &mut Cpu| cpu.rflags |= Rflags::IOPL;
    for (cpl, prepare) in [(0, nothing as fn(&mut Cpu)), (3, trusted)] {
        let mut ports = Ports::default();
        guest_with(cpl, f, &mut ports, prepare, |e| {
            assert_eq!(rax_of(e) & 0xff, 0xc5);
        });
        assert_eq!(ports.0, [(0x80, 1, 0xc5); KINDS.len()]);
    }
    let mut ports = Ports::default();
    guest_with(3, f, &mut ports, nothing, general_protection);
    assert!(ports.0.is_empty());
}

#[test]
fn hlt_halts_the_guests_kernel_and_faults_in_its_users() {
    let f: Assemble = |a| a.hlt();
    bare_traps(f);
    guest(3, f, nothing, general_protection);
    guest(0, f, nothing, |e| {
        assert_eq!(e.exception, None);
        assert_eq!(e.rip & 0xfff, 1);
    });
}

#[test]
fn selectors_are_the_guests_and_load_from_its_table() {
    let read: Assemble = |a| {
        a.mov(eax, cs)?;
        a.mov(edx, ss)
    };
    let load: Assemble = |a| {
        a.mov(ecx, u32::from(SELECTOR))?;
        a.mov(ds, ecx)?;
        a.mov(eax, ds)
    };
    // The privilege level shows in the selectors: a kernel that runs in user mode would see it.
    if let Some(o) = bare_passes(read) {
        assert_eq!((o.gpr[0] & 3, o.gpr[2] & 3), (3, 3));
    }
    if let Some(o) = bare(load) {
        assert_eq!(vector(&o), GENERAL_PROTECTION, "not in the host's table");
    }
    guest(0, read, nothing, |e| {
        assert_eq!((rax_of(e), e.gpr[2]), (0x10, 0x18))
    });
    guest(3, read, nothing, |e| {
        assert_eq!((rax_of(e), e.gpr[2]), (0x33, 0x2b))
    });
    for cpl in [0, 3] {
        guest(cpl, load, nothing, |e| {
            assert_eq!(rax_of(e), u64::from(SELECTOR))
        });
        let none = |cpu: &mut Cpu| cpu.gdtr.limit = 0x4f;
        guest(cpl, load, none, |e| {
            let code = u64::from(SELECTOR & !3);
            assert_eq!(e.exception, Some((GENERAL_PROTECTION, code)));
        });
    }
}

#[test]
fn iret_goes_where_the_guests_frame_says() {
    let f: Assemble = |a| {
        a.push(0x2b)?;
        a.push(0x1060_1000)?;
        a.push(0x202)?;
        a.push(0x33)?;
        a.push(LANDING as i32)?;
        a.iretq()
    };
    const LANDING: u64 = doppel_fuzz::layout::LANDING;
    if let Some(o) = bare_passes(f) {
        assert_eq!(o.rip, LANDING, "no trap: to the same privilege");
    }
    let ud2 = |cpu: &mut Cpu| {
        // The landing's page is the third of the code, and physically the first.
        cpu.ram.store::<u16>(0x20_000, 0x0b0f).unwrap();
    };
    for cpl in [0, 3] {
        guest(cpl, f, ud2, |e| {
            assert_eq!((e.exception, e.rip), (Some((INVALID_OPCODE, 0)), LANDING));
        });
    }
}

#[test]
fn privileged_instructions_trap_and_work_in_the_guests_kernel() {
    let all: [Assemble; 8] = [
        |a| a.mov(rax, cr0),
        |a| a.mov(rax, dr7),
        |a| a.clts(),
        |a| a.invlpg(ptr(rdi)),
        |a| a.wbinvd(),
        |a| {
            a.mov(ecx, 0x10)?;
            a.rdmsr()
        },
        |a| a.swapgs(),
        |a| {
            a.mov(ecx, 0x28)?;
            a.lldt(r8w)
        },
    ];
    for f in all {
        bare_traps(f);
        guest(3, f, nothing, general_protection);
        guest(0, f, nothing, passed);
    }
    let unusable: fn(&mut Cpu) = |cpu| {
        cpu.seg[Seg::Ds as usize].attributes |= Segment::UNUSABLE;
    };
    guest(
        0,
        |a| a.mov(rax, cr0),
        unusable,
        |e| {
            assert_ne!(rax_of(e) & Cr0::PG.bits(), 0);
        },
    );
}
