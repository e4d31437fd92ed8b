//! A disk as the user asks for it, and how it is opened.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::backend::{BlockBackend, SECTOR};
use crate::error::BlockError;
use crate::format::{Format, Look, look};
use crate::lock::lock;
use crate::raw::Raw;

/// `FILE[,format=raw|qcow2][,ro][,overlay=FILE]`. A comma within a name is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Where the image is.
    pub path: PathBuf,
    /// Its format; guessed where it is not said.
    pub format: Option<Format>,
    /// The guest may only read.
    pub read_only: bool,
    /// Where what the guest writes goes instead, made when it is not there.
    pub overlay: Option<PathBuf>,
}

impl DiskSpec {
    /// The image at `path` with nothing else said.
    pub fn new(path: impl Into<PathBuf>) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            format: None,
            read_only: false,
            overlay: None,
        }
    }

    /// Opens the image, locked against other virtual machines.
    pub fn open(&self) -> Result<Arc<dyn BlockBackend>, BlockError> {
        let path = &self.path;
        let mut file = open_file(path, !self.read_only)?;
        let found = look_at(path, &mut file)?;
        let len = length(path, &mut file)?;
        match (self.format, found) {
            (Some(Format::Raw), _) => Ok(Arc::new(Raw::new(file, len, self.read_only))),
            (None, Look::Raw) => Ok(Arc::new(Raw::new(file, len, self.read_only).guarded())),
            (Some(Format::Qcow2), _) | (None, Look::Qcow2) => Err(BlockError::Unsupported {
                path: path.clone(),
                name: "qcow2",
            }),
            (None, Look::Other(name)) => Err(BlockError::Unsupported {
                path: path.clone(),
                name,
            }),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = BlockError;

    fn from_str(text: &str) -> Result<Self, BlockError> {
        let mut parts = split(text).into_iter();
        let mut spec = DiskSpec::new(parts.next().unwrap_or_default());
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => spec.read_only = true,
                Some(("format", name)) => {
                    spec.format = Some(name.parse().map_err(BlockError::Usage)?);
                }
                Some(("overlay", path)) if !path.is_empty() => spec.overlay = Some(path.into()),
                _ => {
                    return Err(BlockError::Usage(format!(
                        "{part:?} is no option of a disk: format=raw|qcow2, ro, overlay=FILE (a comma in a name is written twice)"
                    )));
                }
            }
        }
        match spec.path.as_os_str().is_empty() {
            true => Err(BlockError::Usage("a disk needs the name of a file".into())),
            false => Ok(spec),
        }
    }
}

/// The parts between single commas, with double commas made one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let part = parts.last_mut();
        if c != ',' || characters.next_if_eq(&',').is_some() {
            part.into_iter().for_each(|part| part.push(c));
        } else {
            parts.push(String::new());
        }
    }
    parts
}

/// Opens and locks a file or block device.
fn open_file(path: &Path, writable: bool) -> Result<File, BlockError> {
    // Without O_NONBLOCK, opening a FIFO waits for a writer.
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
    let result = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(flags)
        .open(path);
    let file = match result {
        Err(source) if writable && is_read_only(&source) => {
            let path = path.to_owned();
            return Err(BlockError::NotWritable { path, source });
        }
        result => result.map_err(BlockError::io(path))?,
    };
    let kind = file.metadata().map_err(BlockError::io(path))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::NotADisk(path.to_owned()));
    }
    match lock(&file, writable).map_err(BlockError::io(path))? {
        true => Ok(file),
        false => Err(BlockError::InUse(path.to_owned())),
    }
}

fn is_read_only(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem)
}

fn length(path: &Path, file: &mut File) -> Result<u64, BlockError> {
    file.seek(SeekFrom::End(0)).map_err(BlockError::io(path))
}

fn look_at(path: &Path, file: &mut File) -> Result<Look, BlockError> {
    let mut head = Vec::new();
    file.take(SECTOR)
        .read_to_end(&mut head)
        .map_err(BlockError::io(path))?;
    Ok(look(&head))
}
