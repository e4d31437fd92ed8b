//! Sockets between guest and host, end to end, translated.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, PASSED, Running, Scratch};

const LIMIT: Duration = Duration::from_secs(120);
const LEN: usize = 3_000_000;

const SCRIPT: &str = "
    set -e
    # More than buffers take, there and back.
    head -c 3000000 /dev/urandom >/tmp/sent
    /doppel/vsock connect 1234 </tmp/sent >/tmp/back
    cmp /tmp/sent /tmp/back
    # Nobody listens there.
    ! /doppel/vsock connect 4321 </dev/null 2>/tmp/refused
    grep -q ConnectionReset /tmp/refused
    # Several at a time.
    for n in 1 2 3 4; do
        /doppel/vsock connect 1234 </tmp/sent | cmp - /tmp/sent || echo different >>/tmp/wrong &
    done
    wait
    test ! -e /tmp/wrong
    /doppel/vsock listen 5000
    echo heard
";

fn noise() -> Vec<u8> {
    (0..LEN as u32).map(|n| ((n * 31) >> 4) as u8).collect()
}

/// Sends back what comes, to everybody.
fn serve(path: &Path) {
    let listener = UnixListener::bind(format!("{}_1234", path.display())).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut from = stream.try_clone().unwrap();
                std::io::copy(&mut from, &mut stream).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
            });
        }
    });
}

fn greeted(path: &Path, port: u32) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let (mut answer, mut byte) = (String::new(), [0]);
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        answer.push(byte[0].into());
    }
    (stream, answer)
}

fn sockets(options: &str) {
    let scratch = Scratch::new();
    let (path, stats) = (scratch.path("v"), scratch.path("stats"));
    serve(&path);
    // What an earlier monitor left is replaced.
    drop(UnixListener::bind(&path).unwrap());
    let (mut command, _kept) = Boot::script(CLOUD, SCRIPT)
        .file(
            "doppel/vsock",
            0o755,
            &support::program("vsock_unsafe", &[]),
        )
        .flag(&format!("--debug-exit --net none {options}"))
        .flag(&format!(
            "--vsock {} --stats {}",
            path.display(),
            stats.display()
        ))
        .command("translate");
    let mut doppel = Running::start(&mut command);
    doppel.until("listening", 1);
    // Nobody listens there.
    assert_eq!(greeted(&path, 6000).1, "");
    let (stream, answer) = greeted(&path, 5000);
    assert!(answer.starts_with("OK "), "{answer:?}");
    let (mut to, mut from) = (stream.try_clone().unwrap(), stream);
    let sender = std::thread::spawn(move || {
        to.write_all(&noise()).unwrap();
        to.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    from.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    assert!(back == noise(), "{} bytes came back", back.len());
    doppel.until("heard", 1);
    assert!(support::wait(&mut doppel.child, LIMIT));
    assert_eq!(doppel.child.wait().unwrap().code(), Some(PASSED));
    // The sandbox does not let it take its name away; nobody is behind it.
    assert!(UnixStream::connect(&path).is_err());
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    let count = |name: &str| stats["vsock"][0][name].as_u64().unwrap();
    // Five and one, and those that were refused by the guest.
    assert_eq!((count("connections"), count("refused")), (7, 1), "{stats}");
    assert!(count("sent_bytes") == 6 * LEN as u64, "{stats}");
}

#[test]
fn programs_of_guest_and_host_reach_each_other() {
    sockets("");
}

#[test]
fn so_they_do_with_several_processors_and_without_pci() {
    sockets("--cpus 2 --virtio mmio");
}

#[test]
fn a_path_that_cannot_be_had_is_an_error_that_says_what_to_do() {
    let scratch = Scratch::new();
    let taken = scratch.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    for path in [taken.as_path(), Path::new("/no/such/directory/v")] {
        let mut command = Command::new(DOPPEL);
        command.args(["run", "--vsock"]).arg(path);
        support::run(&mut command, LIMIT)
            .expect(1)
            .says("in a directory that is yours");
    }
}
