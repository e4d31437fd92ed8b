//! The life of a back-end's processes: start, first words, end, and the next.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use doppel_seccomp::{Kind, spawn};
use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::{receive, send};

/// Starts the process that is to serve the other end of the socket.
pub type Start = Box<dyn Fn(OwnedFd) -> io::Result<Child> + Send + Sync>;

/// The longest first record; what is longer of an error is cut off.
const HELLO_MAX: usize = 64 << 10;
/// How long a process has to open what it serves.
const HELLO_TIME: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};
/// The first byte of the first record: it serves, or the rest says why it does not.
const SERVES: u8 = 0;
const REFUSES: u8 = 1;

/// The pause before the next start, doubled each time that one process died soon after another.
const PAUSE: Duration = Duration::from_millis(5);
const DOUBLINGS_MAX: u32 = 6;
/// How long a process has to end by itself.
const FAREWELL: Duration = Duration::from_millis(100);

/// The monitor's half of a back-end that is in another process.
pub trait Frontend: Send + Sync + 'static {
    /// Sees to a process until its end of the socket is closed or it says what is no message.
    fn attend(&self, socket: &OwnedFd);
    /// A process died. How many did since one was of use; `None` where no other is wanted.
    fn died(&self) -> Option<u32>;
    /// Tells a new process, which said `hello`, of what it has to know.
    ///
    /// # Errors
    /// It is of no use, or no other was wanted meanwhile: it is ended.
    fn resume(&self, socket: &Arc<OwnedFd>, hello: &[u8]) -> io::Result<()>;
    /// The end: [`Frontend::attend`] returns soon, and [`Frontend::died`] wants no other process.
    fn end(&self);
}

/// A back-end in a process, and its supervisor. Dropped, it ends the process.
pub struct Domain<F: Frontend> {
    frontend: Arc<F>,
    supervisor: Mutex<Supervisor>,
    start: Arc<Start>,
    process: u32,
    restarts: Arc<AtomicU64>,
}

/// The thread that sees to the process. The first who asks for something starts it, so that it is under whatever the machine has been put under by then.
enum Supervisor {
    Not(Option<Process>),
    Started(JoinHandle<()>),
}

/// A process that serves.
struct Process {
    socket: Arc<OwnedFd>,
    child: Child,
    hello: Vec<u8>,
}

impl<F: Frontend> Domain<F> {
    /// Starts the process and waits until it serves; `frontend` is made of what it says.
    ///
    /// # Errors
    /// The process cannot be started, says why it cannot serve, or says nothing for a minute.
    pub fn new(
        start: Start,
        frontend: impl FnOnce(&Arc<OwnedFd>, &[u8]) -> io::Result<F>,
    ) -> io::Result<Self> {
        let mut process = launch(&start)?;
        let frontend = match frontend(&process.socket, &process.hello) {
            Ok(frontend) => Arc::new(frontend),
            Err(error) => {
                bury(&mut process.child);
                return Err(error);
            }
        };
        Ok(Domain {
            frontend,
            start: Arc::new(start),
            process: process.child.id(),
            restarts: Arc::default(),
            supervisor: Mutex::new(Supervisor::Not(Some(process))),
        })
    }

    /// The number of the process that was started first.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.process
    }

    /// How many processes followed the first.
    #[must_use]
    pub fn restarts(&self) -> &Arc<AtomicU64> {
        &self.restarts
    }

    /// The monitor's half.
    #[must_use]
    pub fn frontend(&self) -> &Arc<F> {
        &self.frontend
    }

    /// Sees to it that the process is seen to.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn supervise(&self) -> io::Result<()> {
        let supervisor = self.supervisor.lock();
        let mut supervisor = supervisor.unwrap_or_else(PoisonError::into_inner);
        if let Supervisor::Not(first) = &mut *supervisor {
            let first = first.take().ok_or(io::ErrorKind::BrokenPipe)?;
            let (frontend, start) = (self.frontend.clone(), self.start.clone());
            let restarts = self.restarts.clone();
            let run = move || supervise(&*frontend, &start, first, &restarts);
            *supervisor = Supervisor::Started(quietly(run)?);
        }
        Ok(())
    }
}

