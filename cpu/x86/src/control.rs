//! Control and debug registers (Intel SDM vol. 3A, sections 2.5 and 18.2): which writes fault, and what they change.
//!
//! Every check precedes the first change. Whatever the software TLBs hold that a write makes stale is flushed here.

use doppel_memory::PAGE_MASK;

use crate::{Bus, Cpu, CpuMode, Cr0, Cr4, Efer, Exception, Seg};

const CR3_PCID: u64 = 0xfff;
const CR3_NO_FLUSH: u64 = 1 << 63;
const DR6_ONES: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_ONE: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GENERAL_DETECT: u64 = 1 << 13;
const DR6_GENERAL_DETECT: u64 = 1 << 13;

const GP0: Exception = Exception::gp(0);

/// MOV from a control register. The caller checked the CPL.
pub(crate) fn read(cpu: &mut Cpu, bus: &mut dyn Bus, n: usize) -> Result<u64, Exception> {
    Ok(match n {
        0 => cpu.cr0.bits(),
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4.bits(),
        8 => bus.cr8(),
        _ => return Err(Exception::UD),
    })
}

/// MOV to a control register. The caller checked the CPL.
pub(crate) fn write(cpu: &mut Cpu, bus: &mut dyn Bus, n: usize, v: u64) -> Result<(), Exception> {
    match n {
        0 => write_cr0(cpu, bus, v),
        2 => {
            cpu.cr2 = v;
            Ok(())
        }
        3 => write_cr3(cpu, bus, v),
        4 => write_cr4(cpu, bus, v),
        8 if v < 16 => {
            bus.set_cr8(v);
            Ok(())
        }
        8 => Err(GP0),
        _ => Err(Exception::UD),
    }
}

/// MOV to CR0, also LMSW and CLTS.
pub(crate) fn write_cr0(cpu: &mut Cpu, bus: &mut dyn Bus, v: u64) -> Result<(), Exception> {
    let new = Cr0::from_bits_truncate(v) | Cr0::ET;
    let invalid = v >> 32 != 0
        || (new.contains(Cr0::PG) && !new.contains(Cr0::PE))
        || (new.contains(Cr0::NW) && !new.contains(Cr0::CD));
    if invalid {
        return Err(GP0);
    }
    let changed = cpu.cr0 ^ new;
    if changed.contains(Cr0::PG) {
        check_paging_switch(cpu, new)?;
    }
    let long = new.contains(Cr0::PG) && cpu.efer.contains(Efer::LME);
    if pae(new, cpu.cr4, long) && changed.intersects(Cr0::PG | Cr0::CD | Cr0::NW) {
        cpu.pdpte = read_pdptes(cpu, bus, cpu.cr3)?;
    }
    cpu.efer.set(Efer::LMA, long);
    cpu.cr0 = new;
    if changed.contains(Cr0::PE) {
        cpu.cpl = 0;
    }
    if changed.intersects(Cr0::PG | Cr0::WP | Cr0::PE) {
        cpu.flush_tlb(true);
    }
    Ok(())
}

/// What must hold where CR0.PG changes.
fn check_paging_switch(cpu: &Cpu, new: Cr0) -> Result<(), Exception> {
    const TSS16_TYPES: u32 = 8;
    let cs_long = cpu.segment(Seg::Cs).long();
    let invalid = if new.contains(Cr0::PG) {
        let tss16 = !cpu.tr.unusable() && cpu.tr.kind() & TSS16_TYPES == 0;
        cpu.efer.contains(Efer::LME) && (!cpu.cr4.contains(Cr4::PAE) || cs_long || tss16)
    } else {
        cpu.mode() == CpuMode::Bits64 || cpu.cr4.contains(Cr4::PCIDE)
    };
    if invalid { Err(GP0) } else { Ok(()) }
}

fn pae(cr0: Cr0, cr4: Cr4, long: bool) -> bool {
    cr0.contains(Cr0::PG) && cr4.contains(Cr4::PAE) && !long
}

/// Bits above the physical address width, up to bit 51.
fn beyond_physical(cpu: &Cpu) -> u64 {
    0x000f_ffff_ffff_ffff & !((1 << cpu.physical_bits) - 1)
}

/// The PDPTE registers that this CR3 gives, or #GP(0) for reserved bits.
fn read_pdptes(cpu: &mut Cpu, bus: &mut dyn Bus, cr3: u64) -> Result<[u64; 4], Exception> {
    let table = cr3 & 0xffff_ffe0;
    let reserved = beyond_physical(cpu) | 0xfff0_0000_0000_01e6;
    let mut pdptes = [0; 4];
    for (n, e) in pdptes.iter_mut().enumerate() {
        let mut bytes = [0; 8];
        cpu.load_physical(bus, table + 8 * n as u64, &mut bytes);
        *e = u64::from_le_bytes(bytes);
        if *e & 1 != 0 && *e & reserved != 0 {
            return Err(GP0);
        }
    }
    Ok(pdptes)
}

fn write_cr3(cpu: &mut Cpu, bus: &mut dyn Bus, v: u64) -> Result<(), Exception> {
    let pcide = cpu.cr4.contains(Cr4::PCIDE);
    let no_flush = pcide && v & CR3_NO_FLUSH != 0;
    let value = if pcide { v & !CR3_NO_FLUSH } else { v };
    let reserved = if cpu.long_mode() {
        beyond_physical(cpu) | 0xfff0_0000_0000_0000
    } else {
        0
    };
    if value & reserved != 0 {
        return Err(GP0);
    }
    if no_flush && value == cpu.cr3 {
        return Ok(());
    }
    let (from, to) = (cpu.cr3 & CR3_PCID, value & CR3_PCID);
    if pcide && from != to {
        cpu.cr3 = value;
        cpu.change_pcid(from, to, no_flush);
        return Ok(());
    }
    load_cr3(cpu, bus, value)
}

