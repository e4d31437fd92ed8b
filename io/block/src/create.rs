//! New images, what images are, and copies of them.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::error::BlockError;
use crate::file::HostFile;
use crate::format::Format;
use crate::qcow2::{self, Chain};

/// Disks larger than this make no sense to anybody (1 EiB; a file of the host ends at 8 EiB).
const SIZE_MAX: u64 = 1 << 60;

/// Makes an image for an empty disk of `size` bytes, which takes no room until it is written to. There must be no file of that name.
pub fn create(path: &Path, format: Format, size: u64) -> Result<(), BlockError> {
    let size = size.next_multiple_of(crate::SECTOR);
    if size > SIZE_MAX {
        return Err(BlockError::Usage(
            "a disk of so many bytes is too large".into(),
        ));
    }
    match format {
        Format::Qcow2 => qcow2::create(path, size),
        Format::Raw => {
            let file = HostFile::create(path)?;
            file.set_len(size).map_err(BlockError::io(path))
        }
    }
}

/// Gives the file `from` the name `to`, if no file has that.
pub fn settle(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // A file system that knows no such call, NFS for one.
        Err(Errno::INVAL | Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        result => Ok(result?),
    }
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub disk_len: u64,
    /// Bytes that it takes on the host, without those of images below it.
    pub host_len: u64,
    /// Bytes of a cluster, where there are clusters.
    pub cluster_size: Option<u64>,
    /// The image it stands on: its name, and its format where that is said.
    pub backing: Option<(String, Option<String>)>,
}

/// Looks at an image that nobody writes to.
pub fn info(path: &Path, format: Option<Format>) -> Result<Info, BlockError> {
    let chain = Chain::open(path, format)?;
    let metadata = std::fs::metadata(path).map_err(BlockError::io(path))?;
    Ok(Info {
        format: chain.format,
        disk_len: chain.disk_len(),
        host_len: metadata.blocks() * 512,
        cluster_size: chain.header().map(|header| header.cluster_size),
        backing: chain.backing.map(|b| (b.name, b.format)),
    })
}
