//! Shared directories in a guest of Debian's, end to end, translated.

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, PASSED, Scratch};

const LIMIT: Duration = Duration::from_secs(120);

/// What a guest does in a share.
const TOUR: &str = "
    set -e
    trap 'echo failed at: $step' EXIT
    step=mount
    mkdir -p /mnt /fixed
    mount -t virtiofs work /mnt
    mount -t virtiofs fixed /fixed
    cd /mnt

    step=files
    test \"$(cat from-host)\" = hello
    echo one >file
    echo two >>file
    test \"$(tr '\\n' ' ' <file)\" = 'one two '
    truncate -s 5 file
    test $(stat -c %s file) -eq 5
    mv file moved
    test ! -e file
    dd if=/dev/urandom of=big bs=64k count=400 2>/dev/null
    sum=$(sha256sum <big)
    echo 3 >/proc/sys/vm/drop_caches
    test \"$(sha256sum <big)\" = \"$sum\"
    echo \"big $sum\"
    cp big copy
    cmp big copy
    rm copy

    step=directories
    mkdir -p many/deep/er
    n=0
    while [ $n -lt 1000 ]; do : >many/$n; n=$((n+1)); done
    test $(ls many | wc -l) -eq 1001
    test $(ls -l many | grep -c '^-') -eq 1000
    ! rmdir many 2>/dev/null
    mv many/deep elsewhere
    test -d elsewhere/er
    rm -r many
    test ! -e many

    step=links
    ln -s moved soft
    test \"$(readlink soft)\" = moved
    test $(stat -L -c %s soft) -eq 5
    ln moved hard
    test $(stat -c %h moved) -eq 2
    # They lead to the guest's own files, and nowhere where it has none.
    ! cat outside 2>/dev/null
    cat passwd | grep -q root:x:0:0:root:/root:/bin/sh

    step=modes
    chmod 751 moved
    test $(stat -c %a moved) = 751
    test $(stat -c %u:%g moved) = 0:0
    chmod 4755 big
    test $(stat -c %a big) = 755
    touch -d '2020-02-02 02:02:02' moved
    test \"$(stat -c %Y moved)\" = 1580608922
    ! chown 1000 moved 2>/dev/null

    step=special
    mkfifo fifo
    (echo through >fifo &)
    test \"$(cat fifo)\" = through
    ! mknod device c 1 3 2>/dev/null

    step=mapped
    /doppel/mapped mapped
    echo \"mapped $(sha256sum <mapped)\"

    step=unlinked
    exec 5<>kept
    rm kept
    echo still >&5
    test $(stat -L -c %s /proc/self/fd/5) -eq 6
    exec 5>&-

    step=statfs
    test $(stat -f -c %b /mnt) -gt 1000
    sync

    step=read-only
    test \"$(cat /fixed/file)\" = fixed
    ! echo x 2>/dev/null >/fixed/file
    ! echo x 2>/dev/null >/fixed/new
    ! rm /fixed/file 2>/dev/null
    ! mkdir /fixed/folder 2>/dev/null

    step=host
    echo ready >to-host
    while [ ! -e from-host-2 ]; do sleep 0.1; done
    n=0
    while [ $n -lt 300 ]; do echo guest $n >>log; n=$((n+1)); done
    echo done >to-host-2
    while [ ! -e from-host-3 ]; do sleep 0.1; done
    # At most a second later the guest sees the whole of what the host appended.
    sleep 1.1
    test $(grep -c host log) -eq 300
    test $(grep -c guest log) -eq 300

    step=umount
    cd /
    umount /mnt
    mount -t virtiofs work /mnt
    test -f /mnt/moved
    ! dmesg | grep -iE 'virtiofs.*(error|fail)|fuse.*(error|fail)'
    trap - EXIT
";

fn sha256(path: &std::path::Path) -> String {
    let output = Command::new("sha256sum")
        .stdin(fs::File::open(path).unwrap())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn wait_for(path: &std::path::Path, over: &AtomicBool) {
    while !path.exists() && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(20));
    }
}

