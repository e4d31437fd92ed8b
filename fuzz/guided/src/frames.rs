//! Frames of the guest to its user network, one after the other, and what the network sends back.

use std::sync::Arc;

use doppel_device::HostClock;
use doppel_net::{
    Accepts, Link, Offload, PartialChecksum, Received, Segment, Segmentation, UserConfig,
    UserNetwork,
};

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "frames",
    longest: 8 << 10,
    words: &[
        b"\x08\x00\x45\x00",
        b"\x08\x06\x00\x01",
        b"\x86\xdd\x60",
        b"\x0a\x00\x02\x02",
        b"\x0a\x00\x02\x03",
        b"\x0a\x00\x02\x0f",
        b"\x63\x82\x53\x63\x35\x01",
        b"\x00\x44\x00\x43",
        b"\x00\x35",
        b"\x40\x06",
        b"\x40\x11",
        b"\x40\x01",
        b"\x20\x00",
    ],
    seeds,
    open,
};

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

pub(crate) fn network() -> UserConfig {
    UserConfig {
        connections: 16,
        sessions: 16,
        dns: vec!["127.0.0.1:9".parse().expect("an address")],
        ..UserConfig::default()
    }
}

fn open() -> anyhow::Result<Take> {
    Ok(Box::new(|bytes| {
        let clock = Arc::new(HostClock::new());
        let mut network = UserNetwork::new(&network(), MAC, clock).expect("descriptors");
        let mut choices = Choices::new(bytes);
        let all = choices.byte() & 1 == 0;
        network.guest_accepts(if all {
            Accepts::ALL
        } else {
            Accepts::default()
        });
        while !choices.is_empty() {
            let offload = offload(&mut choices);
            let mut frame = choices.piece().to_vec();
            keep_home(&mut frame);
            network.send(offload, &frame);
            drain(
                &mut network,
                [65553, 1514, 60, 0][choices.below(4) as usize],
            );
        }
        let (connections, sessions, _) = network.usage();
        assert!(connections <= 16 && sessions <= 16);
    }))
}

fn offload(choices: &mut Choices<'_>) -> Offload {
    if choices.byte() & 3 != 3 {
        return Offload::default();
    }
    let number = |choices: &mut Choices<'_>| choices.word() as u16;
    Offload {
        checksum: Some(PartialChecksum {
            start: number(choices),
            offset: number(choices),
        }),
        segmentation: Some(Segmentation {
            kind: [Segment::Tcp4, Segment::Tcp6][choices.below(2) as usize],
            size: number(choices),
            header: number(choices),
        }),
    }
}

fn drain(network: &mut UserNetwork, room: usize) {
    network.service();
    for _ in 0..1000 {
        let mut len = 0;
        let result = network.receive(room, &mut |_, parts| {
            len = parts.iter().map(|part| part.len()).sum();
        });
        assert!(len <= room, "{len} bytes for {room}");
        match result {
            Received::Frame => {}
            Received::Nothing => return,
            Received::TooLong(n) => {
                assert!(n > room);
                network.discard();
            }
        }
    }
    panic!("it never ends");
}

/// No frame leaves for anywhere but the gateway, the name server and the host's loopback.
fn keep_home(frame: &mut [u8]) {
    if frame.len() < 34 {
        return;
    }
    let ip = &mut frame[14..34];
    if !(ip[16..19] == [10, 0, 2] || ip[16] == 127) {
        ip[16..19].copy_from_slice(&[10, 0, 2]);
    }
    if ip[0] == 0x45 {
        // Sound, so that what is behind it is looked at.
        ip[10..12].fill(0);
        let words = ip
            .chunks(2)
            .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
        let sum = words.sum::<u32>();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

fn ip(protocol: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend(MAC);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + payload.len() as u16).to_be_bytes());
    frame.extend([0, 99, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15, 10, 0, 2, to]);
    frame.extend(payload);
    frame
}

fn seeds() -> Vec<Vec<u8>> {
    let tcp = |flags: u8, data: &[u8]| {
        let mut segment = vec![
            0x9c,
            0x40,
            0,
            9,
            0,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            5 << 4,
            flags,
            0xff,
            0xff,
            0,
            0,
            0,
            0,
        ];
        segment.extend(data);
        ip(6, 2, &segment)
    };
    let udp = ip(17, 2, &[0x9c, 0x40, 0, 9, 0, 12, 0, 0, 1, 2, 3, 4]);
    let question = [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'x', 0, 0, 1, 0, 1];
    let dns = ip(
        17,
        3,
        &[
            &[0x9c, 0x40, 0, 53, 0, 8 + question.len() as u8, 0, 0][..],
            &question,
        ]
        .concat(),
    );
    let mut dhcp = vec![0, 68, 0, 67, 1, 0, 0, 0, 1, 1, 6, 0];
    dhcp.resize(8 + 236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    let dhcp = ip(17, 2, &dhcp);
    let echo = ip(1, 2, &[8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3]);
    let mut arp = [&[0xff; 6][..], &MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC].concat();
    arp.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let piece = |frame: &Vec<u8>| {
        let len = (frame.len() as u16).to_le_bytes();
        [&[0][..], &len, frame, &[1]].concat()
    };
    let all = [
        tcp(2, &[]),
        tcp(16, b"hello"),
        tcp(17, b""),
        tcp(4, b""),
        udp,
        dns,
        dhcp,
        echo,
        arp,
    ];
    let mut seeds: Vec<_> = all.iter().map(|f| [vec![0], piece(f)].concat()).collect();
    seeds.push([vec![0], all.iter().flat_map(piece).collect()].concat());
    seeds
}
