//! The oracle: the code runs on the bare processor, in this process.
//!
//! Problem: arbitrary user code, with arbitrary registers (RSP, FS and GS bases included), must run once and be stopped, and what it
//! left behind read exactly. Idea: `enter` loads everything and jumps; every program ends in an exception, and the kernel's signal
//! frame holds all that the exception saw. The signal handler copies the frame, then makes the kernel return to `leave`
//! on the stack of whoever called `enter`. Invariants: the handler gives the thread its FS base back before any Rust code
//! runs; nothing of the program's state outlives the frame (it is overwritten with the initial x87 and vector state);
//! handlers are installed only while a program runs, by one thread at a time, since the translator has handlers of its
//! own. A program that does not end is found by a timer. Programs get no pointer to the process's own memory, and no
//! system call instruction (the catalogue sees to that). Cost: a signal and a dozen system calls, some 5 µs.

use std::arch::naked_asm;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use doppel_x86::FpuArea;

use crate::layout::{CONSTANT, REGIONS, Region};
use crate::state::{Ending, Memory, Outcome, State};
use crate::xsave::{Vectors, XsaveLayout};

/// Signals that exceptions become, and the timer's.
const SIGNALS: [i32; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGALRM,
];
const ALTERNATE_STACK: usize = 128 << 10;
/// Where the kernel says how long the XSAVE area in a signal frame is: bytes of `struct _fpx_sw_bytes`.
const FRAME_MAGIC: usize = 464;
const FRAME_XSTATE_SIZE: usize = FRAME_MAGIC + 16;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
/// RF, AC, IF and so on: what is left of RFLAGS when the harness goes on.
const HARNESS_FLAGS: i64 = 0x202;
/// Not an exception: the timer found the program still running.
const TIMED_OUT: u64 = 255;

/// What `enter` loads.
#[repr(C)]
struct Entry {
    gpr: [u64; 16],
    flags: u64,
    fs: u64,
    gs: u64,
    mask: u64,
    fpu: *const FpuArea,
}

/// What the handler found. One program at a time, so one of these.
struct Frame {
    gpr: [AtomicU64; 16],
    rip: AtomicU64,
    flags: AtomicU64,
    error: AtomicU64,
    vector: AtomicU64,
    address: AtomicU64,
    /// Where the XSAVE area goes.
    fpu: AtomicU64,
}

static FRAME: Frame = Frame {
    gpr: [const { AtomicU64::new(0) }; 16],
    rip: AtomicU64::new(0),
    flags: AtomicU64::new(0),
    error: AtomicU64::new(0),
    vector: AtomicU64::new(0),
    address: AtomicU64::new(0),
    fpu: AtomicU64::new(0),
};
static RUNNING: AtomicU8 = AtomicU8::new(0);
static TICKS: AtomicU32 = AtomicU32::new(0);
static START: AtomicU64 = AtomicU64::new(0);
static HOST_RSP: AtomicU64 = AtomicU64::new(0);
static HOST_FS: AtomicU64 = AtomicU64::new(0);
static HOST_GS: AtomicU64 = AtomicU64::new(0);
static GUEST_FS: AtomicU64 = AtomicU64::new(0);
static GUEST_GS: AtomicU64 = AtomicU64::new(0);

/// Loads the state and jumps to [`START`]; returns through `leave`.
#[unsafe(naked)]
extern "C" fn enter(entry: *const Entry) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {host_rsp}], rsp",
        "rdfsbase rax",
        "mov [rip + {host_fs}], rax",
        "rdgsbase rax",
        "mov [rip + {host_gs}], rax",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {mask}]",
        "xor edx, edx",
        "xrstor64 [rcx]",
        "mov rax, [rdi + {fs}]",
        "mov rcx, [rdi + {gs}]",
        "mov byte ptr [rip + {running}], 1",
        "wrfsbase rax",
        "wrgsbase rcx",
        "push qword ptr [rdi + {flags}]",
        "popfq",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rsp, [rdi + 32]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "jmp qword ptr [rip + {start}]",
        host_rsp = sym HOST_RSP,
        host_fs = sym HOST_FS,
        host_gs = sym HOST_GS,
        running = sym RUNNING,
        start = sym START,
        flags = const offset_of!(Entry, flags),
        fs = const offset_of!(Entry, fs),
        gs = const offset_of!(Entry, gs),
        mask = const offset_of!(Entry, mask),
        fpu = const offset_of!(Entry, fpu),
    )
}

