//! Whole programs out of Debian packages, started once each, as their user finds them: cold.
//!
//! They are in the initramfs, and natively in a directory that is made the root: `/bench/whole` has their input.

use crate::random::Random;
use crate::row::{Row, Work, fold_bytes, measured};
use anyhow::{Context, Result, bail};
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

const INPUT: &str = "/tmp/bench-input";

pub const ROWS: &[Row] = &[
    row("md5sum", 32, Work::Own(md5sum)),
    row("gzip", 12, Work::Own(gzip)),
    row(
        "shell",
        1,
        Work::Own(|_| script("/bin/busybox", &["sh", "/bench/whole/commands.sh"])),
    ),
    row(
        "perl",
        1,
        Work::Own(|_| script("/usr/bin/perl", &["/bench/whole/program.pl"])),
    ),
    row(
        "python",
        1,
        Work::Own(|_| script("/usr/bin/python3.11", &["-B", "/bench/whole/program.py"])),
    ),
    row("tcc", 1, Work::Own(|_| compile("/usr/bin/tcc", &[]))),
    row(
        "gcc",
        1,
        Work::Own(|_| compile("/usr/bin/gcc-12", &["-O1"])),
    ),
];

const fn row(name: &'static str, count: u64, work: Work) -> Row {
    Row {
        group: "whole",
        name,
        count,
        work,
        repeated: false,
    }
}

fn md5sum(megabytes: u64) -> Result<(u64, Duration)> {
    with_input(megabytes, "md5sum", &[])
}

fn gzip(megabytes: u64) -> Result<(u64, Duration)> {
    with_input(megabytes, "gzip", &["-c"])
}

/// busybox's `applet` on a file of text and noise in turns.
fn with_input(megabytes: u64, applet: &str, flags: &[&str]) -> Result<(u64, Duration)> {
    let mut random = Random::new(5);
    let mut piece = crate::random::text(1 << 20);
    let noise = (0..1 << 15).flat_map(|_| random.next().to_le_bytes());
    for (to, from) in piece.iter_mut().zip(noise) {
        *to = from;
    }
    fs::write(INPUT, piece.repeat(megabytes as usize))?;
    let arguments = [&[applet], flags, &[INPUT]].concat();
    let done = script("/bin/busybox", &arguments);
    fs::remove_file(INPUT)?;
    done
}

/// Compiles a program of a few hundred lines and links it; what it prints is the result.
fn compile(compiler: &str, flags: &[&str]) -> Result<(u64, Duration)> {
    const PROGRAM: &str = "/tmp/bench-program";
    let arguments = [flags, &["-o", PROGRAM, "/bench/whole/program.c"]].concat();
    let (_, took) = script(compiler, &arguments)?;
    let (sum, _) = script(PROGRAM, &[])?;
    fs::remove_file(PROGRAM)?;
    Ok((sum, took))
}

/// Runs a command to its end, and folds what it printed.
fn script(program: &str, arguments: &[&str]) -> Result<(u64, Duration)> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", "/bench/bin:/bin:/usr/bin")
        .stdin(Stdio::inherit());
    measured(command, |command| {
        let output = command
            .output()
            .with_context(|| format!("running {program}"))?;
        if !output.status.success() {
            bail!(
                "{program}: {}\n{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(fold_bytes(&output.stdout))
    })
}
