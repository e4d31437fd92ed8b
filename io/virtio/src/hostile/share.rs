//! A shared directory for hostile drivers, and what they ask of it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use doppel_share::{HEADER_LEN, Limits, Share, ShareSpec, opcode};

use super::Random;
use crate::{Fs, VirtioDevice};

/// A shared directory with something beside it that nobody may touch.
pub(super) struct Folder(PathBuf);

const SECRET: &[u8] = b"secret";

impl Folder {
    pub(super) fn new(seed: u64) -> io::Result<Self> {
        let name = format!("doppel-hostile-{}-{seed}", std::process::id());
        let folder = Folder(std::env::temp_dir().join(name));
        fs::create_dir_all(folder.0.join("share/folder"))?;
        fs::write(folder.0.join("secret"), SECRET)?;
        fs::write(folder.0.join("share/file"), "content")?;
        std::os::unix::fs::symlink("../secret", folder.0.join("share/link"))?;
        Ok(folder)
    }

    pub(super) fn device(&self) -> Box<dyn VirtioDevice> {
        let spec = ShareSpec {
            tag: "hostile".to_owned(),
            directory: self.0.join("share"),
            read_only: false,
            owner: (0, 0),
        };
        let limits = Limits {
            open: 8,
            descriptors: 4,
            node_bytes: 8 << 10,
        };
        let share = Share::open(&spec, limits).expect("the folder is there");
        Box::new(Fs::new(Arc::new(share)))
    }

    pub(super) fn is_as_it_was(&self) -> bool {
        let beside = fs::read_dir(&self.0).map_or(0, |entries| entries.count());
        beside == 2 && fs::read(self.0.join("secret")).is_ok_and(|now| now == SECRET)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A request of FUSE that starts a session: protocol 7.38.
pub(super) fn fuse_init() -> Vec<u8> {
    let mut message = vec![0; HEADER_LEN + 64];
    message[4] = opcode::INIT as u8;
    message[HEADER_LEN] = 7;
    message[HEADER_LEN + 4] = 38;
    message
}

/// A request of FUSE, seldom a sensible one.
pub(super) fn fuse_message(random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        return fuse_init();
    }
    let mut message = vec![0; HEADER_LEN];
    message[4] = match random.below(53) as u32 {
        // These the host would feel: gigabytes set aside, everything written to its disks.
        opcode::FALLOCATE | opcode::SYNCFS => opcode::LOOKUP,
        code => code,
    } as u8;
    let node = random.one(&[1, 1, 2, 3, 4, 5, u64::MAX]);
    message[16..24].copy_from_slice(&node.to_le_bytes());
    // Arguments of one to eleven words: handles, sizes, flags, whatever they are taken for.
    for _ in 0..random.below(11) {
        let word = match random.below(3) {
            0 => random.value(),
            1 => random.below(9),
            _ => random.below(1 << 12) << 32 | random.below(512),
        };
        message.extend(word.to_le_bytes());
    }
    for _ in 0..2 {
        let name = random.one(&[
            "file",
            "folder",
            "link",
            "..",
            ".",
            "",
            "../secret",
            "folder/../../secret",
            "new",
            "newer",
            "secret",
        ]);
        message.extend(name.as_bytes());
        message.push(0);
    }
    message
}
