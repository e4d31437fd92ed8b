//! Partitions: a GUID partition table ([`gpt`]), a master boot record ([`mbr`]), or a file system on the bare disk.

pub mod gpt;
mod mbr;

use crate::reader::Reader;

const SECTOR: u64 = doppel_block::SECTOR;

/// A piece of the disk that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As Linux counts them, from 1; none for the whole disk.
    pub number: Option<u32>,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// As `root=PARTUUID=` takes it.
    pub uuid: Option<String>,
}

impl Partition {
    /// For messages.
    pub fn name(&self) -> String {
        match self.number {
            Some(number) => format!("partition {number}"),
            None => "the whole disk".to_owned(),
        }
    }

    /// What the kernel calls it on the first virtio disk.
    pub fn device(&self) -> String {
        match self.number {
            Some(number) => format!("/dev/vda{number}"),
            None => "/dev/vda".to_owned(),
        }
    }
}

/// All partitions that lie on the disk, or the whole disk where there is no table.
pub fn all(reader: &Reader) -> Vec<Partition> {
    let found = gpt::read(reader).or_else(|| mbr::read(reader));
    let whole = Partition {
        number: None,
        start: 0,
        len: reader.len(),
        uuid: None,
    };
    let mut partitions = found.unwrap_or_else(|| vec![whole]);
    partitions.retain(|p| {
        let end = p.start.checked_add(p.len);
        p.len > 0 && end.is_some_and(|end| end <= reader.len())
    });
    partitions
}
