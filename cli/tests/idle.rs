//! An idle guest costs nothing.

mod support;

use std::fs;
use std::process::Command;
use std::time::Duration;
use support::{CLOUD, DOPPEL, Running, debian};

/// Clock ticks (10 ms) of processor time that a process has used (proc(5), fields 14 and 15).
fn ticks(process: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11..=12]
        .iter()
        .map(|n| n.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn at_the_shell_prompt_no_host_processor_is_used() {
    check(&[]);
}

#[test]
fn nor_where_the_idle_processors_wait_in_mwait() {
    check(&["--cpu", "host,+monitor", "--cpus", "2"]);
}

fn check(arguments: &[&str]) {
    let guest = debian(CLOUD);
    let mut command = Command::new(DOPPEL);
    command.args(["run", "--kernel"]).arg(guest.kernel);
    command.arg("--initrd").arg(guest.initrd).args(arguments);
    let mut doppel = Running::start(&mut command);
    doppel.until("~#", 1);
    std::thread::sleep(Duration::from_secs(3));
    let booted = ticks(doppel.child.id());
    let window = || {
        let before = ticks(doppel.child.id());
        std::thread::sleep(Duration::from_secs(10));
        ticks(doppel.child.id()) - before
    };
    // Half a percent; on a host that is slow just now, a tenth of what the boot has taken.
    let limit = (booted / 10).max(5);
    let used: Vec<_> = (0..3).map(|_| window()).collect();
    let least = used.iter().min().copied().unwrap_or(u64::MAX);
    assert!(
        least <= limit,
        "{used:?} ticks of 10 ms in 10 s each, after {booted} for the boot"
    );
}
