//! Into translated code and out of it: the GS base, signals, the call back from a TLB miss.
//!
//! While translated code runs, RSP and every other register hold the guest's values, and the processor may raise a fault at any of
//! its instructions. Signals are therefore taken on an alternate stack, and with SS_AUTODISARM, without which the kernel would look at
//! the guest's RSP to decide whether it is on that stack already. A fault inside the code cache makes the handler
//! note where, and continue in the exit thunk; a fault anywhere else goes to whoever handled it before. All other signals are blocked on
//! the thread from the first time that it runs guest code, and its GS base stays, since an engine is left for each interrupt and these are
//! system calls. (A process's first thread gets its mask back each time: it may be the only one that a signal could end.)

use std::cell::Cell;
use std::ops::Range;
use std::sync::Once;

use crate::context::Context;
use crate::context_unsafe::ContextBox;
use crate::thunk::EXIT_FAULT;
use crate::translator::Translator;

#[derive(Clone, Copy)]
struct Running {
    context: *mut Context,
    code: (u64, u64),
    exit_thunk: u64,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
    static GS_BASE: Cell<*mut Context> = const { Cell::new(std::ptr::null_mut()) };
    static SIGNALS_BLOCKED: Cell<bool> = const { Cell::new(false) };
    static SIGNAL_STACK: SignalStack = SignalStack::install();
}

/// While it lives, this thread may run translated code of one engine.
pub(crate) struct ThreadSetup {
    old_mask: Option<libc::sigset_t>,
}

const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];
const SS_AUTODISARM: i32 = 1 << 31;
const ARCH_SET_GS: i32 = 0x1001;

impl ThreadSetup {
    pub fn new(context: &ContextBox, code: Range<u64>, exit_thunk: u64) -> Self {
        install_handlers();
        RUNNING.set(Some(Running {
            context: context.as_ptr(),
            code: (code.start, code.end),
            exit_thunk,
        }));
        SIGNAL_STACK.with(|_| ());
        if GS_BASE.replace(context.as_ptr()) != context.as_ptr() {
            // SAFETY: GS is used by nothing but translated code, neither by Rust nor by libc, and translated code of another engine sets
            // it anew. A base that outlives its context is an address that nobody uses.
            unsafe {
                libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, context.as_ptr());
            }
        }
        let old_mask = match SIGNALS_BLOCKED.get() {
            true => None,
            false => {
                // SAFETY: they only tell numbers.
                let first = unsafe { libc::gettid() == libc::getpid() };
                SIGNALS_BLOCKED.set(!first);
                Some(block_signals()).filter(|_| first)
            }
        };
        ThreadSetup { old_mask }
    }
}

/// Blocks all signals on this thread but those of faults; what it blocked before.
fn block_signals() -> libc::sigset_t {
    // SAFETY: the signal sets are valid for the calls.
    unsafe {
        let mut mask: libc::sigset_t = std::mem::zeroed();
        let mut old_mask: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut mask);
        // SIGSYS tells of a system call that is refused, and the kernel kills without a word who blocks it.
        for s in SIGNALS.into_iter().chain([libc::SIGSYS]) {
            libc::sigdelset(&mut mask, s);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &mask, &mut old_mask);
        old_mask
    }
}

/// The thread's alternate signal stack, from the first run of translated code to the end of the thread.
struct SignalStack {
    old: libc::stack_t,
    memory: *mut libc::c_void,
}

/// Bytes of it. Of a mapping of its own only what was touched takes memory.
const SIGNAL_STACK_SIZE: usize = 256 << 10;

