//! What a guest does to files and directories of a share, and what the host sees of it.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use doppel_share::{Session, opcode};
use fuse_abi::linux::{
    FATTR_MODE, FATTR_MTIME, FATTR_SIZE, FATTR_UID, fuse_copy_file_range_in, fuse_link_in,
    fuse_mknod_in, fuse_open_in, fuse_open_out, fuse_rename2_in, fuse_setattr_in,
};
use rustix::io::Errno;
use support::{Mount, ROOT, read, read_in, text, with_text};
use zerocopy::IntoBytes;

const O_APPEND: i32 = 0o2000;

#[test]
fn files_are_made_written_read_appended_truncated_and_removed() {
    let mount = Mount::new("");
    let (node, fh) = mount.create(ROOT, "file", 0o640).unwrap();
    mount.write(fh, 3, b"hello", 0).unwrap();
    fs::write(mount.host("other"), "x").unwrap();
    assert_eq!(fs::read(mount.host("file")).unwrap(), b"\0\0\0hello");
    assert_eq!(mount.read(fh, 4, 100).unwrap(), b"ello");
    // What the host appends meanwhile is not written over.
    let mut host = fs::OpenOptions::new()
        .append(true)
        .open(mount.host("file"))
        .unwrap();
    std::io::Write::write_all(&mut host, b"+host").unwrap();
    mount.write(fh, 8, b"+guest", O_APPEND).unwrap();
    assert_eq!(
        fs::read(mount.host("file")).unwrap(),
        b"\0\0\0hello+host+guest"
    );
    let wanted = fuse_setattr_in {
        valid: FATTR_SIZE | FATTR_MODE | FATTR_MTIME,
        size: 4,
        mode: 0o604,
        mtime: 1000,
        mtimensec: 7,
        ..Default::default()
    };
    mount
        .send(opcode::SETATTR, node, wanted.as_bytes())
        .unwrap();
    let seen = fs::metadata(mount.host("file")).unwrap();
    assert_eq!((seen.len(), seen.permissions().mode() & 0o7777), (4, 0o604));
    assert_eq!((seen.mtime(), seen.mtime_nsec()), (1000, 7));
    mount.send(opcode::UNLINK, ROOT, &text("file")).unwrap();
    assert!(!mount.host("file").exists());
    // Open, it goes on without a name.
    assert_eq!(mount.getattr(node).unwrap().attr.size, 4);
    assert_eq!(mount.read(fh, 0, 9).unwrap().len(), 4);
    mount.release(fh).unwrap();
    assert_eq!(mount.read(fh, 0, 9), Err(Errno::BADF));
}

#[test]
fn modes_are_those_wanted_but_for_set_user_id() {
    let mount = Mount::new("");
    mount.create(ROOT, "all", 0o6777).unwrap();
    mount.mkdir(ROOT, "folder", 0o1777).unwrap();
    let mode = |name: &str| fs::metadata(mount.host(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("all"), mode("folder")), (0o777, 0o1777));
    fs::set_permissions(mount.host("all"), PermissionsExt::from_mode(0o4755)).unwrap();
    assert_eq!(mount.lookup(ROOT, "all").unwrap().attr.mode, 0o100_755);
}

#[test]
fn files_belong_to_the_user_and_are_shown_as_the_owners() {
    let mount = Mount::new(",owner=1000:100");
    let (node, _) = mount.create(ROOT, "file", 0o600).unwrap();
    let seen = fs::metadata(mount.host("file")).unwrap();
    let user = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    assert_eq!((seen.uid(), seen.gid()), user);
    let attr = mount.getattr(node).unwrap().attr;
    assert_eq!((attr.uid, attr.gid), (1000, 100));
    let chown = |uid| {
        let wanted = fuse_setattr_in {
            valid: FATTR_UID,
            uid,
            ..Default::default()
        };
        mount.send(opcode::SETATTR, node, wanted.as_bytes())
    };
    assert!(chown(1000).is_ok(), "nothing changes");
    assert_eq!(chown(0), Err(Errno::PERM));
}

