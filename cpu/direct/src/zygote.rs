//! The zygote: a process with nothing in it, from which children are cloned.
//!
//! Problem: a child must hold nothing of the monitor, and there are many of them, made whenever a guest process turns out to compute. Forking
//! the monitor copies its page tables and leaves its memory to be unmapped; executing a file takes a millisecond.
//! Idea: one process per machine executes a file that is only the stub, unmaps all else, and from then on clones itself. A clone takes
//! over signal handlers, limits and descriptors, maps an exchange area of its own, and locks itself in behind a filter.
//!
//! A child dies with its parent, the zygote, and the zygote with the monitor: by the kernel's parent-death signal, which looks at the
//! parent's *thread*, so that a thread of the monitor does nothing but be that parent. Who was made too late for the signal finds another
//! parent than it was told, and exits.
//!
//! Invariant: the zygote never runs guest code, and shares no memory with a child but the stub, which neither can write.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use doppel_seccomp::{Kind, narrowed};
use raw_cpuid::native_cpuid::cpuid_count;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::arch_stub::{
    EXCHANGE_SIZE, INSTRUCTIONS, ORDERS_AT, ORDERS_SIZE, PARENT, PROGRAM, REASON, ROBUST_ENTRY,
    ROBUST_HEAD, SIGNAL_STACK, STUB_SIZE, Stub, WORD, stub,
};
use crate::change::Call;
use crate::child::Child;
use crate::exchange::Shared;
use crate::frame::Template;
use crate::process::{Called, Process, ended};
use crate::signals::{HANDLED, HANDLED_MASK, SIGCHLD, SIGUSR1};
use crate::{DirectError, elf, filter};

/// Most children at a time.
pub const MOST_CHILDREN: u64 = 4096;

/// The page of a stub is chosen at random here: no executable, library, heap or stack of Linux lies there by itself.
const STUB_RANGE: Range<u64> = 0x1000_0000_0000..0x5000_0000_0000;
const USER_END: u64 = (1 << 47) - 4096;
const EXCHANGE_FD: u64 = 1;
/// What the word says in the turn of a process that does not know its number yet.
const NEWBORN: u32 = 1;

const CLOSE: u64 = 3;
const MUNMAP: u64 = 11;
const RT_SIGACTION: u64 = 13;
const RT_SIGPROCMASK: u64 = 14;
const CLONE: u64 = 56;
const WAIT4: u64 = 61;
const KILL: u64 = 62;
const SETSID: u64 = 112;
const SIGALTSTACK: u64 = 131;
const PRCTL: u64 = 157;
const ARCH_PRCTL: u64 = 158;
const SET_ROBUST_LIST: u64 = 273;
const PRLIMIT64: u64 = 302;
const SECCOMP: u64 = 317;
const CLOSE_RANGE: u64 = 436;

const NAME: &[u8; 16] = b"doppel-direct\0\0\0";

/// What makes children of one machine. Dropping it, and the last child, ends all its processes.
#[derive(Clone, Debug)]
pub struct Zygote {
    machine: Arc<Machine>,
}

/// Whether CPUID is to fault in children. [`Zygote::new`] has it fault where the host is no virtual machine itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidFaults {
    /// Where the host's processor can.
    WherePossible,
    /// Nowhere.
    Never,
}

/// What all children of a machine share.
#[derive(Debug)]
pub(crate) struct Machine {
    pub stub_at: u64,
    pub ram_size: u64,
    pub template: Template,
    cpuid_faults: bool,
    /// All exchange areas; the zygote's is the first.
    areas: Arc<File>,
    /// All orders, in the same order.
    orders: Arc<File>,
    state: Mutex<State>,
    _keeper: Keeper,
}

#[derive(Debug)]
struct State {
    zygote: Process,
    /// Areas that were used and are free.
    free: Vec<u64>,
    /// The first area that was never used.
    fresh: u64,
    /// Children that were killed and hold their areas until they are gone.
    dying: Vec<(OwnedFd, u32, u64)>,
}

/// The thread that is the zygote's parent.
#[derive(Debug)]
struct Keeper {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Zygote {
    /// Starts the zygote of a machine with `ram_size` bytes of RAM in the memfd `ram`.
    ///
    /// # Errors
    /// Where the host lacks what this needs: Linux 5.9 with FSGSBASE and seccomp, and the right to execute a memfd.
    pub fn new(ram: &File, ram_size: u64) -> Result<Zygote, DirectError> {
        let faults = match in_virtual_machine() {
            true => CpuidFaults::Never,
            false => CpuidFaults::WherePossible,
        };
        Self::with(ram, ram_size, faults)
    }

