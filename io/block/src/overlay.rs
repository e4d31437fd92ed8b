//! `overlay=FILE`: what the guest writes goes to a qcow2 image over a disk that is only read.
//!
//! The overlay is made when it is not there. It names the disk below it, so that it is an image of its own afterwards
//! (`--disk FILE`), and that it cannot be put on another disk by mistake.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::BlockError;
use crate::file::HostFile;
use crate::format::Format;
use crate::qcow2::{Chain, Qcow2, create_over, open_over};

/// Opens the overlay at `path` over the image `base`, or makes it.
pub(crate) fn open(path: &Path, base: &Path, format: Option<Format>) -> Result<Qcow2, BlockError> {
    let base = Chain::open(base, format)?;
    let file = match HostFile::open(path, true) {
        Err(BlockError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            create_over(path, &base)?;
            HostFile::open(path, true)?
        }
        result => result?,
    };
    open_over(file, base)
}
