//! Guests of several processors, end to end, on hosts with fewer too.

mod support;

use std::time::Duration;
use support::{Boot, CLOUD, PASSED};

const SCRIPT: &str = include_str!("scripts/processors.sh");
const LIMIT: Duration = Duration::from_secs(180);

/// A guest that puts `cpus` processors to work.
fn guest(cpus: u32) -> Boot {
    Boot::script(CLOUD, &format!("CPUS={cpus}\n{SCRIPT}"))
        .file(
            "doppel/parallel",
            0o755,
            &support::program("parallel_unsafe", &[]),
        )
        .flag(&format!("--cpus {cpus}"))
        .cmdline("quiet")
}

fn works(engine: &str, cpus: u32) {
    let finished = guest(cpus).doppel(engine, LIMIT).expect(PASSED);
    finished.says("parallel: passed").says("step: done");
}

#[test]
fn two_processors_work_translated() {
    works("translate", 2);
}

#[test]
fn four_processors_work_translated() {
    works("translate", 4);
}

#[test]
fn sixteen_processors_work_translated() {
    works("translate", 16);
}

#[test]
fn two_processors_work_interpreted() {
    works("interpret", 2);
}
