//! Debian's kernels boot and work, end to end.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, Finished, GENERIC, PASSED, Scratch};

const SYSTEM: &str = include_str!("scripts/system.sh");
const LANGUAGES: &str = include_str!("scripts/languages.sh");
const MINUTES: Duration = Duration::from_secs(60);

/// A guest that runs the tour of the system, with files whose check sums the host worked out.
fn system(package: &str) -> Boot {
    let data: Vec<u8> = (0..1_000_003u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let scratch = Scratch::new();
    fs::write(scratch.path("data"), &data).unwrap();
    let sum = Command::new("sha256sum")
        .arg(scratch.path("data"))
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let sums = format!("{}  data\n", sum.split_whitespace().next().unwrap());
    Boot::script(package, SYSTEM)
        .file("doppel/data", 0o644, &data)
        .file("doppel/sums", 0o644, sums.as_bytes())
}

/// A guest with perl, tcc and programs of our own.
fn languages(package: &str) -> Boot {
    let shared = |path: &str| {
        path.starts_with("lib") || path.starts_with("usr/lib/x86_64-linux-gnu/libcrypt")
    };
    let perl = move |path: &str| shared(path) || path == "usr/bin/perl";
    let start = [
        "crt1.o",
        "crti.o",
        "crtn.o",
        "libc.so",
        "libc_nonshared.a",
        "libtcc1.a",
        "bcheck.o",
    ];
    let tcc = move |path: &str| {
        path.starts_with("usr/bin") || start.iter().any(|end| path.ends_with(&format!("/{end}")))
    };
    Boot::script(package, LANGUAGES)
        .packages("perl", &["perl-base", "libc6", "libcrypt1"], perl)
        .packages("tcc", &["tcc", "libc6-dev"], tcc)
        .file("doppel/threads", 0o755, &support::program("threads", &[]))
        .file(
            "doppel/vectors",
            0o755,
            &support::program("vectors_unsafe", &[]),
        )
}

#[test]
fn the_scripts_pass_on_another_machine() {
    for boot in [system(CLOUD), languages(CLOUD)] {
        if let Some(finished) = boot.qemu(3 * MINUTES) {
            finished.expect(PASSED);
        }
    }
}

#[test]
fn the_cloud_kernel_boots_and_works_translated() {
    system(CLOUD)
        .doppel("translate", 3 * MINUTES)
        .expect(PASSED)
        .says("step: done");
}

#[test]
fn the_cloud_kernel_boots_and_works_with_user_code_executed_directly() {
    for flags in ["--direct always", "--direct faster"] {
        let boot = system(CLOUD).flag(flags);
        boot.doppel("direct", 3 * MINUTES)
            .expect(PASSED)
            .says("step: done");
    }
}

#[test]
fn an_interpreter_a_compiler_threads_and_vectors_work_executed_directly() {
    for flags in ["--direct always", "--cpus 2"] {
        let boot = languages(CLOUD).flag(flags);
        let finished = boot.doppel("direct", 3 * MINUTES).expect(PASSED);
        finished.says("threads: passed").says("vectors: passed");
    }
}

#[test]
fn the_cloud_kernel_boots_and_works_interpreted() {
    system(CLOUD)
        .doppel("interpret", 10 * MINUTES)
        .expect(PASSED)
        .says("step: done");
}

#[test]
fn the_generic_kernel_boots_and_works_translated() {
    system(GENERIC)
        .doppel("translate", 3 * MINUTES)
        .expect(PASSED)
        .says("step: done");
}

#[test]
fn an_interpreter_a_compiler_threads_and_vectors_work_translated() {
    let finished = languages(CLOUD)
        .doppel("translate", 3 * MINUTES)
        .expect(PASSED);
    finished.says("threads: passed").says("vectors: passed");
}

#[test]
fn the_cloud_kernel_reaches_its_first_process_interpreted() {
    let boot = Boot::script(CLOUD, "echo the first process runs");
    boot.doppel("interpret", 10 * MINUTES)
        .expect(PASSED)
        .says("the first process runs");
}

/// Sleeps until its alarm clock wakes it; processor and devices are then as they were. What the kernel says of that has a second to be said, lest it come between two letters.
const SUSPEND: &str = "\
    set -e\n\
    echo +2 >/sys/class/rtc/rtc0/wakealarm\n\
    before=$(cut -d . -f 1 /proc/uptime)\n\
    echo freeze >/sys/power/state\n\
    after=$(cut -d . -f 1 /proc/uptime)\n\
    [ $((after - before)) -ge 1 ]\n\
    [ \"$(cat /sys/power/suspend_stats/success)\" = 1 ]\n\
    sleep 1\n\
    echo awake\n";

#[test]
fn a_guest_that_is_suspended_is_woken_by_its_alarm_clock() {
    for flags in ["--cpus 1", "--cpus 2"] {
        let boot = Boot::script(GENERIC, SUSPEND).flag(flags);
        boot.doppel("auto", MINUTES).expect(PASSED).says("awake");
    }
}

/// Prints the kernel's messages of level warning and worse, without their time stamps, once it has had time to complain.
const WARNINGS: &str = "sleep 10; echo; dmesg -r | sed -n 's/^<[0-4]>\\[[^]]*\\] /warning: /p'";

/// These messages, with every number left open.
fn warnings(finished: &Finished) -> BTreeSet<String> {
    let lines = finished.console.lines();
    let texts = lines.filter_map(|line| line.trim().strip_prefix("warning: "));
    texts
        .map(|text| text.replace(|c: char| c.is_ascii_digit(), "#"))
        .collect()
}

#[test]
fn dmesg_has_no_complaint_that_qemu_does_not_give() {
    for package in [CLOUD, GENERIC] {
        let boot = || Boot::script(package, WARNINGS).cmdline("quiet");
        let Some(qemu) = boot().qemu(3 * MINUTES) else {
            return;
        };
        let known = warnings(&qemu.expect(PASSED));
        assert!(
            !known.is_empty(),
            "{package}: not one warning of QEMU's was read"
        );
        let ours = warnings(&boot().doppel("translate", 3 * MINUTES).expect(PASSED));
        let new: Vec<_> = ours.difference(&known).collect();
        assert!(new.is_empty(), "{package}: {new:#?}");
    }
}
