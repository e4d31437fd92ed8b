//! The Unix sockets of the host: the one that the monitor listens at, and those that programs of the host listen at.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// A socket at which programs of the host ask for connections to the guest. It goes with this value, unless a sandbox keeps it.
#[derive(Debug)]
pub struct VsockSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl VsockSocket {
    /// Listens at `path`. What a monitor left there that is no more is replaced.
    ///
    /// # Errors
    /// Somebody else listens there, something else is there, or the path is longer than 107 bytes.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        if is_left_over(&path) {
            fs::remove_file(&path)?;
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(VsockSocket { listener, path })
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to the program that listens for the guest at `port`: its socket has the port's number behind its name.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // It does not wait: where the listener has no room, it is an error.
        connect(&socket, &SocketAddrUnix::new(&path)?)?;
        Ok(UnixStream::from(socket))
    }
}

/// True for a socket at which nobody listens.
fn is_left_over(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    let refuses = || {
        let tried = UnixStream::connect(path);
        tried.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    };
    is_socket && refuses()
}

impl Drop for VsockSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
