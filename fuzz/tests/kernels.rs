//! A short campaign of generated kernels with a fixed seed; `cargo xtask fuzz kernels` runs longer ones.

use std::time::Duration;

use doppel_fuzz::kernel::campaign::{Plan, Rig, run};
use doppel_fuzz::kernel::case::Case;
use doppel_fuzz::kernel::layout::{
    ALIASES, CHANGE_LEVELS, PML4, SPARE, STEP_STACK, TO_PML5, WIDE_ALIASES, X_PML4, X_TABLES,
};
use doppel_fuzz::kernel::steps::{Item, Step};
use doppel_fuzz::kernel::write::{Levels, Mode, Paging, Traits};
use doppel_fuzz::limits::Limits;
use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, byte_ptr, qword_ptr};

/// Seconds that are enough where the host has much other work: a hundred kernels take some ten otherwise.
const SLOW_HOST: u64 = 180;

fn plan() -> Plan {
    Plan {
        seed: 7,
        first: 0,
        limits: Limits::asked(Some(100), Some(SLOW_HOST), 3),
        engine: None,
        announce: false,
        coverage: false,
    }
}

#[test]
fn generated_kernels_do_on_every_engine_what_they_do_on_the_interpreter() {
    let mut rig = Rig::new().unwrap();
    let summary = run(&mut rig, &plan()).unwrap();
    let reports: String = summary.failures.iter().map(|f| f.report.as_str()).collect();
    assert!(reports.is_empty(), "{reports}");
    println!(
        "{} kernels, {} exceptions, {:?}",
        summary.cases, summary.records, summary.with
    );
    assert!(summary.with.contains_key("5 levels"));
    assert!(summary.with.contains_key("4 and 5 levels"));
    assert!(summary.cases > 60, "only {} kernels in time", summary.cases);
    assert!(summary.records > 20 * summary.cases, "too few exceptions");
    assert!(summary.endless * 20 < summary.cases, "too many do not end");
    assert!(summary.too_slow * 20 < summary.cases, "too many are slow");
    // Each kernel is compared on three engines.
    assert!(
        summary.unspecified * 20 < 3 * summary.cases,
        "{} not compared",
        summary.unspecified
    );
}

/// Timers and other CPUs call an engine out of its code all the time.
#[test]
fn kicks_in_any_moment_change_nothing() {
    let mut rig = Rig::new().unwrap();
    rig.pester(Duration::from_micros(50));
    let plan = Plan {
        seed: 8,
        limits: Limits::asked(Some(60), Some(SLOW_HOST), 3),
        ..plan()
    };
    let summary = run(&mut rig, &plan).unwrap();
    let reports: String = summary.failures.iter().map(|f| f.report.as_str()).collect();
    assert!(reports.is_empty(), "{reports}");
    assert!(summary.cases > 30, "only {} kernels in time", summary.cases);
    assert!(summary.too_slow * 10 < summary.cases, "too many are slow");
}

#[test]
fn a_short_campaign_reaches_what_kernels_do() {
    let mut rig = Rig::new().unwrap();
    let plan = Plan {
        limits: Limits::asked(Some(100), Some(SLOW_HOST), 3),
        engine: Some("interpret-one-by-one".to_owned()),
        coverage: true,
        ..plan()
    };
    let summary = run(&mut rig, &plan).unwrap();
    let report = summary.coverage.report(rig.cpu().unwrap());
    for wanted in [
        "#PF(present write user)",
        "#GP(GDT)",
        "#GP(IDT)",
        "#DB by",
        "#AC by",
        "64 0 Iretq",
        "64 0 Mov_cr_r64",
        "64 0 Invpcid",
        "64 3 Syscall",
        "32 3 Int_imm8",
        "16 3 Int_imm8",
    ] {
        assert!(
            report.contains(wanted),
            "{wanted} was not reached:\n{report}"
        );
    }
    if rig.cpu().unwrap().cpuid.has_protection_keys() {
        for wanted in [" key)", "64 0 Wrpkru"] {
            assert!(report.contains(wanted), "{wanted}:\n{report}");
        }
    }
}

/// A difference counts only in a case whose outcome is specified: most must be.
#[test]
fn what_comes_out_of_nearly_every_kernel_is_specified() {
    let mut rig = Rig::new().unwrap();
    let why = (0..100).filter_map(|number| {
        let case = rig.case(7, number).unwrap();
        rig.why_unspecified(&case).unwrap()
    });
    let why: Vec<_> = why.collect();
    assert!(why.len() < 40, "{} of 100: {why:#?}", why.len());
}

