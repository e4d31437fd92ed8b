//! Debian's kernels boot and work, end to end.

mod support;

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

/// The kernel's complaints, without their time stamps.
fn complaints(finished: &Finished) -> Vec<String> {
    let lines = finished
        .console
        .lines()
        .map(|line| line.split_once("] ").map_or(line, |(_, text)| text).trim());
    let grave = [
        "WARNING",
        "BUG",
        "Oops",
        "Call Trace",
        "lockup",
        "unstable",
        "stall",
        "rror",
        "ailed",
        "nvalid",
        "irmware Bug",
    ];
    lines
        .filter(|line| grave.iter().any(|word| line.contains(word)))
        .map(str::to_owned)
        .collect()
}

#[test]
fn dmesg_has_no_complaint_that_qemu_does_not_give() {
    for package in [CLOUD, GENERIC] {
        let boot = || Boot::script(package, "dmesg -r | grep -E '^<[0-4]>' | sed 's/^/grave /'");
        let Some(qemu) = boot().qemu(3 * MINUTES) else {
            return;
        };
        let known = complaints(&qemu.expect(PASSED));
        let ours = boot().doppel("translate", 3 * MINUTES).expect(PASSED);
        let new: Vec<_> = complaints(&ours)
            .into_iter()
            .filter(|line| !known.contains(line))
            .collect();
        assert!(new.is_empty(), "{package}: {new:#?}");
    }
}
