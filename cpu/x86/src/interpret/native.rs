//! x87, MMX, SSE, AVX and AVX-512 instructions, executed by the host's processor on the guest's operands.
//!
//! `arch_native` says how one instruction is run; here is what surrounds it: the checks that raise the guest's
//! exceptions, guest memory to and from the bounce buffer, SIMD floating-point exceptions. Instructions
//! that touch many addresses are taken apart in `masked`, those that save and load the state in `xsave`.
//!
//! SIMD floating-point exceptions: a native #XM must not happen, so the instruction runs with all of them masked. Where the
//! guest has unmasked one that is then found raised, the state from before is put back and #XM raised. A tiny result that is exact
//! raises underflow only where that is not masked: a run with flush-to-zero, which raises it for every tiny result, tells.
//! Half-precision instructions know no flush-to-zero: theirs is missed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use iced_x86::{Instruction, Mnemonic, Register};

use super::arch_native::{Bounce, CodeBuffer, Frame};
use super::availability::{HostFeatures, Unit};
use super::flags;
use super::numeric_error;
use super::operand::{effective_address, linear, linear_displaced, linear_unchecked};
use super::snippet::{self, Aligned, Memory, Plan, Snippet};
use super::vector::{self, Layout};
use super::x87_environment::Environment;
use super::{Flow, Step, decode, masked};
use crate::{Bus, Cpu, Cr0, Cr4, Exception, FpuArea, Gpr, Rflags};

/// Bytes of the largest memory operand.
pub(super) const BOUNCE_SIZE: usize = 128;

/// The host's processor as an execution unit of one CPU's; made when it is first needed.
#[derive(Default)]
pub(crate) struct HostUnit(Option<Box<Host>>);

struct Host {
    code: CodeBuffer,
    snippets: HashMap<Instruction, Option<Snippet>, BuildHasherDefault<WordHasher>>,
    frame: Frame,
    bounce: Bounce,
    layout: Layout,
    features: HostFeatures,
}

impl std::fmt::Debug for HostUnit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let snippets = self.0.as_ref().map_or(0, |h| h.snippets.len());
        f.debug_struct("HostUnit")
            .field("snippets", &snippets)
            .finish()
    }
}

/// Mixes the words of an [`Instruction`]; speed matters, and the guest gains nothing by collisions.
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64((*b).into());
        }
    }
    fn write_u8(&mut self, v: u8) {
        self.write_u64(v.into());
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(v.into());
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, v: usize) {
        self.write_u64(v as u64);
    }
    fn write_isize(&mut self, v: isize) {
        self.write_u64(v as u64);
    }
}

pub(super) fn lookup(i: &Instruction) -> Option<super::Handler> {
    Unit::of(i).map(|_| execute as super::Handler)
}

/// Executes an instruction natively; #UD where the host lacks it, or it is not one that may run so.
pub(super) fn execute(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    with_host(cpu, |cpu, host| host.execute(cpu, bus, i))
}

/// The layout of the host's XSAVE area and the bits of MXCSR that it implements.
pub(super) fn host_layout(cpu: &mut Cpu) -> Result<(Layout, u32), Exception> {
    with_host(cpu, |_, host| Ok((host.layout, host.code.limits().mxcsr)))
}

/// #UD where the host lacks the instruction.
pub(super) fn host_has(cpu: &mut Cpu, i: &Instruction) -> Result<(), Exception> {
    with_host(cpu, |_, host| {
        host.features.cover(i).then_some(()).ok_or(Exception::UD)
    })
}

fn with_host<R>(
    cpu: &mut Cpu,
    f: impl FnOnce(&mut Cpu, &mut Host) -> Result<R, Exception>,
) -> Result<R, Exception> {
    let mut host = match cpu.host.0.take() {
        Some(h) => h,
        // A host that gives no executable memory has no such instructions.
        None => Host::new().map_err(|_| Exception::UD)?,
    };
    let out = f(cpu, &mut host);
    cpu.host.0 = Some(host);
    out
}

