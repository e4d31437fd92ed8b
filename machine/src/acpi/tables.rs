//! The fixed ACPI tables: FADT, FACS, MADT, MCFG, HPET.

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::layout;

/// IA-PC boot architecture flags: there are ISA devices, there is no VGA; bit 1 clear: no keyboard controller.
const LEGACY_DEVICES: u16 = 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;

/// Latencies above these mean that C2 and C3 do not exist.
const NO_C2: u16 = 0xfff;
const NO_C3: u16 = 0xfff;

/// Firmware ACPI control structure: nothing of it is used, but its absence is warned about.
pub fn facs() -> FACS {
    FACS::new()
}

/// Fixed ACPI description table.
pub fn fadt(facs: u32, dsdt: u32) -> FADT {
    let mut t = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_32(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    // From 6.3 on a processor that is not enabled has to be marked as one that can be, and memtest86+ starts those.
    t.fadt_minor_version = 2;
    t.sci_int = u16::from(layout::SCI).into();
    t.smi_cmd = u32::from(layout::SMI_COMMAND).into();
    t.acpi_enable = layout::SMI_ACPI_ENABLE;
    t.acpi_disable = layout::SMI_ACPI_DISABLE;
    t.pm1a_evt_blk = u32::from(layout::PM1_EVENT).into();
    t.pm1_evt_len = 4;
    t.pm1a_cnt_blk = u32::from(layout::PM1_CONTROL).into();
    t.pm1_cnt_len = 2;
    t.pm2_cnt_blk = u32::from(layout::PM2_CONTROL).into();
    t.pm2_cnt_len = 1;
    t.pm_tmr_blk = u32::from(layout::PM_TIMER).into();
    t.pm_tmr_len = 4;
    t.gpe0_blk = u32::from(layout::GPE0).into();
    t.gpe0_blk_len = 4;
    t.p_lvl2_lat = NO_C2.into();
    t.p_lvl3_lat = NO_C3.into();
    t.century = doppel_pc::RTC_CENTURY;
    t.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT).into();
    t.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::RESET_CONTROL.into(),
    );
    t.reset_value = layout::RESET_VALUE;
    t.finalize()
}

/// Local APIC IDs from here on need an x2APIC entry.
const FIRST_X2APIC_ID: u32 = 255;
const PCAT_COMPAT: u32 = 1;
const CPU_ENABLED: u32 = 1;
const CPU_ABSENT: u32 = 0;
const ISA_BUS: u8 = 0;
/// Interrupt flags of an override: as the bus has it (ISA: high, edge), and active high with level trigger.
const BUS_DEFAULT: u16 = 0;
const HIGH_LEVEL: u16 = 0b1101;

/// Multiple APIC description table, revision 4 (ACPI 6.2): for `cpus` processors, and places for more up to [`super::possible_cpus`].
pub fn madt(cpus: u32) -> Sdt {
    let mut t = Sdt::new(*b"APIC", 36, 4, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.append(layout::LOCAL_APIC as u32);
    t.append(PCAT_COMPAT);
    for id in 0..super::possible_cpus(cpus) {
        let flags = if id < cpus { CPU_ENABLED } else { CPU_ABSENT };
        t.append_slice(&cpu_entry(id, flags));
    }
    let io_apic = (layout::IO_APIC as u32).to_le_bytes();
    t.append_slice(&[1, 12, layout::IO_APIC_ID, 0]);
    t.append_slice(&io_apic);
    t.append_slice(&[0; 4]); // first GSI
    t.append_slice(&source_override(0, layout::PIT_GSI, BUS_DEFAULT));
    t.append_slice(&source_override(
        layout::SCI,
        layout::SCI.into(),
        HIGH_LEVEL,
    ));
    // NMI at LINT1 of every CPU: by processor UID, and by x2APIC UID for those that have one.
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    if cpus > FIRST_X2APIC_ID {
        t.append_slice(&[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    t
}

fn cpu_entry(id: u32, flags: u32) -> Vec<u8> {
    let [low, ..] = id.to_le_bytes();
    let (head, tail) = if id < FIRST_X2APIC_ID {
        (vec![0, 8, low, low], vec![])
    } else {
        let mut head = vec![9, 16, 0, 0];
        head.extend(id.to_le_bytes());
        (head, id.to_le_bytes().to_vec())
    };
    [head, flags.to_le_bytes().to_vec(), tail].concat()
}

fn source_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    let mut entry = vec![2, 10, ISA_BUS, irq];
    entry.extend(gsi.to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry
}

/// PCI configuration space in memory.
pub fn mcfg() -> MCFG {
    let mut t = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    t.add_ecam(layout::ECAM.start, 0, 0, 0xff);
    t
}

/// Counts that a timer must be ahead of the counter at least: 10 µs.
const HPET_LEAST_TICKS: u16 = 1_000;

/// High precision event timer (IA-PC HPET specification 1.0a, 3.2.4).
pub fn hpet() -> Sdt {
    let mut t = Sdt::new(*b"HPET", 36, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let window = GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::Undefined,
        layout::HPET,
    );
    t.append(doppel_pc::HPET_ID);
    t.append_slice(&bytes(&window));
    // The first of them; no guarantee for the rest of its page.
    t.append(0u8);
    t.append(HPET_LEAST_TICKS);
    t.append(0u8);
    t
}
