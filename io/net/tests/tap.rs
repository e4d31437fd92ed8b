//! A tap device, in a network namespace of the test's own.

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::process::Command;

use doppel_net::{Tap, TapError};
use support::{Guest, MAC, OFFLOADS};

const INSIDE: &str = "DOPPEL_TEST_TAP";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Runs the test named again where it may make tap devices. True where it is there already.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--map-root-user"]);
    command.arg(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1");
    let may = Command::new("unshare")
        .args(["--net", "--map-root-user", "test", "-w", "/dev/net/tun"])
        .output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: this user cannot make a tap device, not even in a namespace");
        return false;
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

#[test]
fn a_guest_reaches_the_host_through_a_tap_device() {
    if !inside("a_guest_reaches_the_host_through_a_tap_device") {
        return;
    }
    let tap = Tap::open("tap0").unwrap();
    assert!(matches!(Tap::open("tap0"), Err(TapError::Host(..))), "busy");
    ip("addr add 10.0.2.2/24 dev tap0");
    ip("link set tap0 up");
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut data = vec![0; 100_000];
        client.read_exact(&mut data).unwrap();
        client.write_all(&data).unwrap();
    });
    let mut guest = Guest::on(Box::new(tap), OFFLOADS[1], MAC, Ipv4Addr::new(10, 0, 2, 15));
    let data: Vec<u8> = (0..100_000u32).map(|n| (n * 13) as u8).collect();
    let handle = guest.connect(SocketAddrV4::new(HOST, port), 4000);
    let (mut sent, mut got) = (0, Vec::new());
    guest.until("the echo", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        while socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                got.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
        (got.len() == data.len()).then_some(())
    });
    assert!(got == data);
    echo.join().unwrap();
}

#[test]
fn a_name_that_cannot_be_is_refused() {
    for name in ["", "a/b", "tap%d", "sixteen-letters-x"] {
        assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name}");
    }
}
