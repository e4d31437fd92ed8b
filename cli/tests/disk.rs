//! Machines that boot from a disk: what is on it is found, and found anew at each boot.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, PASSED, Running, Scratch, run};

const MINUTE: Duration = Duration::from_secs(60);
const ENTRY: &str = "title test\nlinux /vmlinuz\ninitrd /initrd\noptions word=one\n";

/// A raw disk that boots the script; none, said aloud, where the host cannot make one.
fn disk(scratch: &Scratch, script: &str) -> Option<PathBuf> {
    let (kernel, initrd, _kept) = Boot::script(CLOUD, script).prepare();
    let tree = scratch.path("tree");
    fs::create_dir_all(tree.join("loader/entries")).unwrap();
    fs::copy(kernel, tree.join("vmlinuz")).unwrap();
    fs::copy(initrd, tree.join("initrd")).unwrap();
    fs::write(tree.join("loader/entries/test.conf"), ENTRY).unwrap();
    let path = scratch.path("disk");
    let output = Command::new("mke2fs")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, &path])
        .arg("128M")
        .output();
    let Ok(output) = output else {
        eprintln!("SKIPPED: mke2fs is not installed (Debian: e2fsprogs)");
        return None;
    };
    assert!(output.status.success(), "{output:?}");
    Some(path)
}

fn doppel(disk: &str, more: &[&str]) -> Command {
    let mut command = Command::new(DOPPEL);
    command
        .args(["run", "--debug-exit", "--disk", disk])
        .args(more);
    command
}

#[test]
fn kernel_ram_disk_and_command_line_are_found_on_the_disk() {
    let scratch = Scratch::new();
    let script = "grep -q 'word=one console=ttyS0 more=two' /proc/cmdline";
    let Some(disk) = disk(&scratch, script) else {
        return;
    };
    let name = disk.display().to_string();
    let append = ["--append", "more=two"];
    run(&mut doppel(&name, &append), MINUTE).expect(PASSED);
    // The same through an overlay, from a process of its own, and from a copy in the other format.
    let overlay = format!("{name},overlay={}", scratch.path("over").display());
    run(&mut doppel(&overlay, &append), MINUTE).expect(PASSED);
    let apart = [append[0], append[1], "--driver-domain", "disk"];
    run(&mut doppel(&overlay, &apart), MINUTE).expect(PASSED);
    let copy = scratch.path("copy.qcow2");
    let mut convert = Command::new(DOPPEL);
    convert.args(["image", "convert"]).args([&disk, &copy]);
    run(&mut convert, MINUTE).expect(0);
    let copy = format!("{},ro", copy.display());
    run(&mut doppel(&copy, &append), MINUTE).expect(PASSED);
    let own = ["--cmdline", "console=ttyS0 word=mine"];
    run(&mut doppel(&name, &own), MINUTE).expect(((16 + 1) << 1) | 1);
}

#[test]
fn the_disk_is_read_again_at_each_boot() {
    let scratch = Scratch::new();
    let script = "grep -q word=two /proc/cmdline && exit 0; echo first boot; sleep 3; reboot -f";
    let Some(disk) = disk(&scratch, script) else {
        return;
    };
    let mut machine = Running::start(&mut doppel(&format!("{},format=raw", disk.display()), &[]));
    machine.until("first boot", 1);
    replace(&disk, "word=one", "word=two");
    assert!(support::wait(&mut machine.child, MINUTE), "timed out");
    assert_eq!(machine.child.wait().unwrap().code(), Some(PASSED));
}

#[test]
fn a_disk_in_use_is_refused_and_one_below_overlays_is_shared() {
    let scratch = Scratch::new();
    let Some(disk) = disk(&scratch, "echo first boot; sleep 60") else {
        return;
    };
    let name = disk.display().to_string();
    let overlay = |n| format!("{name},overlay={}", scratch.path(n).display());
    let mut first = Running::start(&mut doppel(&overlay("a"), &[]));
    first.until("first boot", 1);
    run(&mut doppel(&name, &[]), MINUTE)
        .expect(1)
        .says("in use by another virtual machine");
    let mut second = Running::start(&mut doppel(&overlay("b"), &[]));
    second.until("first boot", 1);
    run(&mut doppel(&overlay("a"), &[]), MINUTE)
        .expect(1)
        .says("in use by another virtual machine");
}

/// Changes text on a raw disk behind the guest's back.
fn replace(disk: &Path, from: &str, to: &str) {
    let bytes = fs::read(disk).unwrap();
    let find = |window: &[u8]| window == from.as_bytes();
    let at = bytes.windows(from.len()).position(find).unwrap();
    let file = fs::OpenOptions::new().write(true).open(disk).unwrap();
    file.write_all_at(to.as_bytes(), at as u64).unwrap();
}

#[test]
fn what_is_wrong_with_a_disk_is_said() {
    let scratch = Scratch::new();
    let empty = scratch.path("empty");
    fs::write(&empty, [0; 4096]).unwrap();
    let empty = empty.display().to_string();
    run(&mut doppel(&empty, &[]), MINUTE)
        .expect(1)
        .says("no kernel was found")
        .says("--kernel");
    run(&mut doppel("/nonexistent", &[]), MINUTE)
        .expect(1)
        .says("/nonexistent: No such file");
    run(&mut doppel("a,size=3", &[]), MINUTE)
        .expect(1)
        .says("no option of a disk");
    fs::write(scratch.path("bad"), b"QFI\xfb\0\0\0\x03").unwrap();
    let bad = scratch.path("bad").display().to_string();
    run(&mut doppel(&bad, &[]), MINUTE)
        .expect(1)
        .says("truncated");
}

#[test]
fn images_are_made_shown_and_copied() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.path("a.qcow2"), scratch.path("b"));
    let image = |words: &[&str]| {
        let mut command = Command::new(DOPPEL);
        run(command.arg("image").args(words), MINUTE)
    };
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    image(&["create", a, "64M"]).expect(0);
    image(&["create", a, "64M"]).expect(1).says("File exists");
    image(&["info", a])
        .expect(0)
        .says("67108864 bytes")
        .says("qcow2");
    image(&["convert", "--format", "raw", a, b]).expect(0);
    image(&["info", b]).expect(0).says("raw");
    image(&["convert", a, b]).expect(1).says("File exists");
    image(&["build", "fedora", b])
        .expect(1)
        .says("debian:bookworm");
    image(&["build", "debian", b])
        .expect(1)
        .says("is there already");
}

/// The header of an image names its backing file as a stranger likes, there or not.
#[test]
fn names_that_a_stranger_chose_give_a_terminal_no_orders() {
    let scratch = Scratch::new();
    let (top, below) = (scratch.path("top.qcow2"), scratch.path("\x1b[2J"));
    let image = |words: &[&str]| {
        let mut command = Command::new(DOPPEL);
        run(command.arg("image").args(words), MINUTE)
    };
    let text = top.to_str().unwrap();
    image(&["create", text, "64M"]).expect(0);
    let name = b"\x1b[2J";
    let file = fs::OpenOptions::new().write(true).open(&top).unwrap();
    file.write_all_at(name, 4096).unwrap();
    file.write_all_at(&4096u64.to_be_bytes(), 8).unwrap();
    file.write_all_at(&(name.len() as u32).to_be_bytes(), 16)
        .unwrap();
    let missing = image(&["info", text]).expect(1);
    fs::write(below, [0; 4096]).unwrap();
    for shown in [missing, image(&["info", text]).expect(0)] {
        let shown = shown.says("\\u{1b}[2J");
        assert!(![shown.console, shown.stderr].concat().contains('\x1b'));
    }
}
