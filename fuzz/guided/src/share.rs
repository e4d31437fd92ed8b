//! FUSE requests to a shared directory, one after the other.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use doppel_memory::{GuestRam, GuestSlice};
use doppel_share::{Call, Header, Limits, Session, Share, opcode};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "share",
    longest: 4 << 10,
    words: &[
        b"file\0",
        b"..\0",
        b"../secret\0",
        b"link\0",
        b"up\0",
        b".\0",
        b"a/b\0",
        b"user.x\0",
        b"\xa4\x81\0\0",
        b"\x02\0\0\0\x42\0\0\0",
    ],
    seeds,
    open,
};

const LIMITS: Limits = Limits {
    open: 32,
    descriptors: 16,
    node_bytes: 1 << 20,
};

fn open() -> anyhow::Result<Take> {
    let ram = GuestRam::new(4 << 20)?;
    Ok(Box::new(move |bytes| {
        let folder = tempfile::tempdir().expect("a folder");
        let shared = folder.path().join("share");
        prepare(folder.path(), &shared);
        serve(&ram, &shared, bytes);
        let secret = fs::read(folder.path().join("secret")).expect("it is still there");
        assert_eq!(secret, b"secret");
        let beside = fs::read_dir(folder.path()).expect("the folder").count();
        assert_eq!(beside, 2, "something lies beside the share");
    }))
}

fn prepare(beside: &Path, shared: &Path) {
    let done = || -> std::io::Result<()> {
        fs::create_dir(shared)?;
        fs::write(beside.join("secret"), "secret")?;
        fs::write(shared.join("file"), "content")?;
        std::os::unix::fs::symlink("../secret", shared.join("link"))?;
        std::os::unix::fs::symlink("..", shared.join("up"))
    };
    done().expect("a directory to share");
}

fn serve(ram: &GuestRam, shared: &Path, bytes: &[u8]) {
    let spec = format!("t={}", shared.display()).parse().expect("a share");
    let share = Share::open(&spec, LIMITS).expect("the share");
    let session = Session::new(Arc::new(share)).expect("a session");
    let slices = |at: u64, len: u64| -> Vec<GuestSlice<'_>> {
        let slice = ram.view().get_slice(GuestAddress(at), len as usize);
        vec![slice.expect("RAM")]
    };
    // FUSE_INIT: version 7.37, every flag.
    let init = [7u32, 37, 1 << 17, u32::MAX].map(u32::to_le_bytes).concat();
    let mut choices = Choices::new(bytes);
    let mut next = Some((opcode::INIT, 0, &init[..], 0, 4096));
    while let Some((opcode, node, arguments, data, room)) = next {
        let call = Call {
            header: Header {
                opcode,
                unique: 0,
                node,
            },
            arguments,
            data: &slices(0x1000, data),
            room: &slices(0x10_0000, room),
            may_wait: false,
        };
        // Carried out or refused.
        let _ = session.call(&call);
        next = (!choices.is_empty()).then(|| request(&mut choices));
    }
    let (_, handles) = session.counts();
    assert!(handles <= LIMITS.open);
}

fn request<'a>(choices: &mut Choices<'a>) -> (u32, u64, &'a [u8], u64, u64) {
    let code = match choices.byte().into() {
        // The host would feel these.
        opcode::FALLOCATE | opcode::SYNCFS => opcode::LOOKUP,
        code => code,
    };
    let form = choices.byte();
    let node = match form & 0xc0 {
        0xc0 => choices.word(),
        _ => 1 + u64::from(form >> 4 & 3),
    };
    let (data, room) = (form & 3, form >> 2 & 3);
    (
        code,
        node,
        choices.piece(),
        2048 * u64::from(data),
        1024 * u64::from(room),
    )
}

fn seeds() -> Vec<Vec<u8>> {
    let request = |code: u32, form: u8, arguments: &[u8]| {
        let len = (arguments.len() as u16).to_le_bytes();
        [&[code as u8, form], &len[..], arguments].concat()
    };
    let words = |words: &[u64], name: &str| {
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.extend(name.bytes());
        bytes.push(0);
        bytes
    };
    let all = [
        request(opcode::LOOKUP, 0x0c, &words(&[], "file")),
        request(opcode::LOOKUP, 0x0c, &words(&[], "..")),
        request(opcode::MKDIR, 0x0c, &words(&[0o755], "folder")),
        request(
            opcode::CREATE,
            0x0c,
            &words(&[2 | 0o100_644 << 32, 0], "new"),
        ),
        request(opcode::WRITE, 0x0d, &words(&[0, 0, 2048, 0, 0], "")),
        request(opcode::READ, 0x0c, &words(&[0, 0, 1024, 0, 0], "")),
        request(opcode::SYMLINK, 0x0c, b"name\0../secret\0"),
        request(opcode::RENAME, 0x0c, b"\x01\0\0\0\0\0\0\0file\0other\0"),
        request(opcode::UNLINK, 0x0c, &words(&[], "file")),
    ];
    let mut seeds = all.to_vec();
    seeds.push(all.concat());
    seeds
}
