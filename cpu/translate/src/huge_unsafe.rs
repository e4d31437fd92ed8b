//! Huge pages for the code cache, asked for before they are needed.
//!
//! Problem: a huge page spares the processor misses of its small TLB for code, but it takes the host some milliseconds to make one of a
//! memfd, and a boot needs seven.
//! Idea: the cache fills from the bottom, so the next page is known; when half of the one before it is full, a thread has the host make it.
//! Invariant: nothing stands in a page until it was taken, and the thread does not touch it afterwards.
//! Cost: a thread that sleeps, and a huge page that is there half a page early.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use doppel_seccomp::{Kind, spawn};

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Linux 6.1 and later: makes huge pages of a stretch at once, whatever the settings for huge pages in shared memory are.
const MADV_COLLAPSE: i32 = 25;

/// Both mappings of the code.
#[derive(Clone, Copy)]
struct Mappings {
    write: *mut u8,
    execute: *mut u8,
}

// SAFETY: the pointers stand for mappings that the cache keeps as long as its `HugePages`; who touches which part when is the invariant above.
unsafe impl Send for Mappings {}

/// Asks the host for huge pages.
pub(crate) struct HugePages {
    mappings: Mappings,
    /// The thread and the page that it was asked for.
    thread: Option<Thread>,
    asked: Option<usize>,
}

struct Thread {
    requests: Sender<usize>,
    made: Receiver<bool>,
    handle: JoinHandle<()>,
}

impl HugePages {
    /// For these mappings, which stay until this value is gone.
    pub fn new(write: *mut u8, execute: *mut u8) -> Self {
        HugePages {
            mappings: Mappings { write, execute },
            thread: None,
            asked: None,
        }
    }

    /// Has the page at offset `at` made in the background. Nothing stands there until it is taken.
    pub fn ask(&mut self, at: usize) {
        if self.asked.is_some() {
            return;
        }
        self.thread = self.thread.take().or_else(|| Thread::start(self.mappings));
        let thread = self.thread.as_ref();
        if thread.is_some_and(|t| t.requests.send(at).is_ok()) {
            self.asked = Some(at);
        }
    }

    /// Makes the page at offset `at`, where nothing stands, or waits for it; false where the host has none.
    pub fn take(&mut self, at: usize) -> bool {
        match (self.asked.take(), &self.thread) {
            (Some(asked), Some(thread)) => {
                let made = thread.made.recv().unwrap_or(false);
                if asked == at {
                    made
                } else {
                    self.mappings.make(at)
                }
            }
            _ => self.mappings.make(at),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            drop(thread.requests);
            let _ = thread.handle.join();
        }
    }
}

impl Thread {
    fn start(mappings: Mappings) -> Option<Self> {
        let (requests, received) = channel();
        let (answer, made) = channel();
        let body = move || serve(mappings, &received, &answer);
        let handle = spawn(Kind::Helper, "code", body).ok()?;
        Some(Thread {
            requests,
            made,
            handle,
        })
    }
}

fn serve(mappings: Mappings, requests: &Receiver<usize>, answer: &Sender<bool>) {
    for at in requests {
        if answer.send(mappings.make(at)).is_err() {
            return;
        }
    }
}

impl Mappings {
    /// The host makes a huge page of a stretch that has one page, and both mappings get it.
    fn make(self, at: usize) -> bool {
        // SAFETY: within both mappings, as the cache asks for nothing else; nothing stands there yet.
        unsafe {
            self.write.add(at).write_volatile(0);
            let execute = self.execute.add(at).cast();
            if libc::madvise(execute, HUGE_PAGE, MADV_COLLAPSE) != 0 {
                return false;
            }
            libc::madvise(
                self.write.add(at).cast(),
                HUGE_PAGE,
                libc::MADV_POPULATE_WRITE,
            );
            libc::madvise(execute, HUGE_PAGE, libc::MADV_POPULATE_READ);
        }
        true
    }
}
