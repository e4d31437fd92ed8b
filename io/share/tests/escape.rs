//! A guest that wants out: names, links, races, special files, and a monitor that is to hold more and more.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use doppel_share::opcode;
use fuse_abi::linux::{
    FUSE_INIT_EXT, fuse_forget_in, fuse_init_in, fuse_link_in, fuse_mknod_in, fuse_open_in,
    fuse_setattr_in,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use support::{Mount, ROOT, text, with_text};
use zerocopy::IntoBytes;

fn secret_is_untouched(mount: &Mount) {
    assert_eq!(fs::read(mount.host("../secret")).unwrap(), b"secret");
    let beside: BTreeSet<_> = fs::read_dir(mount.host(".."))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(beside, ["secret", "share"].map(Into::into).into());
}

#[test]
fn names_that_lead_elsewhere_are_refused_by_every_request() {
    let mount = Mount::new("");
    fs::write(mount.host("file"), "").unwrap();
    let file = mount.node(ROOT, "file");
    for name in [
        "..",
        ".",
        "",
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "file/../../secret",
    ] {
        let fixed = |len: usize| [vec![0; len], text(name)].concat();
        let link = fuse_link_in { oldnodeid: file };
        let requests = [
            (opcode::LOOKUP, text(name)),
            (opcode::MKDIR, fixed(8)),
            (opcode::MKNOD, fixed(16)),
            (opcode::CREATE, fixed(16)),
            (opcode::SYMLINK, text(&format!("{name}\0x"))),
            (opcode::LINK, with_text(&link, name)),
            (opcode::UNLINK, text(name)),
            (opcode::RMDIR, text(name)),
            (opcode::RENAME, with_text(&ROOT, &format!("file\0{name}"))),
            (opcode::RENAME, with_text(&ROOT, &format!("{name}\0file"))),
            (
                opcode::RENAME2,
                with_text(&[ROOT, 0], &format!("file\0{name}")),
            ),
        ];
        for (code, arguments) in requests {
            let answer = mount.send(code, ROOT, &arguments);
            assert_eq!(answer, Err(Errno::INVAL), "{code} {name:?}");
        }
    }
    secret_is_untouched(&mount);
    assert!(mount.host("file").exists());
}

#[test]
fn symbolic_links_are_read_and_never_followed() {
    let mount = Mount::new("");
    symlink("../secret", mount.host("file")).unwrap();
    symlink("..", mount.host("up")).unwrap();
    symlink("/proc/self/root", mount.host("magic")).unwrap();
    for name in ["file", "up", "magic"] {
        let node = mount.node(ROOT, name);
        assert_eq!(
            mount.getattr(node).unwrap().attr.mode & 0o170_000,
            0o120_000
        );
        for flags in [0, 1, 2, 0o1000] {
            assert_eq!(mount.open(node, flags), Err(Errno::LOOP), "{name}");
        }
        let wanted = fuse_open_in::default();
        assert_eq!(
            mount.send(opcode::OPENDIR, node, wanted.as_bytes()),
            Err(Errno::LOOP)
        );
        let below = mount.lookup(node, "secret");
        assert_eq!(below.err(), Some(Errno::NOTDIR), "{name}");
        let wanted = fuse_setattr_in {
            valid: 8,
            size: 0,
            ..Default::default()
        };
        assert!(
            mount
                .send(opcode::SETATTR, node, wanted.as_bytes())
                .is_err()
        );
        let wanted = fuse_setattr_in {
            valid: 1,
            mode: 0,
            ..Default::default()
        };
        assert!(
            mount
                .send(opcode::SETATTR, node, wanted.as_bytes())
                .is_err()
        );
        // A file is not made through it.
        assert_eq!(mount.create(ROOT, name, 0o644).err(), Some(Errno::LOOP));
        // A hard link to it is one to the link.
        let link = fuse_link_in { oldnodeid: node };
        let hard = format!("{name}-hard");
        mount
            .send(opcode::LINK, ROOT, &with_text(&link, &hard))
            .unwrap();
        assert!(
            fs::symlink_metadata(mount.host(&hard))
                .unwrap()
                .is_symlink()
        );
    }
    assert_eq!(
        mount
            .send(opcode::READLINK, mount.node(ROOT, "up"), &[])
            .unwrap(),
        b".."
    );
    mount
        .send(opcode::SYMLINK, ROOT, &text("mine\0/etc"))
        .unwrap();
    assert_eq!(
        mount.lookup(mount.node(ROOT, "mine"), "passwd").err(),
        Some(Errno::NOTDIR)
    );
    secret_is_untouched(&mount);
}

#[test]
fn a_directory_that_becomes_a_link_meanwhile_leads_nowhere() {
    let mount = Mount::with(
        "",
        doppel_share::Limits {
            // Every use opens the name again.
            descriptors: 0,
            ..support::SMALL
        },
    );
    fs::create_dir_all(mount.host("folder/share")).unwrap();
    fs::write(mount.host("folder/secret"), "inside").unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            symlink("..", mount.host("link")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                for (from, to) in [
                    ("folder", "aside"),
                    ("link", "folder"),
                    ("folder", "link"),
                    ("aside", "folder"),
                ] {
                    fs::rename(mount.host(from), mount.host(to)).unwrap();
                }
            }
        });
        let (mut reached, mut refused) = (0, 0);
        // On a busy host the two threads may take long turns.
        let limit = Instant::now() + Duration::from_secs(30);
        let mut rounds = 0;
        while rounds < 20_000 || (reached.min(refused) == 0 && Instant::now() < limit) {
            rounds += 1;
            let Ok(folder) = mount.lookup(ROOT, "folder") else {
                continue;
            };
            let found = mount.lookup(folder.nodeid, "secret");
            let opened = found.and_then(|found| mount.open(found.nodeid, 0));
            match opened {
                Ok(fh) => {
                    assert_eq!(mount.read(fh, 0, 100).unwrap(), b"inside");
                    mount.release(fh).unwrap();
                    reached += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reached > 0 && refused > 0, "{reached} {refused}: no race");
    });
}

