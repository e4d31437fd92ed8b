//! Disks, the entropy device and the console in a guest of Debian's, end to end, translated.

mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Stdio};
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
    support::reboots_with_its_disk("", LIMIT);
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

/// Both ways through a console: what the host types, and what the guest makes of it.
const CONSOLE: &str = "
    set -e
    # Its settings last as long as somebody has it open.
    exec 3<>/dev/hvc0
    stty raw -echo <&3
    echo ready >&3
    head -c 100000 <&3 >/tmp/typed
    cat /tmp/typed /tmp/typed /tmp/typed >&3
    echo \"sum $(sha256sum </tmp/typed)\" >&3
    # The kernel's messages come here too.
    grep -q hvc0 /sys/class/tty/console/active
    echo from the kernel >/dev/kmsg
";

fn console(words: &str, options: &str) {
    let scratch = Scratch::new();
    let (mut command, _kept) = Boot::script(CLOUD, CONSOLE)
        .cmdline(&format!("console=hvc0 {words}"))
        .flag(&format!("--debug-exit {options}"))
        .flag(&format!(
            "--serial file={}",
            scratch.path("serial").display()
        ))
        .command("translate");
    let mut doppel = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // All bytes but Ctrl-O, by which Linux lets a console give orders.
    let byte = |n: u32| Some(((n * 31) >> 4) as u8).filter(|byte| *byte != 15);
    let typed: Vec<u8> = (0..).filter_map(byte).take(100_000).collect();
    let (keyboard, mut screen) = (doppel.stdin.take().unwrap(), doppel.stdout.take().unwrap());
    let (sent, shown) = (
        typed.clone(),
        std::sync::Arc::new(std::sync::Mutex::new(Vec::new())),
    );
    let collected = shown.clone();
    let reader = std::thread::spawn(move || {
        let (mut buffer, mut keyboard) = ([0; 4096], Some(keyboard));
        while let Ok(n @ 1..) = screen.read(&mut buffer) {
            let mut shown = collected.lock().unwrap();
            shown.extend(&buffer[..n]);
            let ready = shown.windows(6).any(|w| w == b"ready\n");
            drop(shown);
            if ready && let Some(mut keyboard) = keyboard.take() {
                keyboard.write_all(&sent).unwrap();
            }
        }
    });
    let ended = support::wait(&mut doppel, LIMIT / 2);
    let status = doppel.wait().unwrap().code();
    reader.join().unwrap();
    let shown = shown.lock().unwrap();
    let text = String::from_utf8_lossy(&shown);
    let serial = fs::read_to_string(scratch.path("serial")).unwrap_or_default();
    assert!(
        ended && status == Some(PASSED),
        "{status:?}\n{text}\n{serial}"
    );
    let back = typed.repeat(3);
    assert!(
        shown.windows(back.len()).any(|w| w == back),
        "not what was typed"
    );
    fs::write(scratch.path("typed"), &typed).unwrap();
    let sum = format!("sum {}", sha256(&scratch.path("typed")));
    assert!(
        text.contains(&sum) && text.contains("from the kernel"),
        "{sum}"
    );
    assert!(serial.contains("from the kernel"));
}

#[test]
fn a_console_carries_bytes_both_ways() {
    console("", "--console stdio");
}

#[test]
fn a_console_works_where_its_thread_does_everything() {
    console("", "--console stdio,at-once=off");
}

#[test]
fn a_console_works_without_pci_too() {
    console("pci=off", "--virtio mmio --rng --console stdio");
}

#[test]
fn several_consoles_lead_to_files() {
    const SCRIPT: &str = "
        set -e
        echo first >/dev/hvc0
        seq 1 20000 >/dev/hvc1
    ";
    let scratch = Scratch::new();
    let [first, second] = ["first", "second"].map(|name| scratch.path(name));
    Boot::script(CLOUD, SCRIPT)
        .flag(&format!("--console file={}", first.display()))
        .flag(&format!("--console file={}", second.display()))
        .doppel("translate", LIMIT)
        .expect(PASSED);
    assert_eq!(fs::read(first).unwrap(), b"first\r\n");
    let lines: String = (1..=20_000).map(|n| format!("{n}\r\n")).collect();
    assert_eq!(fs::read_to_string(second).unwrap(), lines);
}
