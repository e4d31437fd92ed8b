//! Reference counts of an image that is to be written to: its header and tables must be counted, and what is counted must be in the file.
//!
//! A cluster whose count is 0 is free, and the next write takes it. Where that is the header, or a table (of any level, or of counts), the image is lost; and where the block
//! of counts for the header is missing, the crate that writes images looks for a place for one without end. QEMU's `check` says of such an image
//! that it is corrupt.
//!
//! The crate looks for a free cluster one cluster after the other, from the first one on and with the allocator locked: a tenth of a second for a
//! million. In an image that programs made, what is counted ends with the file. One of 34 MiB that names a block of counts 4 million times has 2^40 clusters to
//! look at, so each block is in the file, is named once, hardly any are about clusters that the file does not have, and there is a bound to all, since
//! files may be sparse.
//!
//! Source: QEMU docs/interop/qcow2.rst, "Host cluster management".

use std::io;

use super::header::field;

/// Bits of an entry of the refcount table that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bytes of the refcount table that are read at a time.
const PIECE: u64 = 64 << 10;
/// Clusters for which there may be counts: a file of 64 TiB with clusters of the usual size.
const COUNTED_MAX: u64 = 1 << 30;
/// Those of them that are beyond the end of the file. Who is killed leaves counts for clusters that were not written yet; blocks are whole, and the
/// largest is about so many clusters.
const BEYOND_MAX: u64 = 1 << 24;
/// Two to this power are the bits of a count in version 2.
const USUAL_ORDER: u64 = 4;

const REPAIR: &str = "repair it: qemu-img check -r all";
const CONVERT: &str = "convert it: qemu-img convert -O qcow2";

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

/// Checks the image in a file of `file_len` bytes whose header, which was found to be right, begins with `head`; a sentence says what is wrong.
pub(super) fn check(head: &[u8], file_len: u64, read: &Read<'_>) -> Result<(), String> {
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
                return Err(uncounted(&format!("its {name}")));
            }
        }
    }
    let blocks = counts.check_blocks(file_len)?;
    counts.check_counted("a block of counts", &blocks)?;
    let tables = counts.tables_of_l1(l1, l1_len)?;
    counts.check_counted("a table of its second level", &tables)
}

fn uncounted(name: &str) -> String {
    format!("{name} is not counted as used, and the next write would destroy it; {REPAIR}")
}