impl Host {
    fn new() -> std::io::Result<Box<Self>> {
        let layout = Layout::of_host();
        Ok(Box::new(Host {
            code: CodeBuffer::new(layout.supported)?,
            snippets: HashMap::default(),
            frame: Frame::default(),
            bounce: Bounce([0; BOUNCE_SIZE]),
            layout,
            features: HostFeatures::default(),
        }))
    }

    fn execute(&mut self, cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
        let snippet = self.snippet(cpu, i).ok_or(Exception::UD)?;
        numeric_error::settle(cpu, bus);
        let step = match snippet.plan.unit.check(cpu) {
            Err(Exception::MF) if !cpu.cr0.contains(Cr0::NE) => {
                numeric_error::report(cpu, bus, i, |cpu, bus| {
                    self.execute_checked(cpu, bus, i, &snippet)
                })
            }
            checked => checked.and_then(|()| self.execute_checked(cpu, bus, i, &snippet)),
        };
        numeric_error::settle(cpu, bus);
        step
    }

    fn execute_checked(
        &mut self,
        cpu: &mut Cpu,
        bus: &mut dyn Bus,
        i: &Instruction,
        snippet: &Snippet,
    ) -> Step {
        let Some(memory) = snippet.plan.memory else {
            self.run_in_steps(cpu, i, snippet)?;
            return self.commit(cpu, i, &snippet.plan);
        };
        let computes_first = cpu.cpuid.traits().vcvtps2ph_computes_before_store;
        if memory.write && i.mnemonic() == Mnemonic::Vcvtps2ph && computes_first {
            let before = cpu.fpu.clone();
            self.run(cpu, snippet)?;
            cpu.fpu = before;
        }
        if i.op_mask() != Register::None {
            return self.execute_masked(cpu, bus, i, snippet);
        }
        if let Some(before) = suppressible(cpu, &snippet.plan) {
            if cpu.cpuid.traits().suppressed_store_faults {
                // Its faults come first, though it will not be made.
                let at = self.memory_operand(cpu, i, &memory)?;
                cpu.check_writable(at, memory.size, cpu.privilege())?;
            }
            self.run(cpu, snippet)?;
            if store_suppressed(cpu, snippet.plan.unit) {
                return self.commit(cpu, i, &snippet.plan);
            }
            cpu.fpu = before;
        }
        let at = self.memory_operand(cpu, i, &memory)?;
        let privilege = cpu.privilege();
        if memory.write {
            cpu.check_writable(at, memory.size, privilege)?;
        }
        if memory.read {
            let size = memory.size.min(loaded(cpu, i));
            load(cpu, bus, at, &mut self.bounce.0[..size])?;
        }
        let environment = Environment::before(cpu, i, &self.bounce.0);
        self.run_in_steps(cpu, i, snippet)?;
        if let Some(environment) = environment {
            environment.settle(&mut cpu.fpu, &mut self.bounce.0);
        }
        if memory.write {
            cpu.store_bytes(bus, at, privilege, &self.bounce.0[..memory.size])?;
        }
        self.commit(cpu, i, &snippet.plan)
    }

    /// The linear address of the memory operand.
    fn memory_operand(
        &self,
        cpu: &mut Cpu,
        i: &Instruction,
        memory: &Memory,
    ) -> Result<u64, Exception> {
        let unchecked = matches!(i.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph)
            && !cpu.cpuid.traits().half_precision_checked_for_alignment;
        let at = if unchecked {
            linear(cpu, i, 1, memory.write).and_then(|at| {
                linear_displaced(cpu, i, memory.size as u64 - 1, 1, memory.write).map(|_| at)
            })
        } else {
            linear(cpu, i, memory.size, memory.write)
        };
        // A misaligned address is #GP whatever else it is.
        let address = at.unwrap_or_else(|_| linear_unchecked(cpu, i));
        check_aligned(cpu, memory, address)?;
        at
    }

