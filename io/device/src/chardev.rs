//! Byte streams between a device (a UART, a console) and the host.
//!
//! Neither side ever blocks the other: the device offers output to a [`CharSink`] that takes what it has room for, and
//! pulls input from a [`CharSource`] as its FIFO empties. When either has something new, the back-end tells the
//! device through [`Backed`], with no lock held. [`OutputQueue`] and [`InputQueue`] are the two queues
//! between that and the threads that do blocking host I/O.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// Where a device's output goes.
pub trait CharSink: Send + Sync {
    /// Takes bytes from the front of `bytes` without blocking; says how many. After it took fewer than offered it calls
    /// [`Backed::backend_ready`] once it has room.
    fn write(&self, bytes: &[u8]) -> usize;
}

/// Where a device's input comes from.
pub trait CharSource: Send + Sync {
    /// Fills the front of `buffer` without blocking; says with how many bytes. Calls [`Backed::backend_ready`]
    /// when bytes arrive.
    fn read(&self, buffer: &mut [u8]) -> usize;
}

/// A device that has host back-ends.
pub trait Backed: Send + Sync {
    /// A back-end has input, or room for output again.
    fn backend_ready(&self);
}

/// A back-end that leads nowhere: output is thrown away, input never comes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disconnected;

impl CharSink for Disconnected {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

impl CharSource for Disconnected {
    fn read(&self, _buffer: &mut [u8]) -> usize {
        0
    }
}

type Frontend = OnceLock<Weak<dyn Backed>>;

fn notify(device: &Frontend) {
    if let Some(device) = device.get().and_then(Weak::upgrade) {
        device.backend_ready();
    }
}

#[derive(Default)]
struct Bytes {
    bytes: VecDeque<u8>,
    refused: bool,
    writing: bool,
    /// The writer thread sleeps until there is something to write.
    idle: bool,
    closed: bool,
}

fn lock(bytes: &Mutex<Bytes>) -> MutexGuard<'_, Bytes> {
    bytes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long the writer thread gathers output after it wrote some. A kernel's messages come a byte at a time: to wake the writer for
/// each would cost a guest more than all else that a byte does. Nobody sees so short a delay.
const GATHER: Duration = Duration::from_micros(500);

/// Output on its way from a device to a host file.
pub struct OutputQueue {
    queue: Mutex<Bytes>,
    changed: Condvar,
    capacity: usize,
    frontend: Frontend,
}

impl OutputQueue {
    /// A queue of at most `capacity` bytes.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(OutputQueue {
            queue: Mutex::default(),
            changed: Condvar::new(),
            capacity: capacity.max(1),
            frontend: OnceLock::new(),
        })
    }

    /// Says whom to tell about room. The first call counts.
    pub fn connect(&self, to: Weak<dyn Backed>) {
        let _ = self.frontend.set(to);
    }

    /// The writer thread: writes out what the device sends until [`OutputQueue::close`] and everything is written. After
    /// an error the rest is thrown away, so that the guest never hangs on a dead terminal; the error is returned at the end.
    pub fn run(&self, mut to: impl Write) -> io::Result<()> {
        let mut result = Ok(());
        while let Some(bytes) = self.take() {
            if result.is_ok() {
                result = to.write_all(&bytes).and_then(|()| to.flush());
            }
            self.written();
            self.gather();
        }
        result
    }

    /// No more output comes: [`OutputQueue::run`] returns when all is written.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Waits until all output so far is written.
    pub fn drain(&self) {
        let queue = lock(&self.queue);
        let _done = self
            .changed
            .wait_while(queue, |q| q.writing || !q.bytes.is_empty());
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut queue = lock(&self.queue);
        queue.idle = true;
        let mut queue = self
            .changed
            .wait_while(queue, |q| q.bytes.is_empty() && !q.closed)
            .unwrap_or_else(PoisonError::into_inner);
        queue.idle = false;
        if queue.bytes.is_empty() {
            return None;
        }
        queue.writing = true;
        Some(queue.bytes.drain(..).collect())
    }

    /// Lets more output come together, unless a device waits for room.
    fn gather(&self) {
        let queue = lock(&self.queue);
        let _gathered = self
            .changed
            .wait_timeout_while(queue, GATHER, |q| !q.closed && !q.refused);
    }

    fn written(&self) {
        let refused = {
            let mut queue = lock(&self.queue);
            queue.writing = false;
            std::mem::take(&mut queue.refused)
        };
        self.changed.notify_all();
        if refused {
            notify(&self.frontend);
        }
    }
}

impl CharSink for OutputQueue {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut queue = lock(&self.queue);
        let room = self.capacity - queue.bytes.len();
        let taken = room.min(bytes.len());
        queue.bytes.extend(&bytes[..taken]);
        let refused = taken < bytes.len() && !std::mem::replace(&mut queue.refused, true);
        let wake = refused || (taken > 0 && std::mem::take(&mut queue.idle));
        drop(queue);
        if wake {
            self.changed.notify_all();
        }
        taken
    }
}

/// Input on its way from a host file to a device.
pub struct InputQueue {
    queue: Mutex<Bytes>,
    changed: Condvar,
    capacity: usize,
    frontend: Frontend,
}

impl InputQueue {
    /// A queue of at most `capacity` bytes.
    pub fn new(capacity: usize) -> Arc<Self> {
        Arc::new(InputQueue {
            queue: Mutex::default(),
            changed: Condvar::new(),
            capacity: capacity.max(1),
            frontend: OnceLock::new(),
        })
    }

    /// Says whom to tell about bytes. The first call counts.
    pub fn connect(&self, to: Weak<dyn Backed>) {
        let _ = self.frontend.set(to);
    }

