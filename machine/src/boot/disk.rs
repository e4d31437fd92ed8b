//! Boot from a disk of the guest: what `doppel_bootdisk` finds there, and what the user adds to it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use doppel_block::BlockBackend;

use super::{BootError, BootFile, BootSource};

/// Where the kernel comes from.
#[derive(Clone, Debug)]
pub enum KernelSource {
    /// A file of the host: a bzImage or an ELF file with a PVH note.
    File(PathBuf),
    /// A disk, which also has the initial RAM disk and the command line. It is read again at each boot of the machine.
    Disk(BootDisk),
}

impl<P: Into<PathBuf>> From<P> for KernelSource {
    fn from(path: P) -> Self {
        KernelSource::File(path.into())
    }
}

/// A disk to boot from.
#[derive(Clone)]
pub struct BootDisk {
    /// The disk.
    pub disk: Arc<dyn BlockBackend>,
    /// Its name, for messages.
    pub name: PathBuf,
    /// Takes the place of the command line that the disk has.
    pub cmdline: Option<String>,
}

impl fmt::Debug for BootDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BootDisk").field(&self.name).finish()
    }
}

const CONSOLE: &str = "console=ttyS0";

impl BootDisk {
    /// Reads what is to be booted, of files no larger than `limit` bytes. A console on the first serial port is added to the
    /// command line where it names none, so that there is something to see, and then `append`.
    pub fn read(&self, limit: u64, append: &str) -> Result<BootSource, BootError> {
        let found = doppel_bootdisk::find(&self.disk, limit).map_err(|source| BootError::Disk {
            path: self.name.clone(),
            source,
        })?;
        let name = |what: &str| PathBuf::from(format!("{}, {what}", self.name.display()));
        let cmdline = match &self.cmdline {
            Some(cmdline) => cmdline.clone(),
            None => with_console(&found.cmdline),
        };
        Ok(BootSource {
            initrd: found
                .initrd
                .map(|bytes| BootFile::Memory(name("initial RAM disk"), bytes)),
            kernel: BootFile::Memory(name(&found.place), found.kernel),
            cmdline: join(&cmdline, append),
            ..BootSource::default()
        })
    }
}

fn with_console(cmdline: &str) -> String {
    let mut words = cmdline.split_ascii_whitespace();
    match words.any(|word| word.starts_with(CONSOLE)) {
        true => cmdline.to_owned(),
        false => join(cmdline, CONSOLE),
    }
}

fn join(a: &str, b: &str) -> String {
    format!("{a} {b}").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_console_is_added_where_there_is_none() {
        assert_eq!(with_console("root=x"), "root=x console=ttyS0");
        assert_eq!(with_console(""), "console=ttyS0");
        let given = "console=ttyS0,9600n8 root=x";
        assert_eq!(with_console(given), given);
    }
}
