//! Disks in processes of their own: the guest does not notice that they die.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, PASSED, Running, Scratch, backends};

const LIMIT: Duration = Duration::from_secs(150);
/// Of each disk's process.
const KILLS: u32 = 20;

/// Blocks that say who they are, each written and synced before the next, over and over until the host has killed enough.
const WRITER: &str = "
    set -e
    trap 'dmesg | tail -5' EXIT
    block() { n=$1; i=0; while [ $i -lt 64 ]; do echo \"block $n round $round line $i $n\"; i=$((i+1)); done; }
    enough() { dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | grep -q enough; }
    mke2fs -F /dev/vdc >/dev/null
    mount /dev/vdc /mnt
    # Meanwhile files come and go on a file system in a qcow2 image.
    (
        n=0
        while [ ! -e /tmp/over ]; do
            dd if=/dev/urandom of=/mnt/file bs=64k count=40 conv=fsync 2>/dev/null
            sum=$(sha256sum </mnt/file)
            echo 3 >/proc/sys/vm/drop_caches
            test \"$(sha256sum </mnt/file)\" = \"$sum\" || touch /tmp/wrong
            cp /mnt/file /mnt/copy$((n % 5)) || touch /tmp/wrong
            n=$((n + 1))
        done
        umount /mnt
        echo \"files: $n\"
        touch /tmp/files-done
    ) &
    round=0
    while [ $round -lt 2000 ]; do
        n=$((round % 50))
        block $n >/tmp/block
        dd if=/tmp/block of=/dev/vda bs=4096 seek=$n count=1 conv=sync,notrunc,fsync oflag=direct 2>/tmp/said || { cat /tmp/said; exit 3; }
        dd if=/dev/vda of=/tmp/back bs=4096 skip=$n count=1 iflag=direct 2>/tmp/said || { cat /tmp/said; exit 4; }
        head -c $(stat -c %s /tmp/block) /tmp/back | head -c 4096 >/tmp/a
        head -c 4096 /tmp/block | cmp - /tmp/a
        echo \"written $n $round\"
        round=$((round + 1))
        # The host says on the second disk when it has killed enough.
        if enough; then break; fi
    done
    touch /tmp/over
    while [ ! -e /tmp/files-done ]; do sleep 0.1; done
    test ! -e /tmp/wrong
    mount /dev/vdc /mnt
    cat /mnt/file /mnt/copy* >/dev/null
    umount /mnt
    ! dmesg | grep -iE 'I/O error|blk_update|EXT4-fs error'
    trap - EXIT
";

/// Processes that serve these disks.
fn servers(images: &[&Path]) -> Vec<u32> {
    let paths = images.iter().map(|image| image.to_str().unwrap());
    paths
        .flat_map(|path| backends("disk", &format!("{path},")))
        .collect()
}

/// Kills the processes of disks until it is enough or the guest is over; the first of them is the one that has blocks.
fn killer(images: &[&Path], told: &File, over: &AtomicBool, kills: &AtomicU32) {
    // The guest has to have started to write.
    let blocks = File::open(images[0]).unwrap();
    let mut first = [0; 5];
    while &first != b"block" && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(20));
        blocks.read_exact_at(&mut first, 0).unwrap();
    }
    let mut pause = 20;
    while kills.load(Ordering::Relaxed) < 2 * KILLS && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(pause));
        pause = (pause * 7 + 13) % 170 + 10;
        for pid in servers(images) {
            let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
            kills.fetch_add(killed.unwrap().success().into(), Ordering::Relaxed);
        }
    }
    told.write_all_at(b"enough", 0).unwrap();
}

