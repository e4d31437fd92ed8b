//! The switch: machines join, talk, and go.

mod support;

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;

use doppel_device::HostClock;
use doppel_net::{
    Accepts, Link, Offload, PartialChecksum, Received, Segment, Segmentation, Sent, Switch,
};
use smoltcp::socket::tcp::State;
use support::{Guest, OFFLOADS};

/// A switch that no other test has.
fn name(test: &str) -> String {
    format!("test-{}-{test}", std::process::id())
}

fn join(name: &str) -> Switch {
    Switch::join(name, Arc::new(HostClock::new())).unwrap()
}

fn frame(to: [u8; 6], from: [u8; 6], content: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], content].concat()
}

fn received(switch: &mut Switch) -> Vec<Vec<u8>> {
    switch.service();
    let mut frames = Vec::new();
    while switch.receive(65553, &mut |_, parts| frames.push(parts.concat())) == Received::Frame {}
    frames
}

#[test]
fn frames_go_to_whom_they_are_for_and_to_all_where_nobody_knows() {
    let name = name("learning");
    let mut ports = [(); 3].map(|()| join(&name));
    let macs = [0, 1, 2].map(|n| ports[n].mac());
    assert!(macs[0] != macs[1] && macs[1] != macs[2]);
    let everybody = frame([0xff; 6], macs[0], b"who is there?");
    assert_eq!(ports[0].send(Offload::default(), &everybody), Sent::Taken);
    assert_eq!(received(&mut ports[1]), std::slice::from_ref(&everybody));
    assert_eq!(received(&mut ports[2]), [everybody]);
    assert!(received(&mut ports[0]).is_empty());
    let answer = frame(macs[0], macs[1], b"I am");
    ports[1].send(Offload::default(), &answer);
    assert_eq!(received(&mut ports[0]), [answer]);
    assert!(received(&mut ports[2]).is_empty(), "it knew where to");
}

#[test]
fn the_switch_outlives_each_machine_and_its_place_is_taken_again() {
    let name = name("life");
    let mut first = join(&name);
    let mut second = join(&name);
    let mac = first.mac();
    second.send(Offload::default(), &frame([0xff; 6], second.mac(), b"x"));
    received(&mut first);
    drop(first);
    let mut third = join(&name);
    assert_eq!(third.mac(), mac);
    for port in [&mut second, &mut third] {
        let hello = frame([0xff; 6], port.mac(), b"hello");
        port.send(Offload::default(), &hello);
    }
    assert!(!received(&mut second).is_empty());
    assert!(!received(&mut third).is_empty());
}

/// What a killed machine leaves behind is found dead.
#[test]
fn a_place_whose_owner_was_killed_is_free() {
    const ROLE: &str = "DOPPEL_TEST_SWITCH";
    if let Ok(name) = std::env::var(ROLE) {
        let _killed = join(&name);
        std::process::abort();
    }
    let name = name("killed");
    let test = "a_place_whose_owner_was_killed_is_free";
    let status = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact"])
        .env(ROLE, &name)
        .output()
        .unwrap();
    assert!(!status.status.success());
    let (a, b) = (join(&name), join(&name));
    let slots = [a.mac()[5], b.mac()[5]];
    assert_eq!(slots, [0, 1]);
}

#[test]
fn a_full_machine_stops_the_sender_for_a_while_only() {
    let name = name("full");
    let (mut a, mut b) = (join(&name), join(&name));
    let hello = frame([0xff; 6], b.mac(), b"here");
    b.send(Offload::default(), &hello);
    received(&mut a);
    let data = frame(b.mac(), a.mac(), &[7; 30_000]);
    let mut sent = 0;
    while a.send(Offload::default(), &data) == Sent::Taken {
        sent += 1;
        assert!(sent < 10_000, "nothing stops it");
    }
    assert!(!a.service(), "still full");
    assert_eq!(received(&mut b).len(), sent, "nothing is lost");
    assert!(a.service(), "there is room again");
    while a.send(Offload::default(), &data) == Sent::Taken {}
    std::thread::sleep(std::time::Duration::from_millis(120));
    assert!(a.service(), "it has waited long enough");
    assert_eq!(a.send(Offload::default(), &data), Sent::Taken);
}

#[test]
fn unfinished_frames_are_finished_for_a_guest_that_needs_it() {
    let name = name("offload");
    let mut sender = join(&name);
    let offload = Offload {
        checksum: Some(PartialChecksum {
            start: 34,
            offset: 16,
        }),
        segmentation: Some(Segmentation {
            kind: Segment::Tcp4,
            size: 1000,
            header: 54,
        }),
    };
    let mut tcp = vec![0; 20 + 10_000];
    tcp[12] = 5 << 4;
    let ip = support::ip_frame(
        smoltcp::wire::IpProtocol::Tcp,
        Ipv4Addr::new(10, 0, 2, 16),
        &tcp,
        0,
        false,
    );
    let nothing = Accepts::default();
    // The last is of a driver that follows another.
    for (accepts, then, count) in [
        (Accepts::ALL, Accepts::ALL, 1),
        (nothing, nothing, 10),
        (Accepts::ALL, nothing, 10),
    ] {
        let mut receiver = join(&name);
        receiver.guest_accepts(accepts);
        let mut to_all = ip.clone();
        to_all[..6].fill(0xff);
        std::thread::sleep(std::time::Duration::from_millis(6));
        sender.send(offload, &to_all);
        receiver.service();
        let no_room = receiver.receive(0, &mut |_, _| panic!("no room"));
        assert!(matches!(no_room, Received::TooLong(_)));
        receiver.guest_accepts(then);
        assert_eq!(received(&mut receiver).len(), count);
    }
}

#[test]
fn two_guests_talk_through_it() {
    let name = name("guests");
    let address = |n: u8| Ipv4Addr::new(10, 0, 2, 100 + n);
    let mut guests = [0u8, 1].map(|n| {
        let port = join(&name);
        let mac = port.mac();
        Guest::on(Box::new(port), OFFLOADS[1], mac, address(n))
    });
    let [a, b] = &mut guests;
    let server = b.stream(65536);
    b.tcp(server).listen(80).unwrap();
    let client = a.connect(std::net::SocketAddrV4::new(address(1), 80), 4000);
    let data: Vec<u8> = (0..500_000u32).map(|n| (n * 31) as u8).collect();
    let (mut sent, mut got) = (0, Vec::new());
    a.until("the data", |a| {
        b.poll();
        let socket = a.tcp(client);
        while socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        let socket = b.tcp(server);
        while socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                got.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
        (got.len() == data.len()).then_some(())
    });
    assert_eq!(b.tcp(server).state(), State::Established);
    assert!(got == data);
}

#[test]
fn a_name_that_is_a_path_is_refused() {
    for name in ["", "../x", "a/b", "a.b", &"x".repeat(100)] {
        let error = Switch::join(name, Arc::new(HostClock::new())).err();
        let message = error.unwrap().to_string();
        assert!(message.contains("letters"), "{message}");
    }
}
