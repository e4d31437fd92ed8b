//! The reference interpreter: one instruction at a time, in every mode.
//!
//! It is the oracle that the other engines are compared with, the fallback where they do not go, and what emulates single
//! instructions for them. So it is written for being right: an instruction computes first and commits last, and where it
//! gives up with an [`Exception`] no register, flag or byte of memory has changed (except where the manual allows:
//! string instructions keep the units that they have done).
//!
//! Executing 64-bit code for long, it runs the common instructions in predecoded blocks (`quick`), which any case out of the
//! ordinary leaves for [`step`]'s way of doing things. `docs/interpret.md` tells of both, and of what is remembered.
//!
//! Reading order: [`step`], `decode` (which instruction is next), `dispatch` (which function executes it), `operand`
//! (how they all reach registers and memory), then a file per textbook concept. x87, SSE and AVX instructions are
//! not written out: `native` lets the host's processor execute them on the guest's operands.

mod arch_native;
mod arithmetic;
mod atomic;
mod availability;
mod bcd;
mod bit;
mod bmi;
mod condition;
pub(crate) mod control;
mod data_transfer;
mod decode;
mod dispatch;
mod engine;
mod flags;
mod hint;
mod logic;
mod masked;
mod multiply_divide;
mod native;
mod numeric_error;
pub(crate) mod operand;
mod push_pop;
mod quick;
pub(crate) mod register;
mod shift;
mod snippet;
pub(crate) mod stack;
mod string;
#[cfg(test)]
mod tests;
mod vector;
mod x87_environment;
mod xsave;
mod zero_vectors;

use std::sync::atomic::AtomicBool;

use iced_x86::{Instruction, Mnemonic};

pub(crate) use decode::CodeCache;
pub use engine::Interpret;

/// Bytes of an XSAVE area, of either format, that holds these state components; `None` where the host does not have them all.
pub fn extended_area_size(components: u64) -> Option<usize> {
    let layout = vector::Layout::of_host();
    (components & !layout.supported == 0).then(|| layout.area_size(components))
}

/// Results and flags of additions, subtractions and logic.
pub mod arithmetic_flags {
    pub use super::flags::{add, logic, sub};
}
pub(crate) use native::HostUnit;
pub(crate) use xsave::in_use_with_mxcsr as components_in_use;

use crate::{Activity, Bus, Cpu, CpuMode, Exception, Outcome, Rflags, exception};

/// Where execution goes on after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// At the next instruction.
    Next,
    /// At RIP, which the instruction has set.
    Done,
    /// At the same instruction: a repeated string instruction was interrupted, its registers are updated.
    Repeat,
    /// At the same instruction, of which nothing was executed, after an interrupt: the processor is frozen by an x87 error (`numeric_error`).
    Freeze,
    /// HLT was executed; RIP goes to the next instruction.
    Halt,
    /// The same of MWAIT, which an interrupt that is masked ends too where `masked` says so.
    Wait { masked: bool },
}

/// What an instruction led to.
pub(crate) type Step = Result<Flow, Exception>;
/// A function that executes an instruction. On `Err` it has changed nothing that the manual does not allow.
pub(crate) type Handler = fn(&mut Cpu, &mut dyn Bus, &Instruction) -> Step;

/// DR6.BS: the exception is a single step.
const DR6_BS: u64 = 1 << 14;

/// Executes one instruction (of a repeated string instruction a bounded part), or delivers the exception that it raised.
/// Pending interrupts are not looked at. Callable in any state of an active CPU.
pub fn step(cpu: &mut Cpu, bus: &mut dyn Bus) -> Outcome {
    execute_one(cpu, bus).0
}

/// Executes some instructions, until an interrupt may have become deliverable, others ask something of the CPU, or `stop` is set: for an engine that leaves instructions
/// to be counted to the interpreter ([`crate::Pmu::steps`]).
pub fn steps(cpu: &mut Cpu, bus: &mut dyn Bus, stop: &dyn Fn() -> bool) {
    const MOST: u32 = 64;
    /// Some microseconds.
    const MOST_QUICK: u64 = 1000;
    cpu.code.expect_all();
    let never = AtomicBool::new(false);
    for _ in 0..MOST {
        run_quick(cpu, &never, MOST_QUICK);
        let (outcome, attention) = execute_one(cpu, bus);
        let changes = !cpu.code_writes.is_empty() || cpu.peer.has_requests();
        if attention || outcome != Outcome::Continue || changes || stop() {
            return;
        }
    }
}

/// Runs predecoded blocks, `most` instructions and a few more, and fewer where their count overflows before.
#[inline]
fn run_quick(cpu: &mut Cpu, kick: &AtomicBool, most: u64) {
    if !cpu.pmu.steps() {
        return quick::run(cpu, kick, most);
    }
    cpu.begin_step();
    let before = cpu.counters.quick_instructions;
    let most = most.min(cpu.pmu.budget());
    quick::run(cpu, kick, most);
    cpu.pmu.retire(cpu.counters.quick_instructions - before);
}

