//! A child: one process that runs user code of one guest address space.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::arch_stub::{MOST_CALLS, RESUMED, STUB_SIZE};
use crate::change::{Call, Change};
use crate::frame::Cause;
use crate::kick_unsafe::KickFlag;
use crate::process::{Called, Process};
use crate::signals::{SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP, SIGUSR1};
use crate::state::CODE_32;
use crate::zygote::Machine;
use crate::{DirectError, UserState};

/// Why user code stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An exception. RIP is as the processor left it: at the instruction for faults, after it for vectors 1, 3 and 4.
    Trap {
        /// Vector, one that user code can raise.
        vector: u8,
        /// Error code, 0 where the vector has none.
        error: u32,
        /// CR2 for vector 14; for vector 1 the bits of DR6 (BS after a single step); else 0.
        address: u64,
    },
    /// A system-call instruction, with RIP at it. RCX and R11 are what SYSCALL leaves in them; nothing else has changed.
    SystemCall(Entry),
    /// [`KickFlag::kick`] was called.
    Kicked,
    /// The child is dead; make another.
    Gone {
        /// User code was running, and its state is lost; else the state is as it was before the call.
        lost: bool,
    },
}

/// The instruction of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// SYSCALL.
    Syscall,
    /// INT 0x80, or whatever else enters Linux for 32-bit calls.
    Int80,
}

/// One child. Dropping it kills the process.
#[derive(Debug)]
pub struct Child {
    process: Option<Process>,
    machine: Arc<Machine>,
    slot: u64,
}

/// By the filter, by user dispatch.
const SYS_SECCOMP: i32 = 1;
const SYS_USER_DISPATCH: i32 = 2;
const TRAP_TRACE: i32 = 2;
const BUS_MCEERR: Range<i32> = 4..6;
const I386: u32 = 0x4000_0003;
const PAGE_FAULT: u8 = 14;
/// Error code of a fetch by user code from a page that is not there.
const FETCH: u32 = 0x14;
const VSYSCALL: Range<u64> = 0xffff_ffff_ff60_0000..0xffff_ffff_ff60_1000;
/// Checks of a kicked child that does not stop until it is killed: five seconds, for a host however busy.
const OVERDUE: u32 = 100;

/// What a frame means.
enum Meaning {
    Stop(Stop),
    /// Nothing that concerns the guest.
    Spurious,
    /// Nothing that the processor does.
    Nonsense,
}

impl Child {
    pub(crate) fn new(process: Process, machine: Arc<Machine>, slot: u64) -> Child {
        Child {
            process: Some(process),
            machine,
            slot,
        }
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("taken by drop only")
    }

    /// The process's number on the host.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |p| p.pid)
    }

    /// Linear addresses that the child needs for itself: no change may touch them.
    pub fn reserved(&self) -> Range<u64> {
        self.machine.reserved()
    }

    /// Applies changes in order. Where one fails, those before it are in force.
    pub fn apply(&mut self, changes: &[Change]) -> Result<(), DirectError> {
        let calls = self.calls(changes)?;
        self.apply_calls(&calls, 0)
    }

    fn calls(&self, changes: &[Change]) -> Result<Vec<Call>, DirectError> {
        let reserved = self.reserved();
        let valid = |c: &Change| c.is_valid(self.machine.ram_size, &reserved);
        if let Some(index) = changes.iter().position(|c| !valid(c)) {
            return Err(DirectError::Invalid {
                index,
                change: changes[index],
            });
        }
        Ok(changes.iter().map(Change::call).collect())
    }

    fn apply_calls(&mut self, calls: &[Call], first: usize) -> Result<(), DirectError> {
        for (n, batch) in calls.chunks(MOST_CALLS).enumerate() {
            let called = self.process().call(batch);
            result(called, first + n * MOST_CALLS)?;
        }
        Ok(())
    }

    /// Applies the changes in order, then runs user code from `user` until it stops; `user` is then its state, unless it is gone.
    ///
    /// # Errors
    /// A change that is not valid or that the host refuses (those before it are in force, no code was run), a state that is not
    /// [`UserState::is_runnable`], or a host without memory for guest RAM.
    pub fn run(
        &mut self,
        user: &mut UserState,
        changes: &[Change],
        kick: &KickFlag,
    ) -> Result<Stop, DirectError> {
        if !user.is_runnable() {
            return Err(DirectError::State);
        }
        let calls = self.calls(changes)?;
        let last = calls.len().saturating_sub(1) / MOST_CALLS * MOST_CALLS;
        let (before, last_calls) = calls.split_at(last);
        match self.apply_calls(before, 0) {
            Err(DirectError::Gone) => return Ok(Stop::Gone { lost: false }),
            other => other?,
        }
        let mut calls = last_calls;
        loop {
            let stop = self.run_once(user, calls, last, kick)?;
            match stop {
                Meaning::Stop(stop) => return Ok(stop),
                Meaning::Spurious => calls = &[],
                Meaning::Nonsense => {
                    self.process().kill();
                    return Ok(Stop::Gone { lost: true });
                }
            }
        }
    }

    fn run_once(
        &mut self,
        user: &mut UserState,
        calls: &[Call],
        first: usize,
        kick: &KickFlag,
    ) -> Result<Meaning, DirectError> {
        let machine = self.machine.clone();
        let process = self.process.as_mut().expect("taken by drop only");
        machine.template.write(&process.exchange, user);
        process.follow();
        if !kick.enter(process.pidfd.as_fd()) {
            kick.leave();
            return match self.apply_calls(calls, first) {
                Err(DirectError::Gone) => Ok(Meaning::Stop(Stop::Gone { lost: false })),
                Err(e) => Err(e),
                Ok(()) => Ok(Meaning::Stop(Stop::Kicked)),
            };
        }
        let alive = process.resume(calls) && wait(process, kick);
        kick.leave();
        let resumed = process.exchange.load32(RESUMED) != 0;
        match (alive, resumed) {
            (false, lost) => Ok(Meaning::Stop(Stop::Gone { lost })),
            (true, false) if calls.is_empty() => Ok(Meaning::Nonsense),
            (true, false) => {
                result(process.called(calls.len()), first)?;
                Ok(Meaning::Nonsense)
            }
            (true, true) => self.stopped(user, kick),
        }
    }

    /// The stop that the frame shows.
    fn stopped(&mut self, user: &mut UserState, kick: &KickFlag) -> Result<Meaning, DirectError> {
        let machine = self.machine.clone();
        let process = self.process();
        let Some(cause) = machine.template.read(&process.exchange, user) else {
            return Ok(Meaning::Nonsense);
        };
        let stub = machine.stub_at..machine.stub_at + STUB_SIZE;
        if stub.contains(&user.rip) {
            // The guest found the stub. There is nothing as far as it can tell; what registers it had there is its own business, but
            // they may be the stub's, so the process has run for the last time.
            process.kill();
            return Ok(Meaning::Stop(Stop::Trap {
                vector: PAGE_FAULT,
                error: FETCH,
                address: user.rip,
            }));
        }
        meaning(user, &cause, &machine.reserved(), kick)
    }
}

