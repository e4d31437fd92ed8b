//! DSDT: the devices that cannot be found by themselves, in AML.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, Interrupt, Memory32Fixed,
    Method, Name, PackageBuilder, ResourceTemplate, Return, Scope,
};
use acpi_tables::sdt::Sdt;
use doppel_virtio::MMIO_SIZE;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::layout;

/// The table for `cpus` CPUs and `virtio_mmio` virtio devices without PCI.
pub fn dsdt(cpus: u32, virtio_mmio: u32) -> Sdt {
    // Revision 2: integers have 64 bits.
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.append_slice(&bytes(&soft_off()));
    let mut devices = pci_root();
    devices.extend(motherboard());
    devices.extend(com1());
    devices.extend(rtc());
    devices.extend(hpet());
    for id in 0..cpus {
        devices.extend(cpu(id));
    }
    for n in 0..virtio_mmio {
        devices.extend(virtio(n));
    }
    t.append_slice(&Scope::raw("\\_SB_".into(), devices));
    t
}

/// `\_S5`: what to write to SLP_TYP for soft off.
fn soft_off() -> Name {
    let mut package = PackageBuilder::new();
    for value in [layout::SLEEP_TYPE_S5, layout::SLEEP_TYPE_S5, 0, 0] {
        package.add_element(&value);
    }
    Name::new("_S5_".into(), &package)
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn crs(resources: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources))
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    bytes(&Device::new(name.into(), children))
}

/// The root of PCI bus 0: a PCI Express host bridge whose interrupts end at fixed I/O APIC inputs.
fn pci_root() -> Vec<u8> {
    let memory = |range: Range<u64>| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            range.start as u32,
            (range.end - 1) as u32,
            None,
        )
    };
    let windows = crs(vec![
        &AddressSpace::new_bus_number(0u16, 0xff),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::new_io(0u16, 0xcf7, None),
        &AddressSpace::new_io(0xd00u16, 0xffff, None),
        &memory(layout::PCI_MMIO_LOW),
        &memory(layout::PCI_MMIO_HIGH),
    ]);
    device(
        "PCI0",
        vec![
            &hid("PNP0A08"),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &windows,
            &interrupt_routes(),
            // The guest gets every feature that it asks for.
            &Method::new("_OSC".into(), 4, false, vec![&Return::new(&Arg(3))]),
        ],
    )
}

/// `_PRT`: for each device and pin, the GSI.
fn interrupt_routes() -> Name {
    let mut routes = PackageBuilder::new();
    for device in 0..32u32 {
        for pin in 0..4u32 {
            let mut route = PackageBuilder::new();
            route.add_element(&(device << 16 | 0xffff));
            route.add_element(&pin);
            route.add_element(&0u8);
            route.add_element(&layout::pci_gsi(device, pin));
            routes.add_element(&route);
        }
    }
    Name::new("_PRT".into(), &routes)
}

/// Resources that no driver may take: the ECAM window, the power management ports.
fn motherboard() -> Vec<u8> {
    let size = (layout::ECAM.end - layout::ECAM.start) as u32;
    let resources = crs(vec![
        &Memory32Fixed::new(true, layout::ECAM.start as u32, size),
        &IO::new(layout::PM_BASE, layout::PM_BASE, 1, layout::PM_LEN),
        &IO::new(layout::PM2_CONTROL, layout::PM2_CONTROL, 1, 1),
    ]);
    device("MBRD", vec![&hid("PNP0C02"), &resources])
}

fn isa_interrupt(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, irq.into())
}

fn com1() -> Vec<u8> {
    let resources = crs(vec![
        &IO::new(layout::COM1, layout::COM1, 1, 8),
        &isa_interrupt(layout::COM1_IRQ),
    ]);
    let uid = Name::new("_UID".into(), &1u8);
    device("COM1", vec![&hid("PNP0501"), &uid, &resources])
}

fn rtc() -> Vec<u8> {
    let resources = crs(vec![
        &IO::new(layout::RTC, layout::RTC, 1, 2),
        &isa_interrupt(layout::RTC_IRQ),
    ]);
    device("RTC_", vec![&hid("PNP0B00"), &resources])
}

fn hpet() -> Vec<u8> {
    let window = Memory32Fixed::new(true, layout::HPET as u32, doppel_pc::HPET_LEN as u32);
    device("HPET", vec![&hid("PNP0103"), &crs(vec![&window])])
}

fn cpu(id: u32) -> Vec<u8> {
    device(
        &format!("C{id:03X}"),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &id),
        ],
    )
}

/// A virtio device as a page of registers, by the name that Linux's virtio_mmio answers to.
fn virtio(n: u32) -> Vec<u8> {
    let page = layout::VIRTIO_MMIO.start as u32 + n * MMIO_SIZE as u32;
    let resources = crs(vec![
        &Memory32Fixed::new(true, page, MMIO_SIZE as u32),
        &Interrupt::new(true, false, false, true, layout::virtio_gsi(n)),
    ]);
    device(
        &format!("V{n:03X}"),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &n),
            &resources,
        ],
    )
}