/// Loads CR3 and forgets the translations of the current PCID, the only one without CR4.PCIDE.
pub(crate) fn load_cr3(cpu: &mut Cpu, bus: &mut dyn Bus, v: u64) -> Result<(), Exception> {
    if pae(cpu.cr0, cpu.cr4, cpu.long_mode()) {
        cpu.pdpte = read_pdptes(cpu, bus, v)?;
    }
    cpu.cr3 = v;
    cpu.flush_tlb(false);
    Ok(())
}

/// The CR4 bits that may be set: those whose feature CPUID shows.
fn supported_cr4() -> Cr4 {
    Cr4::VME
        | Cr4::PVI
        | Cr4::TSD
        | Cr4::DE
        | Cr4::PSE
        | Cr4::PAE
        | Cr4::MCE
        | Cr4::PGE
        | Cr4::PCE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::UMIP
        | Cr4::FSGSBASE
        | Cr4::PCIDE
        | Cr4::SMEP
        | Cr4::SMAP
}

fn write_cr4(cpu: &mut Cpu, bus: &mut dyn Bus, v: u64) -> Result<(), Exception> {
    let mut supported = supported_cr4();
    supported.set(Cr4::OSXSAVE, cpu.cpuid.has_xsave());
    supported.set(Cr4::PKE, cpu.cpuid.has_protection_keys());
    supported.set(Cr4::LA57, cpu.cpuid.has_la57());
    let new = Cr4::from_bits_retain(v);
    let changed = cpu.cr4 ^ new;
    let long = cpu.long_mode();
    let enables_pcid = changed.contains(Cr4::PCIDE) && new.contains(Cr4::PCIDE);
    let invalid = !supported.contains(new)
        || (long && (!new.contains(Cr4::PAE) || changed.contains(Cr4::LA57)))
        || (enables_pcid && (!long || cpu.cr3 & CR3_PCID != 0));
    if invalid {
        return Err(GP0);
    }
    let paging = Cr4::PSE | Cr4::PAE | Cr4::PGE | Cr4::SMEP;
    if pae(cpu.cr0, new, long) && changed.intersects(paging) {
        cpu.pdpte = read_pdptes(cpu, bus, cpu.cr3)?;
    }
    cpu.cr4 = new;
    if changed.intersects(paging | Cr4::SMAP | Cr4::PCIDE) {
        cpu.flush_tlb(true);
    } else if changed.intersects(Cr4::PKE | Cr4::DE) {
        cpu.empty_tlbs();
    }
    Ok(())
}

/// LMSW: the low four bits of CR0, of which PE can only be set.
pub(crate) fn load_machine_status_word(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    v: u16,
) -> Result<(), Exception> {
    let kept = cpu.cr0.bits() & !0xe;
    write_cr0(cpu, bus, kept | u64::from(v & 0xf))
}

/// Checks that come before any access to a debug register, and the register that is meant.
fn debug_register(cpu: &Cpu, n: usize) -> Result<usize, Exception> {
    let n = match n {
        4 | 5 if cpu.cr4.contains(Cr4::DE) => return Err(Exception::UD),
        4 | 5 => n + 2,
        0..=7 => n,
        _ => return Err(Exception::UD),
    };
    if cpu.cpl != 0 {
        return Err(GP0);
    }
    if cpu.dr[7] & DR7_GENERAL_DETECT != 0 {
        return Err(Exception::db(DR6_GENERAL_DETECT, false));
    }
    Ok(n)
}

/// MOV from a debug register.
pub(crate) fn read_debug(cpu: &Cpu, n: usize) -> Result<u64, Exception> {
    Ok(cpu.dr[debug_register(cpu, n)?])
}

/// MOV to a debug register.
pub(crate) fn write_debug(cpu: &mut Cpu, n: usize, v: u64) -> Result<(), Exception> {
    let n = debug_register(cpu, n)?;
    if n >= 6 && v >> 32 != 0 {
        return Err(GP0);
    }
    let v = match n {
        6 => (v & DR6_WRITABLE) | DR6_ONES,
        7 => (v & DR7_WRITABLE) | DR7_ONE,
        _ => v,
    };
    cpu.set_debug_register(n, v);
    Ok(())
}

/// INVPCID (Intel SDM vol. 2A): `descriptor` is its 128-bit memory operand.
pub(crate) fn invalidate_pcid(
    cpu: &mut Cpu,
    kind: u64,
    descriptor: [u64; 2],
) -> Result<(), Exception> {
    let [pcid, linear] = descriptor;
    let pcide = cpu.cr4.contains(Cr4::PCIDE);
    if pcid > CR3_PCID || kind > 3 || (kind < 2 && !pcide && pcid != 0) {
        return Err(GP0);
    }
    let current = if pcide { cpu.cr3 & CR3_PCID } else { 0 };
    match kind {
        0 if cpu.mode() == CpuMode::Bits64 && !cpu.canonical_in_register(linear) => {
            return Err(GP0);
        }
        0 | 1 if pcid != current => cpu.flush_kept(pcid),
        0 => cpu.flush_tlb_page(linear & !PAGE_MASK),
        1 => cpu.flush_tlb(false),
        2 => cpu.flush_tlb(true),
        _ => cpu.flush_all_non_global(),
    }
    Ok(())
}