#[test]
fn special_files_are_names_and_nothing_more() {
    let mount = Mount::new("");
    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        mknodat(CWD, mount.host(name), kind, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    let null = rustix::fs::makedev(1, 3);
    let device = mknodat(
        CWD,
        mount.host("null"),
        FileType::CharacterDevice,
        Mode::RUSR,
        null,
    );
    let names = ["fifo", "socket", "null"];
    for name in &names[..if device.is_ok() { 3 } else { 2 }] {
        let node = mount.node(ROOT, name);
        for flags in [0, 1, 2] {
            assert_eq!(mount.open(node, flags), Err(Errno::ACCESS), "{name}");
        }
        assert_eq!(
            mount.create(ROOT, name, 0o644).err(),
            Some(Errno::ACCESS),
            "{name}"
        );
    }
    let make = |mode, rdev| {
        let wanted = fuse_mknod_in {
            mode,
            rdev,
            ..Default::default()
        };
        mount.send(
            opcode::MKNOD,
            ROOT,
            &with_text(&wanted, &format!("made{mode:o}")),
        )
    };
    for device in [0o020_644, 0o060_644, 0o040_755, 0o120_777, 0] {
        assert_eq!(make(device, 0x103), Err(Errno::PERM), "{device:o}");
    }
    assert!(make(0o010_644, 0).is_ok() && make(0o140_644, 0).is_ok());
}

#[test]
fn what_the_monitor_holds_has_bounds() {
    let mount = Mount::new("");
    fs::write(mount.host("file"), "").unwrap();
    let node = mount.node(ROOT, "file");
    let handles: Vec<_> = (0..100).map(|_| mount.open(node, 0)).collect();
    assert_eq!(handles.iter().filter(|fh| fh.is_ok()).count(), 64);
    assert_eq!(handles[99], Err(Errno::NFILE));
    assert_eq!(
        mount.create(ROOT, "one more", 0o644).err(),
        Some(Errno::NFILE)
    );
    assert!(!mount.host("one more").exists());
    for fh in handles.into_iter().flatten() {
        mount.release(fh).unwrap();
    }
    // More directories than there may be descriptors, each in the one before.
    let mut parent = ROOT;
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let mut chain = Vec::new();
    for _ in 0..300 {
        parent = mount.mkdir(parent, "d", 0o755).unwrap();
        chain.push(parent);
    }
    assert!(mount.getattr(parent).is_ok() && mount.getattr(chain[7]).is_ok());
    assert!(descriptors() < before + 150, "{}", descriptors());
    let nodes = mount.session.counts().0;
    let forget = fuse_forget_in { nlookup: u64::MAX };
    for node in chain.drain(..) {
        mount.send(opcode::FORGET, node, forget.as_bytes()).unwrap();
    }
    assert_eq!(mount.session.counts().0, nodes - 300);
    assert_eq!(mount.getattr(parent).err(), Some(Errno::STALE));
    // Nobody forgets the root.
    mount.send(opcode::FORGET, ROOT, forget.as_bytes()).unwrap();
    assert!(mount.getattr(ROOT).is_ok());
    for n in 0..20_000 {
        let made = mount.mkdir(ROOT, &format!("{n:0>200}"), 0o755);
        if made == Err(Errno::NOMEM) {
            assert!(n > 1000, "{n}");
            return;
        }
        made.unwrap();
    }
    panic!("no bound of nodes");
}

#[test]
fn nothing_is_served_before_init_and_everything_is_forgotten_at_the_next() {
    let mount = Mount::new("");
    let (node, fh) = mount.create(ROOT, "file", 0o644).unwrap();
    mount.send(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(mount.getattr(ROOT).err(), Some(Errno::IO));
    let init = |major, minor| {
        let wanted = fuse_init_in {
            major,
            minor,
            flags: FUSE_INIT_EXT,
            ..Default::default()
        };
        mount.send(opcode::INIT, 0, wanted.as_bytes())
    };
    assert_eq!(init(6, 40), Err(Errno::PROTO));
    assert_eq!(init(7, 30), Err(Errno::PROTO));
    assert_eq!(init(8, 0).unwrap()[..4], [7, 0, 0, 0]);
    assert_eq!(mount.getattr(ROOT).err(), Some(Errno::IO));
    init(7, 31).unwrap();
    assert!(mount.getattr(ROOT).is_ok());
    assert_eq!(mount.getattr(node).err(), Some(Errno::STALE));
    assert_eq!(mount.read(fh, 0, 1), Err(Errno::BADF));
}