#[test]
fn a_directory_of_a_thousand_is_read_in_pieces() {
    let mount = Mount::new("");
    for n in 0..1000 {
        fs::write(mount.host(&format!("file{n:04}")), "").unwrap();
    }
    for (code, fixed) in [(opcode::READDIR, 0), (opcode::READDIRPLUS, 128)] {
        let wanted = fuse_open_in::default();
        let opened = mount
            .send(opcode::OPENDIR, ROOT, wanted.as_bytes())
            .unwrap();
        let fh = read::<fuse_open_out>(&opened).fh;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let wanted = read_in(fh, offset, 4096);
            let answer = mount.send(code, ROOT, wanted.as_bytes()).unwrap();
            assert!(answer.len() <= 4096);
            if answer.is_empty() {
                break;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let dirent = &rest[fixed..];
                offset = read::<u64>(&dirent[8..]);
                let len = read::<u32>(&dirent[16..]) as usize;
                names.push(String::from_utf8(dirent[24..24 + len].to_vec()).unwrap());
                rest = &rest[fixed + (24 + len).next_multiple_of(8)..];
            }
        }
        names.sort();
        assert_eq!(names.len(), 1002);
        assert!(names[..2] == [".", ".."] && names[1001] == "file0999");
        mount.release(fh).unwrap();
    }
    assert_eq!(mount.session.counts(), (1000, 0), "each was looked up once");
}

#[test]
fn names_move_and_nodes_with_them() {
    let mount = Mount::new("");
    let folder = mount.mkdir(ROOT, "folder", 0o755).unwrap();
    let (a, _) = mount.create(folder, "a", 0o644).unwrap();
    let rename = |from: u64, to, flags, names: &str| {
        let wanted = fuse_rename2_in {
            newdir: to,
            flags,
            padding: 0,
        };
        mount.send(opcode::RENAME2, from, &with_text(&wanted, names))
    };
    rename(folder, ROOT, 0, "a\0b").unwrap();
    assert_eq!(mount.node(ROOT, "b"), a);
    mount.create(folder, "c", 0o644).unwrap();
    assert_eq!(rename(folder, ROOT, 1, "c\0b"), Err(Errno::EXIST));
    rename(folder, ROOT, 2, "c\0b").unwrap();
    assert_eq!(mount.node(folder, "c"), a);
    assert_eq!(
        rename(folder, ROOT, 4, "c\0b"),
        Err(Errno::INVAL),
        "whiteout"
    );
    let link = fuse_link_in { oldnodeid: a };
    mount
        .send(opcode::LINK, ROOT, &with_text(&link, "hard"))
        .unwrap();
    assert_eq!(mount.node(ROOT, "hard"), a);
    assert_eq!(mount.getattr(a).unwrap().attr.nlink, 2);
    assert_eq!(
        mount.send(opcode::RMDIR, ROOT, &text("folder")),
        Err(Errno::NOTEMPTY)
    );
    mount.send(opcode::UNLINK, folder, &text("c")).unwrap();
    mount.send(opcode::RMDIR, ROOT, &text("folder")).unwrap();
    assert_eq!(mount.getattr(a).unwrap().attr.nlink, 1);
}

#[test]
fn a_host_that_replaces_a_file_makes_the_old_node_stale() {
    let mount = Mount::with(
        "",
        doppel_share::Limits {
            descriptors: 0,
            ..support::SMALL
        },
    );
    fs::write(mount.host("file"), "old").unwrap();
    let node = mount.node(ROOT, "file");
    fs::write(mount.host("new"), "newer").unwrap();
    fs::rename(mount.host("new"), mount.host("file")).unwrap();
    assert_eq!(mount.getattr(node).err(), Some(Errno::STALE));
    assert_eq!(mount.open(node, 0), Err(Errno::STALE));
    assert_eq!(mount.lookup(ROOT, "file").unwrap().attr.size, 5);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let mount = Mount::new("");
    let ((_, from), (_, to)) = (
        mount.create(ROOT, "from", 0o644).unwrap(),
        mount.create(ROOT, "to", 0o644).unwrap(),
    );
    mount.write(from, 0, &[7; 10_000], 0).unwrap();
    let wanted = fuse_copy_file_range_in {
        fh_in: from,
        off_in: 1000,
        fh_out: to,
        off_out: 10,
        len: u64::MAX,
        ..Default::default()
    };
    let answer = mount
        .send(opcode::COPY_FILE_RANGE, ROOT, wanted.as_bytes())
        .unwrap();
    assert_eq!(read::<u32>(&answer), 9000);
    let all = fs::read(mount.host("to")).unwrap();
    assert_eq!((all.len(), all[9], all[10]), (9010, 0, 7));
}