/// Where the handler makes the kernel return to, with RSP as it was in `enter`.
#[unsafe(naked)]
extern "C" fn leave() {
    naked_asm!(
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx", "ret",
    )
}

/// The handler's first and last instructions: out of the program's FS and GS bases and alignment checks, and for a
/// tick of the timer back into them.
#[unsafe(naked)]
extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    naked_asm!(
        "cmp byte ptr [rip + {running}], 0",
        "je {body}",
        "pushfq",
        "and dword ptr [rsp], 0xfffbffff",
        "popfq",
        "rdfsbase rax",
        "mov [rip + {guest_fs}], rax",
        "mov rax, [rip + {host_fs}]",
        "wrfsbase rax",
        "rdgsbase rax",
        "mov [rip + {guest_gs}], rax",
        "mov rax, [rip + {host_gs}]",
        "wrgsbase rax",
        "sub rsp, 8",
        "call {body}",
        "add rsp, 8",
        "cmp byte ptr [rip + {running}], 0",
        "je 2f",
        "mov rax, [rip + {guest_fs}]",
        "wrfsbase rax",
        "mov rax, [rip + {guest_gs}]",
        "wrgsbase rax",
        "2: ret",
        running = sym RUNNING,
        guest_fs = sym GUEST_FS,
        guest_gs = sym GUEST_GS,
        host_fs = sym HOST_FS,
        host_gs = sym HOST_GS,
        body = sym handle,
    )
}

