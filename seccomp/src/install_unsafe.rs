//! What the kernel is told: a filter for this thread, and who hears of a call that one refuses.

use std::cell::Cell;
use std::fmt::Write;
use std::io;

use syscalls::Sysno;

use crate::{Kind, Program, SeccompError};

/// The exit status of a process that made a call which its filter refuses. No debug-exit of a guest gives an even one.
pub const REFUSED: i32 = 4;

/// `si_code` of a signal that a filter raised (linux/siginfo.h, asm-generic).
const SYS_SECCOMP: i32 = 1;
/// Where a signal's information has the number of the call, in words of 32 bits.
const SYSCALL_WORD: usize = 6;

thread_local! {
    static KIND: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// Has refusals to this process end it with a message.
pub(crate) fn handle_refusals() -> io::Result<()> {
    // SAFETY: a zeroed sigaction is valid. The handler is async-signal-safe: it touches a thread-local value that needs neither
    // initialization nor destruction, its stack, and makes two system calls. It runs on the thread's alternate stack, since translated code has a
    // guest's value in RSP.
    let refused = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_refusal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    match refused {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Notes that this thread is of `kind`, and lets SIGSYS through to it.
pub(crate) fn hear_refusals(kind: Kind) -> io::Result<()> {
    KIND.set(Some(kind));
    // SAFETY: a zeroed signal set is an empty one; both calls take it as such.
    let refused = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut())
    };
    match refused {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Adds a filter to those of this thread.
pub(crate) fn install(program: &Program) -> Result<(), SeccompError> {
    // No set-user-ID program may run under a filter of an ordinary user's (seccomp(2)).
    // SAFETY: this prctl takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel copies `len` instructions, which seccompiler lays out as the kernel does (struct sock_filter), and writes nothing.
    let refused = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            &filter,
        )
    };
    if refused == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        // EINVAL: no filters, or, before Linux 4.17, not this flag.
        Some(libc::ENOSYS | libc::EINVAL) => SeccompError::Unsupported,
        _ => SeccompError::Host(error),
    })
}

extern "C" fn on_refusal(signal: i32, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the signal's information, 128 bytes and aligned; every word of it is initialized.
    let (code, number) = unsafe { ((*info).si_code, *info.cast::<u32>().add(SYSCALL_WORD)) };
    if code != SYS_SECCOMP {
        // Somebody sent it, which is to do what it does by itself. It is blocked until this returns.
        // SAFETY: default action and a signal to this thread; both are async-signal-safe.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    }
    let line = refusal(KIND.get(), number);
    // SAFETY: the line is initialized up to `len`; write and _exit are async-signal-safe, and every filter permits them.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(REFUSED);
    }
}

/// The message, with a carriage return for a terminal that is raw.
fn refusal(kind: Option<Kind>, number: u32) -> Line {
    let mut line = Line::default();
    let (kind, name) = (
        kind.map_or("starting", Kind::name),
        Sysno::new(number as usize),
    );
    let name = name.map_or("unknown", |call| call.name());
    // What does not fit is left out.
    let _ = write!(
        line,
        "doppel: sandbox: a {kind} thread made system call {number} ({name}), which its filter refuses; the machine ends here. \
         --sandbox off does without filters\r\n"
    );
    line
}

/// Text on the stack.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_thread_number_and_call_and_fits() {
        for kind in Kind::ALL {
            for (number, name) in [(101, "(ptrace)"), (0x4000_0065, "(unknown)")] {
                let line = refusal(Some(kind), number);
                let text = std::str::from_utf8(&line.bytes[..line.len]).unwrap();
                assert!(
                    text.contains(&format!("a {} thread", kind.name())),
                    "{text}"
                );
                assert!(text.contains(&format!("call {number} {name}")), "{text}");
                assert!(text.ends_with("\r\n"), "{text}");
            }
        }
    }
}
