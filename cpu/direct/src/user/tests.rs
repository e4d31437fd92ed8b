//! Stops that lead nowhere: each of them ends, one way or another.

use super::*;
use crate::Change;
use doppel_memory::{Backing, GuestRam, PAGE_MASK, PAGE_SIZE};
use doppel_x86::{Efer, EmptyBus, flat_attributes, interpret};
use iced_x86::code_asm::*;

mod patched;

const TABLE: u64 = 0x4000;
const P: u64 = 0x21;
const RW: u64 = 0x42;
const US: u64 = 4;
const XD: u64 = 1 << 63;

const CODE: u64 = 0x10_0000;
/// The page of code behind it.
const NEXT: u64 = CODE + PAGE_SIZE;
/// Code that CODE calls.
const OTHER: u64 = 0x10_8000;
const DATA: u64 = 0x11_0000;
const STACK: u64 = 0x12_0000;
/// MOVDIRI [RDI], EAX, of which nothing before tells whether it is one.
const SENSITIVE: &[u8] = &[0x0f, 0x38, 0xf9, 0x07];

/// User code at [`CODE`], about to be run directly.
struct Rig {
    direct: Direct,
    cpu: Box<Cpu>,
}

impl Rig {
    /// `None`, said aloud, where the host has no direct execution.
    fn new(options: DirectOptions, code: impl FnOnce(&mut CodeAssembler)) -> Option<Rig> {
        let ram = Arc::new(GuestRam::with_backing(4 << 20, Backing::Memfd).unwrap());
        for (at, entry) in [(0x1000u64, 0x2000), (0x2000, 0x3000), (0x3000, TABLE)] {
            ram.store(at, entry | P | RW | US).unwrap();
        }
        for (at, bits) in [
            (CODE, 0),
            (NEXT, 0),
            (OTHER, 0),
            (DATA, RW | XD),
            (STACK - PAGE_SIZE, RW | XD),
        ] {
            ram.store(TABLE + at / PAGE_SIZE * 8, at | P | US | bits)
                .unwrap();
        }
        let mut a = CodeAssembler::new(64).unwrap();
        code(&mut a);
        ram.ptr(CODE).unwrap().write(&a.assemble(CODE).unwrap());
        let host = match DirectHost::new(&ram) {
            Ok(host) => Arc::new(host),
            Err(e) => {
                eprintln!("SKIPPED: no direct execution here: {e}");
                return None;
            }
        };
        let mut cpu = Cpu::new(0, ram);
        begin(&mut cpu);
        let direct = Direct::new(host, &cpu, options);
        Some(Rig { direct, cpu })
    }

    fn put(&self, at: u64, code: &[u8]) {
        for (at, byte) in (at..).zip(code) {
            self.cpu.ram.store(at, *byte).unwrap();
        }
    }

    /// Lets user code of a page be written as well.
    fn writable(&self, at: u64) {
        let entry = at | P | RW | US;
        self.cpu
            .ram
            .store(TABLE + at / PAGE_SIZE * 8, entry)
            .unwrap();
    }

    /// Runs it until it is left; `None` where it is not executed directly.
    fn run(&mut self) -> Option<Left> {
        let Rig { direct, cpu } = self;
        direct.takes(cpu).then(|| direct.run(cpu, &|| false, 0))
    }