extern "C" fn handle(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if RUNNING.load(Relaxed) == 0 {
        if signal != libc::SIGALRM {
            // The harness itself is at fault: it dies of it when the instruction is run again.
            // SAFETY: setting the default disposition is async-signal-safe.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        return;
    }
    let tick = signal == libc::SIGALRM;
    if tick && TICKS.fetch_add(1, Relaxed) == 0 {
        return;
    }
    // SAFETY: the kernel passes a valid ucontext, whose `fpregs` it has pointed to the XSAVE area in the frame.
    unsafe { capture(&mut *context.cast::<libc::ucontext_t>(), tick) };
    RUNNING.store(0, Relaxed);
}

/// Copies the frame, then changes it so that the kernel returns to `leave`.
unsafe fn capture(context: &mut libc::ucontext_t, tick: bool) {
    const ORDER: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    let gregs = &mut context.uc_mcontext.gregs;
    for (to, from) in FRAME.gpr.iter().zip(ORDER) {
        to.store(gregs[from as usize] as u64, Relaxed);
    }
    let vector = gregs[libc::REG_TRAPNO as usize] as u64;
    for (to, value) in [
        (&FRAME.rip, gregs[libc::REG_RIP as usize]),
        (&FRAME.flags, gregs[libc::REG_EFL as usize]),
        (&FRAME.error, gregs[libc::REG_ERR as usize]),
        (&FRAME.address, gregs[libc::REG_CR2 as usize]),
    ] {
        to.store(value as u64, Relaxed);
    }
    FRAME
        .vector
        .store(if tick { TIMED_OUT } else { vector }, Relaxed);
    gregs[libc::REG_RIP as usize] = leave as *const () as i64;
    gregs[libc::REG_RSP as usize] = HOST_RSP.load(Relaxed) as i64;
    gregs[libc::REG_EFL as usize] = HARNESS_FLAGS;
    let area = context.uc_mcontext.fpregs.cast::<u8>();
    // SAFETY: `area` is the frame's XSAVE area, as long as the magic number and the size behind it say (512 bytes without); `fpu` was
    // stored by `run` and has room for FpuArea::SIZE bytes.
    unsafe {
        let magic = area.add(FRAME_MAGIC).cast::<u32>().read_unaligned();
        let size = area.add(FRAME_XSTATE_SIZE).cast::<u32>().read_unaligned() as usize;
        let (size, extended) = match magic {
            FP_XSTATE_MAGIC1 => (size.clamp(576, FpuArea::SIZE), true),
            _ => (512, false),
        };
        area.copy_to_nonoverlapping(FRAME.fpu.load(Relaxed) as *mut u8, size);
        if extended {
            // All components in their initial state; MXCSR is loaded whatever the header says.
            area.add(512).cast::<u64>().write_unaligned(0);
            area.add(24).cast::<u32>().write_unaligned(0x1f80);
        }
    }
}

/// The bare processor with the regions mapped; there is one at a time in a process.
pub struct Native {
    alias: *mut u8,
    alternate: Vec<u8>,
    timer: libc::timer_t,
    layout: XsaveLayout,
    _exclusive: MutexGuard<'static, ()>,
}

/// Keeps everybody else from running programs or engines that handle signals.
pub fn exclusive() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Total bytes of the regions; they lie one after another in the memfd.
fn total() -> usize {
    REGIONS.iter().map(|r| r.len as usize).sum()
}

fn protection(region: &Region) -> i32 {
    let write = if region.write { libc::PROT_WRITE } else { 0 };
    let execute = if region.execute { libc::PROT_EXEC } else { 0 };
    libc::PROT_READ | write | execute
}

/// Maps `len` bytes of `file`: at `at` where that is not 0.
fn map(at: u64, len: usize, protection: i32, file: i32, offset: usize) -> Result<*mut u8> {
    let fixed = if at == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE | fixed;
    // SAFETY: without MAP_FIXED the kernel never replaces a mapping.
    let p = unsafe { libc::mmap(at as *mut _, len, protection, flags, file, offset as i64) };
    let error = std::io::Error::last_os_error();
    ensure!(p != libc::MAP_FAILED, "mapping {at:#x}: {error}");
    ensure!(at == 0 || p as u64 == at, "{at:#x} is taken");
    Ok(p.cast())
}

fn map_regions() -> Result<*mut u8> {
    // SAFETY: creates a file descriptor.
    let file = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(file >= 0, "memfd_create failed");
    // SAFETY: `file` is ours.
    let sized = unsafe { libc::ftruncate(file, total() as i64) };
    ensure!(sized == 0, "ftruncate failed");
    let alias = map(0, total(), libc::PROT_READ | libc::PROT_WRITE, file, 0)?;
    let mut offset = 0;
    for region in &REGIONS {
        map(
            region.base,
            region.len as usize,
            protection(region),
            file,
            offset,
        )?;
        offset += region.len as usize;
    }
    // SAFETY: `file` is ours; the mappings keep what they need.
    unsafe { libc::close(file) };
    Ok(alias)
}

/// A timer that sends SIGALRM to this thread every 100 ms of its processor time: by the wall clock a program of microseconds that
/// has to wait for a processor would look endless.
fn start_timer() -> Result<libc::timer_t> {
    // SAFETY: zeroed structures are valid; the calls fill in or read what is passed.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = std::mem::zeroed();
        let made = libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &mut event, &mut timer);
        ensure!(made == 0, "timer_create failed");
        let period = libc::timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let setting = libc::itimerspec {
            it_interval: period,
            it_value: period,
        };
        libc::timer_settime(timer, 0, &setting, std::ptr::null_mut());
        Ok(timer)
    }
}

fn install(signals: &[i32]) -> Vec<(i32, libc::sigaction)> {
    // SAFETY: a zeroed sigaction is valid; `on_signal` is async-signal-safe.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = on_signal as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigfillset(&mut new.sa_mask);
        let one = |signal: &i32| {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(*signal, &new, &mut old);
            (*signal, old)
        };
        signals.iter().map(one).collect()
    }
}

/// True where user code may read and write its FS and GS bases, and the vector state is what XSAVE saves.
fn processor_serves() -> bool {
    const HWCAP2_FSGSBASE: u64 = 2;
    // SAFETY: reads the auxiliary vector.
    let fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & HWCAP2_FSGSBASE != 0;
    fsgsbase && std::is_x86_feature_detected!("xsave")
}

