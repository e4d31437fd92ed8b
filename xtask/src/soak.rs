//! `cargo xtask soak`: stress-ng in a guest with several processors, for long; the guest's kernel has no complaint, the monitor does not grow.

use crate::debian::{Lab, Ssh, Start};
use anyhow::{Context, Result, ensure};
use clap::Args;
use doppel_footprint::Footprint;
use std::path::Path;
use std::time::{Duration, Instant};

#[derive(Args)]
pub struct Soak {
    /// How long.
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Processors of the guest.
    #[arg(long, default_value_t = 4)]
    cpus: u32,
    /// Release of Debian.
    #[arg(long, default_value = "bookworm")]
    release: String,
}

const STRESSORS: &str = "--cpu 2 --vm 2 --vm-bytes 96M --io 1 --hdd 2 --hdd-bytes 64M --sock 2 --fork 2 --verify --metrics-brief";
const MEMORY: &str = "1G";
const RAM: u64 = 1 << 30;
const BOOT: Duration = Duration::from_secs(300);
const STEP: Duration = Duration::from_secs(120);
/// Bytes that the monitor may grow by after the first quarter of the time, besides translations and their tables, which have a bound of their own.
const GROWTH_MAX: u64 = 4 << 20;
/// What a kernel says in trouble, whatever level it says it at.
const COMPLAINTS: &str = "rcu.*stall|soft lockup|hard lockup|hung_task|blocked for more than|BUG|WARNING|Call Trace|I/O error|Oops|unstable|EXT4-fs error|segfault|out of memory|NETDEV WATCHDOG|nobody cared";

/// A timer's interrupt that took long: the host had other work while the guest handled it.
const LATE: &str = "hrtimer: interrupt took";
/// Time that the guest wanted to run and did not, in per cent.
const STEAL: &str = "awk '/^cpu /{print int(100 * $9 / ($2 + $3 + $4 + $7 + $8 + $9))}' /proc/stat";

/// Does so.
pub fn soak(root: &Path, args: &Soak) -> Result<()> {
    let lab = Lab::new(root, &args.release)?;
    let disk = lab.disk("soak.qcow2")?;
    let ssh = Ssh::new(&lab)?;
    let mut console = lab.start(Start {
        cpus: args.cpus,
        memory: MEMORY,
        ssh: Some(ssh.port),
        ..Start::of("doppel", &disk)
    })?;
    ssh.wait(BOOT)?;
    ssh.run("systemctl is-system-running --wait", STEP)?;
    let warnings = "dmesg --level=emerg,alert,crit,err,warn";
    let before = ssh.run(warnings, STEP)?;
    let seconds = args.minutes * 60;
    let load = format!(
        "cd /root && stress-ng {STRESSORS} --timeout {seconds} > stress.log 2>&1; echo $? > stress.status"
    );
    ssh.run(
        &format!("systemd-run --quiet --collect sh -c '{load}'"),
        STEP,
    )?;
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let mut settled = None;
    while start.elapsed() < length {
        std::thread::sleep((length / 20).max(Duration::from_secs(10)));
        let now = Footprint::of_family(console.pid(), RAM)?;
        println!("{:5} s: {now}", start.elapsed().as_secs());
        if start.elapsed() > length / 4 {
            settled.get_or_insert(now);
        }
    }
    // What is under way is finished; on a busy host that takes a while.
    let wait = "cd /root; for i in $(seq 300); do test -e stress.status && break; sleep 1; done; cat stress.log; exit $(cat stress.status)";
    print!("{}", ssh.run(wait, BOOT * 2).context("stress-ng")?);
    let end = Footprint::of_family(console.pid(), RAM)?;
    println!("    end: {end}");
    let after = ssh.run(warnings, STEP)?;
    let new = after.strip_prefix(before.as_str()).unwrap_or(&after);
    let (late, new): (Vec<_>, Vec<_>) = new.lines().partition(|line| line.contains(LATE));
    ensure!(new.is_empty(), "the kernel complains:\n{}", new.join("\n"));
    if !late.is_empty() {
        let steal = ssh.run(STEAL, STEP)?;
        println!(
            "the host kept the guest waiting ({} % of its time), and its kernel noticed: {}",
            steal.trim(),
            late.join("; ")
        );
    }
    ssh.run(&format!("! dmesg | grep -E '{COMPLAINTS}'"), STEP)?;
    ssh.run("sync", STEP)?;
    console.send("systemctl poweroff")?;
    let status = console.end(BOOT)?;
    ensure!(status.success(), "the monitor ended with {status}");
    lab.look(&disk)?;
    let settled = settled.context("it was too short")?;
    println!(
        "monitor: {} KiB after a quarter of the time, {} KiB at the end; the kernel has no complaint, the disk is clean",
        settled.monitor_bytes >> 10,
        end.monitor_bytes >> 10
    );
    ensure!(
        end.monitor_bytes <= settled.monitor_bytes + GROWTH_MAX,
        "the monitor grows"
    );
    Ok(())
}
