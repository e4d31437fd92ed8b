//! System calls that the standard library has no safe function for, each made safe by its wrapper.

use anyhow::{Context, Result, ensure};
use std::ffi::CStr;
use std::io::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Runs from now on where it runs now, as it would in a machine of one processor.
pub fn pin_to_one_cpu() -> Result<()> {
    // SAFETY: sched_getcpu has no argument; the set is plain data, written and read within its size.
    let status = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    done(status).context("sched_setaffinity")
}

/// Processor time of this process and of the children that it has waited for.
pub fn cpu_time() -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for who in [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN] {
        // SAFETY: the structure is plain data and outlives the call.
        let (status, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            (libc::getrusage(who, &mut usage), usage)
        };
        done(status).context("getrusage")?;
        for time in [usage.ru_utime, usage.ru_stime] {
            sum += Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
        }
    }
    Ok(sum)
}

fn done(status: i32) -> Result<()> {
    ensure!(status >= 0, Error::last_os_error());
    Ok(())
}

pub fn parent() -> i32 {
    // SAFETY: getppid takes nothing and cannot fail.
    unsafe { libc::getppid() }
}

/// A child process that somebody has to wait for.
#[must_use]
pub struct Child(i32);

impl Child {
    /// Its wait status.
    pub fn wait(self) -> Result<i32> {
        let mut status = 0;
        // SAFETY: status outlives the call.
        done(unsafe { libc::waitpid(self.0, &mut status, 0) }).context("waitpid")?;
        Ok(status)
    }
}

/// Runs `child` in a child process, whose exit status it returns.
pub fn fork(child: impl FnOnce() -> i32) -> Result<Child> {
    // SAFETY: this program has one thread when it forks (threads of other rows are joined), and what its children do
    // before they leave by _exit are system calls, which need nothing that another thread could hold.
    let pid = unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(child());
        }
        pid
    };
    done(pid).context("fork")?;
    Ok(Child(pid))
}

/// Becomes another program, with one argument; returns an exit status where that failed.
pub fn exec(program: &CStr, argument: &CStr) -> i32 {
    let arguments = [program.as_ptr(), argument.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: both lists end with a null pointer, and their strings live until the call, which ends them.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    127
}

/// How many of the descriptors can be read from, without waiting.
pub fn select(descriptors: &[i32]) -> Result<u64> {
    let limit = descriptors.iter().max().map_or(0, |most| most + 1);
    ensure!(limit <= libc::FD_SETSIZE as i32, "a descriptor too high");
    // SAFETY: every descriptor fits the set, set and timeout outlive the call.
    let ready = unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        descriptors
            .iter()
            .for_each(|fd| libc::FD_SET(*fd, &mut set));
        let mut now: libc::timeval = std::mem::zeroed();
        let none = std::ptr::null_mut();
        libc::select(limit, &mut set, none, none, &mut now)
    };
    done(ready).context("select")?;
    Ok(ready as u64)
}

/// Signals caught so far.
static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    CAUGHT.fetch_add(1, Ordering::Relaxed);
}

/// Has SIGUSR1 counted from now on; the count so far.
pub fn catch_signals() -> Result<u64> {
    // SAFETY: the handler only adds to an atomic number, which a handler may.
    let status = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as extern "C" fn(i32) as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut())
    };
    done(status).context("sigaction")?;
    Ok(CAUGHT.load(Ordering::Relaxed))
}

/// To this thread: one for the process could wait for another thread, where there are several, and be one with the next.
pub fn raise_signal() -> Result<()> {
    // SAFETY: SIGUSR1 has a handler (catch_signals); without one the process would end, which is no danger to memory.
    let status = unsafe {
        let (process, thread) = (libc::getpid(), libc::gettid());
        libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1)
    };
    done(status as i32)
}

pub enum Access {
    Read,
    ReadWrite,
}

/// Fresh anonymous memory of small pages.
pub struct Mapping {
    base: *mut u8,
    len: usize,
    writable: bool,
}

impl Mapping {
    pub fn new(len: usize) -> Result<Mapping> {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a mapping where the kernel likes disturbs nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        ensure!(base != libc::MAP_FAILED, Error::last_os_error());
        // SAFETY: the range was mapped right above. A kernel without large pages refuses, and that is as well.
        unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
        Ok(Mapping {
            base: base.cast(),
            len,
            writable: true,
        })
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        assert!(self.writable, "a mapping that is read only");
        // SAFETY: base and len are a live mapping, zeroed by the kernel, readable and writable, and borrowed by `self`.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }

    pub fn protect(&mut self, access: Access) -> Result<()> {
        let bits = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        self.writable = matches!(access, Access::ReadWrite);
        // SAFETY: the range is this mapping, of which nobody has a reference while `self` is borrowed.
        done(unsafe { libc::mprotect(self.base.cast(), self.len, bits) }).context("mprotect")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, and nobody refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
