//! FAT, as EFI system partitions have it, through the crate `fatfs`.

use std::io::{self, Read, Seek, SeekFrom, Write};

use super::{FileSystem, too_long};
use crate::partition::Partition;
use crate::reader::Reader;

/// A FAT file system.
pub struct Fat(fatfs::FileSystem<Piece>);

impl Fat {
    /// None where there is no such file system.
    pub fn open(reader: &Reader, partition: &Partition) -> Option<Result<Fat, String>> {
        let sector: [u8; 512] = reader.bytes(partition.start).ok()?;
        let jumps = matches!(sector[0], 0xeb | 0xe9);
        let named = &sector[54..57] == b"FAT" || &sector[82..85] == b"FAT";
        if !jumps || !named || sector[510..] != [0x55, 0xaa] {
            return None;
        }
        let piece = Piece {
            reader: reader.clone(),
            start: partition.start,
            len: partition.len,
            at: 0,
        };
        let options = fatfs::FsOptions::new().update_accessed_date(false);
        let opened = fatfs::FileSystem::new(piece, options);
        Some(opened.map(Fat).map_err(|e| e.to_string()))
    }
}

/// The crate wants to write and seek; it may seek.
struct Piece {
    reader: Reader,
    start: u64,
    len: u64,
    at: u64,
}

impl Read for Piece {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.len.saturating_sub(self.at).min(into.len() as u64) as usize;
        self.reader.read(self.start + self.at, &mut into[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for Piece {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Piece {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl FileSystem for Fat {
    fn list(&self, path: &str, most: usize) -> io::Result<Vec<String>> {
        let root = self.0.root_dir();
        let folder = match path.trim_matches('/') {
            "" => root,
            path => root.open_dir(path)?,
        };
        let names = folder.iter().take(most).filter_map(|entry| {
            let name = entry.ok()?.file_name();
            (name != "." && name != "..").then_some(name)
        });
        Ok(names.collect())
    }

    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut file = self.0.root_dir().open_file(path.trim_matches('/'))?;
        let len = file.seek(SeekFrom::End(0))?;
        if len > limit {
            return Err(too_long(len, limit));
        }
        file.seek(SeekFrom::Start(0))?;
        let mut bytes = vec![0; len as usize];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn exists(&self, path: &str) -> bool {
        let path = path.trim_matches('/');
        let root = self.0.root_dir();
        root.open_file(path).is_ok() || root.open_dir(path).is_ok()
    }

    fn uuid(&self) -> String {
        let id = self.0.volume_id();
        format!("{:04X}-{:04X}", id >> 16, id & 0xffff)
    }

    fn kind(&self) -> &'static str {
        "FAT"
    }
}
