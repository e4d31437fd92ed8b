//! Kernels and initial RAM disks: bzImage, ELF with a PVH note, Multiboot 1.

use std::path::PathBuf;

use doppel_machine::boot::{self, BootFile, BootSource};
use doppel_memory::GuestRam;

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "kernel",
    longest: 16 << 10,
    words: &[
        b"HdrS",
        b"\x55\xaa",
        b"\x7fELF\x02\x01\x01",
        b"\x7fELF\x01\x01\x01",
        b"\x02\xb0\xad\x1b",
        b"Xen\0",
        b"\x12\0\0\0",
        b"\x04\0\0\0\x04\0\0\0",
        b"\x0f\x02",
        b"\x3e\0",
    ],
    seeds,
    open,
};

const RAM: u64 = 32 << 20;
/// Where a table may stand that the loaders only pass on.
const RSDP: u64 = 0xe_0000;

fn open() -> anyhow::Result<Take> {
    let ram = GuestRam::new(RAM)?;
    Ok(Box::new(move |bytes| {
        let mut choices = Choices::new(bytes);
        let file = |name: &str, bytes: &[u8]| BootFile::Memory(PathBuf::from(name), bytes.to_vec());
        let (form, cmdline) = (choices.byte(), choices.byte());
        let initrd =
            (form & 1 != 0).then(|| file("initrd", &vec![0x5a; usize::from(cmdline) << 4]));
        let modules = (0..form >> 1 & 3).map(|n| (file("module", &[n; 100]), "words".to_owned()));
        let source = BootSource {
            modules: modules.collect(),
            initrd,
            cmdline: "x".repeat(cmdline.into()),
            kernel: file("kernel", choices.rest()),
        };
        // Loaded or refused: both are right.
        let _ = boot::load(&ram, &source, RSDP);
    }))
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn seeds() -> Vec<Vec<u8>> {
    let kernels = [bzimage(), elf(), multiboot()];
    let with = |kernel: &Vec<u8>, form: u8| [vec![form, 7], kernel.clone()].concat();
    let forms = kernels
        .iter()
        .flat_map(|k| [0, 1, 7].map(|form| with(k, form)));
    forms.collect()
}

/// One setup sector, and a relocatable kernel of 64 bits (Documentation/arch/x86/boot.rst).
fn bzimage() -> Vec<u8> {
    let mut b = vec![0; 1024 + 512];
    b[0x1f1] = 1;
    put(&mut b, 0x1f4, &32u32.to_le_bytes());
    put(&mut b, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut b, 0x202, b"HdrS");
    put(&mut b, 0x206, &0x020fu16.to_le_bytes());
    b[0x211] = 1;
    put(&mut b, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut b, 0x230, &(2u32 << 20).to_le_bytes());
    b[0x234] = 1;
    put(&mut b, 0x236, &1u16.to_le_bytes());
    put(&mut b, 0x238, &2047u32.to_le_bytes());
    put(&mut b, 0x258, &(16u64 << 20).to_le_bytes());
    put(&mut b, 0x260, &(4u32 << 20).to_le_bytes());
    b
}

/// A segment at 1 MiB and the note that says where PVH enters.
fn elf() -> Vec<u8> {
    let mut b = vec![0; 0x200];
    put(&mut b, 0, b"\x7fELF\x02\x01\x01");
    put(&mut b, 16, &[2, 0, 0x3e, 0, 1]);
    put(&mut b, 24, &(1u64 << 20).to_le_bytes());
    put(&mut b, 32, &64u64.to_le_bytes());
    put(&mut b, 52, &[64, 0, 56, 0, 2]);
    let segment = |kind: u32, offset: u64, address: u64, len: u64| {
        let words = [offset, address, address, len, len, 4096];
        let mut s = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
        words.iter().for_each(|w| s.extend(w.to_le_bytes()));
        s
    };
    put(&mut b, 64, &segment(1, 0x180, 1 << 20, 0x80));
    put(&mut b, 120, &segment(4, 0x100, 0, 20));
    put(&mut b, 0x100, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut b, 0x10c, b"Xen\0");
    put(&mut b, 0x110, &(1u32 << 20).to_le_bytes());
    b
}

/// A Multiboot header with addresses of its own before the code.
fn multiboot() -> Vec<u8> {
    let mut b = vec![0; 0x100];
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16 | 3);
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let load = 1u32 << 20;
    let words = [
        magic,
        flags,
        sum,
        load,
        load,
        load + 0x100,
        load + 0x200,
        load + 0x40,
    ];
    for (n, word) in words.iter().enumerate() {
        put(&mut b, 4 * n, &word.to_le_bytes());
    }
    b
}
