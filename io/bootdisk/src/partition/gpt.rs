//! The GUID partition table (UEFI Specification 2.10, section 5): read, and made for new images.

use crc32fast::hash as crc32;

use super::{Partition, SECTOR};
use crate::reader::Reader;

const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_LEN: usize = 92;
const ENTRY_LEN: usize = 128;
const ENTRIES: u32 = 128;
/// Sectors of the table of entries.
const TABLE_SECTORS: u64 = ENTRIES as u64 * ENTRY_LEN as u64 / SECTOR;
/// Entries that are looked at in a table of whatever size.
const ENTRIES_MAX: u32 = 1024;
/// Where partitions of new images begin and end: MiB, as every tool has it.
pub const ALIGNMENT: u64 = 1 << 20;

/// "Root partition (x86-64)" of the Discoverable Partitions Specification.
pub const ROOT_X86_64: Guid = Guid([
    0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09,
]);

/// A GUID as it stands on disk: the first three groups little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

impl std::fmt::Display for Guid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let b = &self.0;
        let groups: [&[usize]; 5] = [
            &[3, 2, 1, 0],
            &[5, 4],
            &[7, 6],
            &[8, 9],
            &[10, 11, 12, 13, 14, 15],
        ];
        for (n, group) in groups.iter().enumerate() {
            f.write_str(if n == 0 { "" } else { "-" })?;
            group.iter().try_for_each(|i| write!(f, "{:02x}", b[*i]))?;
        }
        Ok(())
    }
}

/// The partitions of the table at the start of the disk, else of the one at its end.
pub fn read(reader: &Reader) -> Option<Vec<Partition>> {
    let last = (reader.len() / SECTOR).checked_sub(1)?;
    read_at(reader, 1).or_else(|| read_at(reader, last))
}

fn read_at(reader: &Reader, sector: u64) -> Option<Vec<Partition>> {
    let mut header: [u8; HEADER_LEN] = reader.bytes(sector.checked_mul(SECTOR)?).ok()?;
    let sum = number(&header, 16, 4);
    header[16..20].fill(0);
    if !header.starts_with(SIGNATURE) || u64::from(crc32(&header)) != sum {
        return None;
    }
    let table = number(&header, 72, 8).checked_mul(SECTOR)?;
    let count = (number(&header, 80, 4) as u32).min(ENTRIES_MAX);
    let entry_len = number(&header, 84, 4);
    if !(ENTRY_LEN as u64..=4096).contains(&entry_len) {
        return None;
    }
    let entries = (0..count).filter_map(|index| {
        let at = table.checked_add(u64::from(index) * entry_len)?;
        let entry: [u8; ENTRY_LEN] = reader.bytes(at).ok()?;
        partition(index + 1, &entry)
    });
    Some(entries.collect())
}

fn partition(index: u32, entry: &[u8; ENTRY_LEN]) -> Option<Partition> {
    if entry[..16] == [0; 16] {
        return None;
    }
    let (first, last) = (number(entry, 32, 8), number(entry, 40, 8));
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let mut guid = Guid([0; 16]);
    guid.0.copy_from_slice(&entry[16..32]);
    Some(Partition {
        number: Some(index),
        start: first.checked_mul(SECTOR)?,
        len: sectors.checked_mul(SECTOR)?,
        uuid: Some(guid.to_string()),
    })
}

/// A little-endian number.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes[at..at + len].iter().rev();
    bytes.fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// The table of a new disk of `disk_len` bytes (whole sectors, 4 MiB or more) with one partition for the root file system.
pub struct NewTable {
    /// What goes to the start of the disk.
    pub head: Vec<u8>,
    /// What goes to its end.
    pub tail: Vec<u8>,
    /// First byte of the partition.
    pub start: u64,
    /// Bytes in it.
    pub len: u64,
}

/// Makes it; `disk` and `partition` are the GUIDs that it gets.
pub fn new_table(disk_len: u64, disk: Guid, partition: Guid) -> NewTable {
    let sectors = disk_len / SECTOR;
    let start = ALIGNMENT;
    let usable_end = (sectors - 1 - TABLE_SECTORS) * SECTOR;
    let end = usable_end / ALIGNMENT * ALIGNMENT;
    let mut table = vec![0; (TABLE_SECTORS * SECTOR) as usize];
    table[..16].copy_from_slice(&ROOT_X86_64.0);
    table[16..32].copy_from_slice(&partition.0);
    table[32..40].copy_from_slice(&(start / SECTOR).to_le_bytes());
    table[40..48].copy_from_slice(&(end / SECTOR - 1).to_le_bytes());
    for (to, c) in table[56..].chunks_exact_mut(2).zip("root".encode_utf16()) {
        to.copy_from_slice(&c.to_le_bytes());
    }
    let header = |own, other, table_at| header(sectors, own, other, table_at, disk, crc32(&table));
    let mut head = protective_mbr(sectors);
    head.extend(header(1, sectors - 1, 2));
    head.extend(&table);
    let mut tail = table.clone();
    tail.extend(header(sectors - 1, 1, sectors - 1 - TABLE_SECTORS));
    NewTable {
        head,
        tail,
        start,
        len: end - start,
    }
}

fn header(sectors: u64, own: u64, other: u64, table: u64, disk: Guid, sum: u32) -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    let mut put = |value: &[u8]| bytes.extend(value);
    put(&0x0001_0000_u32.to_le_bytes());
    put(&(HEADER_LEN as u32).to_le_bytes());
    put(&[0; 8]);
    let usable = [2 + TABLE_SECTORS, sectors - 2 - TABLE_SECTORS];
    for value in [own, other, usable[0], usable[1]] {
        put(&value.to_le_bytes());
    }
    put(&disk.0);
    put(&table.to_le_bytes());
    for value in [ENTRIES, ENTRY_LEN as u32, sum] {
        put(&value.to_le_bytes());
    }
    let sum = crc32(&bytes);
    bytes[16..20].copy_from_slice(&sum.to_le_bytes());
    bytes.resize(SECTOR as usize, 0);
    bytes
}

/// A master boot record that says that all of the disk is taken.
fn protective_mbr(sectors: u64) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR as usize];
    let len = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    bytes[447..454].copy_from_slice(&[0, 2, 0, 0xee, 0xff, 0xff, 0xff]);
    bytes[454..458].copy_from_slice(&1u32.to_le_bytes());
    bytes[458..462].copy_from_slice(&len.to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}
