//! A short campaign of generated kernels with a fixed seed; `cargo xtask fuzz kernels` runs longer ones.

use doppel_fuzz::kernel::campaign::{Plan, Rig, run};
use doppel_fuzz::limits::Limits;

fn plan() -> Plan {
    Plan {
        seed: 7,
        first: 0,
        limits: Limits::asked(Some(600), Some(8), 3),
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
    println!("{} kernels, {} exceptions", summary.cases, summary.records);
    assert!(summary.cases > 60, "only {} kernels in time", summary.cases);
    assert!(summary.records > 20 * summary.cases, "too few exceptions");
    assert!(summary.endless * 20 < summary.cases, "too many do not end");
    assert!(summary.too_slow * 20 < summary.cases, "too many are slow");
    assert!(
        summary.unspecified * 20 < summary.cases,
        "too many not compared"
    );
}

#[test]
fn a_short_campaign_reaches_what_kernels_do() {
    let mut rig = Rig::new().unwrap();
    let plan = Plan {
        limits: Limits::asked(Some(100), Some(8), 3),
        engine: Some("interpret-one-by-one".to_owned()),
        coverage: true,
        ..plan()
    };
    let summary = run(&mut rig, &plan).unwrap();
    let report = summary.coverage.report(rig.cpu());
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
}

/// A difference counts only in a case whose outcome is specified: most must be.
#[test]
fn what_comes_out_of_nearly_every_kernel_is_specified() {
    let mut rig = Rig::new().unwrap();
    let why = (0..100).filter_map(|number| {
        let case = rig.case(7, number).unwrap();
        rig.why_unspecified(&case)
    });
    let why: Vec<_> = why.collect();
    assert!(why.len() < 40, "{} of 100: {why:#?}", why.len());
}