#[test]
fn a_read_only_share_changes_nothing() {
    let mount = Mount::new(",ro");
    fs::write(mount.host("file"), "text").unwrap();
    let node = mount.node(ROOT, "file");
    let fh = mount.open(node, 0).unwrap();
    assert_eq!(mount.read(fh, 0, 100).unwrap(), b"text");
    const O_TRUNC: i32 = 0o1000;
    for flags in [1, 2, O_TRUNC] {
        assert_eq!(mount.open(node, flags), Err(Errno::ROFS));
    }
    let link = fuse_link_in { oldnodeid: node };
    let fifo = fuse_mknod_in {
        mode: 0o010_644,
        ..Default::default()
    };
    let changes = [
        (
            opcode::SETATTR,
            ROOT,
            fuse_setattr_in::default().as_bytes().to_vec(),
        ),
        (opcode::UNLINK, ROOT, text("file")),
        (opcode::RMDIR, ROOT, text("file")),
        (opcode::SYMLINK, ROOT, text("s\0x")),
        (opcode::LINK, ROOT, with_text(&link, "hard")),
        (opcode::MKNOD, ROOT, with_text(&fifo, "fifo")),
        (opcode::RENAME, ROOT, with_text(&ROOT, "file\0b")),
        (opcode::RENAME2, ROOT, with_text(&[ROOT, 0], "file\0b")),
        (opcode::FALLOCATE, ROOT, vec![0; 32]),
        (opcode::COPY_FILE_RANGE, ROOT, vec![0; 56]),
    ];
    for (code, node, arguments) in changes {
        assert_eq!(
            mount.send(code, node, &arguments),
            Err(Errno::ROFS),
            "{code}"
        );
    }
    assert_eq!(mount.create(ROOT, "new", 0o644).err(), Some(Errno::ROFS));
    assert_eq!(mount.mkdir(ROOT, "new", 0o755), Err(Errno::ROFS));
    assert_eq!(mount.write(fh, 0, b"x", 0), Err(Errno::BADF));
    assert_eq!(fs::read_dir(mount.host("")).unwrap().count(), 1);
}

#[test]
fn a_saved_session_goes_on_in_another() {
    let mount = Mount::new("");
    let folder = mount.mkdir(ROOT, "folder", 0o755).unwrap();
    let (node, fh) = mount.create(folder, "file", 0o644).unwrap();
    let (gone, lost) = mount.create(folder, "gone", 0o644).unwrap();
    mount.write(fh, 0, b"text", 0).unwrap();
    let state = mount.session.save();
    fs::remove_file(mount.host("folder/gone")).unwrap();
    let session = Session::restore(mount.share(), &state).unwrap();
    let mount = Mount { session, ..mount };
    assert_eq!(mount.read(fh, 1, 9).unwrap(), b"ext");
    assert_eq!(mount.getattr(node).unwrap().attr.size, 4);
    assert_eq!(mount.read(lost, 0, 1), Err(Errno::BADF));
    assert_eq!(mount.getattr(gone).err(), Some(Errno::STALE));
    let mut bad = state.clone();
    bad.nodes[0].name = b"..".to_vec();
    assert!(Session::restore(mount.share(), &bad).is_none());
    bad = state;
    bad.nodes[0].id = 1;
    assert!(Session::restore(mount.share(), &bad).is_none());
}
