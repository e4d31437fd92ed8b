//! The program that the first process executes: the stub and nothing else, as a static ELF file.
//!
//! A process that executes a file begins with no memory but that file, a stack and the vDSO, whatever the monitor is made of, and none of the
//! C library's registrations with the kernel. That, and not a fork of the monitor, is why there is a file.

use crate::arch_stub::{STUB_SIZE, Stub};

const HEADER: usize = 64;
const SEGMENT: usize = 56;

/// An executable that has the stub at `at` and starts there.
pub(crate) fn image(stub: &Stub, at: u64) -> Vec<u8> {
    let mut file = Vec::new();
    // e_ident: ELF, 64 bits, little endian, version 1.
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    file.extend([0; 8]);
    // e_type EXEC, e_machine x86-64, e_version.
    file.extend(words16(&[2, 62]));
    file.extend(1u32.to_le_bytes());
    // e_entry, e_phoff, e_shoff.
    file.extend(words64(&[at, HEADER as u64, 0]));
    file.extend(0u32.to_le_bytes());
    file.extend(words16(&[HEADER as u16, SEGMENT as u16, 2, 0, 0, 0]));
    // PT_LOAD, readable and executable.
    file.extend([1u32, 5].map(u32::to_le_bytes).concat());
    file.extend(words64(&[
        STUB_SIZE, at, at, STUB_SIZE, STUB_SIZE, STUB_SIZE,
    ]));
    // PT_GNU_STACK, readable and writable: memory is not executable unless it says so.
    file.extend([0x6474_e551u32, 6].map(u32::to_le_bytes).concat());
    file.extend(words64(&[0, 0, 0, 0, 0, 16]));
    file.resize(STUB_SIZE as usize, 0);
    file.extend(stub.code);
    file.resize(2 * STUB_SIZE as usize, 0xcc);
    file
}

fn words16(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}
