//! Boot: a kernel, its initial RAM disk and its command line, placed in guest RAM as a boot loader would.
//!
//! Three protocols: the Linux boot protocol of a bzImage by its 64-bit or 32-bit entry ([`bzimage`]), the Xen PVH protocol of an
//! ELF kernel ([`pvh`]), and Multiboot 1 ([`multiboot`]). All need the same memory map and the same low-memory tables ([`params`]), find what
//! a BIOS would have left ([`bios`]), and end in a CPU state ([`Entry`]). Every problem with a file is a [`BootError`] that names the file.

mod bios;
mod bzimage;
mod disk;
mod elf;
mod entry;
mod image;
mod multiboot;
mod params;
mod pvh;

use std::io;
use std::path::PathBuf;

use doppel_bootdisk::BootDiskError;
use doppel_memory::GuestRam;

pub use disk::{BootDisk, KernelSource};
pub use entry::Entry;
use image::Image;
pub use image::{BootFile, place};

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A directory, a pipe, a device.
    #[error("{}: not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// Neither a bzImage nor an ELF file.
    #[error("{}: not a kernel: neither a bzImage (such as /boot/vmlinuz-*) nor an ELF file (vmlinux), nor one with a Multiboot header", .0.display())]
    NotAKernel(PathBuf),
    /// The file ends before what its headers promise.
    #[error("{}: the file is truncated; copy it anew", .0.display())]
    Truncated(PathBuf),
    /// Headers that make no sense.
    #[error("{}: damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A kernel that cannot be entered the way this monitor does.
    #[error("{}: this kernel cannot be booted: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        what: String,
    },
    /// Nothing to boot on a disk.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// What is missing.
        source: BootDiskError,
    },
    /// Not enough guest memory.
    #[error("{}: does not fit into guest memory: needs {need_mib} MiB, give the guest more with --memory", path.display())]
    TooBig {
        /// The file.
        path: PathBuf,
        /// Lowest size of guest memory with which it would fit, about.
        need_mib: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {len} bytes, this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// What the kernel accepts.
        max: usize,
    },
    /// More modules than their list has room for.
    #[error("a kernel takes {0} modules at most, the initial RAM disk counted")]
    TooManyModules(usize),
    /// The command line holds a NUL byte.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// The machine has more in it than the firmware tables have room for.
    #[error("the ACPI tables of this machine are too long")]
    TablesTooLong,
    /// Something was to be placed where there is no RAM.
    #[error("guest memory is too small: there is no RAM at {0:#x}; give it more with --memory")]
    NoRam(u64),
}

/// What to boot.
#[derive(Clone, Default)]
pub struct BootSource {
    /// bzImage or ELF with a PVH note.
    pub kernel: BootFile,
    /// Initial RAM disk, passed as it is.
    pub initrd: Option<BootFile>,
    /// More modules, each with its command line, for kernels that take them.
    pub modules: Vec<(BootFile, String)>,
    /// Kernel command line.
    pub cmdline: String,
}

/// Where the RSDP of the ACPI tables is, for the boot protocols that pass it on.
pub type RsdpAddress = u64;

/// Loads everything into guest RAM and says how the boot CPU starts.
pub fn load(ram: &GuestRam, source: &BootSource, rsdp: RsdpAddress) -> Result<Entry, BootError> {
    let kernel = Image::open(&source.kernel)?;
    let initrd = source.initrd.as_ref().map(Image::open).transpose()?;
    let modules = source.modules.iter().map(|(file, cmdline)| {
        let image = Image::open(file)?;
        Ok((image, cmdline.as_bytes()))
    });
    let modules = modules.collect::<Result<Vec<_>, BootError>>()?;
    let cmdline = source.cmdline.as_bytes();
    let texts = modules.iter().map(|(_, cmdline)| *cmdline);
    if texts.chain([cmdline]).any(|text| text.contains(&0)) {
        return Err(BootError::CmdlineNul);
    }
    let boot = Boot {
        ram,
        kernel: &kernel,
        initrd: initrd.as_ref(),
        modules: &modules,
        cmdline,
        rsdp,
    };
    let kind = kind(&kernel)?;
    bios::place_data(ram)?;
    match kind {
        Kind::BzImage if !modules.is_empty() => Err(BootError::Unsupported {
            path: kernel.path().to_owned(),
            what: "Linux takes an initial RAM disk (--initrd) and no modules".into(),
        }),
        Kind::BzImage => bzimage::load(&boot),
        Kind::Elf => pvh::load(&boot),
        Kind::Multiboot(header) => multiboot::load(&boot, &header),
    }
}

/// Everything that a loader works with.
pub(crate) struct Boot<'a> {
    pub ram: &'a GuestRam,
    pub kernel: &'a Image<'a>,
    pub initrd: Option<&'a Image<'a>>,
    pub modules: &'a [(Image<'a>, &'a [u8])],
    pub cmdline: &'a [u8],
    pub rsdp: RsdpAddress,
}

/// True for a kernel that is booted by Multiboot: the words of its command line are its own, and no Linux's.
///
/// # Errors
/// The file cannot be read, or is no kernel.
pub fn is_multiboot(kernel: &BootFile) -> Result<bool, BootError> {
    Ok(matches!(kind(&Image::open(kernel)?)?, Kind::Multiboot(_)))
}

enum Kind {
    BzImage,
    Elf,
    Multiboot(multiboot::Header),
}

fn kind(kernel: &Image) -> Result<Kind, BootError> {
    if let Some(header) = multiboot::header(kernel)? {
        return Ok(Kind::Multiboot(header));
    }
    let mut magic = [0; 4];
    if kernel.read_at(0, &mut magic).is_ok() && magic == *b"\x7fELF" {
        return Ok(Kind::Elf);
    }
    if kernel.read_at(bzimage::MAGIC_OFFSET, &mut magic).is_ok() && magic == *b"HdrS" {
        return Ok(Kind::BzImage);
    }
    Err(BootError::NotAKernel(kernel.path().to_owned()))
}

#[cfg(test)]
mod tests;