impl<F: Frontend> Drop for Domain<F> {
    fn drop(&mut self) {
        self.frontend.end();
        let supervisor = self.supervisor.get_mut();
        let supervisor = supervisor.unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(supervisor, Supervisor::Not(None)) {
            Supervisor::Not(Some(mut first)) => bury(&mut first.child),
            Supervisor::Not(None) => {}
            Supervisor::Started(thread) => drop(thread.join()),
        }
    }
}

fn supervise(frontend: &impl Frontend, start: &Start, first: Process, restarts: &AtomicU64) {
    let mut running = Some(first);
    loop {
        if let Some(mut process) = running.take() {
            frontend.attend(&process.socket);
            bury(&mut process.child);
        }
        let Some(deaths) = frontend.died() else {
            return;
        };
        tracing::warn!("the process of a back-end died; it is started anew");
        if deaths > 1 {
            thread::sleep(PAUSE * 2u32.pow(deaths.min(DOUBLINGS_MAX)));
        }
        match launch(start).and_then(|process| resume(frontend, process)) {
            Ok(process) => {
                restarts.fetch_add(1, Ordering::Relaxed);
                running = Some(process);
            }
            Err(error) => tracing::warn!("it cannot be: {error}"),
        }
    }
}

fn resume(frontend: &impl Frontend, mut process: Process) -> io::Result<Process> {
    match frontend.resume(&process.socket, &process.hello) {
        Ok(()) => Ok(process),
        Err(error) => {
            bury(&mut process.child);
            Err(error)
        }
    }
}

/// The two ends of what goes between monitor and process.
///
/// # Errors
/// The host has no descriptors left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(kind.0, kind.1, SocketFlags::CLOEXEC, None)?)
}

/// Starts a process and hears what it has to say first.
fn launch(start: &Start) -> io::Result<Process> {
    let (ours, theirs) = pair()?;
    let mut child = start(theirs)?;
    match hear_first(&ours) {
        Ok(hello) => Ok(Process {
            socket: Arc::new(ours),
            child,
            hello,
        }),
        Err(error) => {
            bury(&mut child);
            Err(error)
        }
    }
}

fn hear_first(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    let mut wanted = [PollFd::new(socket, PollFlags::IN)];
    if retry_on_intr(|| poll(&mut wanted, Some(&HELLO_TIME)))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut record = vec![0; HELLO_MAX];
    let (len, _) = receive(socket, &mut record)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    record.truncate(len);
    match record.split_first() {
        Some((&SERVES, hello)) => Ok(hello.to_vec()),
        Some((&REFUSES, why)) => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A process's first record: `hello` of what it opened, or why it could not. What it opened, unless that is so.
///
/// # Errors
/// The socket fails.
pub fn answer_for<T, E: Display>(
    socket: impl AsFd,
    opened: Result<T, E>,
    hello: impl FnOnce(&T) -> Vec<u8>,
) -> io::Result<Option<T>> {
    let (first, rest) = match &opened {
        Ok(opened) => (SERVES, hello(opened)),
        Err(error) => (REFUSES, error.to_string().into_bytes()),
    };
    let mut record = vec![first];
    record.extend(rest);
    record.truncate(HELLO_MAX);
    send(socket, &record, None)?;
    Ok(opened.ok())
}

/// What a process under way never does would be waited for: with this on the stack of a thread, a panic there ends all of it, which the monitor sees.
pub struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            std::process::abort();
        }
    }
}

/// A thread that no signal is delivered to: whoever starts it may not have blocked those that are his business. But for SIGSYS, which
/// the kernel would kill for without a word.
fn quietly(body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    spawn(Kind::Supervisor, "supervisor", move || {
        let mut signals = SigSet::all();
        signals.remove(Signal::SIGSYS);
        // It is refused for no valid set.
        let _ = signals.thread_block();
        body();
    })
}

/// Sees to it that a process is dead, and nothing of it under way any more. One whose socket is closed goes by itself, unless it hangs.
fn bury(child: &mut Child) {
    let since = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && since.elapsed() < FAREWELL {
        thread::sleep(FAREWELL / 100);
    }
    let _ = child.kill();
    let _ = child.wait();
}
