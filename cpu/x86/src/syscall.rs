//! SYSCALL, SYSRET, SYSENTER and SYSEXIT, as the vendor that CPUID names does them (Intel SDM vol. 2B; AMD APM vol. 3).
//!
//! The vendors differ: AMD has SYSCALL in legacy and compatibility mode and no SYSENTER in long mode, Intel the reverse;
//! AMD's SYSRET takes a return address that is not canonical and faults in user mode.

use crate::segment::{flat, flat_attributes};
use crate::{Cpu, CpuMode, Cr0, Efer, Exception, Gpr, Rflags, Seg};

const GP0: Exception = Exception::gp(0);

/// True where SYSCALL and SYSRET are instructions.
fn has_syscall(cpu: &Cpu) -> bool {
    let anywhere = cpu.cpuid.traits().syscall_outside_64_bit_mode;
    let here = anywhere || cpu.mode() == CpuMode::Bits64;
    cpu.efer.contains(Efer::SCE) && cpu.cr0.contains(Cr0::PE) && here
}

/// SYSCALL.
pub(crate) fn syscall(cpu: &mut Cpu, next_rip: u64) -> Result<(), Exception> {
    let mode = cpu.mode();
    if !has_syscall(cpu) {
        return Err(Exception::UD);
    }
    let star = cpu.msr.star;
    cpu.gpr[Gpr::Rcx as usize] = next_rip;
    let mut cleared = Rflags::RF;
    if cpu.long_mode() {
        let saved = cpu.rflags & !Rflags::RF;
        cpu.gpr[Gpr::R11 as usize] = saved.bits();
        cleared |= Rflags::from_bits_truncate(cpu.msr.sfmask);
        cpu.rip = if mode == CpuMode::Bits64 {
            cpu.msr.lstar
        } else {
            cpu.msr.cstar
        };
    } else {
        cleared |= Rflags::VM | Rflags::IF;
        cpu.rip = star & 0xffff_ffff;
    }
    cpu.rflags = (cpu.rflags & !cleared) | Rflags::ONE;
    let long = cpu.long_mode();
    enter_kernel(cpu, (star >> 32) as u16 & !3, long);
    Ok(())
}

fn enter_kernel(cpu: &mut Cpu, cs: u16, long: bool) {
    let attributes = code_attributes(long);
    cpu.seg[Seg::Cs as usize] = flat(cs, attributes, 0);
    cpu.seg[Seg::Ss as usize] = flat(cs.wrapping_add(8), flat_attributes::DATA, 0);
    cpu.cpl = 0;
}

fn enter_user(cpu: &mut Cpu, cs: u16, ss: u16, long: bool) {
    cpu.seg[Seg::Cs as usize] = flat(cs | 3, code_attributes(long), 3);
    cpu.seg[Seg::Ss as usize] = flat(ss | 3, flat_attributes::DATA, 3);
    cpu.cpl = 3;
}

fn code_attributes(long: bool) -> u32 {
    if long {
        flat_attributes::CODE64
    } else {
        flat_attributes::CODE32
    }
}

/// SYSRET; `wide` with a 64-bit operand size.
pub(crate) fn sysret(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    // What SYSRET takes from R11: neither RF nor VM.
    const RESTORED: u64 = 0x3c_7fd7;
    if !has_syscall(cpu) {
        return Err(Exception::UD);
    }
    let rcx = cpu.reg(Gpr::Rcx);
    let checks = wide && cpu.cpuid.traits().sysret_checks_address;
    if cpu.cpl != 0 || checks && !cpu.canonical(rcx) {
        return Err(GP0);
    }
    cpu.rflags = if cpu.long_mode() {
        Rflags::from_bits_truncate(cpu.reg(Gpr::R11) & RESTORED) | Rflags::ONE
    } else {
        cpu.rflags | Rflags::IF
    };
    let base = (cpu.msr.star >> 48) as u16;
    cpu.rip = if wide { rcx } else { rcx & 0xffff_ffff };
    let cs = if wide { base.wrapping_add(16) } else { base };
    enter_user(cpu, cs, base.wrapping_add(8), wide);
    Ok(())
}

/// #UD where the vendor has no SYSENTER in this mode, #GP(0) outside protected mode.
fn check_sysenter(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.long_mode() && !cpu.cpuid.traits().sysenter_in_long_mode {
        return Err(Exception::UD);
    }
    if !cpu.cr0.contains(Cr0::PE) || cpu.msr.sysenter_cs & 0xfffc == 0 {
        return Err(GP0);
    }
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(cpu: &mut Cpu) -> Result<(), Exception> {
    check_sysenter(cpu)?;
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags.remove(Rflags::VM | Rflags::IF);
    cpu.gpr[Gpr::Rsp as usize] = cpu.msr.sysenter_esp & mask;
    cpu.rip = cpu.msr.sysenter_eip & mask;
    enter_kernel(cpu, cpu.msr.sysenter_cs as u16 & !3, long);
    Ok(())
}

/// SYSEXIT; `wide` with a 64-bit operand size.
pub(crate) fn sysexit(cpu: &mut Cpu, wide: bool) -> Result<(), Exception> {
    if cpu.cpl != 0 && cpu.cpuid.traits().sysexit_checks_privilege_first {
        return Err(GP0);
    }
    check_sysenter(cpu)?;
    let (rsp, rip) = (cpu.reg(Gpr::Rcx), cpu.reg(Gpr::Rdx));
    let invalid = wide && !(cpu.canonical(rsp) && cpu.canonical(rip));
    if cpu.cpl != 0 || invalid {
        return Err(GP0);
    }
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[Gpr::Rsp as usize] = rsp & mask;
    cpu.rip = rip & mask;
    let base = cpu.msr.sysenter_cs as u16 & !3;
    let cs = base.wrapping_add(if wide { 32 } else { 16 });
    enter_user(cpu, cs, cs.wrapping_add(8), wide);
    Ok(())
}