    /// The same, with a choice.
    pub fn with(ram: &File, ram_size: u64, faults: CpuidFaults) -> Result<Zygote, DirectError> {
        host_serves()?;
        let stub = stub();
        let stub_at = random_place()?;
        let areas = Arc::new(File::from(memory_file(
            "doppel-direct-exchange",
            MemfdFlags::NOEXEC_SEAL,
        )?));
        let orders = Arc::new(File::from(memory_file(
            "doppel-direct-orders",
            MemfdFlags::NOEXEC_SEAL,
        )?));
        ftruncate(&*areas, EXCHANGE_SIZE * (MOST_CHILDREN + 1)).map_err(host("ftruncate"))?;
        ftruncate(&*orders, ORDERS_SIZE * (MOST_CHILDREN + 1)).map_err(host("ftruncate"))?;
        let (exchange, first_orders) = shared(&areas, &orders, 0)?;
        exchange.begin(NEWBORN);
        exchange.store32(PARENT, std::process::id());
        let (command, program) = command(&stub, stub_at, [ram, &areas, &orders])?;
        let (keeper, pid) = Keeper::start(command)?;
        drop(program);
        let pidfd = open(pid)?;
        let mut zygote = Process::new(exchange, first_orders, pidfd, pid, NEWBORN);
        if !zygote.wait_patiently() {
            return Err(DirectError::Zygote);
        }
        let (template, cpuid_faults) = set_up(&mut zygote, &stub, stub_at, faults)?;
        let state = State {
            zygote,
            free: Vec::new(),
            fresh: 1,
            dying: Vec::new(),
        };
        let machine = Machine {
            stub_at,
            ram_size,
            template,
            cpuid_faults,
            areas,
            orders,
            state: Mutex::new(state),
            _keeper: keeper,
        };
        Ok(Zygote {
            machine: Arc::new(machine),
        })
    }

    /// Makes a child with nothing mapped.
    pub fn spawn(&self) -> Result<Child, DirectError> {
        let machine = &self.machine;
        let mut state = machine.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.reap(&machine.areas, &machine.orders);
        let slot = state.take_slot()?;
        match machine.clone_zygote(&mut state, slot) {
            Ok(process) => Ok(Child::new(process, machine.clone(), slot)),
            Err(e) => {
                state.free.push(slot);
                Err(e)
            }
        }
    }

    /// Linear addresses that children need for themselves.
    pub fn reserved(&self) -> Range<u64> {
        self.machine.reserved()
    }

    /// Whether CPUID faults (vector 13) in children; else it answers as the host does.
    pub fn cpuid_faults(&self) -> bool {
        self.machine.cpuid_faults
    }

    /// The zygote's process number on the host.
    pub fn pid(&self) -> u32 {
        let state = self.machine.state.lock();
        state.unwrap_or_else(PoisonError::into_inner).zygote.pid
    }
}

impl Machine {
    pub fn reserved(&self) -> Range<u64> {
        self.stub_at..self.stub_at + STUB_SIZE + EXCHANGE_SIZE
    }

    fn clone_zygote(&self, state: &mut State, slot: u64) -> Result<Process, DirectError> {
        let offset = slot * EXCHANGE_SIZE;
        let (exchange, orders) = shared(&self.areas, &self.orders, slot)?;
        exchange.store64(ORDERS_AT, slot * ORDERS_SIZE);
        exchange.begin(NEWBORN);
        exchange.store32(PARENT, state.zygote.pid);
        let call = [CLONE, SIGCHLD.into(), 0, 0, 0, EXCHANGE_FD, offset];
        called(state.zygote.call(&[call]), "clone")?;
        let pid = state.zygote.result(0) as u32;
        // The zygote has not waited for it, so that the number is still its own.
        let mut process = Process::new(exchange, orders, open(pid)?, pid, NEWBORN);
        let locked = process.wait_patiently() && self.lock_in(&mut process, slot).is_ok();
        if !locked {
            process.kill();
            state.dying.push((process.pidfd, pid, slot));
            return Err(DirectError::Zygote);
        }
        process.owner = pid;
        Ok(process)
    }

