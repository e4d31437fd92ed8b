//! What the BIOS of a PC leaves in low memory: interrupt vectors, the BIOS data area, the extended one.
//!
//! There is no BIOS here, but kernels that are loaded as by one look at its data to find the end of conventional memory (Xen puts its
//! trampoline below it), and some call it in real mode to ask for what the boot loader did not say. Each vector leads to a few bytes of
//! code: a service that does not exist returns with the carry flag set, which is how a BIOS refuses; the vectors of the two interrupt
//! controllers and of exceptions return with flags as they were. Linux keeps these pages back and never reads most of it.
//!
//! Source: IBM Personal System/2 and Personal Computer BIOS Interface Technical Reference, section 3 (data areas).

use std::ops::Range;

use doppel_memory::GuestRam;

use super::BootError;
use super::image::place;
use crate::layout;

/// The interrupt vector table of real mode: 256 far pointers, offset first.
const VECTORS_AT: u64 = 0;
/// Vectors of services: what lies below and [`SECOND_PIC`] are interrupts of the processor and of hardware.
const SERVICES: Range<u32> = 0x10..0x100;
const SECOND_PIC: Range<u32> = 0x70..0x78;

/// Port of the first serial line, in the data area's list of four.
const SERIAL_PORTS_AT: u64 = 0x400;
/// Segment of the extended BIOS data area.
const EBDA_SEGMENT_AT: u64 = 0x40e;
/// KiB of conventional memory.
const MEMORY_SIZE_AT: u64 = 0x413;

/// Where the code of the vectors is, from the start of the extended BIOS data area, whose first byte is its size in KiB.
const IGNORE_AT: u16 = 0x10;
const REFUSE_AT: u16 = 0x18;
const IGNORE: &[u8] = &[0xcf]; // iret
/// Sets the carry flag among the flags that IRET takes: push bp; mov bp, sp; or byte [bp + 6], 1; pop bp; iret.
const REFUSE: &[u8] = &[0x55, 0x89, 0xe5, 0x80, 0x4e, 0x06, 0x01, 0x5d, 0xcf];

/// KiB of conventional memory: what lies below the extended BIOS data area.
pub const CONVENTIONAL_KIB: u16 = (layout::EBDA.start >> 10) as u16;

/// Writes it all.
pub fn place_data(ram: &GuestRam) -> Result<(), BootError> {
    let segment = (layout::EBDA.start >> 4) as u16;
    let size = (layout::EBDA.end - layout::EBDA.start) >> 10;
    let vectors: Vec<u8> = (0..SERVICES.end)
        .flat_map(|vector| {
            let is_service = SERVICES.contains(&vector) && !SECOND_PIC.contains(&vector);
            let offset = if is_service { REFUSE_AT } else { IGNORE_AT };
            [offset.to_le_bytes(), segment.to_le_bytes()].concat()
        })
        .collect();
    let code = |offset: u16| layout::EBDA.start + u64::from(offset);
    for (at, bytes) in [
        (VECTORS_AT, &vectors[..]),
        (SERIAL_PORTS_AT, &layout::COM1.to_le_bytes()),
        (EBDA_SEGMENT_AT, &segment.to_le_bytes()),
        (MEMORY_SIZE_AT, &CONVENTIONAL_KIB.to_le_bytes()),
        (code(0), &[size as u8]),
        (code(IGNORE_AT), IGNORE),
        (code(REFUSE_AT), REFUSE),
    ] {
        place(ram, at, bytes)?;
    }
    Ok(())
}