    /// A memory operand under an AVX-512 mask: only what the mask selects is accessed, or may fault.
    fn execute_masked(
        &mut self,
        cpu: &mut Cpu,
        bus: &mut dyn Bus,
        i: &Instruction,
        snippet: &Snippet,
    ) -> Step {
        let Some(memory) = snippet.plan.memory else {
            return Err(Exception::UD);
        };
        let elements = masked::Elements::of(i, &cpu.fpu, &self.layout, memory.size);
        let whole = self.memory_operand(cpu, i, &memory);
        let at = match whole {
            Err(_) if elements.none() => 0,
            Err(fault) if memory.aligned == Aligned::No => {
                elements.address(cpu, i, memory.write, fault)?
            }
            at => at?,
        };
        let bytes = &mut self.bounce.0[..memory.size];
        if memory.write {
            elements.check_writable(cpu, at)?;
        } else if let Err(fault) = whole {
            elements.load(cpu, bus, at, bytes, fault)?;
        } else if let Err(fault) = load(cpu, bus, at, bytes) {
            elements.load(cpu, bus, at, bytes, fault)?;
        }
        self.run(cpu, snippet)?;
        if memory.write {
            elements.store(cpu, bus, at, &self.bounce.0[..memory.size])?;
        }
        self.commit(cpu, i, &snippet.plan)
    }

    fn snippet(&mut self, cpu: &mut Cpu, i: &Instruction) -> Option<Snippet> {
        let key = snippet::normalize(i);
        if let Some(known) = self.snippets.get(&key) {
            return *known;
        }
        let bytes = decode::bytes_of(cpu, i);
        let bytes = bytes.as_ref().and_then(|bytes| bytes.get(..i.len()));
        let made = snippet::compile(&key, bytes, &mut self.features);
        let made = made.and_then(|(code, plan)| {
            let code = self.append(&code)?;
            Some(Snippet { code, plan })
        });
        // The guest decides how many there are: they must not grow without bound.
        if self.snippets.len() >= MOST_SNIPPETS {
            self.forget();
            return self.snippet(cpu, i);
        }
        self.snippets.insert(key, made);
        made
    }

    fn append(&mut self, code: &[u8]) -> Option<super::arch_native::SnippetCode> {
        if let Some(at) = self.code.append(code) {
            return Some(at);
        }
        self.forget();
        self.code.append(code)
    }

    fn forget(&mut self) {
        self.snippets.clear();
        self.code.clear();
    }

    /// Runs a snippet on the CPU's extended state; on `Err` that state is as before but for MXCSR's flags.
    fn run(&mut self, cpu: &mut Cpu, snippet: &Snippet) -> Result<(), Exception> {
        let plan = &snippet.plan;
        let frame = &mut self.frame;
        frame.gpr = cpu.gpr;
        frame.flags = cpu.rflags.bits() & Rflags::ARITHMETIC.bits() | Rflags::ONE.bits();
        if let Some(n) = plan.stack_pointer {
            frame.gpr[n] = cpu.reg(Gpr::Rsp);
        }
        if let Some(m) = &plan.memory {
            frame.gpr[m.register] = self.bounce.address();
        }
        let components = plan.components(cpu);
        let mxcsr = cpu.fpu.mxcsr();
        if !plan.unit.simd() || mxcsr & MXCSR_MASKS == MXCSR_MASKS {
            self.code.run(snippet.code, frame, &mut cpu.fpu, components);
            return Ok(());
        }
        let before = cpu.fpu.clone();
        let mut masked = mxcsr & !MXCSR_FLAGS | MXCSR_MASKS;
        if mxcsr & MXCSR_UM == 0 && !plan.flushes {
            // Where underflow is not masked nothing is flushed.
            masked &= !MXCSR_FTZ;
        }
        let tiny = mxcsr & MXCSR_UM == 0 && {
            let mut frame = self.frame.clone();
            vector::set_mxcsr(&mut cpu.fpu, masked | MXCSR_FTZ);
            self.code
                .run(snippet.code, &mut frame, &mut cpu.fpu, components);
            let tiny = cpu.fpu.mxcsr() & MXCSR_UE;
            cpu.fpu = before.clone();
            tiny != 0
        };
        vector::set_mxcsr(&mut cpu.fpu, masked);
        let frame = &mut self.frame;
        self.code.run(snippet.code, frame, &mut cpu.fpu, components);
        if tiny {
            let mxcsr = cpu.fpu.mxcsr();
            vector::set_mxcsr(&mut cpu.fpu, mxcsr | MXCSR_UE);
        }
        settle_mxcsr(cpu, &before)
    }

