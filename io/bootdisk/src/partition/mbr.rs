//! The master boot record: four primary partitions, one of which may be a chain of logical ones.
//!
//! A file system on a bare disk can have the same signature in its first sector (FAT has), so a table counts only where its entries
//! make sense.

use super::{Partition, SECTOR};
use crate::reader::Reader;

/// Logical partitions that are looked at; the chain may be a circle.
const LOGICAL_MAX: u32 = 60;
const EXTENDED: &[u8] = &[0x05, 0x0f, 0x85];

#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

/// The partitions of the table, if there is one.
pub fn read(reader: &Reader) -> Option<Vec<Partition>> {
    let (signature, entries) = table(reader, 0)?;
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        if EXTENDED.contains(&entry.kind) {
            logical(reader, signature, entry, &mut partitions);
        } else if entry.kind != 0 {
            partitions.push(partition(signature, number, 0, entry));
        }
    }
    (!partitions.is_empty()).then_some(partitions)
}

fn logical(reader: &Reader, signature: u32, extended: Entry, to: &mut Vec<Partition>) {
    let mut at = extended.start;
    for number in 5..5 + LOGICAL_MAX {
        let Some((_, [entry, next, ..])) = table(reader, at) else {
            return;
        };
        if entry.kind != 0 {
            to.push(partition(signature, number, at, entry));
        }
        if !EXTENDED.contains(&next.kind) {
            return;
        }
        at = extended.start + next.start;
    }
}

fn partition(signature: u32, number: u32, base: u64, entry: Entry) -> Partition {
    Partition {
        number: Some(number),
        start: (base + entry.start) * SECTOR,
        len: entry.sectors * SECTOR,
        uuid: Some(format!("{signature:08x}-{number:02x}")),
    }
}

/// The disk's signature and the four entries of the table in a sector.
fn table(reader: &Reader, sector: u64) -> Option<(u32, [Entry; 4])> {
    let bytes: [u8; SECTOR as usize] = reader.bytes(sector.checked_mul(SECTOR)?).ok()?;
    if bytes[510..] != [0x55, 0xaa] {
        return None;
    }
    let number =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let entries = [446, 462, 478, 494].map(|at| Entry {
        kind: bytes[at + 4],
        start: u64::from(number(at + 8)),
        sectors: u64::from(number(at + 12)),
    });
    let flags = [446, 462, 478, 494].map(|at| bytes[at]);
    let sensible = flags.iter().all(|flag| flag & 0x7f == 0)
        && (entries.iter()).all(|e| (e.kind == 0) == (e.sectors == 0));
    sensible.then_some((number(440), entries))
}