/// What every processor can do.
fn is_plain(t: &Traits) -> bool {
    t.features.is_empty()
}

/// A kernel of one step of 64-bit code at CPL 0, with address spaces that are flushed by loading CR3.
fn of_code(
    rig: &Rig,
    wanted: impl Fn(&Traits) -> bool,
    flags: u64,
    mut code: CodeAssembler,
) -> Case {
    let mut cases = (0..).map(|number| rig.case(7, number).unwrap());
    let is_kernel = |step: &&Step| step.context.mode == Mode::Bits64 && step.context.cpl == 0;
    let plain = |case: &Case| {
        let t = case.traits;
        t.paging == Paging::Long && wanted(&t) && !t.globals && !t.pcids
    };
    let mut case = cases
        .find(|case| plain(case) && case.steps.iter().any(|step| is_kernel(&step)))
        .unwrap();
    let mut context = case.steps.iter().find(is_kernel).unwrap().context.clone();
    (context.cr3, context.flags, context.rsp) = (0, flags, STEP_STACK - 0x400);
    let item = Item {
        name: "code",
        bytes: code.assemble(0).unwrap(),
    };
    case.steps = vec![Step {
        context,
        items: vec![item],
        gap: 0,
    }];
    case.schedule = vec![0];
    case
}

/// Code that uses a page, changes its entry in the page table, does something in between, and uses it again.
fn remapped(rig: &Rig, used: bool, entry: u64, between: &[Between]) -> Case {
    const PAGE: u64 = 40;
    const GOOD: u64 = SPARE + 0x20_000 + 3;
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(rcx, X_TABLES[0][2] + 8 * PAGE).unwrap();
    a.mov(rbx, ALIASES[0] + 0x1000 * PAGE).unwrap();
    a.mov(rax, GOOD).unwrap();
    a.mov(qword_ptr(rcx), rax).unwrap();
    a.mov(rdx, cr3).unwrap();
    a.mov(cr3, rdx).unwrap();
    if used {
        a.mov(rdx, qword_ptr(rbx)).unwrap();
    }
    a.mov(rax, entry).unwrap();
    a.mov(qword_ptr(rcx), rax).unwrap();
    for what in between {
        let at = match what {
            Between::InvalidatePage => ALIASES[0] + 0x1000 * PAGE,
            Between::InvalidateAlias => ALIASES[1] + 0x1000 * PAGE,
            Between::LoadRoot => {
                a.mov(rdx, cr3).unwrap();
                a.mov(cr3, rdx).unwrap();
                continue;
            }
        };
        a.mov(rdx, at).unwrap();
        a.invlpg(byte_ptr(rdx)).unwrap();
    }
    a.mov(rdx, qword_ptr(rbx)).unwrap();
    of_code(rig, is_plain, 0x202, a)
}

#[test]
fn a_time_that_is_read_is_nobodys_to_compare_under_single_steps_too() {
    let mut rig = Rig::new().unwrap();
    for (flags, reads, open) in [
        (0x202, true, true),
        (0x302, true, true),
        (0x302, false, false),
    ] {
        let mut a = CodeAssembler::new(64).unwrap();
        a.mov(rcx, rcx).unwrap();
        if reads {
            a.rdtsc().unwrap();
        }
        let case = of_code(&rig, is_plain, flags, a);
        let why = rig.why_unspecified(&case).unwrap();
        assert_eq!(why.is_some(), open, "{flags:#x}, {reads}: {why:?}");
    }
}

#[derive(Clone, Copy)]
enum Between {
    InvalidatePage,
    InvalidateAlias,
    LoadRoot,
}

#[test]
fn a_translation_that_may_be_an_old_one_leaves_the_outcome_open() {
    use Between::{InvalidateAlias, InvalidatePage, LoadRoot};
    const OTHER: u64 = SPARE + 0x21_000 + 3;
    const ABSENT: u64 = SPARE + 0x21_000;
    let mut rig = Rig::new().unwrap();
    let mut why = |used, entry, between: &[Between]| {
        let case = remapped(&rig, used, entry, between);
        rig.why_unspecified(&case).unwrap()
    };
    for entry in [OTHER, ABSENT] {
        let stale = why(true, entry, &[]).expect("nothing was invalidated");
        assert!(stale.contains("without a flush"), "{stale}");
        assert!(why(true, entry, &[InvalidateAlias]).is_some());
        assert_eq!(why(true, entry, &[InvalidatePage]), None);
        assert_eq!(why(true, entry, &[LoadRoot]), None);
        assert_eq!(why(false, entry, &[]), None, "it was never used");
    }
}