    /// Queues all of `bytes`, waiting for room where the guest is slow; false once the queue is closed.
    pub fn push(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let queue = lock(&self.queue);
            let mut queue = self
                .changed
                .wait_while(queue, |q| q.bytes.len() >= self.capacity && !q.closed)
                .unwrap_or_else(PoisonError::into_inner);
            if queue.closed {
                return false;
            }
            let taken = (self.capacity - queue.bytes.len()).min(bytes.len());
            queue.bytes.extend(&bytes[..taken]);
            bytes = &bytes[taken..];
            drop(queue);
            notify(&self.frontend);
        }
        true
    }

    /// The reader thread: passes on what `from` gives until its end or [`InputQueue::close`].
    pub fn run(&self, mut from: impl Read) -> io::Result<()> {
        let mut buffer = [0; 1024];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) if self.push(&buffer[..n]) => {}
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// No more input is wanted: a waiting [`InputQueue::push`] returns.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }
}

impl CharSource for InputQueue {
    fn read(&self, buffer: &mut [u8]) -> usize {
        let mut queue = lock(&self.queue);
        let was_full = queue.bytes.len() >= self.capacity;
        let n = queue.bytes.len().min(buffer.len());
        for (to, byte) in buffer.iter_mut().zip(queue.bytes.drain(..n)) {
            *to = byte;
        }
        drop(queue);
        if was_full && n > 0 {
            self.changed.notify_all();
        }
        n
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread;
    use std::time::Duration;

    struct Device(Mutex<Sender<()>>);
    impl Backed for Device {
        fn backend_ready(&self) {
            let _ = self.0.lock().unwrap().send(());
        }
    }

    fn device() -> (Arc<dyn Backed>, Receiver<()>) {
        let (sender, heard) = channel();
        (Arc::new(Device(Mutex::new(sender))), heard)
    }

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn output_is_written_by_its_thread_and_nothing_is_lost_at_the_end() {
        let queue = OutputQueue::new(100);
        assert_eq!(queue.write(b"hello "), 6);
        queue.write(b"world");
        queue.close();
        let mut file = Vec::new();
        queue.run(&mut file).unwrap();
        assert_eq!(file, b"hello world");
    }

    #[test]
    fn a_full_output_queue_takes_what_fits_and_says_when_it_has_room() {
        let (device, heard) = device();
        let queue = OutputQueue::new(4);
        queue.connect(Arc::downgrade(&device));
        assert_eq!(queue.write(b"abcdef"), 4);
        assert_eq!(queue.write(b"ef"), 0);
        let writer = thread::spawn({
            let queue = queue.clone();
            move || {
                let mut file = Vec::new();
                queue.run(&mut file).unwrap();
                file
            }
        });
        assert_eq!(heard.recv_timeout(LONG), Ok(()));
        assert_eq!(queue.write(b"ef"), 2);
        queue.drain();
        queue.close();
        assert_eq!(writer.join().unwrap(), b"abcdef");
    }

    /// Counts what it is given at a time.
    struct Pieces(Sender<Vec<u8>>);
    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.send(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_first_byte_goes_out_at_once_and_those_that_follow_together() {
        let queue = OutputQueue::new(1 << 16);
        let (pieces, seen) = channel();
        let writer = thread::spawn({
            let queue = queue.clone();
            move || queue.run(Pieces(pieces))
        });
        let mut sent = Vec::new();
        for n in 0..20_000u32 {
            sent.push(n as u8);
            assert_eq!(queue.write(&[n as u8]), 1);
        }
        queue.close();
        writer.join().unwrap().unwrap();
        let pieces: Vec<_> = seen.iter().collect();
        assert_eq!(pieces.concat(), sent);
        assert!(pieces.len() < sent.len() / 10, "{}", pieces.len());
        // An idle writer is woken by a single byte.
        let queue = OutputQueue::new(4);
        let (pieces, seen) = channel();
        thread::spawn({
            let queue = queue.clone();
            move || queue.run(Pieces(pieces))
        });
        for byte in *b"ab" {
            queue.write(&[byte]);
            assert_eq!(seen.recv_timeout(LONG), Ok(vec![byte]));
            thread::sleep(4 * GATHER);
        }
        queue.close();
    }

    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_broken_output_file_swallows_output_and_is_reported() {
        let queue = OutputQueue::new(4);
        let writer = thread::spawn({
            let queue = queue.clone();
            move || queue.run(Broken)
        });
        for _ in 0..3 {
            assert_eq!(queue.write(b"abcd"), 4);
            queue.drain();
        }
        queue.close();
        let error = writer.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn input_waits_for_a_slow_guest_and_arrives_in_order() {
        let (device, heard) = device();
        let queue = InputQueue::new(2);
        queue.connect(Arc::downgrade(&device));
        let reader = thread::spawn({
            let queue = queue.clone();
            move || queue.run(&b"abcdefg"[..])
        });
        let mut got: Vec<u8> = Vec::new();
        while got.len() < 7 {
            assert_eq!(heard.recv_timeout(LONG), Ok(()));
            let mut buffer = [0; 16];
            let n = queue.read(&mut buffer);
            assert!(n <= 2);
            got.extend_from_slice(&buffer[..n]);
        }
        assert_eq!(got, b"abcdefg");
        reader.join().unwrap().unwrap();
    }

    #[test]
    fn closing_the_input_frees_a_waiting_reader() {
        let queue = InputQueue::new(1);
        let reader = thread::spawn({
            let queue = queue.clone();
            move || queue.push(b"abc")
        });
        queue.close();
        assert!(!reader.join().unwrap());
    }
}
