//! stress-ng in a guest with two processors: no stressor finds anything wrong, and the kernel has no complaint. `DOPPEL_STRESS_SECONDS` says how
//! long each group of stressors runs.

mod support;

use doppel_cli::guest::STRESS_NG;
use std::time::Duration;
use support::{Boot, CLOUD, PASSED};

const SCRIPT: &str = include_str!("scripts/stress.sh");
/// Groups of stressors in the script.
const GROUPS: u32 = 5;
const BOOT: Duration = Duration::from_secs(120);

fn seconds() -> u32 {
    std::env::var("DOPPEL_STRESS_SECONDS").map_or(3, |n| n.parse().unwrap())
}

/// A guest that does so.
fn stressed(flags: &str, engine: &str) {
    let wanted = |path: &str| {
        path.starts_with("lib")
            || path.contains("/lib/x86_64-linux-gnu/")
            || path == "usr/bin/stress-ng"
    };
    let script = format!("seconds={}\n{SCRIPT}", seconds());
    let boot = Boot::script(CLOUD, &script)
        .packages("stress-ng", STRESS_NG, wanted)
        .cmdline("quiet")
        .flag(flags);
    // A stressor ends what it is at, and that may take long on a busy host.
    let limit = BOOT + Duration::from_secs(1) * GROUPS * (4 * seconds() + 10);
    boot.doppel(engine, limit).expect(PASSED).says("step: done");
}

#[test]
fn stress_ng_finds_nothing_wrong_with_user_code_executed_directly() {
    stressed("--cpus 2 --direct always", "direct");
}

#[test]
fn stress_ng_finds_nothing_wrong_with_what_the_policy_does() {
    stressed("--cpus 2", "auto");
}
