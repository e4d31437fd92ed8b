//! bzImage: the 64-bit and the 32-bit entry of the Linux boot protocol (Documentation/arch/x86/boot.rst).
//!
//! The file is a boot sector and a 16-bit setup part, of which only the setup header at 0x1f1 is used, and
//! the protected-mode part, which is copied to its preferred address. A kernel that says that it has a 64-bit entry is entered there,
//! 0x200 bytes into it, any other at its start in protected mode without paging.

use std::ops::Range;

use doppel_memory::GuestRam;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::entry::Entry;
use super::image::{Image, place};
use super::params::{self, CMDLINE_AT, mib};
use super::{Boot, BootError};

/// Where "HdrS" is in the file.
pub const MAGIC_OFFSET: u64 = 0x202;
const HEADER_OFFSET: u64 = 0x1f1;
const SECTOR: u64 = 512;
/// The first protocol that says where the kernel is best loaded and what it takes (`pref_address`, `init_size`), Linux 2.6.31.
const LOWEST_VERSION: u16 = 0x020a;
/// The first that says whether there is a 64-bit entry (`xloadflags`), Linux 3.8.
const VERSION_OF_XLOADFLAGS: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
const LOADER_UNDEFINED: u8 = 0xff;
const ENTRY_64: u64 = 0x200;
const ZERO_PAGE_AT: u64 = 0x7000;
/// A kernel is never placed below this.
const LOWEST_LOAD: u64 = 0x10_0000;

/// Loads the kernel and everything that goes with it.
pub(crate) fn load(boot: &Boot) -> Result<Entry, BootError> {
    let header = read_header(boot.kernel)?;
    check_header(boot.kernel, &header)?;
    let payload = payload(boot.kernel, &header)?;
    let kernel = load_address(boot, &header, payload.end - payload.start)?;
    boot.kernel.copy_to(
        boot.ram,
        payload.start,
        kernel.start,
        payload.end - payload.start,
    )?;
    params::place_cmdline(boot.ram, boot.cmdline, header.cmdline_size as usize)?;
    let initrd_limit = u64::from(header.initrd_addr_max) + 1;
    let initrd = params::place_initrd(boot, &kernel, initrd_limit)?;
    place_zero_page(boot, header, &initrd)?;
    let entry = entry(&header, kernel.start);
    entry.place_tables(boot.ram)?;
    Ok(entry)
}

fn entry(header: &setup_header, start: u64) -> Entry {
    let says = header.version >= VERSION_OF_XLOADFLAGS;
    match says && header.xloadflags & XLF_KERNEL_64 != 0 {
        true => Entry::Linux64 {
            rip: start + ENTRY_64,
            params: ZERO_PAGE_AT,
        },
        false => Entry::Linux32 {
            // All of the kernel is below 4 GiB.
            eip: start as u32,
            params: ZERO_PAGE_AT as u32,
        },
    }
}

/// The setup header, cut to the length that it gives itself.
fn read_header(kernel: &Image) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let mut jump = [0; 2];
    kernel.read_at(0x200, &mut jump)?;
    let end = 0x202 + u64::from(jump[1]);
    let len = (end - HEADER_OFFSET).min(size_of::<setup_header>() as u64) as usize;
    let mut bytes = vec![0; len];
    kernel.read_at(HEADER_OFFSET, &mut bytes)?;
    header.as_mut_slice()[..len].copy_from_slice(&bytes);
    Ok(header)
}

fn check_header(kernel: &Image, header: &setup_header) -> Result<(), BootError> {
    let unsupported = |what: String| BootError::Unsupported {
        path: kernel.path().to_owned(),
        what,
    };
    let version = header.version;
    if version < LOWEST_VERSION {
        return Err(unsupported(format!(
            "boot protocol {}.{:02} is too old, 2.10 (Linux 2.6.31) is the oldest that says where it is to be loaded",
            version >> 8,
            version & 0xff
        )));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(unsupported("it is a zImage".into()));
    }
    Ok(())
}

/// Where in the file the protected-mode part is.
fn payload(kernel: &Image, header: &setup_header) -> Result<Range<u64>, BootError> {
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let start = (sectors + 1) * SECTOR;
    let promised = u64::from(header.syssize) * 16;
    if promised <= ENTRY_64 {
        return Err(kernel.damaged("the kernel in it is empty"));
    }
    // The last paragraph may be partial; signatures may follow.
    if kernel.len() < start + promised - 15 {
        return Err(kernel.truncated());
    }
    Ok(start..kernel.len())
}

/// The preferred address, with room for what the kernel makes of itself there. Lower is of no use: a Linux that is loaded
/// below its preferred address moves to it before it looks at the memory map.
fn load_address(boot: &Boot, header: &setup_header, payload: u64) -> Result<Range<u64>, BootError> {
    let size = u64::from(header.init_size).max(payload);
    let start = header.pref_address;
    if start < LOWEST_LOAD {
        return Err((boot.kernel).damaged("its preferred address is below 1 MiB"));
    }
    let end = start.saturating_add(size);
    if end > params::low_end(boot.ram) {
        return Err(BootError::TooBig {
            path: boot.kernel.path().to_owned(),
            need_mib: mib(end),
        });
    }
    Ok(start..end)
}

fn place_zero_page(
    boot: &Boot,
    header: setup_header,
    initrd: &Range<u64>,
) -> Result<(), BootError> {
    let mut zero_page = boot_params {
        hdr: header,
        acpi_rsdp_addr: boot.rsdp,
        ..boot_params::default()
    };
    zero_page.hdr.type_of_loader = LOADER_UNDEFINED;
    zero_page.hdr.cmd_line_ptr = CMDLINE_AT as u32;
    // Below `initrd_addr_max`, so in 32 bits.
    zero_page.hdr.ramdisk_image = initrd.start as u32;
    zero_page.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    fill_e820(&mut zero_page, boot.ram);
    place(boot.ram, ZERO_PAGE_AT, zero_page.as_slice())
}

fn fill_e820(zero_page: &mut boot_params, ram: &GuestRam) {
    let map = params::memory_map(ram);
    zero_page.e820_entries = map.len() as u8;
    for (i, m) in map.iter().enumerate() {
        zero_page.e820_table[i] = boot_e820_entry {
            addr: m.range.start,
            size: m.range.end - m.range.start,
            r#type: m.kind as u32,
        };
    }
}
