//! A short campaign with a fixed seed; `cargo xtask fuzz` runs longer ones.

use doppel_fuzz::campaign::{Engines, Plan, run};
use doppel_fuzz::limits::Limits;
use doppel_fuzz::native_unsafe::supported;
use doppel_fuzz::rig::Rig;

#[test]
fn every_engine_does_what_the_processor_does() {
    if !supported() {
        eprintln!("SKIPPED: no bare processor here");
        return;
    }
    let mut rig = Rig::new().unwrap();
    let plan = Plan {
        seed: 7,
        first: 0,
        limits: Limits::asked(Some(30_000), Some(25), 5),
        engines: Engines::All,
        shape: None,
        announce: false,
    };
    let summary = run(&mut rig, &plan).unwrap();
    let reports: Vec<_> = summary.failures.iter().map(|f| &f.report).collect();
    assert!(
        reports.is_empty(),
        "{}",
        reports.iter().map(|r| r.as_str()).collect::<String>()
    );
    println!(
        "{} cases, {} instructions",
        summary.cases, summary.instructions
    );
    assert!(summary.cases > 2000, "only {} cases in time", summary.cases);
    assert!(
        summary.faults * 20 > summary.cases,
        "too few faults: {}",
        summary.faults
    );
    assert!(
        summary.discarded * 20 < summary.cases,
        "too many not compared: {}",
        summary.discarded
    );
    assert!(summary.instructions > 5 * summary.cases);
}
