//! What a guest costs that has nothing to do.

use super::lab::{Lab, Start};
use super::ssh::Ssh;
use super::{BOOT, STEP};
use anyhow::{Result, ensure};
use doppel_footprint::Footprint;
use doppel_footprint::family::time_of_all;
use std::time::{Duration, Instant};

/// Units that start late are done after this.
const SETTLE: Duration = Duration::from_secs(30);
const WATCH: Duration = Duration::from_secs(60);
/// Goal: of a processor.
const SHARE_MAX: f64 = 0.01;
/// Bytes of the guest.
const RAM: u64 = 512 << 20;

/// Goal: MiB of the monitor's process, without guest RAM, translations and records of them.
const MONITOR_MAX: f64 = 8.0;

/// One processor, a disk, a network card; on each engine that serves for more than a reference.
pub fn idle(lab: &Lab) -> Result<()> {
    for engine in ["translate", "direct"] {
        match lab.refusal(engine)? {
            Some(reason) => println!("SKIPPED: {reason}"),
            None => idle_on(lab, engine)?,
        }
    }
    Ok(())
}

fn idle_on(lab: &Lab, engine: &str) -> Result<()> {
    let disk = lab.disk("idle.qcow2")?;
    let ssh = Ssh::new(lab)?;
    let mut console = lab.start(Start {
        ssh: Some(ssh.port),
        ..Start::of(&format!("doppel/{engine}"), &disk)
    })?;
    ssh.wait(BOOT)?;
    ssh.run("systemctl is-system-running --wait", STEP)?;
    std::thread::sleep(SETTLE);
    let (start, before) = (Instant::now(), time_of_all(console.pid())?);
    std::thread::sleep(WATCH);
    let used = time_of_all(console.pid())?.saturating_sub(before);
    let share = used.as_secs_f64() / start.elapsed().as_secs_f64();
    println!("{engine}, idle: {:.2} % of a processor", share * 100.0);
    println!("memory: {}", Footprint::of_family(console.pid(), RAM)?);
    console.send("poweroff")?;
    console.end(STEP)?;
    let (records, monitor) = (lab.memory("record_bytes")?, lab.memory("monitor_bytes")?);
    println!(
        "at the end, in MiB: records of translations {records:.1}; program, libraries and all else of the monitor's process {monitor:.1}"
    );
    ensure!(share < SHARE_MAX, "an idle guest takes too much");
    ensure!(monitor <= MONITOR_MAX, "the monitor takes too much memory");
    Ok(())
}
