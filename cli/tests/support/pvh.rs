//! Kernels with a PVH entry (Xen, docs/misc/pvh.pandoc).

/// Where the code is, and begins.
pub const LOAD: u32 = 1 << 20;

/// Code that is entered in 32-bit protected mode, as an ELF file.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x200];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(32, &64u64.to_le_bytes());
    put(54, &[56, 0, 2]);
    let (len, load) = (code.len() as u64, u64::from(LOAD));
    // Kind, offset, physical address, bytes in the file and in memory.
    for (n, (kind, offset, paddr, len)) in [(4u32, 0x100u64, 0, 20), (1, 0x200, load, len)]
        .into_iter()
        .enumerate()
    {
        let at = 64 + 56 * n;
        put(at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, paddr), (32, len), (40, len)] {
            put(at + field, &value.to_le_bytes());
        }
    }
    put(0x100, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x10c, b"Xen\0");
    put(0x110, &LOAD.to_le_bytes());
    file.extend(code);
    file
}
