//! Memory that a guest frees goes back to the host, end to end, translated.

mod support;

use std::fs;
use std::time::{Duration, Instant};
use support::{Boot, CLOUD, PASSED, Running, Scratch};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

/// Fills memory, frees it, and uses it again.
const FILL: &str = "
    set -e
    mount -t tmpfs -o size=400M tmpfs /mnt
    head -c 1048576 /dev/urandom >/tmp/piece
    fill() {
        for n in $(seq 250); do cat /tmp/piece; done >/mnt/file
    }
    fill
    echo it is full
    sleep 3
    rm /mnt/file
    echo it is free
    sleep 12
    fill
    sha256sum /mnt/file >/tmp/first
    for n in $(seq 250); do cat /tmp/piece; done | sha256sum | cut -c-64 >/tmp/second
    grep -qf /tmp/second /tmp/first
    echo it is used again
    # Until that has been looked at.
    sleep 2
";

/// Bytes that a process has of the host's memory.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn free(options: &str) {
    let (mut command, _scratch) = Boot::script(CLOUD, FILL)
        .flag(&format!("--debug-exit --net none {options}"))
        .command("translate");
    let mut doppel = Running::start(&mut command);
    let pid = doppel.child.id();
    doppel.until("it is full", 1);
    let full = resident(pid);
    assert!(full > 250 * MIB, "{full}");
    doppel.until("it is free", 1);
    let end = Instant::now() + Duration::from_secs(12);
    let mut now = resident(pid);
    while now + 200 * MIB > full {
        assert!(Instant::now() < end, "{full} bytes, and {now} after all");
        std::thread::sleep(Duration::from_millis(50));
        now = resident(pid);
    }
    doppel.until("it is used again", 1);
    // It may have been seen while it fell, so it is not all of the file that it rises by.
    assert!(resident(pid) > now + 150 * MIB);
    assert!(support::wait(&mut doppel.child, LIMIT));
    assert_eq!(doppel.child.wait().unwrap().code(), Some(PASSED));
}

#[test]
fn free_memory_goes_back_to_the_host() {
    free("");
}

#[test]
fn so_it_does_with_several_processors_and_without_pci() {
    free("--cpus 2 --virtio mmio");
}

#[test]
fn so_it_does_from_a_memfd() {
    free("--memory-backing memfd");
}

#[test]
fn so_it_does_from_huge_pages() {
    free("--memory-backing huge");
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back_to_a_guest_that_runs_out() {
    const SCRIPT: &str = "
        pages() {
            awk \"\\$1 == \\\"balloon_$1\\\" { print \\$2 }\" /proc/vmstat
        }
        n=0
        until [ $(pages inflate) -ge 51200 ]; do
            sleep 0.1
            n=$((n + 1))
            [ $n -lt 200 ] || exit 1
        done
        free=$(awk '/MemFree/ { print $2 }' /proc/meminfo)
        [ $free -lt 300000 ] || exit 2
        echo inflated
        # More than is there without what is in the balloon.
        mount -t tmpfs -o size=400M tmpfs /mnt
        dd if=/dev/zero of=/mnt/file bs=1M count=330 2>/dev/null || exit 3
        [ $(wc -c </mnt/file) -eq $((330 << 20)) ] || exit 4
        [ $(pages deflate) -gt 1000 ] || exit 5
        dmesg | grep -q 'Out of memory: Killed' && exit 6
        true
    ";
    let scratch = Scratch::new();
    let stats = scratch.path("stats");
    Boot::script(CLOUD, SCRIPT)
        .flag(&format!("--balloon 200M --stats {}", stats.display()))
        .doppel("translate", LIMIT)
        .expect(PASSED);
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    let balloon = &stats["balloon"][0];
    let count = |name: &str| balloon[name].as_u64().unwrap();
    assert!(count("inflated_bytes") >= 200 * MIB, "{balloon}");
    assert!(count("deflated_bytes") > 0 && count("discarded_bytes") >= 200 * MIB);
    let total = balloon["guest"]["total"].as_u64().unwrap();
    assert!((400 * MIB..512 * MIB).contains(&total), "{balloon}");
}
