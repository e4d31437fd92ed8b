//! New images, what images are, and copies of them.

use std::path::Path;

use crate::error::BlockError;
use crate::file::HostFile;
use crate::format::Format;
use crate::qcow2;

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
