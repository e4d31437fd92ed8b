//! Why a disk cannot be opened.

use std::io;
use std::path::{Path, PathBuf};

use crate::Format;

/// Why a disk cannot be opened; each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The host refuses the file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file may be read and not written.
    #[error("{}: this file cannot be written ({source}); for a disk that the guest only reads, add `,ro`", path.display())]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("{}: neither a regular file nor a block device", .0.display())]
    NotADisk(PathBuf),
    /// Another process has it open in a way that does not go with this one.
    #[error("{}: in use by another virtual machine or by qemu; end that first, or give each its own `,overlay=FILE`", .0.display())]
    InUse(PathBuf),
    /// The image is of another format than it was said to be.
    #[error("{}: no image of the format {format}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it was taken for.
        format: Format,
        /// What is wrong.
        what: String,
    },
    /// An image of a format that nobody here reads.
    #[error("{}: images of the format {name} are not supported; convert it: qemu-img convert -O qcow2 {} OUT.qcow2", path.display(), path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        name: &'static str,
    },
    /// A backing file that cannot be opened.
    #[error("{}: its backing file cannot be used: {source}", path.display())]
    Below {
        /// The image above.
        path: PathBuf,
        /// What is wrong below.
        source: Box<BlockError>,
    },
    /// An overlay that was made over something else.
    #[error("{}: this overlay was made over {base}, not over the disk it is used with; name another overlay=FILE, or remove it", path.display())]
    OtherBase {
        /// The overlay.
        path: PathBuf,
        /// What its header names.
        base: String,
    },
    /// An option of `--disk` that makes no sense.
    #[error("{0}")]
    Usage(String),
}

impl BlockError {
    /// What turns the host's error about `path` into one of these.
    pub(crate) fn io(path: &Path) -> impl Fn(io::Error) -> BlockError {
        move |source| BlockError::Io {
            path: path.to_owned(),
            source,
        }
    }
}
