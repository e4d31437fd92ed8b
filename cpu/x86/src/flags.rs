//! PUSHF, POPF, CLI and STI: the flags that IOPL guards, and VIF, which stands for IF where IOPL does not give that away (Intel SDM vol. 3B, sections
//! 22.3 and 22.4).

use iced_x86::{Code, Instruction};

use crate::interpret::stack::{peek, push, release};
use crate::{Bus, Cpu, CpuMode, Cr4, Exception, Rflags};

const GP0: Exception = Exception::gp(0);

impl Cpu {
    /// CLI and STI change VIF: in virtual-8086 mode by CR4.VME, in other code at CPL 3 by CR4.PVI.
    fn has_virtual_interrupts(&self) -> bool {
        let extension = match self.mode() {
            CpuMode::V86 => Cr4::VME,
            _ => Cr4::PVI,
        };
        self.cpl == 3 && self.iopl() < 3 && self.cr4.contains(extension)
    }

    /// The next instruction raises #GP(0): the code may be interrupted, and an interrupt is pending.
    #[inline]
    pub fn virtual_interrupt_waits(&self) -> bool {
        const BOTH: Rflags = Rflags::VIF.union(Rflags::VIP);
        self.rflags.contains(BOTH) && self.has_virtual_interrupts()
    }
}

/// #GP(0) in place of the next instruction where a virtual interrupt waits.
#[inline]
pub(crate) fn check_virtual_interrupt(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.virtual_interrupt_waits() {
        Err(GP0)
    } else {
        Ok(())
    }
}

fn operand_size(i: &Instruction) -> usize {
    match i.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

/// Whether VIF stands for IF in the FLAGS of `size` bytes that PUSHF, POPF and IRET move; #GP(0) where they are not for virtual-8086 code.
pub(crate) fn shows_vif(cpu: &Cpu, size: u64) -> Result<bool, Exception> {
    match cpu.mode() {
        CpuMode::V86 if cpu.iopl() == 3 => Ok(false),
        CpuMode::V86 if size == 2 && cpu.has_virtual_interrupts() => Ok(true),
        CpuMode::V86 => Err(GP0),
        _ => Ok(false),
    }
}

/// FLAGS as virtual-8086 code that has VIF in the place of IF sees them.
pub(crate) fn with_vif(flags: Rflags) -> Rflags {
    let mut shown = flags | Rflags::IOPL;
    shown.set(Rflags::IF, flags.contains(Rflags::VIF));
    shown
}

/// The monitor's part of FLAGS that such code pops: interrupts that are pending, and single steps.
pub(crate) fn check_vif(cpu: &Cpu, popped: Rflags) -> Result<(), Exception> {
    let pending = popped.contains(Rflags::IF) && cpu.rflags.contains(Rflags::VIP);
    if pending || popped.contains(Rflags::TF) {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// PUSHF, PUSHFD, PUSHFQ: VM and RF are stored as 0.
pub(crate) fn pushf(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let size = operand_size(i);
    let image = match shows_vif(cpu, size as u64)? {
        true => with_vif(cpu.rflags),
        false => cpu.rflags,
    };
    push(cpu, bus, size, (image & !(Rflags::VM | Rflags::RF)).bits())
}

/// POPF, POPFD, POPFQ: IOPL changes at CPL 0 only, IF only where IOPL allows; the rest of what it may not change stays
/// without a fault.
pub(crate) fn popf(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let size = operand_size(i);
    let vif = shows_vif(cpu, size as u64)?;
    let popped = Rflags::from_bits_truncate(peek(cpu, bus, size, 0)?);
    if vif {
        check_vif(cpu, popped)?;
        cpu.rflags.set(Rflags::VIF, popped.contains(Rflags::IF));
    }
    release(cpu, size as u64);
    let mut writable = Rflags::ARITHMETIC | Rflags::TF | Rflags::DF | Rflags::NT;
    if size != 2 {
        writable |= Rflags::AC | Rflags::ID;
    }
    writable.set(Rflags::IF, cpu.io_privileged());
    writable.set(Rflags::IOPL, cpu.cpl == 0);
    cpu.rflags = (cpu.rflags & !(writable | Rflags::RF)) | (popped & writable) | Rflags::ONE;
    Ok(())
}

/// The flag that CLI and STI change.
fn interrupt_flag(cpu: &Cpu) -> Result<Rflags, Exception> {
    if cpu.io_privileged() {
        Ok(Rflags::IF)
    } else if cpu.has_virtual_interrupts() {
        Ok(Rflags::VIF)
    } else {
        Err(GP0)
    }
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu) -> Result<(), Exception> {
    let flag = interrupt_flag(cpu)?;
    cpu.rflags.remove(flag);
    Ok(())
}

/// STI: where it sets IF, the next instruction still runs undisturbed.
pub(crate) fn sti(cpu: &mut Cpu) -> Result<(), Exception> {
    let flag = interrupt_flag(cpu)?;
    if flag == Rflags::IF {
        cpu.interrupt_shadow = !cpu.rflags.contains(Rflags::IF);
    } else if cpu.rflags.contains(Rflags::VIP) {
        return Err(GP0);
    }
    cpu.rflags.insert(flag);
    Ok(())
}