/// [`step`]; also says whether an interrupt may have become deliverable.
#[inline]
fn execute_one(cpu: &mut Cpu, bus: &mut dyn Bus) -> (Outcome, bool) {
    cpu.counters.interpreted_instructions += 1;
    let shadow = cpu.interrupt_shadow || cpu.mov_ss_shadow;
    let after_mov_ss = cpu.mov_ss_shadow;
    cpu.interrupt_shadow = false;
    cpu.mov_ss_shadow = false;
    let before = cpu.rflags;
    // In the shadow of MOV SS no #DB is raised, but for the fault of an instruction breakpoint on AMD's processors.
    let breakpoints = if after_mov_ss && cpu.cpuid.traits().mov_ss_holds_instruction_breakpoints {
        Ok(())
    } else {
        check_breakpoints(cpu)
    };
    let mut decoded = decode::Decoded::none();
    let virtual_interrupt = crate::flags::check_virtual_interrupt(cpu);
    if let Err(e) = breakpoints
        .and(virtual_interrupt)
        .and_then(|()| decode::next(cpu, &mut decoded))
    {
        // As of any instruction that faults: MOV SS before it may have left some.
        cpu.breakpoint_hits = 0;
        return (exception::raise(cpu, bus, e, cpu.rip), true);
    }
    let i = &decoded.instruction;
    cpu.rflags.remove(Rflags::RF);
    let next = next_rip(cpu, i);
    let devices = cpu.counters.mmio_accesses;
    let counted = cpu.pmu.steps();
    if counted {
        cpu.begin_step();
    }
    let outcome = match (decoded.handler)(cpu, bus, i) {
        Ok(flow) => {
            if counted && !matches!(flow, Flow::Repeat | Flow::Freeze) {
                cpu.pmu.retire(1);
            }
            finish(cpu, bus, i, flow, next, before)
        }
        Err(e) => {
            cpu.breakpoint_hits = 0;
            let outcome = exception::raise(cpu, bus, e, next);
            return (outcome, true);
        }
    };
    let overflow = counted && cpu.end_step();
    let attention = shadow || decoded.system || overflow || devices != cpu.counters.mmio_accesses;
    (outcome, attention)
}

fn next_rip(cpu: &Cpu, i: &Instruction) -> u64 {
    let next = cpu.rip.wrapping_add(i.len() as u64);
    if cpu.mode() == CpuMode::Bits64 {
        next
    } else {
        next & 0xffff_ffff
    }
}

#[inline]
fn finish(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    flow: Flow,
    next: u64,
    before: Rflags,
) -> Outcome {
    match flow {
        Flow::Next => cpu.rip = next,
        Flow::Done => {}
        // An event that comes now finds RF set, so that the rest is no new hit of an instruction breakpoint.
        Flow::Repeat if steps_without_rf(cpu) => {}
        Flow::Repeat => cpu.rflags |= Rflags::RF,
        Flow::Freeze => {
            cpu.rflags |= before & Rflags::RF;
            cpu.activity = Activity::Halted;
            return Outcome::Halted;
        }
        Flow::Halt => {
            cpu.rip = next;
            cpu.activity = Activity::Halted;
        }
        Flow::Wait { masked } => {
            cpu.rip = next;
            cpu.activity = Activity::Waiting { masked };
        }
    }
    let traps = traps(cpu, i, flow, before);
    if traps != 0 {
        let at = cpu.rip;
        // It ends a halt.
        cpu.activity = Activity::Active;
        return exception::raise(cpu, bus, Exception::db(traps, true), at);
    }
    match cpu.activity {
        Activity::Active => Outcome::Continue,
        Activity::Shutdown => Outcome::Shutdown,
        Activity::Halted | Activity::Waiting { .. } | Activity::WaitForSipi => Outcome::Halted,
    }
}

/// The traps after an instruction, as bits of DR6: hits of data breakpoints and the single step.
#[inline]
fn traps(cpu: &mut Cpu, i: &Instruction, flow: Flow, before: Rflags) -> u64 {
    let mut traps = 0;
    let may_step = (cpu.rflags | before).contains(Rflags::TF) && cpu.steps_at(flow == Flow::Done);
    if may_step && single_steps(cpu, i, before) {
        traps |= DR6_BS;
    }
    if cpu.breakpoint_hits != 0 && !cpu.mov_ss_shadow {
        traps |= cpu.take_hits();
    }
    traps
}

/// True where TF leads to #DB after an instruction: not in the shadow of MOV SS, and not in the handler that the instruction entered.
/// TF counts as it was before, but as SYSCALL and SYSRET leave it: the kernel is not stepped into where SFMASK has TF, and user code
/// is stepped from behind the system call on. (The manuals are silent. Linux's entry_64.S returns with IRET where TF is set, since SYSRET traps at once.)
fn single_steps(cpu: &Cpu, i: &Instruction, before: Rflags) -> bool {
    use Mnemonic::*;
    let counts = match i.mnemonic() {
        Int | Int1 | Int3 | Into => return false,
        Syscall | Sysret | Sysretq => cpu.rflags,
        _ => before,
    };
    counts.contains(Rflags::TF) && !cpu.mov_ss_shadow && !cpu.has_switched_task()
}

fn steps_without_rf(cpu: &Cpu) -> bool {
    cpu.rflags.contains(Rflags::TF) && !cpu.cpuid.traits().step_in_repetition_sets_rf
}

/// #DB, a fault, where an instruction breakpoint in DR0 to DR3 is enabled for RIP and RF does not skip it.
#[inline]
fn check_breakpoints(cpu: &Cpu) -> Result<(), Exception> {
    const ENABLES: u64 = 0xff;
    if cpu.dr[7] & ENABLES == 0 || cpu.rflags.contains(Rflags::RF) {
        return Ok(());
    }
    cpu.check_instruction_breakpoints()
}
