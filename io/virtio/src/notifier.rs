//! How a driver reaches its device: an eventfd for each queue.
//!
//! The vCPU that writes to a notification register makes one system call and goes on. With VIRTIO_F_EVENT_IDX a driver notifies
//! only a device that ran dry, so a busy queue costs no such writes. An eventfd can be waited for beside other
//! descriptors, and handed to another process.
//!
//! A device may put a handler before the eventfd, which deals with a notification in the vCPU's own thread: to wake another one
//! takes longer than a short frame does.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{PoisonError, RwLock, Weak};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// Who deals with notifications at once, in the thread that notifies.
pub trait OnNotify: Send + Sync {
    /// Queue `queue` was notified. False where the flag is to be raised, so that the thread that waits for it sees to it.
    fn notified(&self, queue: u16) -> bool;
}

type Handler = (u16, Weak<dyn OnNotify>);

/// A flag that threads can wait for.
pub struct Notifier {
    flag: OwnedFd,
    handler: RwLock<Option<Handler>>,
}

impl Notifier {
    /// A flag that is down.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Notifier {
            flag: eventfd(0, flags)?,
            handler: RwLock::new(None),
        })
    }

    /// Has `handler` deal with notifications, as those of queue `queue`, before the flag is raised; or nobody.
    pub fn handle(&self, handler: Option<Handler>) {
        let slot = self.handler.write();
        *slot.unwrap_or_else(PoisonError::into_inner) = handler;
    }

    /// Notifies: has the handler see to it if there is one, else raises the flag.
    pub fn notify(&self) {
        let handler = {
            let slot = self.handler.read();
            let slot = slot.unwrap_or_else(PoisonError::into_inner);
            slot.as_ref().map(|(queue, of)| (*queue, of.upgrade()))
        };
        let done = match handler {
            Some((queue, Some(handler))) => handler.notified(queue),
            _ => false,
        };
        if !done {
            self.raise();
        }
    }

    /// Raises the flag and wakes who waits.
    pub fn raise(&self) {
        // It fails only where the counter is full, and then the flag is up.
        let _ = rustix::io::write(&self.flag, &1u64.to_ne_bytes());
    }

    /// Lowers the flag; says whether it was up.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.flag, &mut [0; 8]).is_ok()
    }
}

impl std::fmt::Debug for Notifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Notifier").field(&self.flag).finish()
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.flag.as_fd()
    }
}

/// Waits until one of the descriptors can be read or is at its end; says which.
///
/// # Errors
/// What poll(2) gives: the host is out of memory.
pub fn wait_readable(of: &[BorrowedFd<'_>]) -> io::Result<Vec<bool>> {
    wait_readable_for(of, None)
}

/// The same for a time at most, after which none is readable.
///
/// # Errors
/// As above.
pub fn wait_readable_for(of: &[BorrowedFd<'_>], limit: Option<Duration>) -> io::Result<Vec<bool>> {
    let limit = limit.map(|limit| Timespec {
        tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    });
    let mut fds: Vec<_> = of
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) => return Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_up_from_the_first_notification_to_the_take() {
        let flag = Notifier::new().unwrap();
        assert!(!flag.take());
        flag.notify();
        flag.notify();
        assert!(flag.take() && !flag.take());
    }

    #[test]
    fn a_wait_says_which_flag_is_up() {
        let flags = [(); 3].map(|()| Notifier::new().unwrap());
        flags[1].notify();
        let fds: Vec<_> = flags.iter().map(AsFd::as_fd).collect();
        assert_eq!(wait_readable(&fds).unwrap(), [false, true, false]);
    }
}