    /// The same for instructions of which a first step may raise #XM before the others add their flags: dot products.
    fn run_in_steps(
        &mut self,
        cpu: &mut Cpu,
        i: &Instruction,
        snippet: &Snippet,
    ) -> Result<(), Exception> {
        use Mnemonic::*;
        if !matches!(i.mnemonic(), Dpps | Dppd | Vdpps | Vdppd) {
            return self.run(cpu, snippet);
        }
        let before = cpu.fpu.clone();
        let outcome = self.run(cpu, snippet);
        if outcome.is_err() {
            let all = cpu.fpu.mxcsr();
            let products = self.flags_of_products(cpu, i, &before);
            cpu.fpu = before.clone();
            vector::set_mxcsr(&mut cpu.fpu, products);
            if settle_mxcsr(cpu, &before).is_ok() {
                vector::set_mxcsr(&mut cpu.fpu, all | products);
            }
        }
        outcome
    }

    /// The flags that the multiplications of a dot product raise: each alone, with nothing added to it.
    fn flags_of_products(&mut self, cpu: &mut Cpu, i: &Instruction, before: &FpuArea) -> u32 {
        let mut flags = 0;
        let set = |bit| before.mxcsr() & bit != 0;
        let of_exact = match (set(MXCSR_UM), set(MXCSR_FTZ)) {
            (false, _) => MXCSR_PE,
            (true, false) => MXCSR_PE | MXCSR_UE,
            // It is flushed indeed, exact or not.
            (true, true) => 0,
        };
        for n in (4..8).filter(|n| i.immediate8() >> n & 1 != 0) {
            let mut one = *i;
            one.set_immediate8(1 << n | 1);
            let Some(snippet) = self.snippet(cpu, &one) else {
                continue;
            };
            // A tiny product is flushed lest its sum raises what a denormal operand does; without that it tells whether it is exact.
            for (ftz, of_interest) in [(MXCSR_FTZ, !of_exact), (0, of_exact)] {
                let controls = before.mxcsr() & !MXCSR_FLAGS & !MXCSR_FTZ;
                cpu.fpu = before.clone();
                vector::set_mxcsr(&mut cpu.fpu, controls | MXCSR_MASKS | ftz);
                let components = snippet.plan.components(cpu);
                let mut frame = self.frame.clone();
                self.code
                    .run(snippet.code, &mut frame, &mut cpu.fpu, components);
                flags |= cpu.fpu.mxcsr() & MXCSR_FLAGS & of_interest;
            }
        }
        flags
    }

    fn commit(&self, cpu: &mut Cpu, i: &Instruction, plan: &Plan) -> Step {
        let bounce = plan.memory.map(|m| m.register);
        let frame = &self.frame;
        for n in (0..16).filter(|n| Some(*n) != bounce && Some(*n) != plan.stack_pointer) {
            if n != Gpr::Rsp as usize {
                cpu.gpr[n] = frame.gpr[n];
            }
        }
        if let Some(n) = plan.stack_pointer {
            cpu.gpr[Gpr::Rsp as usize] = frame.gpr[n];
        }
        flags::set(cpu, frame.flags);
        // Control instructions leave the pointers, or load them (Intel SDM vol. 1, 8.1.8).
        let controls = matches!(
            i.mnemonic(),
            Mnemonic::Fldcw | Mnemonic::Fldenv | Mnemonic::Frstor
        );
        if plan.unit == Unit::X87 && !controls {
            set_x87_pointers(cpu, i, self.bounce.address());
        }
        Ok(Flow::Next)
    }
}

const MOST_SNIPPETS: usize = 1 << 14;
const MXCSR_FLAGS: u32 = 0x3f;
const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_MASK_SHIFT: u32 = 7;
/// Invalid operation, denormal and division by zero: where one of them is raised unmasked, no result is computed and
/// the other flags stay.
const BEFORE_COMPUTATION: u32 = 0b111;
const MXCSR_UE: u32 = 1 << 4;
const MXCSR_PE: u32 = 1 << 5;
const MXCSR_UM: u32 = 1 << 11;
const MXCSR_FTZ: u32 = 1 << 15;
const MXCSR_MM: u32 = 1 << 17;

