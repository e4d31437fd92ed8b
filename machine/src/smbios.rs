//! SMBIOS: names for the machine (SMBIOS 3.0, 64-bit entry point).

use doppel_memory::GuestRam;

use crate::boot::{BootError, place};
use crate::layout;

const VENDOR: &str = "Doppel";
const PRODUCT: &str = "Doppel PC";
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// BIOS characteristics: not supported (bit 3); extension byte 2: virtual machine (bit 4).
const CHARACTERISTICS: u64 = 1 << 3;
const VIRTUAL_MACHINE: u8 = 1 << 4;
const WAKE_UP_POWER_SWITCH: u8 = 6;
const ENTRY_POINT_LEN: usize = 24;

/// Writes the entry point and the structures of a machine with `cpus` CPUs.
pub fn place_tables(ram: &GuestRam, cpus: u32) -> Result<(), BootError> {
    let structures = structures(cpus);
    let at = layout::SMBIOS + ENTRY_POINT_LEN.next_multiple_of(16) as u64;
    place(ram, at, &structures)?;
    place(
        ram,
        layout::SMBIOS,
        &entry_point(at, structures.len() as u32),
    )
}

fn entry_point(at: u64, len: u32) -> [u8; ENTRY_POINT_LEN] {
    let mut e = [0; ENTRY_POINT_LEN];
    e[..5].copy_from_slice(b"_SM3_");
    e[6] = ENTRY_POINT_LEN as u8;
    e[7] = 3; // version 3.0
    e[10] = 1; // entry point revision
    e[12..16].copy_from_slice(&len.to_le_bytes());
    e[16..].copy_from_slice(&at.to_le_bytes());
    e[5] = e.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    e
}

/// Processor information (type 4): one socket, whose cores are the CPUs, as CPUID has it.
fn processor(cpus: u32) -> Vec<u8> {
    const CENTRAL: u8 = 3;
    const UNKNOWN: u8 = 2;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const OTHER_UPGRADE: u8 = 1;
    /// 64-bit capable; of several cores.
    const CHARACTERISTICS: u16 = 1 << 2;
    const SEVERAL_CORES: u16 = 1 << 3;
    let cores = u16::try_from(cpus).unwrap_or(u16::MAX);
    let few = u8::try_from(cores).unwrap_or(u8::MAX);
    let several = if cores > 1 { SEVERAL_CORES } else { 0 };
    let mut p = vec![1, CENTRAL, UNKNOWN, 2];
    p.extend([0; 8]); // processor ID: ask CPUID
    p.extend([0; 8]); // version, voltage, clock, speeds: unknown
    p.extend([POPULATED_AND_ENABLED, OTHER_UPGRADE]);
    p.extend([0xff; 6]); // caches: none described
    p.extend([0; 3]); // serial number, asset tag, part number
    p.extend([few; 3]); // cores, cores enabled, threads
    p.extend((CHARACTERISTICS | several).to_le_bytes());
    p.extend(u16::from(UNKNOWN).to_le_bytes());
    for _ in 0..3 {
        p.extend(cores.to_le_bytes());
    }
    p
}

fn structures(cpus: u32) -> Vec<u8> {
    let mut bios = vec![1, 2, 0, 0, 3, 0];
    bios.extend(CHARACTERISTICS.to_le_bytes());
    bios.extend([0, VIRTUAL_MACHINE, 0, 0, 0xff, 0xff]);
    let mut system = vec![1, 2, 0, 0];
    system.extend([0; 16]); // UUID: none
    system.extend([WAKE_UP_POWER_SWITCH, 0, 0]);
    [
        structure(0, &bios, &[VENDOR, VERSION, "01/01/2026"]),
        structure(1, &system, &[VENDOR, PRODUCT]),
        structure(4, &processor(cpus), &["CPU 0", VENDOR]),
        structure(127, &[], &[]),
    ]
    .concat()
}

/// One structure: header, formatted area, strings; the type is its handle too.
fn structure(kind: u8, formatted: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut s = vec![kind, 4 + formatted.len() as u8, kind, 0];
    s.extend(formatted);
    for string in strings {
        s.extend(string.as_bytes());
        s.push(0);
    }
    if strings.is_empty() {
        s.push(0);
    }
    s.push(0);
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_sums_to_zero_and_leads_to_the_end_structure() {
        let ram = GuestRam::new(1 << 20).unwrap();
        place_tables(&ram, 6).unwrap();
        let byte = |a: u64| ram.load::<u8>(a).unwrap();
        let sum = (0..24).fold(0u8, |s, i| s.wrapping_add(byte(layout::SMBIOS + i)));
        assert_eq!(sum, 0);
        let mut at = ram.load::<u64>(layout::SMBIOS + 16).unwrap();
        let end = at + u64::from(ram.load::<u32>(layout::SMBIOS + 12).unwrap());
        let mut kinds = Vec::new();
        while at < end {
            kinds.push(byte(at));
            if byte(at) == 4 {
                let counts = [0x23, 0x24, 0x25, 0x2a, 0x2c, 0x2e].map(|field| byte(at + field));
                assert_eq!((byte(at + 1), counts), (0x30, [6; 6]));
            }
            at += u64::from(byte(at + 1));
            while byte(at) != 0 || byte(at + 1) != 0 {
                at += 1;
            }
            at += 2;
        }
        assert_eq!((at, kinds), (end, vec![0, 1, 4, 127]));
    }
}