    /// The last that a child does without a filter.
    fn lock_in(&self, process: &mut Process, slot: u64) -> Result<(), DirectError> {
        const SET_MODE_FILTER: u64 = 1;
        const SPEC_ALLOW: u64 = 4;
        const USER_DISPATCH: u64 = 59;
        const DISPATCH_ON: u64 = 1;
        // Linux before 5.11 does not know it, and lets the filter see every call instead.
        process.call(&[[
            PRCTL,
            USER_DISPATCH,
            DISPATCH_ON,
            self.stub_at,
            STUB_SIZE,
            0,
            0,
        ]]);
        let key = key()?;
        let exchange_at = self.stub_at + STUB_SIZE;
        let program = filter::program(&stub(), self.stub_at, slot * ORDERS_SIZE, key);
        for (n, instruction) in program.iter().enumerate() {
            process
                .exchange
                .store64(INSTRUCTIONS + 8 * n, instruction.bytes());
        }
        process.exchange.store64(PROGRAM, program.len() as u64);
        process
            .exchange
            .store64(PROGRAM + 8, exchange_at + INSTRUCTIONS as u64);
        let (head, entry) = (
            exchange_at + ROBUST_HEAD as u64,
            exchange_at + ROBUST_ENTRY as u64,
        );
        process.exchange.store64(ROBUST_HEAD, entry);
        let distance = (WORD as u64).wrapping_sub(ROBUST_ENTRY as u64);
        process.exchange.store64(ROBUST_HEAD + 8, distance);
        process.exchange.store64(ROBUST_ENTRY, head);
        let seccomp = exchange_at + PROGRAM as u64;
        let calls: [Call; 3] = [
            [SET_ROBUST_LIST, head, 24, 0, 0, 0, 0],
            [CLOSE, EXCHANGE_FD, 0, 0, 0, 0, 0],
            [SECCOMP, SET_MODE_FILTER, SPEC_ALLOW, seccomp, 0, 0, 0],
        ];
        called(process.call(&calls), "seccomp")?;
        // The key would be in the filter's text.
        (0..program.len()).for_each(|n| process.exchange.store64(INSTRUCTIONS + 8 * n, 0));
        process.lock(key);
        Ok(())
    }

    /// Takes a child that was killed; its area is free once it is gone.
    pub fn bury(&self, process: Process, slot: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.dying.push((process.pidfd, process.pid, slot));
        state.reap(&self.areas, &self.orders);
    }
}

impl State {
    fn take_slot(&mut self) -> Result<u64, DirectError> {
        if let Some(slot) = self.free.pop() {
            return Ok(slot);
        }
        if self.fresh > MOST_CHILDREN {
            return Err(DirectError::TooMany);
        }
        self.fresh += 1;
        Ok(self.fresh - 1)
    }

