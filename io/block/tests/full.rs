//! A full host disk: writes that need room fail, all else goes on, and the image stays sound.
//!
//! The small host disk is a tmpfs in a mount namespace of the test's own.

mod support;

use std::io::{ErrorKind, IoSlice};
use std::path::Path;
use std::process::Command;

use doppel_block::{Format, create};
use support::{Scratch, check, has_qemu_img, open_path, read, write};

const ME: &str = "DOPPEL_FULL_DISK";
const BLOCK: usize = 65536;

#[test]
fn a_full_host_disk_is_an_error_of_the_write_alone() {
    if let Ok(folder) = std::env::var(ME) {
        return fill(Path::new(&folder));
    }
    let scratch = Scratch::new();
    let folder = scratch.path("small");
    std::fs::create_dir(&folder).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=8m none {0} && exec {1} --exact a_full_host_disk_is_an_error_of_the_write_alone --nocapture",
        folder.display(),
        std::env::current_exe().unwrap().display()
    );
    let mut command = Command::new("unshare");
    command.args(["-Urm", "sh", "-c"]);
    let allowed = command.arg("true").output();
    if !allowed.is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED: this host allows no mount namespaces to its users");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["-Urm", "sh", "-c", &script]);
    let output = command.env(ME, &folder).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("was full"), "{said}");
}

fn fill(folder: &Path) {
    for (name, format) in [("disk.qcow2", Format::Qcow2), ("disk.raw", Format::Raw)] {
        let path = folder.join(name);
        create(&path, format, 64 << 20).unwrap();
        let disk = open_path(&path, "").unwrap();
        let mut written = 0;
        let error = loop {
            let bytes = vec![written as u8 + 1; BLOCK];
            let offset = (written * BLOCK) as u64;
            match disk.write_at(offset, &[IoSlice::new(&bytes)]) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull, "{name}");
        assert!(written > 60, "{name}: {written}");
        // What is there can be read, written again, and made durable.
        write(&*disk, 0, &[77; 512]);
        disk.flush().unwrap();
        for n in 1..written {
            let found = read(&*disk, (n * BLOCK) as u64, 512);
            assert_eq!(found, [n as u8 + 1; 512], "{name}");
        }
        // Room that is given back can be used.
        disk.discard(BLOCK as u64, 8 * BLOCK as u64).unwrap();
        disk.flush().unwrap();
        for n in 0..4 {
            write(&*disk, ((written + n) * BLOCK) as u64, &[99; BLOCK]);
        }
        disk.flush().unwrap();
        drop(disk);
        if format == Format::Qcow2 && has_qemu_img() {
            let state = check(&path);
            assert!(state == 0 || state == 3, "check says {state}");
        }
        let disk = open_path(&path, "").unwrap();
        assert_eq!(read(&*disk, 0, 512), [77; 512]);
        assert_eq!(read(&*disk, (written * BLOCK) as u64, 512), [99; 512]);
        drop(disk);
        std::fs::remove_file(&path).unwrap();
    }
    eprintln!("the disk was full");
}
