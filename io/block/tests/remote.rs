//! A disk in another process: here the test's own program, which serves one when it is told to.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use doppel_block::{BlockBackend, BlockError, DiskSpec, RemoteDisk, serve};
use doppel_memory::{Backing, GuestRam, GuestSlice};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const DISK: &str = "DOPPEL_TEST_DISK";
const LEN: u64 = 4 << 20;
/// Whoever reads the sector here ends the process.
const TRAP: u64 = LEN - 512;

/// Not a test, but the other process.
#[test]
fn the_other_process() {
    let Ok(disk) = std::env::var(DISK) else {
        return;
    };
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let spec: DiskSpec = disk.parse().unwrap();
    let open =
        || -> Result<Arc<dyn BlockBackend>, BlockError> { Ok(Arc::new(Trapped(spec.open()?))) };
    serve(socket, open).unwrap();
    std::process::exit(0);
}

/// A disk on which one sector is the process's end.
struct Trapped(Arc<dyn BlockBackend>);

impl BlockBackend for Trapped {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        assert_ne!(offset, TRAP);
        self.0.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        self.0.write_at(offset, from)
    }
    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.read_to_guest(offset, into)
    }
    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.write_from_guest(offset, from)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn settle(&self) -> io::Result<()> {
        self.0.settle()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, may_unmap)
    }
}

/// A disk in a process, and who that is by now.
struct Rig {
    disk: RemoteDisk,
    process: Arc<AtomicU32>,
    starts: Arc<AtomicU32>,
    ram: Arc<GuestRam>,
    _folder: tempfile::TempDir,
    image: std::path::PathBuf,
}

impl Rig {
    fn new(format: doppel_block::Format) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        doppel_block::create(&image, format, LEN).unwrap();
        let text = format!("{},format={format}", image.display());
        let (process, starts) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let (started, count) = (process.clone(), starts.clone());
        let start = move |socket: OwnedFd| -> io::Result<Child> {
            let child = Command::new(std::env::current_exe()?)
                .args(["--exact", "the_other_process", "--nocapture"])
                .env(DISK, &text)
                .stdin(Stdio::from(socket))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            started.store(child.id(), Ordering::SeqCst);
            count.fetch_add(1, Ordering::SeqCst);
            Ok(child)
        };
        let disk = RemoteDisk::new(Box::new(start)).unwrap();
        let ram = Arc::new(GuestRam::with_backing(8 << 20, Backing::Memfd).unwrap());
        disk.use_memory(Some(&ram)).unwrap();
        Rig {
            disk,
            process,
            starts,
            ram,
            _folder: folder,
            image,
        }
    }

    fn kill(&self) {
        let pid = self.process.load(Ordering::SeqCst).to_string();
        let _ = Command::new("kill")
            .args(["-9", &pid])
            .stderr(Stdio::null())
            .status();
    }

    fn slices(&self, pieces: &[(u64, usize)]) -> Vec<GuestSlice<'_>> {
        let slice = |&(at, len)| self.ram.view().get_slice(GuestAddress(at), len).unwrap();
        pieces.iter().map(slice).collect()
    }
}

