//! Reference counts of an image that is to be written to: its header and tables must be counted.
//!
//! A cluster whose count is 0 is free, and the next write takes it. Where that is the header, or a table, the image is lost; and where the block
//! of counts for the header is missing, the crate that writes images looks for a place for one without end. QEMU's `check` says of such an image
//! that it is corrupt.
//! Source: QEMU docs/interop/qcow2.rst, "Host cluster management".

use std::io;

use super::header::field;

/// Bits of an entry of the refcount table that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Two to this power are the bits of a count in version 2.
const USUAL_ORDER: u64 = 4;

/// Reads at an offset; what lies beyond the file is zeros.
pub(super) type Read<'a> = dyn Fn(u64, &mut [u8]) -> io::Result<()> + 'a;

/// The table of an image.
struct Refcounts<'a> {
    read: &'a Read<'a>,
    cluster: u64,
    table: u64,
    /// Entries of the table.
    len: u64,
    bits: u64,
    /// The block that was read last, and its region.
    block: Option<(u64, Vec<u8>)>,
}

/// Checks the image whose header, which was found to be right, begins with `head`; a sentence says what is wrong.
pub(super) fn check(head: &[u8], read: &Read<'_>) -> Result<(), String> {
    let cluster = 1 << field(head, 20, 4)?;
    let order = match field(head, 4, 4)? {
        2 => USUAL_ORDER,
        _ => field(head, 96, 4)?,
    };
    if order > 6 {
        return Err(format!("counts of 2^{order} bits are not allowed"));
    }
    let (table, table_len) = (field(head, 48, 8)?, field(head, 56, 4)? * cluster);
    let (l1, l1_len) = (field(head, 40, 8)?, field(head, 36, 4)? * 8);
    let mut counts = Refcounts {
        read,
        cluster,
        table,
        len: table_len / 8,
        bits: 1 << order,
        block: None,
    };
    for (name, offset, len) in [
        ("header", 0, 1),
        ("L1 table", l1, l1_len),
        ("refcount table", table, table_len),
    ] {
        for n in offset / cluster..(offset + len).div_ceil(cluster) {
            if !counts.is_counted(n)? {
                return Err(format!(
                    "its {name} is not counted as used, and the next write would destroy it; repair it: qemu-img check -r all"
                ));
            }
        }
    }
    Ok(())
}

impl Refcounts<'_> {
    fn is_counted(&mut self, cluster: u64) -> Result<bool, String> {
        let per_block = self.cluster * 8 / self.bits;
        let (region, n) = (cluster / per_block, cluster % per_block);
        if self.block.as_ref().is_none_or(|(at, _)| *at != region) {
            self.block = Some((region, self.load(region)?));
        }
        let Some((_, block)) = &self.block else {
            return Ok(false);
        };
        let (first, len) = ((n * self.bits / 8) as usize, self.bits.div_ceil(8) as usize);
        let mask = match self.bits {
            bits @ 1..8 => ((1 << bits) - 1) << (n * bits % 8),
            _ => 0xff,
        };
        let bytes = block.get(first..first + len).unwrap_or(&[]);
        Ok(bytes.iter().any(|byte| byte & mask != 0))
    }

    /// The counts of a region; none where it has no block.
    fn load(&self, region: u64) -> Result<Vec<u8>, String> {
        let unreadable = |error: io::Error| error.to_string();
        let mut entry = [0; 8];
        if region < self.len {
            (self.read)(self.table + 8 * region, &mut entry).map_err(unreadable)?;
        }
        let offset = u64::from_be_bytes(entry) & OFFSET;
        if offset == 0 || !offset.is_multiple_of(self.cluster) {
            return Ok(Vec::new());
        }
        let mut block = vec![0; self.cluster as usize];
        (self.read)(offset, &mut block).map_err(unreadable)?;
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 512;

    /// Header, L1 table, refcount table, its block; counts of `1 << order` bits.
    fn image(order: u32) -> Vec<u8> {
        let mut b = vec![0; 4 * CLUSTER];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &9u32.to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &512u64.to_be_bytes());
        put(48, &1024u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &order.to_be_bytes());
        put(2 * CLUSTER, &(3 * CLUSTER as u64).to_be_bytes());
        for n in 0..4 {
            count(&mut b, order, n, true);
        }
        b
    }

    fn count(image: &mut [u8], order: u32, n: usize, used: bool) {
        let bits = 1 << order;
        let last_bit = if bits < 8 {
            n * bits
        } else {
            n * bits + bits - 8
        };
        let byte = &mut image[3 * CLUSTER + last_bit / 8];
        *byte &= !(1 << (last_bit % 8));
        *byte |= u8::from(used) << (last_bit % 8);
    }

    fn checked(image: &[u8]) -> Result<(), String> {
        check(&image[..104], &|at, into| {
            let at = at as usize;
            into.copy_from_slice(&image[at..at + into.len()]);
            Ok(())
        })
    }

    #[test]
    fn a_header_and_tables_that_are_counted_pass_and_each_that_is_not_is_named() {
        for order in 0..=6 {
            assert_eq!(checked(&image(order)), Ok(()), "{order}");
            for (n, name) in [(0, "header"), (1, "L1 table"), (2, "refcount table")] {
                let mut image = image(order);
                count(&mut image, order, n, false);
                let error = checked(&image).unwrap_err();
                assert!(error.contains(name) && error.contains("-r all"), "{error}");
            }
        }
        assert!(checked(&image(7)).is_err());
    }

    #[test]
    fn a_missing_block_of_counts_is_an_error() {
        for entry in [0u64, 0x1ff, 1 << 63] {
            let mut image = image(4);
            image[2 * CLUSTER..2 * CLUSTER + 8].copy_from_slice(&entry.to_be_bytes());
            assert!(checked(&image).unwrap_err().contains("header"));
        }
    }
}
