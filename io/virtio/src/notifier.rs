//! How a driver reaches its device: an eventfd for each queue.
//!
//! The vCPU that writes to a notification register makes one system call and goes on. With VIRTIO_F_EVENT_IDX a driver notifies
//! only a device that ran dry, so a busy queue costs no such writes. An eventfd can be waited for beside other
//! descriptors, and handed to another process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

/// A flag that threads can wait for.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// A flag that is down.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Notifier(eventfd(0, flags)?))
    }

    /// Raises the flag and wakes who waits.
    pub fn notify(&self) {
        // It fails only where the counter is full, and then the flag is up.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Lowers the flag; says whether it was up.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors can be read or is at its end; says which.
///
/// # Errors
/// What poll(2) gives: the host is out of memory.
pub fn wait_readable(of: &[BorrowedFd<'_>]) -> io::Result<Vec<bool>> {
    let mut fds: Vec<_> = of
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        match poll(&mut fds, None) {
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
