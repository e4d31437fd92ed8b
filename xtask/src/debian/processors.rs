//! What a second processor is worth: two programs that compute, at the same time, on one and on two; beside the host itself, whose second
//! processor others may use.

use super::lab::{Lab, Start, succeed};
use super::ssh::Ssh;
use super::work::{Took, timed};
use super::{BOOT, STEP, least};
use anyhow::{Result, ensure};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Goal: by the guest's clock, how often as fast on two.
const GAIN_MIN: f64 = 1.9;
/// One of the two: Debian's essential packages have a Perl.
const COMPUTES: &str = "perl -e 'my $x = 1; for my $i (1 .. 60_000_000) { $x = ($x * 31 + $i) % 65521 } print \"$x\\n\"'";

/// In turns; the least of each counts.
pub fn processors(lab: &Lab, rounds: usize) -> Result<()> {
    let (mut guest, mut host): ([Vec<f64>; 2], [Vec<f64>; 2]) = Default::default();
    for _ in 0..rounds {
        for cpus in [1, 2] {
            host[cpus - 1].push(on_the_host(cpus)?);
            guest[cpus - 1].push(on(lab, cpus)?.wall);
        }
    }
    gain("the host", &host);
    let gain = gain("a guest", &guest);
    ensure!(gain >= GAIN_MIN, "the goal is {GAIN_MIN}");
    Ok(())
}

fn gain(of: &str, times: &[Vec<f64>; 2]) -> f64 {
    let [one, two] = times.each_ref().map(|times| least(times));
    let gain = one / two;
    println!(
        "two programs that compute, {of}: on one processor {one:.1} s, on two {two:.1} s; {gain:.2} times as fast"
    );
    gain
}

/// Seconds on so many of the host's processors.
fn on_the_host(cpus: usize) -> Result<f64> {
    let mut command = Command::new("taskset");
    let list = ["0", "0,1"][cpus - 1];
    command.args(["-c", list, "sh", "-c", &both()]);
    let start = Instant::now();
    succeed(command.stdout(Stdio::null()))?;
    Ok(start.elapsed().as_secs_f64())
}

fn both() -> String {
    format!("{COMPUTES} & {COMPUTES}; wait")
}

fn on(lab: &Lab, cpus: usize) -> Result<Took> {
    let disk = lab.disk("processors.qcow2")?;
    let ssh = Ssh::new(lab)?;
    let mut console = lab.start(Start {
        ssh: Some(ssh.port),
        cpus: cpus as u32,
        ..Start::of("doppel", &disk)
    })?;
    ssh.wait(BOOT)?;
    ssh.run("systemctl is-system-running --wait", STEP)?;
    let took = timed(&ssh, console.pid(), &both())?;
    println!("{cpus} processors: {took}");
    console.send("poweroff")?;
    console.end(STEP)?;
    lab.look(&disk)?;
    Ok(took)
}