impl Refcounts<'_> {
    /// Clusters that a block is about.
    fn per_block(&self) -> u64 {
        self.cluster * 8 / self.bits
    }

    /// Where the L1 table has tables, in their order.
    fn tables_of_l1(&self, l1: u64, len: u64) -> Result<Vec<u64>, String> {
        let mut tables = Vec::new();
        for at in (0..len).step_by(PIECE as usize) {
            let mut piece = vec![0; PIECE.min(len - at) as usize];
            (self.read)(l1 + at, &mut piece).map_err(|error| error.to_string())?;
            let entries = piece.as_chunks().0.iter();
            let places = entries.map(|entry| u64::from_be_bytes(*entry) & OFFSET);
            tables.extend(places.filter(|place| *place != 0));
        }
        // Those of one block of counts come one after the other.
        tables.sort_unstable();
        Ok(tables)
    }

    /// Checks that clusters at these places are counted.
    fn check_counted(&mut self, name: &str, places: &[u64]) -> Result<(), String> {
        for place in places {
            if !self.is_counted(place / self.cluster)? {
                return Err(uncounted(name));
            }
        }
        Ok(())
    }

    /// Says where the blocks are, in their order.
    fn check_blocks(&self, file_len: u64) -> Result<Vec<u64>, String> {
        let end = file_len.div_ceil(self.cluster).div_ceil(self.per_block());
        let (mut blocks, mut beyond) = (Vec::new(), 0);
        for at in (0..self.len * 8).step_by(PIECE as usize) {
            let mut piece = vec![0; PIECE.min(self.len * 8 - at) as usize];
            (self.read)(self.table + at, &mut piece).map_err(|error| error.to_string())?;
            for (region, entry) in (at / 8..).zip(piece.as_chunks().0) {
                let block = u64::from_be_bytes(*entry);
                if block != 0 {
                    self.check_place(block, file_len)?;
                    beyond += u64::from(region >= end);
                    blocks.push(block);
                }
            }
        }
        blocks.sort_unstable();
        if !blocks.is_sorted_by(|a, b| a < b) {
            return Err(format!("its refcount table names a block twice; {REPAIR}"));
        }
        if beyond * self.per_block() > BEYOND_MAX {
            return Err(format!(
                "it counts clusters far beyond the end of its file; {CONVERT}"
            ));
        }
        match blocks.len() as u64 * self.per_block() > COUNTED_MAX {
            true => Err(format!(
                "it has too many clusters; {CONVERT} -o cluster_size=2M"
            )),
            false => Ok(blocks),
        }
    }

    fn check_place(&self, block: u64, file_len: u64) -> Result<(), String> {
        let what = match block {
            _ if !block.is_multiple_of(self.cluster) => "in the wrong place",
            _ if block >= file_len => "beyond the end of the file",
            _ => return Ok(()),
        };
        Err(format!("its refcount table names a block {what}; {REPAIR}"))
    }

    fn is_counted(&mut self, cluster: u64) -> Result<bool, String> {
        let per_block = self.per_block();
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
        check(&image[..104], image.len() as u64, &|at, into| {
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
    fn tables_and_blocks_that_are_not_counted_are_an_error() {
        let mut image = image(4);
        count(&mut image, 4, 3, false);
        assert!(checked(&image).unwrap_err().contains("a block of counts"));
        count(&mut image, 4, 3, true);
        // The second entry of the L1 table, in whose cluster there is room.
        let table = (5 * CLUSTER as u64) | 1 << 63;
        image[36..40].copy_from_slice(&2u32.to_be_bytes());
        image[CLUSTER + 8..CLUSTER + 16].copy_from_slice(&table.to_be_bytes());
        assert!(checked(&image).unwrap_err().contains("second level"));
        count(&mut image, 4, 5, true);
        assert_eq!(checked(&image), Ok(()));
    }

    #[test]
    fn a_missing_block_of_counts_is_an_error() {
        for entry in [0u64, 0x1ff, 1 << 63] {
            let mut image = image(4);
            image[2 * CLUSTER..2 * CLUSTER + 8].copy_from_slice(&entry.to_be_bytes());
            assert!(checked(&image).unwrap_err().contains("header"));
        }
    }

    #[test]
    fn blocks_are_in_the_file_and_are_named_once() {
        for (entry, says) in [
            (3 * CLUSTER as u64, "twice"),
            (4 * CLUSTER as u64, "beyond the end"),
            (1 << 56, "beyond the end"),
            (CLUSTER as u64 + 8, "wrong place"),
        ] {
            for n in [1, 63] {
                let mut image = image(4);
                let at = 2 * CLUSTER + 8 * n;
                image[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                let error = checked(&image).unwrap_err();
                assert!(error.contains(says) && error.contains("-r all"), "{error}");
            }
        }
    }

    /// A sparse file may have as many clusters as it likes.
    #[test]
    fn clusters_that_are_counted_have_a_bound() {
        let mut head = image(0);
        head[20..24].copy_from_slice(&16u32.to_be_bytes());
        head[40..48].copy_from_slice(&(1u64 << 16).to_be_bytes());
        head[48..56].copy_from_slice(&(2u64 << 16).to_be_bytes());
        let with = |blocks: u64| {
            check(&head[..104], 1 << 50, &|at, into| {
                // The L1 table has nothing.
                into.fill(if at >> 16 == 1 { 0 } else { 0xff });
                for (entry, n) in into.chunks_mut(8).zip(at / 8..) {
                    if at >> 16 == 2 {
                        let n = n % 8192;
                        let block = if n < blocks { (3 + n) << 16 } else { 0 };
                        entry.copy_from_slice(&block.to_be_bytes());
                    }
                }
                Ok(())
            })
        };
        assert_eq!(with(COUNTED_MAX >> 19), Ok(()));
        let error = with((COUNTED_MAX >> 19) + 1).unwrap_err();
        assert!(error.contains("too many"), "{error}");
    }
}