/// The guest's tour, while the host works in the same directory.
fn tour(transport: &str) {
    let scratch = Scratch::new();
    let [work, fixed] = ["work", "fixed"].map(|name| scratch.path(name));
    fs::create_dir(&work).unwrap();
    fs::create_dir(&fixed).unwrap();
    fs::write(work.join("from-host"), "hello\n").unwrap();
    fs::write(fixed.join("file"), "fixed\n").unwrap();
    fs::write(scratch.path("secret"), "secret\n").unwrap();
    symlink("../secret", work.join("outside")).unwrap();
    symlink("/etc/passwd", work.join("passwd")).unwrap();
    let boot = Boot::script(CLOUD, TOUR)
        .file(
            "doppel/mapped",
            0o755,
            &support::program("mapped_unsafe", &[]),
        )
        .flag(&format!(
            "--virtio {transport} --share work={} --share fixed={},ro --net none",
            work.display(),
            fixed.display()
        ))
        .cmdline("quiet");
    let over = AtomicBool::new(false);
    let finished = thread::scope(|scope| {
        scope.spawn(|| {
            wait_for(&work.join("to-host"), &over);
            fs::write(work.join("from-host-2"), "").unwrap();
            let mut log = fs::OpenOptions::new();
            let log = log.create(true).append(true);
            let mut log = log.open(work.join("log")).unwrap();
            for n in 0..300 {
                writeln!(log, "host {n}").unwrap();
            }
            wait_for(&work.join("to-host-2"), &over);
            fs::write(work.join("from-host-3"), "").unwrap();
        });
        let finished = boot.doppel("translate", LIMIT);
        over.store(true, Ordering::Relaxed);
        finished
    });
    finished
        .expect(PASSED)
        .says("mapped: passed")
        .says(&format!("big {}", sha256(&work.join("big"))))
        .says(&format!("mapped {}", sha256(&work.join("mapped"))));
    let moved = fs::metadata(work.join("moved")).unwrap();
    let me = fs::metadata(scratch.path("secret")).unwrap();
    assert_eq!((moved.uid(), moved.gid()), (me.uid(), me.gid()));
    assert_eq!(moved.permissions().mode() & 0o7777, 0o751);
    let log = fs::read_to_string(work.join("log")).unwrap();
    assert_eq!(log.lines().count(), 600, "no line is torn or lost");
    assert_eq!(fs::read(scratch.path("secret")).unwrap(), b"secret\n");
    assert_eq!(fs::read_dir(&fixed).unwrap().count(), 1);
}

#[test]
fn a_shared_directory_is_worked_in_from_both_sides() {
    tour("pci");
}

#[test]
fn a_shared_directory_is_reached_without_pci_too() {
    tour("mmio");
}

#[test]
fn a_file_larger_than_the_host_allows_is_an_error_in_the_guest() {
    const SCRIPT: &str = "
        set -e
        mount -t virtiofs work /mnt
        truncate -s 1M /mnt/file
        ! truncate -s 200M /mnt/file 2>/dev/null
        ! dd if=/dev/zero of=/mnt/file bs=1M seek=99 count=2 conv=notrunc 2>/dev/null
        test $(stat -c %s /mnt/file) -gt 1000000
    ";
    let scratch = Scratch::new();
    let boot = Boot::script(CLOUD, SCRIPT).flag(&format!(
        "--debug-exit --net none --share work={}",
        scratch.path("").display()
    ));
    let (inner, _kept) = boot.command("translate");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f 204800; exec \"$0\" \"$@\""]);
    command.arg(inner.get_program()).args(inner.get_args());
    support::run(&mut command, LIMIT).expect(PASSED);
}

#[test]
fn a_mistake_in_share_says_what_to_do() {
    for (flags, advice) in [
        ("--share work", "TAG=DIR"),
        (
            "--share work=/nowhere",
            "name a directory that you may read",
        ),
        (
            "--share a=/tmp --share a=/var",
            "two directories have the tag a",
        ),
    ] {
        let mut command = Command::new(DOPPEL);
        command.arg("run").args(flags.split(' '));
        let finished = support::run(&mut command, LIMIT);
        assert!(finished.status.is_some_and(|status| status != 0), "{flags}");
        finished.says(advice);
    }
}
