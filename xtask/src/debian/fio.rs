//! What fio measures in a guest: long requests one after another, short ones many at a time; beside QEMU and beside the host itself.

use super::lab::{Lab, Start, succeed};
use super::ssh::Ssh;
use super::{BOOT, QUIET, STEP, median};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// Name, what fio is told, and which of its numbers counts.
const ROWS: &[(&str, &str, Number)] = &[
    (
        "sequential read, 1 MiB",
        "--rw=read --bs=1M --ioengine=psync",
        Number::ReadRate,
    ),
    (
        "sequential write, 1 MiB",
        "--rw=write --bs=1M --ioengine=psync",
        Number::WriteRate,
    ),
    (
        "the same read, 4 deep",
        "--rw=read --bs=1M --ioengine=libaio --iodepth=4",
        Number::ReadRate,
    ),
    (
        "the same write, 4 deep",
        "--rw=write --bs=1M --ioengine=libaio --iodepth=4",
        Number::WriteRate,
    ),
    (
        "random read, 4 KiB, 32 deep",
        "--rw=randread --bs=4k --ioengine=libaio --iodepth=32",
        Number::Reads,
    ),
    (
        "random read, 4 KiB, one by one",
        "--rw=randread --bs=4k --ioengine=psync",
        Number::Reads,
    ),
];
/// MiB of the file.
const SIZE: u64 = 512;
/// Seconds of a row.
const RUNTIME: u64 = 3;

/// Fields of fio's terse output, version 3.
#[derive(Clone, Copy)]
enum Number {
    /// MB/s.
    ReadRate,
    /// MB/s.
    WriteRate,
    /// Requests a second.
    Reads,
}

impl Number {
    fn of(self, terse: &str) -> Option<f64> {
        let (field, unit) = match self {
            Number::ReadRate => (6, 1000.0),
            Number::WriteRate => (47, 1000.0),
            Number::Reads => (7, 1.0),
        };
        let line = terse.lines().find(|line| line.starts_with("3;"))?;
        let value: f64 = line.split(';').nth(field)?.parse().ok()?;
        Some(value / unit)
    }
}

fn fio(file: &Path, what: &str, direct: bool) -> String {
    format!(
        "fio --name=x --filename={} --size={SIZE}M {what} --direct={} --invalidate=0 --time_based --runtime={RUNTIME} --minimal",
        file.display(),
        u8::from(direct)
    )
}

/// All rows, in turns.
pub fn compare(lab: &Lab, rounds: usize, monitors: &[&str]) -> Result<()> {
    let columns: Vec<(&str, &str)> = ["raw", "qcow2"]
        .iter()
        .flat_map(|format| monitors.iter().map(move |monitor| (*monitor, *format)))
        .collect();
    let mut table = vec![vec![Vec::new(); columns.len() + 2]; ROWS.len()];
    for round in 1..=rounds {
        for (column, (monitor, format)) in columns.iter().enumerate() {
            eprintln!("round {round}: {monitor}, {format}");
            let values = in_guest(lab, monitor, format)?;
            for (row, value) in values.into_iter().enumerate() {
                table[row][column].push(value);
            }
        }
        for (column, direct) in [(columns.len(), false), (columns.len() + 1, true)] {
            let values = on_host(lab, direct)?;
            for (row, value) in values.into_iter().enumerate() {
                table[row][column].push(value);
            }
        }
    }
    let names = columns
        .iter()
        .map(|(monitor, format)| format!("{monitor}, {format}"));
    let names: Vec<_> = names
        .chain(["host, cached".to_owned(), "host, direct".to_owned()])
        .collect();
    println!(
        "| MB/s, requests/s: median of {rounds} | {} |",
        names.join(" | ")
    );
    println!("|---|{}", "--:|".repeat(names.len()));
    for ((name, _, _), values) in ROWS.iter().zip(&table) {
        let cells: Vec<_> = values
            .iter()
            .map(|of| format!("{:.0}", median(of)))
            .collect();
        println!("| {name} | {} |", cells.join(" | "));
    }
    Ok(())
}

/// A raw file that the host has in its cache. Anew each time: an old file's cache may lie in small folios, as whoever had it before left
/// them, and writes to those take the host a third longer.
fn file(lab: &Lab) -> Result<PathBuf> {
    let path = lab.file("fio.raw");
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).context("fio.raw"),
        _ => {}
    }
    let mut prepare = Command::new("fio");
    prepare.arg(format!("--filename={}", path.display()));
    prepare.arg(format!("--size={SIZE}M"));
    prepare.args("--name=x --rw=write --bs=1M --ioengine=psync --end_fsync=1".split(' '));
    succeed(&mut prepare).context("fio; on Debian: apt-get install fio")?;
    Ok(path)
}

fn in_guest(lab: &Lab, monitor: &str, format: &str) -> Result<Vec<f64>> {
    let (disk, file) = (lab.disk("fio.qcow2")?, file(lab)?);
    let ssh = Ssh::new(lab)?;
    let mut console = lab.start(Start {
        second: Some(&file),
        ssh: Some(ssh.port),
        memory: "1G",
        ..Start::of(monitor, &disk)
    })?;
    console.until("# ", BOOT)?;
    console.shell(QUIET, STEP)?;
    let target = match format {
        "raw" => Path::new("/dev/vdb"),
        _ => Path::new("/root/fio"),
    };
    // Clusters are there before anything is measured, as they are in a file of the host.
    let prepare = fio(target, "--rw=write --bs=1M --ioengine=psync", true);
    ssh.wait(BOOT)?;
    ssh.run(&prepare.replace("--time_based ", ""), STEP)?;
    let values = ROWS
        .iter()
        .map(|(name, what, number)| {
            let terse = ssh.run(&fio(target, what, true), STEP)?;
            number
                .of(&terse)
                .with_context(|| format!("{name}: fio said {terse:?}"))
        })
        .collect::<Result<_>>()?;
    console.send("poweroff")?;
    console.end(STEP)?;
    Ok(values)
}

fn on_host(lab: &Lab, direct: bool) -> Result<Vec<f64>> {
    let file = file(lab)?;
    let values = ROWS.iter().map(|(name, what, number)| {
        let command = fio(&file, what, direct);
        let mut words = command.split(' ');
        let output = Command::new(words.next().unwrap_or_default())
            .args(words)
            .output()?;
        let terse = String::from_utf8_lossy(&output.stdout).into_owned();
        number
            .of(&terse)
            .with_context(|| format!("{name}: fio said {terse:?}"))
    });
    values.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_as_fio_counts_them() {
        let fields: Vec<_> = (1..=60).map(|n| (n * 1000).to_string()).collect();
        let terse = format!("a warning\n3;{}\n", fields[1..].join(";"));
        assert_eq!(Number::ReadRate.of(&terse), Some(7.0));
        assert_eq!(Number::Reads.of(&terse), Some(8000.0));
        assert_eq!(Number::WriteRate.of(&terse), Some(48.0));
        assert_eq!(Number::Reads.of("no such file"), None);
    }
}