/// Puts the guest's masks back into MXCSR, and raises #XM where a flag was raised that they do not mask.
fn settle_mxcsr(cpu: &mut Cpu, before: &FpuArea) -> Result<(), Exception> {
    let guest = before.mxcsr();
    let raised = cpu.fpu.mxcsr() & MXCSR_FLAGS;
    let unmasked = raised & !(guest >> MXCSR_MASK_SHIFT);
    if unmasked == 0 {
        vector::set_mxcsr(&mut cpu.fpu, guest | raised);
        return Ok(());
    }
    let early = unmasked & BEFORE_COMPUTATION != 0;
    let shown = if early {
        raised & BEFORE_COMPUTATION
    } else {
        raised
    };
    cpu.fpu = before.clone();
    vector::set_mxcsr(&mut cpu.fpu, guest | shown);
    Err(if cpu.cr4.contains(Cr4::OSXMMEXCPT) {
        Exception::XM
    } else {
        Exception::UD
    })
}

/// Bytes of a memory operand that are loaded, at most: where those of SSE need not be aligned, a processor may show that it loads half of some.
fn loaded(cpu: &Cpu, i: &Instruction) -> usize {
    use Mnemonic::*;
    let half = matches!(
        i.mnemonic(),
        Unpcklps
            | Unpcklpd
            | Punpcklbw
            | Punpcklwd
            | Punpckldq
            | Punpcklqdq
            | Psrlw
            | Psrld
            | Psrlq
            | Psraw
            | Psrad
            | Psllw
            | Pslld
            | Psllq
    );
    match half && cpu.cpuid.traits().loads_needed_half_alone {
        true => 8,
        false => BOUNCE_SIZE,
    }
}

fn check_aligned(cpu: &Cpu, memory: &Memory, at: u64) -> Result<(), Exception> {
    let needed = match memory.aligned {
        Aligned::No => false,
        Aligned::Always => true,
        Aligned::UnlessMxcsr => cpu.fpu.mxcsr() & MXCSR_MM == 0,
        Aligned::AsVendor => cpu.cpuid.traits().sha_needs_alignment,
    };
    if needed && !at.is_multiple_of(memory.size as u64) {
        return Err(Exception::gp(0));
    }
    Ok(())
}

const INVALID_OVERFLOW_UNDERFLOW: u8 = 0b01_1001;

/// The state before an x87 store that may turn out not to store; `None` for all other instructions.
fn suppressible(cpu: &Cpu, plan: &Plan) -> Option<FpuArea> {
    let stores = plan.unit == Unit::X87 && plan.memory.is_some_and(|m| m.write);
    let masked = !cpu.fpu.bytes[0] & INVALID_OVERFLOW_UNDERFLOW == 0;
    (stores && !masked).then(|| cpu.fpu.clone())
}

/// An x87 store that raised an exception that FCW does not mask (but for precision) does not access memory.
fn store_suppressed(cpu: &Cpu, unit: Unit) -> bool {
    let [control, _, status, ..] = cpu.fpu.bytes;
    unit == Unit::X87 && status & !control & INVALID_OVERFLOW_UNDERFLOW != 0
}

/// Loads any number of bytes with the current privilege.
fn load(cpu: &mut Cpu, bus: &mut dyn Bus, at: u64, out: &mut [u8]) -> Result<(), Exception> {
    let privilege = cpu.privilege();
    match cpu.tlb[privilege as usize].lookup_read(at, out.len()) {
        Some(p) => {
            p.read(out);
            Ok(())
        }
        None => cpu.load_bytes(bus, at, privilege, out),
    }
}

/// FIP and FDP: the guest's addresses, not those of the snippet and of its operand. FDP is the offset in the segment; whether each instruction notes it or
/// only one with an exception that is not masked (CPUID's FDP_EXCPTN_ONLY), the processor has shown.
fn set_x87_pointers(cpu: &mut Cpu, i: &Instruction, operand: u64) {
    cpu.fpu.set_fip(cpu.rip);
    if cpu.fpu.fdp() == operand {
        cpu.fpu.set_fdp(effective_address(cpu, i));
    }
}