    /// Does what an engine does then; a page that is declined it interprets.
    fn follow(&mut self, left: Left) {
        let page = self.cpu.rip & !PAGE_MASK;
        match left {
            Left::Writes(page) => self.direct.written(&self.cpu, page),
            Left::Interpret => self.step(),
            Left::Declined => {
                while self.cpu.rip & !PAGE_MASK == page {
                    self.step();
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn step(&mut self) {
        let rip = self.cpu.rip;
        self.cpu.asked_cpuid = false;
        let _ = interpret::step(&mut self.cpu, &mut EmptyBus);
        if self.cpu.asked_cpuid {
            self.direct.asked_cpuid(&self.cpu, rip);
        }
        for (at, _) in std::mem::take(&mut self.cpu.code_writes) {
            self.direct.written(&self.cpu, at & !PAGE_MASK);
        }
    }

    /// Runs until it is translated; how many stops that took, if it took no more than `most`.
    fn stops_until_translated(&mut self, most: u64) -> Option<u64> {
        assert!(self.direct.open(root(&self.cpu)));
        while let Some(left) = self.run() {
            if self.direct.counts.page_faults > most {
                return None;
            }
            self.follow(left);
        }
        Some(self.direct.counts.page_faults)
    }
}

fn begin(cpu: &mut Cpu) {
    const USER: u32 = 3 << 5;
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM;
    cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::FSGSBASE;
    cpu.cr4.set(Cr4::OSXSAVE, cpu.cpuid.has_xsave());
    cpu.xcr0 = cpu.cpuid.xcr0().max(1);
    cpu.efer = Efer::LME | Efer::LMA | Efer::NXE | Efer::SCE;
    cpu.cr3 = 0x1000;
    cpu.tsc_offset = 0;
    cpu.given_up.wanted = true;
    let segment = |attributes, selector| Segment {
        base: 0,
        limit: u32::MAX,
        attributes: attributes | USER,
        selector,
    };
    cpu.seg = [segment(flat_attributes::DATA, 0); 6];
    cpu.seg[Seg::Cs as usize] = segment(flat_attributes::CODE64, state::CODE_64);
    cpu.seg[Seg::Ss as usize] = segment(flat_attributes::DATA, state::STACK);
    cpu.cpl = 3;
    cpu.rflags = Rflags::ONE | Rflags::IF;
    cpu.gpr[4] = STACK - 64;
    cpu.rip = CODE;
}

/// Calls OTHER for ever.
fn calls(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.call(OTHER).unwrap();
    a.jmp(again).unwrap();
}

/// Reads DATA for ever.
fn reads(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.mov(rbx, DATA).unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(al, byte_ptr(rbx)).unwrap();
    a.mov(byte_ptr(rbx + 1), al).unwrap();
    a.dec(edx).unwrap();
    a.jnz(again).unwrap();
    a.syscall().unwrap();
}

/// Executes directly what calls, again and again, into a page that is not.
fn calls_sensitive_code() -> Option<Rig> {
    let rig = Rig::new(DirectOptions::always(), calls)?;
    rig.put(OTHER, &[0xc3]);
    rig.put(OTHER + 256, SENSITIVE);
    Some(rig)
}

#[test]
fn each_visit_to_sensitive_code_is_the_engines() {
    let Some(mut rig) = calls_sensitive_code() else {
        return;
    };
    for visit in 0..20 {
        let left = rig.run().unwrap();
        assert_eq!((left, rig.cpu.rip), (Left::Declined, OTHER), "{visit}");
        rig.follow(left);
    }
    let counts = rig.direct.counts;
    assert_eq!((counts.sensitive, counts.unexplained), (20, 0));
}

#[test]
fn interruptions_tell_where_user_code_was() {
    let Some(mut rig) = calls_sensitive_code() else {
        return;
    };
    assert_eq!(rig.run(), Some(Left::Declined));
    let Rig { direct, cpu } = &mut rig;
    direct.interrupted(cpu, 0);
    assert_eq!(direct.counts.found, [0, 1], "in a page that is translated");
    cpu.rip = CODE;
    direct.interrupted(cpu, 0);
    assert_eq!(direct.counts.found, [0, 1], "none of it ran");
    direct.kicked = true;
    direct.interrupted(cpu, 0);
    assert_eq!(direct.counts.found, [1, 1], "called out of the child");
}

#[test]
fn an_instruction_that_goes_on_in_sensitive_code_is_the_engines() {
    const LAST: u64 = NEXT - 2;
    let jump = |a: &mut CodeAssembler| {
        a.mov(rax, LAST).unwrap();
        a.jmp(rax).unwrap();
    };
    let Some(mut rig) = Rig::new(DirectOptions::always(), jump) else {
        return;
    };
    // MOV EAX, 1, of which two bytes are in the first page; JMP CODE.
    rig.put(LAST, &[0xb8, 1, 0, 0, 0, 0xe9]);
    let back = CODE.wrapping_sub(LAST + 10) as u32;
    rig.put(LAST + 6, &back.to_le_bytes());
    rig.put(NEXT + 256, SENSITIVE);
    for visit in 0..20 {
        for at in [LAST, NEXT + 3] {
            let left = rig.run().unwrap();
            assert_eq!((left, rig.cpu.rip), (Left::Declined, at), "{visit}");
            rig.follow(left);
        }
        assert_eq!(rig.cpu.rip, CODE);
    }
    assert_eq!(rig.direct.counts.unexplained, 0);
}

#[test]
fn a_mapping_that_is_gone_is_made_again() {
    let Some(mut rig) = Rig::new(DirectOptions::always(), reads) else {
        return;
    };
    rig.cpu.gpr[2] = 5;
    assert_eq!(rig.run(), Some(Left::Interpret));
    let end = rig.cpu.rip;
    assert!(rig.direct.counts.system_calls == 1 && rig.cpu.gpr[2] == 0);
    let faults = rig.direct.counts.page_faults;
    let root = root(&rig.cpu);
    let space = rig.direct.space(root).unwrap();
    let gone = Change::Unmap {
        at: DATA,
        len: PAGE_SIZE,
    };
    space.child.as_mut().unwrap().apply(&[gone]).unwrap();
    (rig.cpu.rip, rig.cpu.gpr[2]) = (CODE, 100_000);
    while rig.cpu.rip != end {
        let left = rig.run().unwrap();
        if rig.cpu.rip != end {
            rig.follow(left);
        }
    }
    assert_eq!(rig.cpu.gpr[2], 0);
    let counts = rig.direct.counts;
    assert_eq!((counts.unexplained, counts.page_faults - faults), (3, 3));
}

/// The pieces of a large page outlive a flush of everything where nothing has changed, and one INVLPG later drops them all.
#[test]
fn a_large_page_is_dropped_as_a_whole_after_a_flush_of_everything() {
    const DIRECTORY_ENTRY: u64 = 0x3000 + 8;
    const OTHER_TABLE: u64 = 0x5000;
    const LARGE: u64 = 0x80;
    const AT: u64 = 2 << 20;
    const WITHIN: u64 = 5 * PAGE_SIZE;
    let read = |a: &mut CodeAssembler| {
        a.mov(rbx, AT + WITHIN).unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.syscall().unwrap();
    };
    let Some(mut rig) = Rig::new(DirectOptions::always(), read) else {
        return;
    };
    let flush = |rig: &mut Rig, flush: fn(&mut Cpu)| {
        flush(&mut rig.cpu);
        let flushed = std::mem::take(&mut rig.cpu.flushed);
        rig.direct.flushed(&rig.cpu, &flushed);
    };
    let ram = rig.cpu.ram.clone();
    ram.store(DIRECTORY_ENTRY, AT | P | RW | US | LARGE)
        .unwrap();
    rig.put(AT + WITHIN, &[1]);
    rig.put(DATA, &[2]);
    ram.store(OTHER_TABLE + 8 * 5, DATA | P | US | XD).unwrap();
    let runs = |rig: &mut Rig| {
        rig.cpu.rip = CODE;
        assert_eq!(rig.run(), Some(Left::Interpret));
        rig.cpu.gpr[0] as u8
    };
    assert_eq!(runs(&mut rig), 1);
    flush(&mut rig, |cpu| cpu.flush_tlb(true));
    let faults = rig.direct.counts.page_faults;
    assert_eq!(runs(&mut rig), 1);
    assert_eq!(rig.direct.counts.page_faults, faults, "it is still mapped");
    ram.store(DIRECTORY_ENTRY, OTHER_TABLE | P | RW | US)
        .unwrap();
    flush(&mut rig, |cpu| cpu.flush_tlb_page(AT));
    assert_eq!(runs(&mut rig), 2);
}

/// Nothing stops user code from loading a selector that no child is started with; that is no fault of the host's.
#[test]
fn a_state_that_user_code_made_unusual_is_translated() {
    const CODE_SELECTOR: u32 = 0x33;
    let loads = |a: &mut CodeAssembler| {
        a.mov(eax, CODE_SELECTOR).unwrap();
        a.mov(ds, eax).unwrap();
        a.mov(rbx, DATA).unwrap();
        a.mov(al, byte_ptr(rbx)).unwrap();
        a.syscall().unwrap();
    };
    let Some(mut rig) = Rig::new(DirectOptions::always(), loads) else {
        return;
    };
    for _ in 0..2 * MOST_FAILURES {
        rig.cpu.rip = CODE;
        rig.cpu.seg[Seg::Ds as usize].selector = 0;
        // Nobody has accessed the page that it reads.
        const PRESENT: u64 = 1;
        let entry = DATA | PRESENT | US | XD;
        let ram = &rig.cpu.ram;
        ram.store(TABLE + DATA / PAGE_SIZE * 8, entry).unwrap();
        let root = root(&rig.cpu);
        if let Some(space) = rig.direct.space(root) {
            space.shadow.unmap(DATA, &mut space.changes);
        }
        assert_eq!(rig.run(), Some(Left::Declined));
        assert_eq!(rig.cpu.gpr[3], DATA);
    }
    assert_eq!((rig.direct.failures, rig.direct.counts.gone), (0, 0));
}

#[test]
fn a_fault_that_stays_leads_to_translation() {
    const WRITE: u32 = 6;
    let Some(mut rig) = Rig::new(DirectOptions::always(), reads) else {
        return;
    };
    rig.cpu.gpr[2] = 5;
    assert_eq!(rig.run(), Some(Left::Interpret));
    let root = root(&rig.cpu);
    let Rig { direct, cpu } = &mut rig;
    let lefts: Vec<_> = (0..6)
        .map(|_| direct.fault(cpu, root, DATA + 1, WRITE))
        .collect();
    let interpret = Some(Left::Interpret);
    let expected = [
        interpret,
        interpret,
        None,
        interpret,
        interpret,
        Some(Left::Declined),
    ];
    assert_eq!(lefts, expected);
    let space = &direct.spaces[&root];
    assert!(!space.account.is_direct() && !space.account.has_paid());
    let stats = direct.stats();
    assert_eq!(stats.get("direct_stops_unexplained"), Some(&6));
}

#[test]
fn stops_that_have_become_dearer_than_they_were_are_charged_as_they_are() {
    let Some(mut rig) = Rig::new(DirectOptions::default(), calls) else {
        return;
    };
    rig.put(OTHER, &[0xc3]);
    rig.put(OTHER + 256, SENSITIVE);
    // What the host was when it was measured: nothing but stops would look like gain for ever.
    let hz = rig.cpu.tsc_hz;
    rig.direct.times.set_stop(hz, std::time::Duration::ZERO);
    let stops = rig.stops_until_translated(20_000);
    assert!(stops.is_some(), "{:?}", rig.direct.counts);
}

#[test]
fn a_page_that_is_written_and_executed_again_and_again_is_translated() {
    let Some(mut rig) = Rig::new(DirectOptions::default(), calls) else {
        return;
    };
    // INC dword [RIP + 1018]; RET.
    rig.put(OTHER, &[0xff, 0x05, 0xfa, 3, 0, 0, 0xc3]);
    rig.writable(OTHER);
    let stops = rig.stops_until_translated(20_000);
    assert!(stops.is_some(), "{:?}", rig.direct.counts);
    let counter: u32 = rig.cpu.ram.load(OTHER + 1024).unwrap();
    assert!(counter > MOST_TURNS, "{counter}");
}

#[test]
fn pages_that_no_process_may_have_are_the_engines() {
    let Some(mut rig) = Rig::new(DirectOptions::always(), |a| {
        a.mov(al, byte_ptr(8)).unwrap();
        a.syscall().unwrap();
    }) else {
        return;
    };
    let entry = DATA | P | RW | US;
    rig.cpu.ram.store(TABLE, entry).unwrap();
    if rig.direct.host.can_map(0) {
        return eprintln!("SKIPPED: this host lets processes have all pages");
    }
    rig.put(DATA + 8, &[0x77]);
    let left = rig.run().unwrap();
    assert_eq!((left, rig.cpu.rip), (Left::Interpret, CODE));
    rig.follow(left);
    assert_eq!(rig.cpu.gpr[0] & 0xff, 0x77);
    assert_eq!((rig.direct.failures, rig.direct.counts.unexplained), (0, 0));
}

#[test]
fn a_state_that_a_process_cannot_have_is_not_executed_directly() {
    let Some(mut rig) = Rig::new(DirectOptions::always(), |a| a.nop().unwrap()) else {
        return;
    };
    type Spoil = (&'static str, fn(&mut Cpu));
    let spoils: [Spoil; 4] = [
        ("x87 errors by a pin", |cpu| cpu.cr0.remove(Cr0::NE)),
        ("x87 switched off", |cpu| cpu.cr0.insert(Cr0::TS)),
        ("RDTSC is privileged", |cpu| cpu.cr4.insert(Cr4::TSD)),
        ("single steps", |cpu| cpu.rflags.insert(Rflags::TF)),
    ];
    for (what, spoil) in spoils {
        begin(&mut rig.cpu);
        assert!(rig.direct.takes(&rig.cpu), "before: {what}");
        spoil(&mut rig.cpu);
        assert!(!rig.direct.takes(&rig.cpu), "{what}");
    }
}
