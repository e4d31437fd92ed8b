//! `--cpu`: the default guest as each level of the psABI, and what a host or a user gets wrong.

mod support;

use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, Finished, PASSED, Scratch, program, run};

const SECONDS: Duration = Duration::from_secs(60);
const LEVELS: [&str; 4] = ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

/// Says what Linux and the dynamic loader take the processor for.
const LOOK: &str = "grep -m3 -E 'vendor_id|model name|stepping' /proc/cpuinfo
grep -m1 flags /proc/cpuinfo
dmesg | grep -E 'BUG:|WARNING:|Call Trace' && exit 1
grep . /sys/devices/system/cpu/vulnerabilities/*
if [ -x /loader ]; then /loader --help | grep -A9 hwcaps; fi
exit 0";

/// The words by which Linux tells of a level's instruction sets: those that it has beyond the one below.
const WORDS: [&[&str]; 4] = [
    &[
        "cmov", "cx8", "fpu", "fxsr", "mmx", "sse", "sse2", "syscall",
    ],
    &[
        "cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3",
    ],
    &[
        "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
    ],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

/// Sets that no level has.
const OTHERS: &[&str] = &[
    "aes",
    "pclmulqdq",
    "rdrand",
    "rdseed",
    "adx",
    "sha_ni",
    "gfni",
    "vaes",
    "avx512_vnni",
    "xsavec",
];

/// Boots a level; `None`, said aloud, where the host cannot carry it.
fn boot(engine: &str, level: &str, cpus: u32) -> Option<Finished> {
    let mut boot = Boot::script(CLOUD, LOOK).flag(&format!("--cpu {level} --cpus {cpus}"));
    match std::fs::read("/lib64/ld-linux-x86-64.so.2") {
        Ok(loader) => boot = boot.file("loader", 0o755, &loader),
        Err(_) => eprintln!("SKIPPED: this host has no dynamic loader that names levels"),
    }
    let finished = boot.doppel(engine, SECONDS);
    if finished.stderr.contains("cannot be x86-64-v") {
        eprintln!("SKIPPED: {}", finished.stderr);
        return None;
    }
    Some(finished)
}

fn flags(finished: &Finished) -> Vec<String> {
    let line = finished.console.lines().find(|l| l.starts_with("flags"));
    let line = line.unwrap_or_else(|| panic!("no flags in\n{}", finished.console));
    line.split_whitespace().map(str::to_owned).collect()
}

fn check_level(engine: &str, n: usize, cpus: u32) {
    let level = LEVELS[n];
    let Some(finished) = boot(engine, level, cpus) else {
        return;
    };
    let finished = finished.expect(PASSED);
    let flags = flags(&finished);
    let has = |word: &&str| flags.iter().any(|f| f == word);
    for (of, words) in WORDS.iter().enumerate() {
        for word in *words {
            assert_eq!(has(word), of <= n, "{word} of {level}: {flags:?}");
        }
    }
    assert_eq!(OTHERS.iter().find(|word| has(word)), None, "{level}");
    let finished = finished.says(&format!("Doppel {level} processor"));
    if !finished.console.contains("hwcaps") {
        return;
    }
    for (of, name) in LEVELS.iter().enumerate().skip(1) {
        let supported = finished.console.contains(&format!("{name} (supported"));
        assert_eq!(
            supported,
            of <= n,
            "{name} of {level}\n{}",
            finished.console
        );
    }
}

#[test]
fn linux_and_its_loader_see_the_first_level() {
    check_level("auto", 0, 1);
}

#[test]
fn linux_and_its_loader_see_the_second_level() {
    check_level("auto", 1, 2);
}

#[test]
fn linux_and_its_loader_see_the_third_level() {
    check_level("auto", 2, 2);
}

#[test]
fn linux_and_its_loader_see_the_fourth_level() {
    check_level("auto", 3, 1);
}

#[test]
fn a_level_is_had_by_translation_alone_too() {
    check_level("translate", 2, 1);
}

#[test]
fn a_model_that_is_none_is_told_which_there_are() {
    let mut command = Command::new(DOPPEL);
    let finished = run(command.args(["run", "--cpu", "help"]), SECONDS);
    let mut finished = finished.expect(1);
    for name in ["host", "x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"] {
        finished = finished.says(name);
    }
}

#[test]
fn a_feature_that_is_none_is_told_which_there_are() {
    for (model, says) in [
        ("host,+smap", "+pku or +la57 or +monitor or +pmu"),
        ("x86-64-v3,+pku", "takes no features"),
    ] {
        let mut command = Command::new(DOPPEL);
        let finished = run(command.args(["run", "--cpu", model]), SECONDS);
        finished.expect(1).says(says);
    }
}

/// With keys; `None`, said aloud, where the host has none.
fn boot_with_keys(engine: &str, cpus: u32) -> Option<Finished> {
    const SCRIPT: &str = "grep -qw pku /proc/cpuinfo && grep -qw ospke /proc/cpuinfo || exit 1
dmesg | grep -E 'BUG:|WARNING:|Call Trace' && exit 1
/doppel/keys";
    let boot = Boot::script(CLOUD, SCRIPT)
        .file("doppel/keys", 0o755, &program("keys_unsafe", &[]))
        .flag(&format!("--cpu host,+pku --cpus {cpus}"));
    let finished = boot.doppel(engine, SECONDS);
    if finished.stderr.contains("cannot be host,+pku") {
        eprintln!("SKIPPED: {}", finished.stderr);
        return None;
    }
    Some(finished)
}

#[test]
fn programs_use_the_protection_keys_that_were_asked_for() {
    if let Some(finished) = boot_with_keys("auto", 2) {
        finished.expect(PASSED).says("keys: passed");
    }
}

#[test]
fn programs_use_them_in_translation_alone_too() {
    if let Some(finished) = boot_with_keys("translate", 1) {
        finished.expect(PASSED).says("keys: passed");
    }
}

fn boot_with_five_levels(engine: &str, cpus: u32) -> Finished {
    const SCRIPT: &str = "grep -qw la57 /proc/cpuinfo || exit 1
dmesg | grep -E 'BUG:|WARNING:|Call Trace' && exit 1
/doppel/high";
    Boot::script(CLOUD, SCRIPT)
        .file("doppel/high", 0o755, &program("high_unsafe", &[]))
        .flag(&format!("--cpu host,+la57 --cpus {cpus}"))
        .doppel(engine, SECONDS)
}

#[test]
fn programs_have_memory_above_47_bits_with_five_levels() {
    let finished = boot_with_five_levels("auto", 2);
    finished.expect(PASSED).says("high: passed");
}

#[test]
fn they_have_it_in_translation_alone_too() {
    let finished = boot_with_five_levels("translate", 1);
    finished.expect(PASSED).says("high: passed");
}

/// Puts two CPUs to work whose idle tasks wait in MWAIT: they wake each other by stores to a word of these. How often one waited so.
fn waits_with_monitor(engine: &str) -> u64 {
    let scratch = Scratch::new();
    let stats = scratch.path("stats");
    let script = format!(
        "grep -qw monitor /proc/cpuinfo || exit 1\nCPUS=2\n{}",
        include_str!("scripts/processors.sh")
    );
    let finished = Boot::script(CLOUD, &script)
        .file("doppel/parallel", 0o755, &program("parallel_unsafe", &[]))
        .flag(&format!(
            "--cpu host,+monitor --cpus 2 --stats {}",
            stats.display()
        ))
        .cmdline("quiet")
        .doppel(engine, 3 * SECONDS);
    finished.expect(PASSED).says("step: done");
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(stats).unwrap()).unwrap();
    stats["counters"]["monitor_waits"].as_u64().unwrap()
}

#[test]
fn idle_processors_wait_in_mwait_where_that_was_asked_for() {
    assert!(waits_with_monitor("auto") > 100);
}

#[test]
fn they_do_so_in_translation_alone_too() {
    assert!(waits_with_monitor("translate") > 100);
}

#[test]
fn they_do_so_interpreted_too() {
    assert!(waits_with_monitor("interpret") > 100);
}

/// Linux's perf events on the counters that were asked for: exact counts of instructions, cycles, sampling, and RDPMC in user code.
fn counts(engine: &str, cpus: u32) -> Finished {
    const SCRIPT: &str = "dmesg | grep -E 'Performance Events|PMU'
dmesg | grep -E 'BUG:|WARNING:|Call Trace|Broken PMU|unchecked MSR' && exit 1
/doppel/counters";
    Boot::script(CLOUD, SCRIPT)
        .file("doppel/counters", 0o755, &program("counters_unsafe", &[]))
        .flag(&format!("--cpu host,+pmu --cpus {cpus}"))
        .doppel(engine, SECONDS)
}

#[test]
fn programs_count_with_the_performance_counters_that_were_asked_for() {
    counts("auto", 2).expect(PASSED).says("counters: passed");
}

#[test]
fn they_count_in_translation_alone_too() {
    let finished = counts("translate", 1);
    finished.expect(PASSED).says("counters: passed");
}

#[test]
fn they_count_interpreted_too() {
    let finished = counts("interpret", 1);
    finished.expect(PASSED).says("counters: passed");
}
