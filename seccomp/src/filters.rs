//! Filters of a machine, and how threads come by theirs.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use crate::install_unsafe::{handle_refusals, hear_refusals, install};
use crate::{Kind, Program};

thread_local! {
    /// What this thread is under, for the threads that it starts: the kernel hands filters on, and does not tell of them.
    static CONFINED: RefCell<Option<Confined>> = const { RefCell::new(None) };
}

/// A thread is not confined.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel has no filters.
    #[error("this kernel has no seccomp filters")]
    Unsupported,
    /// The kernel refuses this one, or a thread.
    #[error("the host refuses a seccomp filter: {0}")]
    Host(#[from] io::Error),
}

/// A filter for each kind of thread.
#[derive(Clone, Debug)]
pub struct Filters(Arc<BTreeMap<Kind, Program>>);

/// A thread's state.
#[derive(Clone)]
struct Confined {
    filters: Filters,
    kind: Kind,
    /// To the thread that starts others.
    starter: Option<Sender<Start>>,
}

/// Starts a thread and tells who wanted it.
type Start = Box<dyn FnOnce() + Send>;

impl Filters {
    /// Of these programs. A kind without one has the filter of who starts it, and no more.
    #[must_use]
    pub fn new(programs: BTreeMap<Kind, Program>) -> Filters {
        Filters(Arc::new(programs))
    }

    /// Binds this thread, as one of `kind`, and all that it starts from now on. For good. A control thread is given a second one, which
    /// starts threads for those that may not ([`spawn`]).
    ///
    /// # Errors
    /// The kernel has no filters or refuses this one, and then nothing has changed; or it refuses a thread.
    pub fn confine(&self, kind: Kind) -> Result<(), SeccompError> {
        handle_refusals()?;
        self.enter(kind, true)?;
        let mut confined = Confined {
            filters: self.clone(),
            kind,
            starter: None,
        };
        if kind == Kind::Control {
            let (starter, starts) = channel();
            confined.starter = Some(starter);
            let this = confined.clone();
            Builder::new().name("starter".to_owned()).spawn(move || {
                // Without a way to itself, so that it ends when all others have ended.
                let starter = None;
                let confined = Confined { starter, ..this };
                if confined.enter(false).is_ok() {
                    serve(&starts);
                }
            })?;
        }
        CONFINED.set(Some(confined));
        Ok(())
    }

    fn enter(&self, kind: Kind, another: bool) -> Result<(), SeccompError> {
        hear_refusals(kind)?;
        match self.0.get(&kind) {
            Some(program) if another => install(program),
            _ => Ok(()),
        }
    }
}

impl Confined {
    /// Binds this thread; `another` where it is of another kind than who started it.
    fn enter(self, another: bool) -> Result<(), SeccompError> {
        self.filters.enter(self.kind, another)?;
        CONFINED.set(Some(self));
        Ok(())
    }
}

fn serve(starts: &Receiver<Start>) {
    for start in starts {
        start();
    }
}

/// The body of a thread of `kind` that this thread is about to start. Where this thread has filters, the new one takes its own before `body`;
/// where the kernel refuses that, the process ends, with a message and status 1.
pub fn narrowed<T>(kind: Kind, body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    narrow(CONFINED.with_borrow(Clone::clone), kind, body)
}

fn narrow<T>(from: Option<Confined>, kind: Kind, body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    move || {
        if let Some(from) = from {
            let another = from.kind != kind;
            if let Err(error) = (Confined { kind, ..from }).enter(another) {
                eprintln!(
                    "doppel: sandbox: a {} thread cannot be confined: {error}; --sandbox off does without",
                    kind.name()
                );
                std::process::exit(1);
            }
        }
        body()
    }
}

/// Starts a thread of `kind` with the filter of its kind and the control thread's, and not with that of this thread, which may be
/// narrower: a vCPU starts what serves a shared directory and may not open a file itself.
///
/// # Errors
/// The host has no thread for it.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let thread = Builder::new().name(name.to_owned());
    let from = CONFINED.with_borrow(Clone::clone);
    let Some(starter) = from.as_ref().and_then(|from| from.starter.clone()) else {
        return thread.spawn(narrow(from, kind, body));
    };
    let (answer, started) = channel();
    let start = move || {
        let from = from.map(|from| Confined {
            kind: Kind::Control,
            ..from
        });
        let _ = answer.send(thread.spawn(narrow(from, kind, body)));
    };
    let gone = |_| io::Error::other("the thread that starts others is gone");
    starter.send(Box::new(start)).map_err(|_| gone(()))?;
    started.recv().map_err(|_| gone(()))?
}