#[test]
fn the_process_of_a_disk_is_killed_twenty_times_and_the_guest_loses_nothing() {
    let scratch = Scratch::new();
    let [raw, told, qcow2] = ["raw", "told", "qcow2"].map(|name| scratch.path(name));
    File::create(&raw).unwrap().set_len(16 << 20).unwrap();
    File::create(&told).unwrap().set_len(1 << 20).unwrap();
    let made = Command::new(DOPPEL)
        .args(["image", "create"])
        .arg(&qcow2)
        .arg("64M")
        .status();
    assert!(made.unwrap().success());
    let stats = scratch.path("stats");
    let boot = Boot::script(CLOUD, WRITER).cmdline("quiet").flag(&format!(
        "--stats {} --driver-domain disk --net none --disk {},format=raw --disk {},format=raw,ro --disk {}",
        stats.display(),
        raw.display(),
        told.display(),
        qcow2.display()
    ));
    let (over, kills) = (AtomicBool::new(false), AtomicU32::new(0));
    let word = File::options().write(true).open(&told).unwrap();
    let finished = thread::scope(|scope| {
        scope.spawn(|| killer(&[&raw, &qcow2], &word, &over, &kills));
        let finished = boot.doppel("translate", LIMIT);
        over.store(true, Ordering::Relaxed);
        finished
    });
    let finished = finished.expect(PASSED);
    let kills = kills.load(Ordering::Relaxed);
    assert!(kills >= 2 * KILLS);
    let [raws, tolds, qcow2s] = [0, 1, 2].map(|disk| support::restarts(&stats, "disk", disk));
    // One that is hardly there may be killed twice.
    let counted = raws + qcow2s;
    let likely = u64::from(KILLS)..=u64::from(kills);
    assert!(likely.contains(&counted), "{counted} of {kills}");
    assert_eq!(tolds, 0, "nobody killed it");
    // What the guest saw written is on the disk.
    let image = fs::read(&raw).unwrap();
    let mut last = std::collections::BTreeMap::new();
    for line in finished.console.lines() {
        if let ["written", n, round] = *line.split_whitespace().collect::<Vec<_>>() {
            last.insert(n.parse::<usize>().unwrap(), round.to_owned());
        }
    }
    assert!(!last.is_empty());
    for (n, round) in last {
        let text = String::from_utf8_lossy(&image[n * 4096..][..64]).into_owned();
        let wanted = format!("block {n} round {round} line 0 {n}\n");
        assert!(text.starts_with(&wanted), "{text:?}, not {wanted:?}");
    }
    assert!(
        servers(&[&raw, &qcow2]).is_empty(),
        "they end with the monitor"
    );
    match Command::new("qemu-img").arg("check").arg(&qcow2).output() {
        // Clusters that are counted and not used are no harm (3).
        Ok(check) => assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}"),
        Err(_) => eprintln!("SKIPPED: this host has no qemu-img to check the image with"),
    }
}

#[test]
fn a_disk_in_a_process_of_its_own_survives_a_reboot() {
    support::reboots_with_its_disk("--driver-domain disk", LIMIT);
}

#[test]
fn the_process_of_a_disk_ends_with_the_monitor_however_that_ends() {
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    for signal in ["-TERM", "-KILL"] {
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let boot = Boot::script(CLOUD, "echo first; sleep 60").flag(&format!(
            "--driver-domain disk --disk {},format=raw",
            path.display()
        ));
        let (mut command, _kept) = boot.command("translate");
        let mut machine = Running::start(&mut command);
        machine.until("first", 1);
        assert_eq!(servers(&[&path]).len(), 1);
        let pid = machine.child.id().to_string();
        let killed = Command::new("kill").args([signal, &pid]).status();
        assert!(killed.unwrap().success() && support::wait(&mut machine.child, LIMIT));
        let status = machine.child.wait().unwrap().code();
        assert_eq!(status, (signal == "-TERM").then_some(1), "in order, or not");
        for _ in 0..100 {
            if servers(&[&path]).is_empty() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        assert!(servers(&[&path]).is_empty(), "{signal}");
    }
}

#[test]
fn a_mistake_in_driver_domain_says_what_to_do() {
    for (flags, advice) in [
        ("--driver-domain memory", "write disk, net or disk,net"),
        (
            "--driver-domain net --net user,dns=192.0.2.1,hostfwd=tcp:192.0.2.1:22-:22",
            "192.0.2.1:22",
        ),
        (
            "--driver-domain disk --memory-backing huge",
            "needs --memory-backing memfd",
        ),
        (
            "--driver-domain disk --disk /nowhere/at/all",
            "/nowhere/at/all",
        ),
    ] {
        let mut command = Command::new(DOPPEL);
        command.arg("run").args(flags.split(' '));
        let finished = support::run(&mut command, LIMIT);
        assert!(finished.status.is_some_and(|s| s != 0), "{flags}");
        finished.says(advice);
    }
}