#[test]
fn bytes_go_between_guest_memory_and_the_image_and_are_noted() {
    for format in [doppel_block::Format::Raw, doppel_block::Format::Qcow2] {
        let rig = Rig::new(format);
        assert_eq!((rig.disk.len(), rig.disk.read_only()), (LEN, false));
        rig.ram.write_from_device(0x10_0000, &[7; 4096]);
        rig.disk
            .write_from_guest(8192, &rig.slices(&[(0x10_0000, 1000), (0x10_03e8, 3096)]))
            .unwrap();
        let cpu = rig.ram.tracker().join();
        rig.ram.tracker().add_code(0x20_0000, 8, &cpu);
        cpu.take_requests();
        rig.disk
            .read_to_guest(
                8192 - 512,
                &rig.slices(&[(0x1f_fe00, 1024), (0x30_0000, 512)]),
            )
            .unwrap();
        assert_eq!(rig.ram.load::<u16>(0x1f_fffe), Some(0));
        assert_eq!(rig.ram.load::<u32>(0x20_0000), Some(0x0707_0707));
        assert!(!cpu.take_requests().0.code.is_empty(), "translated code");
        assert!(rig.ram.tracker().is_dirty(0x30_0000));
        let mut bytes = [0; 1024];
        rig.disk
            .read_at(8192 + 3584, &mut [IoSliceMut::new(&mut bytes)])
            .unwrap();
        assert!(bytes[..512] == [7; 512] && bytes[512..] == [0; 512]);
        rig.disk.write_at(0, &[IoSlice::new(&[9; 512])]).unwrap();
        rig.disk.write_zeroes(8192, 512, true).unwrap();
        rig.disk.discard(1 << 20, 1 << 20).unwrap();
        rig.disk.flush().unwrap();
        rig.disk
            .read_at(8192, &mut [IoSliceMut::new(&mut bytes)])
            .unwrap();
        assert_eq!((bytes[0], bytes[600]), (0, 7));
        let beyond = rig.disk.read_at(LEN, &mut [IoSliceMut::new(&mut bytes)]);
        assert_eq!(beyond.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

/// Writers that note what was answered, and a killer: everything answered is there, in the image too.
#[test]
fn no_write_that_was_answered_is_lost_when_the_process_is_killed() {
    for format in [doppel_block::Format::Raw, doppel_block::Format::Qcow2] {
        let rig = Rig::new(format);
        let stop = AtomicBool::new(false);
        let written = Mutex::new(BTreeMap::new());
        thread::scope(|scope| {
            for writer in 0..4u64 {
                let (rig, stop, written) = (&rig, &stop, &written);
                scope.spawn(move || {
                    for n in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        // Each has sectors of its own, all over the disk.
                        let sector = (n * 97 % 2000) * 4 + writer;
                        let value = writer << 32 | n;
                        let at = 0x1_0000 * (writer + 1);
                        rig.ram.store(at, value).unwrap();
                        rig.disk
                            .write_from_guest(sector * 512, &rig.slices(&[(at, 512)]))
                            .unwrap();
                        written.lock().unwrap().insert(sector, value);
                        rig.disk
                            .read_to_guest(sector * 512, &rig.slices(&[(at + 0x1000, 512)]))
                            .unwrap();
                        assert_eq!(rig.ram.load::<u64>(at + 0x1000), Some(value));
                    }
                });
            }
            for _ in 0..20 {
                thread::sleep(Duration::from_millis(40));
                rig.kill();
            }
            thread::sleep(Duration::from_millis(40));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(rig.starts.load(Ordering::SeqCst) > 10, "{format}");
        let written = written.into_inner().unwrap();
        assert!(written.len() > 100, "{format}: {}", written.len());
        rig.kill();
        let image = rig.image.clone();
        drop(rig.disk);
        let spec = format!("{},format={format}", image.display());
        let disk = spec.parse::<DiskSpec>().unwrap().open().unwrap();
        for (sector, value) in written {
            let mut bytes = [0; 8];
            disk.read_at(sector * 512, &mut [IoSliceMut::new(&mut bytes)])
                .unwrap();
            assert_eq!(
                u64::from_le_bytes(bytes),
                value,
                "{format}: sector {sector}"
            );
        }
    }
}

#[test]
fn a_request_that_ends_every_process_is_an_error_and_others_go_on() {
    let rig = Rig::new(doppel_block::Format::Raw);
    thread::scope(|scope| {
        let trap = scope.spawn(|| {
            rig.disk
                .read_at(TRAP, &mut [IoSliceMut::new(&mut [0; 512])])
        });
        for n in 0..50 {
            rig.disk
                .write_at(n * 512, &[IoSlice::new(&[n as u8; 512])])
                .unwrap();
        }
        assert!(trap.join().unwrap().is_err());
    });
    assert!(rig.starts.load(Ordering::SeqCst) > 3);
    rig.disk.flush().unwrap();
    assert_eq!(fs::read(&rig.image).unwrap()[49 * 512], 49);
}

#[test]
fn a_disk_that_cannot_be_opened_says_why() {
    let start = |socket: OwnedFd| {
        Command::new(std::env::current_exe()?)
            .args(["--exact", "the_other_process", "--nocapture"])
            .env(DISK, "/nowhere/at/all")
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .spawn()
    };
    let error = RemoteDisk::new(Box::new(start)).err().unwrap();
    assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
}

#[test]
fn memory_that_no_process_can_map_is_refused_and_memory_changes() {
    let rig = Rig::new(doppel_block::Format::Raw);
    assert!(
        rig.disk
            .use_memory(Some(&GuestRam::new(1 << 20).unwrap()))
            .is_err()
    );
    let other = GuestRam::with_backing(1 << 20, Backing::Memfd).unwrap();
    rig.disk.use_memory(Some(&other)).unwrap();
    rig.disk.write_at(0, &[IoSlice::new(&[5; 512])]).unwrap();
    let slice = other.view().get_slice(GuestAddress(0x1000), 512).unwrap();
    rig.disk.read_to_guest(0, &[slice]).unwrap();
    assert_eq!(other.load::<u8>(0x1000), Some(5));
    // A piece that the memory there does not have.
    assert!(
        rig.disk
            .read_to_guest(0, &rig.slices(&[(0x20_0000, 512)]))
            .is_err()
    );
    rig.disk.use_memory(None).unwrap();
    assert!(rig.disk.read_to_guest(0, &[slice]).is_err());
}
