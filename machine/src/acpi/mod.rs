//! ACPI: the tables that tell the guest what hardware there is (ACPI 6.2).
//!
//! RSDP → XSDT, and RSDT for who reads no other → FADT (→ FACS, DSDT), MADT, MCFG, HPET, one after another in the firmware area below 1 MiB.
//! [`tables`] holds the fixed tables, [`dsdt`] the devices in AML.

mod dsdt;
mod tables;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use doppel_memory::GuestRam;

use crate::boot::{BootError, place};
use crate::layout;

const OEM_ID: [u8; 6] = *b"DOPPEL";
const OEM_TABLE_ID: [u8; 8] = *b"DOPPELPC";
const OEM_REVISION: u32 = 1;
/// As many as the names of CPU devices can tell apart.
const CPUS_MAX: u32 = 0x1000;
/// The FACS must be 64-byte aligned; the others follow suit.
const ALIGN: u64 = 64;

/// How many processors a machine of `cpus` has room for: two at least. Linux drives a disk by several queues only where it can come to several processors,
/// and by one queue each request goes by a scheduler and a worker thread first.
pub fn possible_cpus(cpus: u32) -> u32 {
    cpus.max(2)
}

/// Writes all tables for a machine of `cpus` CPUs and `virtio_mmio` virtio devices without PCI; returns the address of the RSDP.
pub fn place_tables(ram: &GuestRam, cpus: u32, virtio_mmio: u32) -> Result<u64, BootError> {
    if cpus > CPUS_MAX {
        return Err(BootError::TablesTooLong);
    }
    let rsdp = layout::FIRMWARE_TABLES.start;
    let mut writer = Writer {
        ram,
        next: rsdp + ALIGN,
    };
    let facs = writer.put(&tables::facs())?;
    let dsdt = writer.put(&dsdt::dsdt(cpus, virtio_mmio))?;
    let described = [
        writer.put(&tables::fadt(facs as u32, dsdt as u32))?,
        writer.put(&tables::madt(cpus))?,
        writer.put(&tables::mcfg())?,
        writer.put(&tables::hpet())?,
    ];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    described.iter().for_each(|table| xsdt.add_entry(*table));
    let xsdt = writer.put(&xsdt)?;
    let rsdt = writer.put(&rsdt(&described))?;
    place(ram, rsdp, &root(rsdt as u32, xsdt))?;
    Ok(rsdp)
}

/// What the XSDT says, in 32 bits (ACPI 6.2, 5.2.7).
fn rsdt(described: &[u64]) -> Sdt {
    const HEADER: u32 = 36;
    let mut rsdt = Sdt::new(*b"RSDT", HEADER, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in described {
        rsdt.append(*table as u32);
    }
    rsdt
}

/// The RSDP (ACPI 6.2, 5.2.5.3), which the crate makes without an RSDT.
fn root(rsdt: u32, xsdt: u64) -> Vec<u8> {
    const RSDT: usize = 16;
    /// A checksum, and what it is over.
    const CHECKSUMS: [(usize, usize); 2] = [(8, 20), (32, 36)];
    let mut rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    rsdp[RSDT..][..4].copy_from_slice(&rsdt.to_le_bytes());
    for (at, len) in CHECKSUMS {
        rsdp[at] = 0;
        let sum = rsdp[..len].iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
        rsdp[at] = sum.wrapping_neg();
    }
    rsdp
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &dyn Aml) -> Result<u64, BootError> {
        let bytes = bytes(table);
        let at = self.next;
        self.next = (at + bytes.len() as u64).next_multiple_of(ALIGN);
        if self.next > layout::SMBIOS {
            return Err(BootError::TablesTooLong);
        }
        place(self.ram, at, &bytes)?;
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ram: &GuestRam, at: u64, len: u64) -> Vec<u8> {
        (at..at + len).map(|a| ram.load::<u8>(a).unwrap()).collect()
    }

    fn table(ram: &GuestRam, at: u64) -> Vec<u8> {
        let len = ram.load::<u32>(at + 4).unwrap();
        read(ram, at, len.into())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |s, b| s.wrapping_add(*b))
    }

    fn u32_at(b: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
    }

    /// Follows the pointers as a guest does.
    fn tables(cpus: u32) -> Vec<Vec<u8>> {
        let ram = GuestRam::new(1 << 20).unwrap();
        let rsdp = place_tables(&ram, cpus, 0).unwrap();
        let r = read(&ram, rsdp, 36);
        assert_eq!(&r[..8], b"RSD PTR ");
        assert_eq!((sum(&r[..20]), sum(&r)), (0, 0));
        let xsdt = table(&ram, u64::from(u32_at(&r, 24)));
        let rsdt = table(&ram, u64::from(u32_at(&r, 16)));
        let (narrow, wide) = (rsdt[36..].chunks_exact(4), xsdt[36..].chunks_exact(8));
        assert!(narrow.map(|e| u32_at(e, 0)).eq(wide.map(|e| u32_at(e, 0))));
        let mut found = vec![rsdt, xsdt.clone()];
        for entry in xsdt[36..].chunks_exact(8) {
            let t = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            if &t[..4] == b"FACP" {
                found.push(table(&ram, u32_at(&t, 40).into()));
                let facs = u32_at(&t, 36);
                assert_eq!(facs % 64, 0);
                assert_eq!(&table(&ram, facs.into())[..4], b"FACS");
            }
            found.push(t);
        }
        found
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let tables = tables(1);
        let names: Vec<_> = tables.iter().map(|t| &t[..4]).collect();
        assert_eq!(
            names,
            [
                b"RSDT", b"XSDT", b"DSDT", b"FACP", b"APIC", b"MCFG", b"HPET"
            ]
        );
        for t in &tables {
            assert_eq!(sum(t), 0, "{:?}", &t[..4]);
            assert_eq!(u32_at(t, 4) as usize, t.len());
        }
    }

    #[test]
    fn pm2_control_keeps_isa_plug_and_play_from_its_port() {
        let tables = tables(1);
        let fadt = tables.iter().find(|t| &t[..4] == b"FACP").unwrap();
        let (block, len) = (u32_at(fadt, 72), fadt[90]);
        assert_eq!((block, len), (0xa79, 1), "PM2_CNT_BLK and PM2_CNT_LEN");
    }

    #[test]
    fn the_madt_lists_every_cpu_once() {
        for cpus in [1, 2, 300] {
            let all = tables(cpus);
            let madt = all.iter().find(|t| &t[..4] == b"APIC").unwrap();
            let (mut at, mut ids) = (44, Vec::new());
            while at < madt.len() {
                match madt[at] {
                    0 => ids.push((u32::from(madt[at + 3]), u32_at(madt, at + 4))),
                    9 => ids.push((u32_at(madt, at + 4), u32_at(madt, at + 8))),
                    _ => {}
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            let possible = 0..cpus.max(2);
            let enabled = possible.map(|id| (id, u32::from(id < cpus)));
            assert_eq!(ids, enabled.collect::<Vec<_>>());
        }
    }

    #[test]
    fn more_cpus_than_the_area_describes_are_refused() {
        let ram = GuestRam::new(1 << 20).unwrap();
        for cpus in [0x1000, 0x1001, u32::MAX] {
            let e = place_tables(&ram, cpus, 0).unwrap_err();
            assert!(matches!(e, BootError::TablesTooLong));
        }
    }
}