/// Code that uses a page by another entry of each table of five levels, changes one of them, does something in between, and uses it again.
fn remapped_in_five(level: usize, entry: u64, between: &[u64]) -> Result<CodeAssembler, IcedError> {
    const PAGE: u64 = 40;
    let [pdpt, pd, pt] = X_TABLES[0];
    let entries = [
        (PML4 + TO_PML5 + 8, X_PML4[0] + 7),
        (X_PML4[0] + 8, pdpt + 7),
        (pdpt, pd + 7),
        (pd, pt + 7),
        (pt + 8 * PAGE, SPARE + 0x20_000 + 3),
    ];
    let mut a = CodeAssembler::new(64)?;
    for (at, entry) in entries {
        a.mov(rcx, at)?;
        a.mov(rax, entry)?;
        a.mov(qword_ptr(rcx), rax)?;
    }
    a.mov(rdx, cr3)?;
    a.mov(cr3, rdx)?;
    a.mov(rbx, WIDE_ALIASES[4] + 0x1000 * PAGE)?;
    a.mov(rdx, qword_ptr(rbx))?;
    a.mov(rax, entry)?;
    a.mov(rcx, entries[level].0)?;
    a.mov(qword_ptr(rcx), rax)?;
    for base in between {
        a.mov(rdx, base + 0x1000 * PAGE)?;
        a.invlpg(byte_ptr(rdx))?;
    }
    a.mov(rdx, qword_ptr(rbx))?;
    Ok(a)
}

#[test]
fn what_may_be_old_of_five_levels_is_known() {
    let mut rig = Rig::new().unwrap();
    for level in 0..5 {
        for (between, open) in [
            (&[][..], true),
            (&[WIDE_ALIASES[4]], false),
            (&[ALIASES[0]], true),
        ] {
            let code = remapped_in_five(level, 0, between).unwrap();
            let case = of_code(&rig, |t| t.levels == Levels::Five, 0x202, code);
            let why = rig.why_unspecified(&case).unwrap();
            assert_eq!(why.is_some(), open, "{level}, {between:x?}: {why:?}");
        }
    }
}

/// A page's other key counts once it was invalidated, other rights at once.
#[test]
fn a_key_may_be_an_old_one_and_rights_may_not() {
    const GOOD: u64 = SPARE + 0x20_000 + 3;
    const ACCESSED: u64 = 1 << 5;
    let mut rig = Rig::new().unwrap();
    if !rig.cpu().unwrap().cpuid.has_protection_keys() {
        eprintln!("SKIPPED: this host has no protection keys");
        return;
    }
    for (entry, between, open) in [
        (GOOD | 5 << 59, &[][..], true),
        (GOOD | 5 << 59, &[WIDE_ALIASES[4]], false),
        // As it is by now.
        (GOOD | ACCESSED, &[], false),
    ] {
        let mut code = remapped_in_five(4, entry, between).unwrap();
        code.mov(rax, cr4).unwrap();
        code.or(eax, 1 << 22).unwrap();
        code.mov(cr4, rax).unwrap();
        code.xor(ecx, ecx).unwrap();
        code.xor(edx, edx).unwrap();
        code.mov(eax, 1 << 10).unwrap();
        code.wrpkru().unwrap();
        code.mov(rdx, qword_ptr(rbx)).unwrap();
        let wanted = |t: &Traits| t.levels == Levels::Five && t.has_keys();
        let case = of_code(&rig, wanted, 0x202, code);
        let why = rig.why_unspecified(&case).unwrap();
        assert_eq!(why.is_some(), open, "{entry:x}, {between:x?}: {why:?}");
    }
}

#[test]
fn steps_change_the_levels() {
    let mut a = CodeAssembler::new(64).unwrap();
    a.mov(eax, CHANGE_LEVELS as u32).unwrap();
    a.call(rax).unwrap();
    a.mov(rcx, cr4).unwrap();
    a.and(ecx, 1 << 12).unwrap();
    a.mov(rdx, cr3).unwrap();
    let mut rig = Rig::new().unwrap();
    let mut case = of_code(&rig, |t| t.levels == Levels::Both, 0x202, a);
    case.schedule = vec![0; 3];
    let steps = rig.steps(&case).unwrap();
    for wanted in ["RCX = 1000\n", "RCX = 0\n", "RDX = 3000\n", "RDX = 1000\n"] {
        assert!(steps.contains(wanted), "{wanted}: {steps}");
    }
}
