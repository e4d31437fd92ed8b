//! `cargo xtask boots`: boots the default guest again and again, and tells how long it takes to its first process.
//!
//! The guest's init runs a script that says its kernel's uptime and ends through the debug-exit port. With `--qemu` the same
//! kernel, initramfs and command line run in QEMU's TCG, turn by turn, so that a noisy host is noisy for both.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SCRIPT: &str = "#!/bin/sh\necho uptime $(cut -d ' ' -f 1 /proc/uptime)\n";
/// What `doppel run --debug-exit` ends with after a script that succeeded (16 << 1 | 1).
const PASSED: i32 = 33;

#[derive(Args)]
pub struct Boots {
    /// Boot real operating systems instead; the arguments that follow go to the systems crate (try --systems --help).
    #[arg(long, num_args = 0.., allow_hyphen_values = true, value_name = "ARGUMENTS")]
    pub systems: Option<Vec<String>>,
    /// How many.
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// Which engine.
    #[arg(long, default_value = "auto")]
    engine: String,
    /// The Debian package that has the kernel.
    #[arg(long, default_value = "linux-image-cloud-amd64")]
    package: String,
    /// Compare with qemu-system-x86_64 -accel tcg -cpu max.
    #[arg(long)]
    qemu: bool,
    /// Seconds after which a boot has failed.
    #[arg(long, default_value_t = 120)]
    timeout: u32,
}

/// What is booted: files for either monitor.
struct Guest {
    doppel: PathBuf,
    kernel: String,
    initrd: String,
}

/// Does so.
pub fn boots(root: &Path, args: &Boots) -> Result<()> {
    let guest = Guest::assemble(root, &args.package)?;
    let mut rows = vec![Row::new(&args.engine)];
    if args.qemu {
        rows.push(Row::new("qemu-system-x86_64 -accel tcg -cpu max"));
    }
    for number in 1..=args.count {
        for (which, row) in rows.iter_mut().enumerate() {
            let command = match which {
                0 => guest.doppel(&args.engine),
                _ => guest.qemu(),
            };
            let took = boot(command, args.timeout)
                .with_context(|| format!("boot {number}, {}", row.name))?;
            row.times.push(took);
        }
    }
    rows.iter_mut().for_each(Row::print);
    Ok(())
}

impl Guest {
    fn assemble(root: &Path, package: &str) -> Result<Guest> {
        let doppel = root.join("target/release/doppel");
        let script = root.join("target/boots-script");
        let output = root.join("target/boots-initrd");
        std::fs::write(&script, SCRIPT)?;
        let mut command = Command::new(&doppel);
        command
            .args(["guest", "--package", package, "--script"])
            .arg(script);
        let printed = command
            .arg("--output")
            .arg(output)
            .stderr(Stdio::inherit())
            .output()?;
        ensure!(printed.status.success(), "doppel guest failed");
        let printed = String::from_utf8(printed.stdout)?;
        let mut lines = printed.lines().map(str::to_owned);
        let mut line = || lines.next().context("doppel guest printed no path");
        Ok(Guest {
            doppel,
            kernel: line()?,
            initrd: line()?,
        })
    }

    fn doppel(&self, engine: &str) -> Command {
        let mut command = Command::new(&self.doppel);
        command.args([
            "run",
            "--debug-exit",
            "--engine",
            engine,
            "--cmdline",
            "console=ttyS0",
        ]);
        command.args(["--kernel", &self.kernel, "--initrd", &self.initrd]);
        command
    }

    fn qemu(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(
            "-accel tcg -cpu max -m 512 -nodefaults -display none -serial stdio -no-reboot"
                .split(' '),
        );
        command.args([
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=4",
            "-append",
            "console=ttyS0",
        ]);
        command.args(["-kernel", &self.kernel, "-initrd", &self.initrd]);
        command
    }
}

/// Runs one boot to its end: the wall-clock time, and the guest's own uptime in seconds.
fn boot(mut command: Command, timeout: u32) -> Result<(Duration, f64)> {
    let start = Instant::now();
    let mut limited = Command::new("timeout");
    limited
        .arg("--foreground")
        .arg(timeout.to_string())
        .arg(command.get_program())
        .args(command.get_args());
    command = limited;
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("starting it")?;
    let took = start.elapsed();
    let console = String::from_utf8_lossy(&output.stdout);
    if output.status.code() != Some(PASSED) {
        bail!(
            "ended with {}\n{console}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let uptime = console
        .lines()
        .find_map(|line| line.strip_prefix("uptime "));
    let uptime = uptime.context("the guest said no uptime")?.trim().parse()?;
    Ok((took, uptime))
}

struct Row {
    name: String,
    times: Vec<(Duration, f64)>,
}

impl Row {
    fn new(name: &str) -> Row {
        Row {
            name: name.to_owned(),
            times: Vec::new(),
        }
    }

    fn print(&mut self) {
        let mut wall: Vec<f64> = self
            .times
            .iter()
            .map(|(wall, _)| wall.as_secs_f64())
            .collect();
        let mut uptime: Vec<f64> = self.times.iter().map(|(_, uptime)| *uptime).collect();
        println!("{}: {} boots succeeded", self.name, wall.len());
        println!("  seconds from start to end:  {}", summary(&mut wall));
        println!("  guest's uptime in init:     {}", summary(&mut uptime));
    }
}

fn summary(values: &mut [f64]) -> String {
    values.sort_by(f64::total_cmp);
    let median = values.get(values.len() / 2).copied().unwrap_or_default();
    match values {
        [] => "none".to_owned(),
        [least, .., most] => format!("median {median:.2}, from {least:.2} to {most:.2}"),
        [only] => format!("{only:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_the_median_between_the_extremes() {
        assert_eq!(
            summary(&mut [3.0, 1.0, 2.0]),
            "median 2.00, from 1.00 to 3.00"
        );
        assert_eq!(summary(&mut [1.5]), "1.50");
    }

    #[test]
    fn a_boot_that_does_not_pass_is_an_error() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo uptime 1.5; exit 33"]);
        assert_eq!(boot(command, 5).unwrap().1, 1.5);
        let mut command = Command::new("sh");
        command.args(["-c", "echo uptime 1.5"]);
        assert!(boot(command, 5).is_err());
        let mut command = Command::new("sleep");
        command.arg("10");
        assert!(boot(command, 1).is_err());
    }
}
