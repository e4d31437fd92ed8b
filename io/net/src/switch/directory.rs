//! The directory of a switch: a socket for each machine at it, named by its number.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, sockopt};

/// Machines at one switch.
const SLOTS: u16 = 256;
const NAME_MAX: usize = 48;
const LOCK: &str = "lock";
/// Room for a few segments of 64 KiB under way; the host gives what it allows.
const SEND_BUFFER: usize = 1 << 20;

/// Why a switch cannot be joined.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// A name that is none.
    #[error("{0:?} is no name for a switch: take up to {NAME_MAX} letters, digits, '-' and '_'")]
    Name(String),
    /// Somebody else's directory.
    #[error("{} is not a directory of yours that nobody else can enter; remove it or set XDG_RUNTIME_DIR", .0.display())]
    NotOurs(PathBuf),
    /// Every number is taken.
    #[error("{SLOTS} machines are at the switch already")]
    Crowded,
    /// The host refused something.
    #[error("{}: {}", .0.display(), .1)]
    Path(PathBuf, io::Error),
    /// Likewise, not about a file.
    #[error("the switch cannot be joined: {0}")]
    Host(io::Error),
}

impl SwitchError {
    /// The host refused something.
    pub fn host(error: Errno) -> Self {
        SwitchError::Host(error.into())
    }
}

/// A machine's place at a switch.
pub struct Place {
    folder: PathBuf,
    /// Its number.
    pub slot: u16,
    /// Its socket.
    pub socket: OwnedFd,
    /// Of the switch's name.
    pub hash: u16,
}

impl Place {
    /// Takes the first number that is free.
    pub fn claim(name: &str) -> Result<Self, SwitchError> {
        let folder = make_switch_folder(name)?;
        let _lock = lock(&folder)?;
        for slot in 0..SLOTS {
            if let Some(socket) = claim(&folder, slot)? {
                return Ok(Place {
                    folder,
                    slot,
                    socket,
                    hash: hash(name),
                });
            }
        }
        Err(SwitchError::Crowded)
    }

    /// The numbers of the others.
    pub fn others(&self) -> Vec<u16> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else {
            return Vec::new();
        };
        let number = |name: &str| name.parse().ok().filter(|n| *n < SLOTS && *n != self.slot);
        let names = entries.flatten().map(|entry| entry.file_name());
        names.filter_map(|name| number(name.to_str()?)).collect()
    }

    /// A socket that sends to another one's; `None` where nobody is behind it.
    pub fn connect(&self, slot: u16) -> Option<OwnedFd> {
        connect(&self.folder.join(slot.to_string())).ok()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What stays behind after a crash is found dead by the next one who comes.
        let _ = std::fs::remove_file(self.folder.join(self.slot.to_string()));
    }
}

fn hash(name: &str) -> u16 {
    // FNV-1a, folded.
    let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    let hash = name.bytes().fold(0x811c_9dc5, step);
    (hash >> 16) as u16 ^ hash as u16
}

/// Where all switches of this user are: `$XDG_RUNTIME_DIR/doppel`, or `/tmp/doppel-UID`.
fn switch_root() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match runtime {
        Some(dir) => Path::new(&dir).join("doppel"),
        None => format!("/tmp/doppel-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// Where a switch is: `switch/NAME` there.
///
/// # Errors
/// No name of a switch.
pub fn switch_folder(name: &str) -> Result<PathBuf, SwitchError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(plain) {
        return Err(SwitchError::Name(name.to_owned()));
    }
    Ok(switch_root().join("switch").join(name))
}

/// The same, and it is there, and the user's alone.
///
/// # Errors
/// No name of a switch, or a directory that cannot be made or is another's.
pub fn make_switch_folder(name: &str) -> Result<PathBuf, SwitchError> {
    let (root, folder) = (switch_root(), switch_folder(name)?);
    for folder in [&root, &root.join("switch"), &folder] {
        make(folder)?;
    }
    Ok(folder)
}

fn make(folder: &Path) -> Result<(), SwitchError> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(folder);
    if let Err(error) = made
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(SwitchError::Path(folder.to_owned(), error));
    }
    let found = folder
        .symlink_metadata()
        .map_err(|error| SwitchError::Path(folder.to_owned(), error))?;
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    if !found.is_dir() || !ours || found.mode() & 0o077 != 0 {
        return Err(SwitchError::NotOurs(folder.to_owned()));
    }
    Ok(())
}

/// One at a time looks for a number.
fn lock(folder: &Path) -> Result<OwnedFd, SwitchError> {
    let path = folder.join(LOCK);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
        .and_then(|file| {
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        })
        .map_err(|error| SwitchError::Path(path, error.into()))?;
    Ok(lock)
}

fn claim(folder: &Path, slot: u16) -> Result<Option<OwnedFd>, SwitchError> {
    let path = folder.join(slot.to_string());
    let failed = |error: Errno| SwitchError::Path(path.clone(), error.into());
    let address = SocketAddrUnix::new(path.as_os_str().as_bytes()).map_err(failed)?;
    let socket = socket().map_err(failed)?;
    match bind(&socket, &address) {
        Ok(()) => return Ok(Some(socket)),
        Err(Errno::ADDRINUSE) => {}
        Err(error) => return Err(failed(error)),
    }
    if !matches!(connect(&path), Err(Errno::CONNREFUSED)) {
        return Ok(None);
    }
    std::fs::remove_file(&path).map_err(|error| SwitchError::Path(path.clone(), error))?;
    bind(&socket, &address).map_err(failed)?;
    Ok(Some(socket))
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER)?;
    Ok(socket)
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path.as_os_str().as_bytes())?;
    let socket = socket()?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}