    /// Has the zygote wait for those children that are gone.
    fn reap(&mut self, areas: &File, orders: &File) {
        let (gone, dying) = std::mem::take(&mut self.dying)
            .into_iter()
            .partition::<Vec<_>, _>(|(pidfd, ..)| ended(pidfd.as_fd()));
        self.dying = dying;
        for (_, pid, slot) in gone {
            self.zygote.call(&[[WAIT4, pid.into(), 0, 0, 0, 0, 0]]);
            // What is not cleared is not used again.
            if clear(areas, slot, EXCHANGE_SIZE) && clear(orders, slot, ORDERS_SIZE) {
                self.free.push(slot);
            }
        }
    }
}

impl Keeper {
    /// Runs the command as a child of a new thread.
    fn start(mut command: Command) -> Result<(Keeper, u32), DirectError> {
        let (end, ended) = channel();
        let (started, start) = channel();
        let thread = std::thread::Builder::new().name("zygote".into());
        let run = move || match command.spawn() {
            Ok(child) => {
                let _ = started.send(Ok(child.id()));
                keep(child, &ended);
            }
            Err(e) => {
                let _ = started.send(Err(e));
            }
        };
        let thread = thread
            .spawn(narrowed(Kind::Zygote, run))
            .map_err(|e| DirectError::Host("thread", e))?;
        let keeper = Keeper {
            end: Some(end),
            thread: Some(thread),
        };
        match start.recv() {
            Ok(Ok(pid)) => Ok((keeper, pid)),
            Ok(Err(e)) => Err(DirectError::Host("execve of a memfd", e)),
            Err(_) => Err(DirectError::Zygote),
        }
    }
}

/// Waits for the end, and brings it about.
fn keep(mut child: std::process::Child, ended: &Receiver<()>) {
    let _ = ended.recv();
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn host_serves() -> Result<(), DirectError> {
    const FSGSBASE: usize = 2;
    let (_, hwcap2) = rustix::param::linux_hwcap();
    if hwcap2 & FSGSBASE == 0 {
        return Err(DirectError::Fsgsbase);
    }
    Ok(())
}

/// A hypervisor makes the register that has CPUID fault expensive, and it is written at each switch to a child and from it: 7 µs each
/// where this was measured, four times all else.
fn in_virtual_machine() -> bool {
    const HYPERVISOR: u32 = 1 << 31;
    cpuid_count(1, 0).ecx & HYPERVISOR != 0
}

fn host(what: &'static str) -> impl Fn(rustix::io::Errno) -> DirectError {
    move |e| DirectError::Host(what, e.into())
}

fn called(called: Called, what: &'static str) -> Result<(), DirectError> {
    match called {
        Called::Done => Ok(()),
        Called::Failed(_, e) => Err(DirectError::Host(what, e)),
        Called::Dead => Err(DirectError::Zygote),
    }
}

/// Gives the memory of a piece of a file back, so that it is all zero.
fn clear(file: &File, slot: u64, size: u64) -> bool {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, hole, slot * size, size).is_ok()
}

/// The exchange area and the orders of a slot.
fn shared(
    areas: &Arc<File>,
    orders: &Arc<File>,
    slot: u64,
) -> Result<(Shared, Shared), DirectError> {
    let map = |file, size| Shared::map(file, slot, size).map_err(|e| DirectError::Host("mmap", e));
    Ok((map(areas, EXCHANGE_SIZE)?, map(orders, ORDERS_SIZE)?))
}

fn random() -> Result<u64, DirectError> {
    let mut bytes = [0; 8];
    getrandom(&mut bytes, GetRandomFlags::empty()).map_err(host("getrandom"))?;
    Ok(u64::from_le_bytes(bytes))
}

fn random_place() -> Result<u64, DirectError> {
    let pages = (STUB_RANGE.end - STUB_RANGE.start) / STUB_SIZE;
    Ok(STUB_RANGE.start + random()? % pages * STUB_SIZE)
}

/// 64 random bits, in the upper halves.
fn key() -> Result<[u64; 2], DirectError> {
    let key = random()?;
    Ok([key << 32, key >> 32 << 32])
}

/// A file in memory that is executable, or never will be. Linux before 6.3 does not tell them apart.
fn memory_file(name: &str, kind: MemfdFlags) -> Result<OwnedFd, DirectError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    memfd_create(name, flags | kind)
        .or_else(|_| memfd_create(name, flags))
        .map_err(host("memfd_create"))
}

fn open(pid: u32) -> Result<OwnedFd, DirectError> {
    let pid = Pid::from_raw(pid as i32).ok_or(DirectError::Zygote)?;
    pidfd_open(pid, PidfdFlags::empty()).map_err(host("pidfd_open"))
}

/// The zygote's command, where descriptors 0, 1 and 2 are the RAM, the exchange areas and the orders, and its program, which must be open until it runs.
fn command(stub: &Stub, at: u64, files: [&File; 3]) -> Result<(Command, File), DirectError> {
    let program = File::from(memory_file("doppel-direct", MemfdFlags::EXEC)?);
    io::Write::write_all(&mut &program, &elf::image(stub, at))
        .map_err(|e| DirectError::Host("write", e))?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&program, seals).map_err(host("fcntl"))?;
    let dup = |file: &File| file.try_clone().map_err(|e| DirectError::Host("dup", e));
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .env_clear()
        .stdin(Stdio::from(dup(files[0])?))
        .stdout(Stdio::from(dup(files[1])?))
        .stderr(Stdio::from(dup(files[2])?));
    Ok((command, program))
}

