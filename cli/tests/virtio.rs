//! Virtio devices in a guest of Debian's, end to end, translated.

mod support;

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, Finished, PASSED, Scratch};

const LIMIT: Duration = Duration::from_secs(120);

const RNG: &str = "
    set -e
    grep -q virtio_rng /sys/class/misc/hw_random/rng_current
    # 64 KiB of randomness do not get shorter.
    head -c 65536 /dev/hwrng >/tmp/random
    test $(wc -c </tmp/random) -eq 65536
    test $(gzip -c /tmp/random | wc -c) -gt 65000
";

/// Three disks: one to make a file system on, a sparse one, one that is read-only.
const DISKS: &str = "
    set -e
    test $(cat /sys/block/vda/serial) = disk0
    mke2fs -F /dev/vda >/dev/null
    mount /dev/vda /mnt
    dd if=/dev/urandom of=/mnt/file bs=64k count=400 2>/dev/null
    sha256sum </mnt/file >/tmp/sum
    umount /mnt
    mount /dev/vda /mnt
    sha256sum </mnt/file | cmp - /tmp/sum
    umount /mnt
    sync

    # 2 GiB of which the last block is written.
    test $(blockdev --getsize64 /dev/vdb) -eq 2147483648
    echo the end | dd of=/dev/vdb bs=4096 seek=524287 conv=notrunc,sync oflag=direct 2>/dev/null
    dd if=/dev/vdb bs=4096 skip=524287 iflag=direct 2>/dev/null | grep -q 'the end'
    dd if=/dev/urandom of=/dev/vdb bs=1M count=16 oflag=direct 2>/dev/null
    blkdiscard -o 0 -l 16777216 /dev/vdb
    dd if=/dev/vdb bs=1M count=16 iflag=direct 2>/dev/null | cmp -n 16777216 - /dev/zero

    test $(cat /sys/block/vdc/ro) = 1
    ! dd if=/dev/zero of=/dev/vdc bs=4096 count=1 2>/dev/null
    echo \"vda $(sha256sum </dev/vda)\"
    echo \"vdc $(sha256sum </dev/vdc)\"
    dmesg | grep -E 'I/O error' && exit 9
    true
";

fn sha256(path: &std::path::Path) -> String {
    let sum = Command::new("sha256sum")
        .stdin(File::open(path).unwrap())
        .output()
        .unwrap();
    String::from_utf8(sum.stdout).unwrap().trim().to_owned()
}

/// Runs the tour of disks with more words on the kernel's command line.
fn disks(words: &str, transport: &str) {
    let scratch = Scratch::new();
    let [work, sparse, fixed] = ["work", "sparse", "fixed"].map(|name| scratch.path(name));
    for (path, len) in [(&work, 64 << 20), (&sparse, 2 << 30)] {
        File::create(path).unwrap().set_len(len).unwrap();
    }
    let content: Vec<u8> = (0..3_000_000u32 / 512 * 512)
        .map(|n| ((n * 31) >> 3) as u8)
        .collect();
    fs::write(&fixed, &content).unwrap();
    let flags = format!(
        "--virtio {transport} --disk {},format=raw --rng --disk {},format=raw --disk {},format=raw,ro",
        work.display(),
        sparse.display(),
        fixed.display()
    );
    let finished: Finished = Boot::script(CLOUD, DISKS)
        .flag(&flags)
        .cmdline(words)
        .doppel("translate", LIMIT)
        .expect(PASSED);
    finished
        .says(&format!("vda {}", sha256(&work)))
        .says(&format!("vdc {}", sha256(&fixed)));
    assert_eq!(fs::read(&fixed).unwrap(), content);
    let used = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&sparse).unwrap());
    assert!(used * 512 < 2 << 20, "{used} blocks of the sparse file");
}

#[test]
fn a_disk_is_formatted_mounted_written_discarded_and_the_host_sees_the_same() {
    disks("", "pci");
}

#[test]
fn disks_work_without_messages_too() {
    disks("pci=nomsi", "pci");
}

#[test]
fn disks_work_without_pci_too() {
    disks("pci=off", "mmio");
}

#[test]
fn the_guest_has_the_hosts_randomness() {
    Boot::script(CLOUD, RNG)
        .flag("--rng")
        .doppel("translate", LIMIT)
        .expect(PASSED);
}

#[test]
fn a_reboot_finds_the_disk_as_it_was_left() {
    const SCRIPT: &str = "
        set -e
        if grep -q marked /dev/vda; then exit 0; fi
        echo marked | dd of=/dev/vda bs=512 count=1 conv=notrunc,sync 2>/dev/null
        sync
        reboot -f
    ";
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    Boot::script(CLOUD, SCRIPT)
        .flag(&format!("--disk {},format=raw", path.display()))
        .doppel("translate", LIMIT)
        .expect(PASSED);
}

#[test]
fn a_host_that_is_full_is_an_io_error_in_the_guest() {
    const SCRIPT: &str = "
        ! dd if=/dev/zero of=/dev/vda bs=1M seek=90 count=20 oflag=direct 2>/dev/null || exit 1
        dmesg | grep -q 'I/O error, dev vda' || exit 2
        # What is there can still be read.
        dd if=/dev/vda of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null
    ";
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    File::create(&path).unwrap().set_len(200 << 20).unwrap();
    let (doppel, _kept) = Boot::script(CLOUD, SCRIPT)
        .flag(&format!(
            "--debug-exit --disk {},format=raw",
            path.display()
        ))
        .command("translate");
    // No file may be written beyond 100 MiB: the host's way to say that it is full, without root.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 204800; exec \"$0\" \"$@\""]);
    command.arg(doppel.get_program()).args(doppel.get_args());
    support::run(&mut command, LIMIT).expect(PASSED);
}
