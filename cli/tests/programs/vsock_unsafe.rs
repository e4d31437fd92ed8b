//! A program of the guest that speaks AF_VSOCK: `connect PORT` sends its input to the host and writes out what comes back,
//! `listen PORT` sends back whatever the first that connects sends.

use std::ffi::c_int;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: c_int = 1;
const SHUT_WR: c_int = 1;
const ANYBODY: u32 = u32::MAX;
const HOST: u32 = 2;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(socket: c_int, address: *const Address, len: u32) -> c_int;
    fn bind(socket: c_int, address: *const Address, len: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn accept(socket: c_int, address: *mut Address, len: *mut u32) -> c_int;
    fn shutdown(socket: c_int, how: c_int) -> c_int;
}

fn done(result: c_int) -> io::Result<c_int> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn address(cid: u32, port: u32) -> Address {
    Address {
        family: AF_VSOCK,
        reserved: 0,
        port,
        cid,
        flags: [0; 4],
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the descriptor that comes out is ours alone.
    unsafe {
        let socket = done(socket(AF_VSOCK.into(), SOCK_STREAM, 0))?;
        Ok(OwnedFd::from_raw_fd(socket))
    }
}

fn connected(port: u32) -> io::Result<File> {
    let (socket, to) = (new_socket()?, address(HOST, port));
    // SAFETY: the address is as long as it says and lives through the call.
    unsafe {
        done(connect(
            socket.as_raw_fd(),
            &to,
            size_of::<Address>() as u32,
        ))?
    };
    Ok(File::from(socket))
}

fn accepted(port: u32) -> io::Result<File> {
    let (socket, at) = (new_socket()?, address(ANYBODY, port));
    // SAFETY: the address is as long as it says and lives through the calls; none is asked for, and the
    // descriptor that comes out is ours alone.
    unsafe {
        let fd = socket.as_raw_fd();
        done(bind(fd, &at, size_of::<Address>() as u32))?;
        done(listen(fd, 1))?;
        println!("listening");
        let stream = done(accept(fd, std::ptr::null_mut(), std::ptr::null_mut()))?;
        Ok(File::from_raw_fd(stream))
    }
}

fn end(stream: &File) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { done(shutdown(stream.as_raw_fd(), SHUT_WR)).map(drop) }
}

fn echo(mut stream: File) -> io::Result<()> {
    let mut buffer = vec![0; 30_000];
    loop {
        match stream.read(&mut buffer)? {
            0 => return end(&stream),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

fn talk(stream: File) -> io::Result<()> {
    let mut sender = stream.try_clone()?;
    let sending = std::thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut sender)?;
        end(&sender)
    });
    io::copy(&mut &stream, &mut io::stdout())?;
    sending.join().unwrap()
}

fn main() -> io::Result<()> {
    let words: Vec<_> = std::env::args().collect();
    let port = words[2].parse().unwrap();
    match &words[1][..] {
        "connect" => talk(connected(port)?),
        _ => echo(accepted(port)?),
    }
}