/// Makes the zygote forget where it comes from, and learns what a signal frame looks like.
fn set_up(
    zygote: &mut Process,
    stub: &Stub,
    stub_at: u64,
    faults: CpuidFaults,
) -> Result<(Template, bool), DirectError> {
    const SET_CPUID: u64 = 0x1012;
    let exchange_at = stub_at + STUB_SIZE;
    called(zygote.call(&strip(zygote, stub_at)), "setting up a process")?;
    called(zygote.call(&handlers(zygote, stub, stub_at)), "sigaction")?;
    let fault = [ARCH_PRCTL, SET_CPUID, 0, 0, 0, 0, 0];
    let cpuid_faults =
        faults == CpuidFaults::WherePossible && matches!(zygote.call(&[fault]), Called::Done);
    // It is in the handler from here on, and so are its clones.
    let interrupted = zygote.interrupt([KILL, zygote.pid.into(), SIGUSR1.into(), 0, 0, 0, 0]);
    if !interrupted || zygote.exchange.load32(REASON) != SIGUSR1 {
        return Err(DirectError::Zygote);
    }
    let template = Template::learn(&zygote.exchange, exchange_at).ok_or(DirectError::Frame)?;
    Ok((template, cpuid_faults))
}

/// Unmaps and closes what is not the zygote's, and gives up rights and ties.
fn strip(zygote: &Process, stub_at: u64) -> Vec<Call> {
    const SET_NAME: u64 = 15;
    const SET_NO_NEW_PRIVS: u64 = 38;
    const RLIMIT_CORE: u64 = 4;
    const RLIMIT_MEMLOCK: u64 = 8;
    let exchange_at = stub_at + STUB_SIZE;
    let end = exchange_at + EXCHANGE_SIZE;
    let scratch = exchange_at + INSTRUCTIONS as u64;
    zygote.exchange.write(INSTRUCTIONS, NAME);
    zygote.exchange.write(INSTRUCTIONS + 16, &[0; 16]);
    vec![
        [MUNMAP, 0, stub_at, 0, 0, 0, 0],
        [MUNMAP, end, USER_END - end, 0, 0, 0, 0],
        [CLOSE_RANGE, 3, u32::MAX.into(), 0, 0, 0, 0],
        [SETSID, 0, 0, 0, 0, 0, 0],
        [PRCTL, SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0],
        [PRCTL, SET_NAME, scratch, 0, 0, 0, 0],
        [PRLIMIT64, 0, RLIMIT_CORE, scratch + 16, 0, 0, 0],
        [PRLIMIT64, 0, RLIMIT_MEMLOCK, scratch + 16, 0, 0, 0],
    ]
}

/// Makes the stub the handler of all that a trap can raise, on the alternate stack, all other signals blocked meanwhile; and blocks
/// all but those from now on, whatever the thread that made the zygote did.
fn handlers(zygote: &Process, stub: &Stub, stub_at: u64) -> Vec<Call> {
    const SIGINFO_ONSTACK_RESTORER: u64 = 4 | 0x0800_0000 | 0x0400_0000;
    const AUTODISARM: u64 = 1 << 31;
    const SET_MASK: u64 = 2;
    let exchange_at = stub_at + STUB_SIZE;
    let scratch = exchange_at + INSTRUCTIONS as u64;
    let handler = stub_at + stub.handler;
    let size = EXCHANGE_SIZE - SIGNAL_STACK as u64;
    let action = [handler, SIGINFO_ONSTACK_RESTORER, handler, u64::MAX];
    let stack = [exchange_at + SIGNAL_STACK as u64, AUTODISARM, size];
    let words = action.into_iter().chain(stack).chain([!HANDLED_MASK]);
    for (n, word) in words.enumerate() {
        zygote.exchange.store64(INSTRUCTIONS + 8 * n, word);
    }
    let mut calls: Vec<Call> = HANDLED
        .iter()
        .map(|signal| [RT_SIGACTION, (*signal).into(), scratch, 0, 8, 0, 0])
        .collect();
    calls.push([SIGALTSTACK, scratch + 32, 0, 0, 0, 0, 0]);
    calls.push([RT_SIGPROCMASK, SET_MASK, scratch + 56, 0, 8, 0, 0]);
    calls
}

impl Drop for Machine {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Children are all killed by now: their end is a matter of moments.
        for (_, pid, _) in std::mem::take(&mut state.dying) {
            state.zygote.call(&[[WAIT4, pid.into(), 0, 0, 0, 0, 0]]);
        }
    }
}