impl SignalStack {
    fn install() -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let size = SIGNAL_STACK_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
        assert!(memory != libc::MAP_FAILED, "there is no memory for a stack");
        let new = libc::stack_t {
            ss_sp: memory,
            ss_flags: SS_AUTODISARM,
            ss_size: size,
        };
        // SAFETY: the memory lives as long as this value, whose drop puts the old stack back first.
        let old = unsafe {
            let mut old: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(&new, &mut old);
            old
        };
        SignalStack { old, memory }
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        // SAFETY: `old` is what the kernel gave us for this thread; nobody uses the memory once it is put back.
        unsafe {
            libc::sigaltstack(&self.old, std::ptr::null_mut());
            libc::munmap(self.memory, SIGNAL_STACK_SIZE);
        }
    }
}

impl Drop for ThreadSetup {
    fn drop(&mut self) {
        RUNNING.set(None);
        if let Some(old_mask) = &self.old_mask {
            // SAFETY: puts back what `new` found.
            unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, old_mask, std::ptr::null_mut());
            }
        }
    }
}

/// Runs translated code from `context.entry` until it leaves. The thread was set up with [`ThreadSetup`].
pub(crate) fn enter(translator: &mut Translator, thunk: u64) {
    translator.context.slow_access = slow_access as *const () as u64;
    let this: *mut Translator = translator;
    translator.context.translator = this as u64;
    // SAFETY: `thunk` is the enter thunk of this translator's cache, which keeps to the C calling convention; the
    // code it runs was emitted by this translator and touches only the context (through GS, set by
    // `ThreadSetup`) and guest RAM behind TLB checks. It may call `slow_access` with `this`, which is the only path
    // to the translator during the call.
    unsafe {
        let f: extern "sysv64" fn() = std::mem::transmute(thunk);
        f();
    }
}

/// Called by the slow thunk: see [`Translator::access`].
extern "sysv64" fn slow_access(this: *mut Translator, linear: u64, site: u32) -> u64 {
    // SAFETY: `enter` stored this pointer from a unique borrow that nobody else uses during the call.
    unsafe { (*this).access(linear, site) }
}

fn install_handlers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for s in SIGNALS {
            // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe (it touches a const thread-local
            // and the ucontext only).
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(s, std::ptr::null(), &mut old);
                previous(s).set(old);
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = on_fault as *const () as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigaction(s, &new, std::ptr::null_mut());
            }
        }
    });
}

/// The process-wide disposition that stood before ours, per signal. Written once, before the handler is installed.
struct Previous(std::sync::OnceLock<libc::sigaction>);

impl Previous {
    fn set(&self, old: libc::sigaction) {
        let _ = self.0.set(old);
    }
}

static PREVIOUS: [Previous; 5] = [const { Previous(std::sync::OnceLock::new()) }; 5];

fn previous(signal: i32) -> &'static Previous {
    &PREVIOUS[SIGNALS.iter().position(|s| *s == signal).unwrap_or(0)]
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, uc: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext; `context` is alive while `RUNNING` is set on this thread.
    unsafe {
        let gregs = &mut (*uc.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let pc = gregs[libc::REG_RIP as usize] as u64;
        if let Some(run) = RUNNING.get()
            && (run.code.0..run.code.1).contains(&pc)
        {
            (*run.context).fault_pc = pc;
            (*run.context).fault_address = (*info).si_addr() as u64;
            (*run.context).exit = EXIT_FAULT;
            gregs[libc::REG_RIP as usize] = run.exit_thunk as i64;
            return;
        }
        // Not ours: give it to whoever was there before; by default the instruction faults again and kills us.
        if let Some(old) = previous(signal).0.get() {
            match old.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => {
                    libc::sigaction(signal, old, std::ptr::null_mut());
                }
                f if old.sa_flags & libc::SA_SIGINFO != 0 => {
                    let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(f);
                    f(signal, info, uc);
                }
                f => {
                    let f: extern "C" fn(i32) = std::mem::transmute(f);
                    f(signal);
                }
            }
        }
    }
}

/// True where the processor and the kernel let processes use XSAVE with the state that guests are offered.
pub(crate) fn host_features() -> (bool, bool) {
    let xsave = std::is_x86_feature_detected!("xsave");
    (xsave, xsave && std::is_x86_feature_detected!("xsaveopt"))
}
