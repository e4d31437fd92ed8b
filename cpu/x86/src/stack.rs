//! The stack as control transfers use it: pushes and pops that take effect on RSP only once all succeeded.

use doppel_memory::Privilege;

use crate::interpret::operand;
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Rflags, Seg, Segment};

/// A stack pointer that moves ahead of the CPU's until [`Stack::commit`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    ss: Segment,
    pub sp: u64,
    long: bool,
    privilege: Privilege,
    /// Error code of the #SS of a limit or canonical violation.
    fault_code: u32,
}

impl Stack {
    /// The current stack.
    pub fn current(cpu: &Cpu) -> Self {
        Self::new(
            cpu,
            *cpu.segment(Seg::Ss),
            cpu.reg(Gpr::Rsp),
            cpu.cpl,
            cpu.mode() == CpuMode::Bits64,
        )
    }

    /// A stack that code of privilege `cpl` uses; `long` in 64-bit mode.
    pub fn new(cpu: &Cpu, ss: Segment, sp: u64, cpl: u8, long: bool) -> Self {
        let privilege = match cpl {
            3 => Privilege::User,
            _ if cpu.rflags.contains(Rflags::AC) => Privilege::SupervisorAc,
            _ => Privilege::Supervisor,
        };
        Stack {
            ss,
            sp,
            long,
            privilege,
            fault_code: 0,
        }
    }

    /// The same with another error code for #SS.
    pub fn with_code(self, fault_code: u32) -> Self {
        Stack { fault_code, ..self }
    }

    fn mask(&self) -> u64 {
        match (self.long, self.ss.big()) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        }
    }

    fn linear(&self, cpu: &Cpu, sp: u64, size: u64) -> Result<u64, Exception> {
        let fault = Exception::ss(self.fault_code);
        let offset = sp & self.mask();
        let linear = if self.long {
            let last = offset.wrapping_add(size - 1);
            if !(cpu.canonical(offset) && cpu.canonical(last)) {
                return Err(fault);
            }
            offset
        } else {
            if !self.within(offset, offset + size - 1) {
                return Err(fault);
            }
            self.ss.base.wrapping_add(offset) & 0xffff_ffff
        };
        self.check_alignment(cpu, linear, size)?;
        Ok(linear)
    }

    /// #AC for a misaligned stack of CPL 3 where the guest asked for alignment checks. Its error code is EXT.
    fn check_alignment(&self, cpu: &Cpu, linear: u64, size: u64) -> Result<(), Exception> {
        const EXT: u32 = 1;
        if self.privilege != Privilege::User || !cpu.rflags.contains(Rflags::AC) {
            return Ok(());
        }
        operand::alignment_checked(cpu, linear, size as usize).map_err(|e| Exception {
            error_code: Some(self.fault_code & EXT),
            ..e
        })
    }

    fn within(&self, first: u64, last: u64) -> bool {
        let limit = u64::from(self.ss.limit);
        let expand_down = self.ss.attributes & 0x1c == 0x14;
        if expand_down {
            first > limit && last <= self.mask()
        } else {
            last <= limit
        }
    }

    /// Pushes the low `size` (2, 4 or 8) bytes of a value.
    pub fn push(
        &mut self,
        cpu: &mut Cpu,
        bus: &mut dyn Bus,
        size: u64,
        v: u64,
    ) -> Result<(), Exception> {
        let sp = self.sp.wrapping_sub(size) & self.mask();
        let at = self.linear(cpu, sp, size)?;
        match size {
            2 => cpu.store(bus, at, self.privilege, v as u16)?,
            4 => cpu.store(bus, at, self.privilege, v as u32)?,
            _ => cpu.store(bus, at, self.privilege, v)?,
        }
        self.sp = sp;
        Ok(())
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, bus: &mut dyn Bus, size: u64) -> Result<u64, Exception> {
        let at = self.linear(cpu, self.sp, size)?;
        let v = match size {
            2 => cpu.load::<u16>(bus, at, self.privilege)?.into(),
            4 => cpu.load::<u32>(bus, at, self.privilege)?.into(),
            _ => cpu.load::<u64>(bus, at, self.privilege)?,
        };
        self.skip(size);
        Ok(v)
    }

    /// Moves up by `bytes` without a look at them.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp.wrapping_add(bytes) & self.mask();
    }

    /// The value that RSP takes: a 16-bit stack changes SP alone.
    pub fn rsp(&self, old: u64) -> u64 {
        let mask = self.mask();
        if mask == 0xffff {
            (old & !mask) | (self.sp & mask)
        } else {
            self.sp & mask
        }
    }

    /// Makes this the CPU's stack.
    pub fn commit(&self, cpu: &mut Cpu) {
        cpu.seg[Seg::Ss as usize] = self.ss;
        let rsp = &mut cpu.gpr[Gpr::Rsp as usize];
        *rsp = self.rsp(*rsp);
    }

    pub fn segment(&self) -> &Segment {
        &self.ss
    }
}
