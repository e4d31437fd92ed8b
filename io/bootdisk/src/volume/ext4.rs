//! ext2, ext3 and ext4, through the crate `ext4-view`, which also reads what is only in the journal yet: after a crash of the guest
//! its files are as the guest's own kernel would find them.

use std::error::Error;
use std::io;

use ext4_view::Ext4Read;

use super::{FileSystem, too_long};
use crate::partition::Partition;
use crate::reader::Reader;

const SUPERBLOCK_AT: u64 = 1024;
const MAGIC_AT: u64 = SUPERBLOCK_AT + 56;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// The crate makes room for all descriptors of block groups before it reads the first. So many are 32 TiB in blocks of 4 KiB.
const GROUPS_MAX: u64 = 1 << 18;

/// The crate's cache has a fixed number of blocks, of whatever size. The largest that Linux makes are 64 KiB (EXT4_MAX_BLOCK_LOG_SIZE).
const LOG_BLOCK_SIZE_MAX: u32 = 16 - 10;

/// An ext4 file system.
pub struct Ext4(ext4_view::Ext4);

impl Ext4 {
    /// None where there is no such file system.
    pub fn open(reader: &Reader, partition: &Partition) -> Option<Result<Ext4, String>> {
        if reader.bytes(partition.start + MAGIC_AT).ok()? != MAGIC {
            return None;
        }
        if let Err(refused) = check_size(reader, partition.start + SUPERBLOCK_AT) {
            return Some(Err(refused));
        }
        let piece = Piece {
            reader: reader.clone(),
            start: partition.start,
            len: partition.len,
        };
        let opened = ext4_view::Ext4::load(Box::new(piece));
        Some(opened.map(Ext4).map_err(|e| e.to_string()))
    }
}

/// Refuses what would take much memory to open, by the superblock (Linux, Documentation/filesystems/ext4/super.rst).
fn check_size(reader: &Reader, superblock: u64) -> Result<(), String> {
    const BLOCKS_COUNT: (u64, u64) = (0x4, 0x150);
    const LOG_BLOCK_SIZE: u64 = 0x18;
    const BLOCKS_PER_GROUP: u64 = 0x20;
    let word = |at| {
        let bytes = reader.bytes(superblock + at);
        bytes.map(u32::from_le_bytes).map_err(|e| e.to_string())
    };
    let blocks = u64::from(word(BLOCKS_COUNT.1)?) << 32 | u64::from(word(BLOCKS_COUNT.0)?);
    let groups = blocks / u64::from(word(BLOCKS_PER_GROUP)?.max(1));
    if groups > GROUPS_MAX {
        return Err(format!(
            "{groups} block groups, of {GROUPS_MAX} at most: damaged?"
        ));
    }
    let log_size = word(LOG_BLOCK_SIZE)?;
    if log_size > LOG_BLOCK_SIZE_MAX {
        return Err(format!(
            "blocks of 2^{log_size} KiB, of 64 KiB at most: damaged?"
        ));
    }
    Ok(())
}

struct Piece {
    reader: Reader,
    start: u64,
    len: u64,
}

impl Ext4Read for Piece {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        let end = start_byte.checked_add(dst.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err("beyond the end of the partition".into());
        }
        Ok(self.reader.read(self.start + start_byte, dst)?)
    }
}

impl FileSystem for Ext4 {
    fn list(&self, path: &str, most: usize) -> io::Result<Vec<String>> {
        let entries = self.0.read_dir(path).map_err(io::Error::other)?;
        let names = entries.take(most).filter_map(|entry| {
            let name = entry.ok()?.file_name().as_str().ok()?.to_owned();
            (name != "." && name != "..").then_some(name)
        });
        Ok(names.collect())
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut file = self.0.open(path).map_err(io::Error::other)?;
        let len = file.metadata().len();
        if len > limit {
            return Err(too_long(len, limit));
        }
        let mut bytes = vec![0; len as usize];
        let mut done = 0;
        while done < bytes.len() {
            let n = file
                .read_bytes(&mut bytes[done..])
                .map_err(io::Error::other)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(bytes)
    }

    fn exists(&self, path: &str) -> bool {
        self.0.exists(path).unwrap_or(false)
    }

    fn uuid(&self) -> String {
        let digits: String = self
            .0
            .uuid()
            .as_bytes()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let groups = [0..8, 8..12, 12..16, 16..20, 20..32];
        groups.map(|group| digits[group].to_owned()).join("-")
    }

    fn kind(&self) -> &'static str {
        "ext4"
    }
}
