//! MONITOR and MWAIT, on a processor that was asked to have them: a CPU sleeps until somebody stores to a line of memory.
//!
//! What notices the store is [`doppel_memory::Peer`]'s watch of the line. MWAIT is a halt that ends for one reason more: [`Activity::Waiting`]. A monitor is armed by MONITOR and holds until a store to the
//! line, the end of an MWAIT or an interrupt in between; without one MWAIT is a no-op, which the architecture allows always.
//!
//! Sources: Intel SDM vol. 2B (MONITOR, MWAIT), vol. 3A, 9.10; AMD APM vol. 3 (MONITOR, MWAIT).

use doppel_memory::AccessKind;
use iced_x86::{Code, Instruction};

use crate::interpret::{Flow, operand};
use crate::{Activity, Bus, Cpu, CpuMode, Exception, Gpr, Seg};

/// IA32_MISC_ENABLE: both instructions work.
pub(crate) const MISC_ENABLE_MONITOR: u64 = 1 << 18;
/// HWCR: neither does; both do in user code too.
const HWCR_DISABLED: u64 = 1 << 9;
const HWCR_USER: u64 = 1 << 10;
/// ECX of MWAIT: an interrupt ends it, masked or not.
const MASKED_TOO: u64 = 1;

impl Cpu {
    /// True where the processor has MONITOR and MWAIT and they are not switched off, as CPUID tells.
    pub(crate) fn has_monitor_now(&self) -> bool {
        let on = match self.cpuid.traits().monitor_in_misc_enable {
            true => self.msr.misc_enable & MISC_ENABLE_MONITOR != 0,
            false => self.msr.hwcr & HWCR_DISABLED == 0,
        };
        self.cpuid.has_monitor() && on
    }

    /// Ends an MWAIT that has nothing to wait for any more.
    #[inline]
    pub(crate) fn follow_monitor(&mut self, bus: &mut dyn Bus) {
        if let Activity::Waiting { masked } = self.activity
            && (!self.peer.is_armed() || masked && bus.interrupt_pending())
        {
            self.activity = Activity::Active;
            self.peer.disarm();
        }
    }
}

/// #UD where the instructions are not to be had here; #GP(0) where ECX asks for more than `known`.
fn check(cpu: &Cpu, known: u64) -> Result<(), Exception> {
    let traits = cpu.cpuid.traits();
    let opened = !traits.monitor_in_misc_enable && cpu.msr.hwcr & HWCR_USER != 0;
    let user = opened && cpu.mode() != CpuMode::V86;
    if !cpu.has_monitor_now() || cpu.cpl != 0 && !user {
        return Err(Exception::UD);
    }
    let wide = traits.monitor_extensions_in_rcx && cpu.mode() == CpuMode::Bits64;
    let extensions = cpu.reg(Gpr::Rcx) & if wide { u64::MAX } else { 0xffff_ffff };
    if extensions & !known != 0 {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// Where the line is, checked as a load of its byte is.
fn line(cpu: &Cpu, i: &Instruction) -> Result<u64, Exception> {
    let mask = match i.code() {
        Code::Monitorw => 0xffff,
        Code::Monitord => 0xffff_ffff,
        _ => u64::MAX,
    };
    let seg = operand::segment_of(i.memory_segment());
    let flat_stack = seg == Seg::Ss && cpu.mode() == CpuMode::Bits64;
    let seg = match flat_stack && !cpu.cpuid.traits().monitor_uses_stack_segment {
        true => Seg::Ds,
        false => seg,
    };
    operand::linear_in(cpu, seg, cpu.reg(Gpr::Rax) & mask, 1, false)
}

/// MONITOR. Hints in EDX are none that matter. Nothing is armed where there is no RAM.
pub(crate) fn monitor(cpu: &mut Cpu, i: &Instruction) -> Result<(), Exception> {
    check(cpu, 0)?;
    let linear = line(cpu, i)?;
    let privilege = cpu.privilege();
    let gpa = cpu.translate(linear, AccessKind::Read, privilege)?.gpa;
    cpu.note_access(linear, 1, false);
    match cpu.ram.is_ram(gpa) {
        true => cpu.watch_line(gpa),
        false => cpu.peer.disarm(),
    }
    Ok(())
}

/// MWAIT. The hint in EAX, how deep to sleep, is the host's affair.
pub(crate) fn mwait(cpu: &mut Cpu) -> Result<Flow, Exception> {
    check(cpu, MASKED_TOO)?;
    if !cpu.peer.is_armed() {
        return Ok(Flow::Next);
    }
    cpu.counters.monitor_waits += 1;
    let masked = cpu.reg(Gpr::Rcx) & MASKED_TOO != 0;
    Ok(Flow::Wait { masked })
}
