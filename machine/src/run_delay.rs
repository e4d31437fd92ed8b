//! How long a thread was ready to run and had no processor: what a guest is told as steal time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The kernel's account of one thread (proc(5), schedstat: time on a processor, time waiting for one, time slices).
pub struct RunDelay {
    account: Option<File>,
    read: Option<Instant>,
}

impl RunDelay {
    /// How often it is worth reading a file: seldomer than the guest's timer ticks.
    const INTERVAL: Duration = Duration::from_millis(20);

    /// Of the calling thread. A host without such accounts tells nothing.
    pub fn of_this_thread() -> Self {
        RunDelay {
            account: File::open("/proc/thread-self/schedstat").ok(),
            read: None,
        }
    }

    /// Nanoseconds that the thread has waited, where the last answer is some time ago.
    pub fn now_and_then(&mut self) -> Option<u64> {
        let account = self.account.as_ref()?;
        if self.read.is_some_and(|t| t.elapsed() < Self::INTERVAL) {
            return None;
        }
        self.read = Some(Instant::now());
        let mut text = [0; 80];
        let len = account.read_at(&mut text, 0).ok()?;
        std::str::from_utf8(&text[..len])
            .ok()?
            .split_whitespace()
            .nth(1)?
            .parse()
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_told_what_it_waited_and_not_too_often() {
        let mut delay = RunDelay::of_this_thread();
        if delay.account.is_none() {
            eprintln!("SKIPPED: this host keeps no account of waiting threads");
            return;
        }
        let first = delay.now_and_then().unwrap();
        assert_eq!(delay.now_and_then(), None);
        std::thread::sleep(RunDelay::INTERVAL);
        assert!(delay.now_and_then().unwrap() >= first);
    }
}
