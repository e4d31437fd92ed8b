//! What a host without descriptors does to clients of a forwarded port. Alone in its process, whose limit it changes.

mod support;

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_device::{FakeClock, NANOS_PER_SECOND};
use doppel_net::{Accepts, Link, Received, Transport, UserConfig, UserNetwork};
use rustix::process::{Resource, getrlimit, setrlimit};
use support::{LIMIT, MAC};

/// Lets the process have so many descriptors.
fn limit_descriptors(most: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(most);
    setrlimit(Resource::Nofile, limit).unwrap();
}

fn frames(network: &mut UserNetwork) -> usize {
    let mut count = 0;
    while network.receive(65553, &mut |_, _| {}) == Received::Frame {
        count += 1;
    }
    count
}

#[test]
fn a_client_for_whom_there_was_no_descriptor_is_let_in_when_there_is() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = free.local_addr().unwrap();
    drop(free);
    let config = UserConfig {
        forwards: support::forwarded(Transport::Tcp, host, 22),
        ..UserConfig::default()
    };
    let clock = Arc::new(FakeClock::new(Duration::ZERO));
    let mut network = UserNetwork::new(&config, MAC, clock.clone()).unwrap();
    network.guest_accepts(Accepts::ALL);
    let _client = TcpStream::connect(host).unwrap();
    let before = getrlimit(Resource::Nofile).current.unwrap();
    limit_descriptors(0);
    let start = Instant::now();
    while network.deadline().is_none() {
        network.service();
        assert!(start.elapsed() < LIMIT, "the client is not noticed");
    }
    assert_eq!(frames(&mut network), 0);
    limit_descriptors(before);
    network.service();
    assert_eq!(network.usage().0, 0, "it is not looked at all the time");
    clock.advance(NANOS_PER_SECOND / 5);
    network.service();
    assert_eq!((network.usage().0, frames(&mut network)), (1, 1));
}