impl Native {
    /// Waits until nobody else has it. `layout` is of the state that programs get.
    pub fn new(layout: XsaveLayout) -> Result<Self> {
        let exclusive = exclusive();
        if !processor_serves() {
            bail!("the oracle needs FSGSBASE and XSAVE from the host");
        }
        static ALIAS: AtomicU64 = AtomicU64::new(0);
        if ALIAS.load(Relaxed) == 0 {
            // Mapped once for the life of the process.
            ALIAS.store(map_regions()? as u64, Relaxed);
        }
        install(&[libc::SIGALRM]);
        Ok(Native {
            alias: ALIAS.load(Relaxed) as *mut u8,
            alternate: vec![0; ALTERNATE_STACK],
            timer: start_timer()?,
            layout,
            _exclusive: exclusive,
        })
    }

    /// Runs `code` from `state.rip` to its exception.
    pub fn run(&mut self, state: &State, code: &[u8]) -> Outcome {
        self.store_memory(state, code);
        let area = state.vectors.store(&self.layout);
        let entry = Entry {
            gpr: state.gpr,
            flags: state.flags,
            fs: state.fs,
            gs: state.gs,
            mask: self.layout.mask,
            fpu: &*area,
        };
        let mut after = Box::new(FpuArea::reset());
        START.store(state.rip, Relaxed);
        TICKS.store(0, Relaxed);
        FRAME.fpu.store(after.bytes.as_mut_ptr() as u64, Relaxed);
        let old = install(&SIGNALS[..5]);
        let stack = self.switch_stack();
        enter(&entry);
        // SAFETY: what `switch_stack` and `install` have found.
        unsafe {
            libc::sigaltstack(&stack, std::ptr::null_mut());
            for (signal, action) in old {
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
        self.outcome(state, &after)
    }

    fn switch_stack(&mut self) -> libc::stack_t {
        let new = libc::stack_t {
            ss_sp: self.alternate.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: self.alternate.len(),
        };
        // SAFETY: `alternate` lives as long as `self`, and the old stack is put back after each run.
        unsafe {
            let mut old: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(&new, &mut old);
            old
        }
    }

    fn region(&mut self, n: usize) -> &mut [u8] {
        let before: u64 = REGIONS[..n].iter().map(|r| r.len).sum();
        // SAFETY: the alias maps all regions one after another; nothing else writes while `self` is borrowed.
        unsafe {
            std::slice::from_raw_parts_mut(self.alias.add(before as usize), REGIONS[n].len as usize)
        }
    }

    fn store_memory(&mut self, state: &State, code: &[u8]) {
        for (n, bytes) in state.memory.0.iter().enumerate() {
            self.region(n).copy_from_slice(bytes);
        }
        let at = (state.rip - REGIONS[0].base) as usize;
        self.region(0)[at..at + code.len()].copy_from_slice(code);
        // A page that is not present gives another error code than one that may not be written.
        let constant = CONSTANT.base as *const u8;
        // SAFETY: mapped for reading.
        unsafe { constant.read_volatile() };
    }

    fn outcome(&mut self, state: &State, after: &FpuArea) -> Outcome {
        let load = |a: &AtomicU64| a.load(Relaxed);
        let ending = match load(&FRAME.vector) {
            TIMED_OUT => Ending::TimedOut,
            vector => exception(vector, load(&FRAME.error), load(&FRAME.address)),
        };
        Outcome {
            ending,
            gpr: std::array::from_fn(|n| load(&FRAME.gpr[n])),
            rip: load(&FRAME.rip),
            flags: load(&FRAME.flags),
            fs: load(&GUEST_FS),
            gs: load(&GUEST_GS),
            vectors: Vectors::of(after, &self.layout),
            memory: Memory(std::array::from_fn(|n| match n {
                0 => state.memory.0[0].clone(),
                _ => self.region(n).to_vec(),
            })),
        }
    }
}

/// The kernel says "present" for all of its own half of the addresses, and #GP where it decoded a non-canonical address.
fn exception(vector: u64, error: u64, address: u64) -> Ending {
    const PAGE_FAULT: u64 = 14;
    Ending::Exception {
        vector: vector as u8,
        error,
        address: (vector == PAGE_FAULT).then_some(address),
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the timer is ours; a last signal of it finds the handler still installed.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Whether [`Native`] can run here.
pub fn supported() -> bool {
    static KNOWN: AtomicBool = AtomicBool::new(false);
    KNOWN.load(Relaxed) || {
        KNOWN.store(processor_serves(), Relaxed);
        KNOWN.load(Relaxed)
    }
}