/// Waits for a running child to stop. False where it died, or had to.
fn wait(process: &mut Process, kick: &KickFlag) -> bool {
    let mut overdue = 0;
    loop {
        if let Some(alive) = process.wait() {
            return alive;
        }
        overdue = if kick.is_set() { overdue + 1 } else { 0 };
        if overdue > OVERDUE {
            process.kill();
            return false;
        }
    }
}

fn result(called: Called, first: usize) -> Result<(), DirectError> {
    match called {
        Called::Done => Ok(()),
        Called::Failed(n, source) => Err(DirectError::Change {
            index: first + n,
            source,
        }),
        Called::Dead => Err(DirectError::Gone),
    }
}

fn meaning(
    user: &mut UserState,
    cause: &Cause,
    reserved: &Range<u64>,
    kick: &KickFlag,
) -> Result<Meaning, DirectError> {
    match cause.signal {
        SIGUSR1 if kick.is_set() => Ok(Meaning::Stop(Stop::Kicked)),
        SIGUSR1 => Ok(Meaning::Spurious),
        SIGSYS if [SYS_SECCOMP, SYS_USER_DISPATCH].contains(&cause.code) => {
            Ok(system_call(user, cause))
        }
        SIGSEGV | SIGBUS | SIGILL | SIGFPE | SIGTRAP | SIGSYS if cause.code <= 0 => {
            Ok(Meaning::Spurious)
        }
        SIGBUS if BUS_MCEERR.contains(&cause.code) || cause.vector == u64::from(PAGE_FAULT) => {
            Err(DirectError::Memory)
        }
        SIGSEGV | SIGBUS | SIGILL | SIGFPE | SIGTRAP => Ok(trap(cause, reserved)),
        _ => Ok(Meaning::Nonsense),
    }
}

/// Undoes what the kernel did between the instruction and the signal.
fn system_call(user: &mut UserState, cause: &Cause) -> Meaning {
    const RSP: usize = 4;
    if VSYSCALL.contains(&cause.call_address) {
        // The kernel has emulated the page's RET.
        user.rip = cause.call_address;
        user.gprs[RSP] = user.gprs[RSP].wrapping_sub(8);
        return Meaning::Stop(Stop::Trap {
            vector: PAGE_FAULT,
            error: FETCH,
            address: user.rip,
        });
    }
    if user.cs == CODE_32 && user.rip > u32::MAX.into() {
        // SYSCALL of 32-bit code, which AMD's processors have, or SYSENTER of 64-bit code, which Intel's have: the kernel goes on at its own
        // address, and nobody knows where the code was.
        return Meaning::Nonsense;
    }
    user.rip = user.rip.wrapping_sub(2);
    let entry = match cause.call_architecture {
        I386 => Entry::Int80,
        _ => Entry::Syscall,
    };
    Meaning::Stop(Stop::SystemCall(entry))
}

fn trap(cause: &Cause, reserved: &Range<u64>) -> Meaning {
    const USER: u32 = 4;
    const BS: u64 = 1 << 14;
    let error = cause.error as u32;
    let (error, address) = match cause.vector {
        14 if reserved.contains(&cause.cr2) => (error & 0x16 | USER, cause.cr2),
        14 => (error & 0x37 | USER, cause.cr2),
        1 if cause.code == TRAP_TRACE => (0, BS),
        10..=13 | 17 => (error & 0xffff, 0),
        0 | 1 | 3..=6 | 16 | 19 => (0, 0),
        _ => return Meaning::Nonsense,
    };
    Meaning::Stop(Stop::Trap {
        vector: cause.vector as u8,
        error,
        address,
    })
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
            self.machine.bury(process, self.slot);
        }
    }
}
