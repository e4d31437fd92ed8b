//! A boot loader for disks: finds kernel, initial RAM disk and command line on a disk of the guest.
//!
//! On hardware firmware starts a boot loader that is on the disk, and that reads its own configuration. Here the monitor does the
//! loader's work from outside, so that a guest boots without firmware in a blink, and a kernel upgrade within it takes effect at the next
//! boot. [`find`] looks at each partition ([`partition`]) for a file system that it can read ([`volume`]), and applies three
//! rules in turn ([`rules`]): Boot Loader Specification entries, GRUB's configuration, kernels in /boot by their names.
//!
//! **Everything on the disk is the guest's.** Files have bounds, directories too, and so has all reading of one search ([`Reader`]), since a
//! damaged file system can lead a reader in circles. Nothing is ever written.

mod partition;
mod reader;
mod rules;
mod version;
mod volume;

use std::sync::Arc;

use doppel_block::BlockBackend;

pub use partition::gpt;
use reader::Reader;
use volume::Volume;

/// What a disk says is to be booted.
#[derive(Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// Where the kernel was found, for messages: "partition 1: /boot/vmlinuz-6.1.0".
    pub place: String,
    /// The kernel.
    pub kernel: Vec<u8>,
    /// Initial RAM disks one after another, as a boot loader gives them to the kernel.
    pub initrd: Option<Vec<u8>>,
    /// The kernel's command line as the disk has it, `root=` included.
    pub cmdline: String,
}

/// Why there is nothing to boot on a disk.
#[derive(Debug, thiserror::Error)]
pub enum BootDiskError {
    /// No rule found a kernel.
    #[error(
        "no kernel was found on the disk. Looked for: entries of the Boot Loader Specification (/loader/entries), GRUB's grub.cfg (/boot/grub), \
         /boot/vmlinuz-*, /vmlinuz. On the disk are: {found}. Name a kernel with --kernel FILE"
    )]
    Nothing {
        /// What is on the disk instead.
        found: String,
    },
    /// A file that a rule names cannot be had.
    #[error("{place}: {what}")]
    File {
        /// The partition and the file.
        place: String,
        /// What is wrong.
        what: String,
    },
}

/// Finds what to boot on `disk`; kernel and initial RAM disk may have `limit` bytes each, the guest's memory for example.
pub fn find(disk: &Arc<dyn BlockBackend>, limit: u64) -> Result<BootFiles, BootDiskError> {
    let reader = Reader::new(disk.clone());
    let volumes: Vec<Volume> = partition::all(&reader)
        .into_iter()
        .map(|partition| Volume::open(&reader, partition))
        .collect();
    for rule in rules::ALL {
        if let Some(choice) = rule(&volumes) {
            return choice.load(&volumes, limit);
        }
    }
    let found: Vec<String> = volumes.iter().map(Volume::describe).collect();
    Err(BootDiskError::Nothing {
        found: found.join(", "),
    })
}
