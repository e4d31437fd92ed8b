//! The entropy device behind virtio-pci: negotiation, rings, interrupts, resets, as a driver goes through them.

use doppel_device::PciFunction;
use doppel_virtio::testing::{BAR_AT, DriverQueue, Piece, Rig};
use doppel_virtio::{EVENT_IDX, FEATURES_OK, NEEDS_RESET, Rng, VERSION_1};

const RINGS: u64 = 0x1_0000;
const BUFFER: u64 = 0x20_0000;

fn rig() -> Rig {
    Rig::new(Box::new(Rng::new()))
}

fn bytes(rig: &Rig, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|a| rig.ram.load(a).unwrap()).collect()
}

fn is_random(bytes: &[u8]) -> bool {
    let mut counts = [0; 256];
    bytes.iter().for_each(|b| counts[usize::from(*b)] += 1);
    bytes.len() > 40 && counts.iter().all(|n| *n < bytes.len() / 4)
}

#[test]
fn a_buffer_is_filled_and_no_more_than_it() {
    let rig = rig();
    let queue = &mut rig.start(0, RINGS)[0];
    let head = queue.submit(
        &rig.ram,
        &[Piece::In(BUFFER + 1, 64), Piece::In(BUFFER + 200, 36)],
    );
    assert_eq!(rig.complete(queue), (head.into(), 100));
    assert!(is_random(&bytes(&rig, BUFFER + 1, 64)));
    assert_eq!(rig.ram.load::<u8>(BUFFER), Some(0));
    assert!(bytes(&rig, BUFFER + 65, 135).iter().all(|b| *b == 0));
    assert!(bytes(&rig, BUFFER + 236, 100).iter().all(|b| *b == 0));
    assert!(rig.ram.tracker().is_dirty(BUFFER));
}

#[test]
fn an_indirect_table_is_followed() {
    let rig = rig();
    let queue = &mut rig.start(0, RINGS)[0];
    let pieces: Vec<_> = (0..10)
        .map(|n| Piece::In(BUFFER + 0x1000 * n, 16))
        .collect();
    let head = queue.submit_indirect(&rig.ram, 0x8000, &pieces);
    assert_eq!(rig.complete(queue), (head.into(), 160));
}

#[test]
fn a_ring_goes_round() {
    let rig = rig();
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    for _ in 0..70_000 / u32::from(queue.size) {
        for _ in 0..queue.size {
            queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
        }
        for n in 0..queue.size {
            let used = if n == 0 {
                rig.complete(queue)
            } else {
                queue.wait(&rig.ram).unwrap()
            };
            assert_eq!(used.1, 8);
        }
    }
}

#[test]
fn features_are_agreed_on_or_refused() {
    let rig = rig();
    assert_eq!(
        rig.offered() & (VERSION_1 | EVENT_IDX),
        VERSION_1 | EVENT_IDX
    );
    assert!(rig.negotiate(EVENT_IDX));
    assert!(!rig.negotiate(1 << 60), "not offered");
    // A driver of old does not take VERSION_1.
    rig.set_status(0);
    rig.set_status(3);
    rig.set_status(3 | FEATURES_OK);
    assert_eq!(rig.status(), 3);
    rig.set_status(3 | FEATURES_OK | 4);
    assert_eq!(rig.status(), 3, "not ready without features");
}

#[test]
fn interrupts_go_by_message_by_pin_or_not_at_all() {
    let rig = rig();
    let queue = &mut rig.start(0, RINGS)[0];
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    rig.complete(queue);
    while !rig.pin.level() {
        std::thread::yield_now();
    }
    assert_eq!(rig.pci.config_read(6, 2) & 8, 8, "interrupt status");
    rig.pci.config_write(4, 2, 0x0406);
    assert!(!rig.pin.level(), "disabled");
    rig.pci.config_write(4, 2, 0x0006);
    assert!(rig.pin.level());
    assert_eq!((rig.read(0x1000, 1), rig.read(0x1000, 1)), (1, 0));
    assert!(!rig.pin.level(), "the load of the status ends it");

    rig.use_msix(1);
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    rig.complete(queue);
    assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x41)]);
    assert!(!rig.pin.level());

    rig.set_msix_control(0xc000);
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    rig.complete(queue);
    while rig.read(0x6000, 4) != 2 {
        std::thread::yield_now();
    }
    assert_eq!(rig.messages.take(), []);
    rig.set_msix_control(0x8000);
    assert_eq!(rig.messages.take(), [(0xfee0_0000, 0x41)]);
}

#[test]
fn used_event_says_when_an_interrupt_is_due() {
    let rig = rig();
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    rig.use_msix(1);
    queue.interrupt_after(&rig.ram, 5);
    for n in 1..=10 {
        queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
        rig.complete(queue);
        if n == 5 {
            assert_eq!(rig.messages.wait().len(), 1);
        }
    }
    rig.set_status(0);
    assert_eq!(rig.messages.take(), [], "one for ten");
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_heals() {
    type Break = fn(&Rig, &mut DriverQueue);
    let ways: [(&str, Break); 9] = [
        ("outside", |rig, q| {
            q.submit(&rig.ram, &[Piece::In(1 << 40, 8)]);
        }),
        ("past the end", |rig, q| {
            q.submit(&rig.ram, &[Piece::In((16 << 20) - 4, 8)]);
        }),
        ("wraps", |rig, q| {
            q.submit(&rig.ram, &[Piece::In(u64::MAX - 3, 8)]);
        }),
        ("loop", |rig, q| {
            DriverQueue::put_descriptor(&rig.ram, q.base, 0, (BUFFER, 8, 3, 0));
            q.offer(&rig.ram, 0);
        }),
        ("next beyond the table", |rig, q| {
            DriverQueue::put_descriptor(&rig.ram, q.base, 0, (BUFFER, 8, 3, q.size));
            q.offer(&rig.ram, 0);
        }),
        ("head beyond the table", |rig, q| q.offer(&rig.ram, q.size)),
        ("more than there can be", |rig, q| {
            rig.ram.store(q.avail() + 2, q.size + 1).unwrap();
        }),
        ("to read after to write", |rig, q| {
            q.submit(&rig.ram, &[Piece::In(BUFFER, 8), Piece::Out(BUFFER, 8)]);
        }),
        ("a table in a table", |rig, q| {
            DriverQueue::put_descriptor(&rig.ram, 0x8000, 0, (0x9000, 16, 4, 0));
            DriverQueue::put_descriptor(&rig.ram, q.base, 0, (0x8000, 16, 4, 0));
            q.offer(&rig.ram, 0);
        }),
    ];
    for (name, break_it) in ways {
        let rig = rig();
        let mut queue = rig.start(0, RINGS).remove(0);
        rig.use_msix(1);
        break_it(&rig, &mut queue);
        rig.notify(&queue);
        assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x40)], "{name}");
        assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        let queue = &mut rig.start(0, 2 * RINGS)[0];
        queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
        assert_eq!(rig.complete(queue).1, 8, "{name}");
    }
}

#[test]
fn rings_that_cannot_be_are_refused() {
    for (register, value) in [
        (0x20, 8),
        (0x24, 1),
        (0x28, 1),
        (0x28, 0),
        (0x30, 2),
        (0x34, 7),
    ] {
        let rig = rig();
        assert!(rig.negotiate(0));
        rig.enable_queue(0, RINGS);
        rig.write(0x3a, 2, 1);
        assert_eq!(rig.read(0x1c, 2), 0);
        for (register, value) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)] {
            rig.write(register, 4, value);
        }
        rig.write(register, 4, value);
        rig.write(0x1c, 2, 1);
        rig.set_status(15);
        assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET, "{register:#x}");
    }
}

#[test]
fn an_enabled_queue_cannot_be_moved_but_reset() {
    let rig = rig();
    let mut queue = rig.start(0, RINGS).remove(0);
    rig.write(0x20, 4, 0x9000);
    rig.write(0x18, 2, 2);
    assert_eq!((rig.read(0x20, 4), rig.read(0x18, 2)), (RINGS, 64));
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    assert_eq!(rig.complete(&mut queue).1, 8);
    rig.write(0x3a, 2, 1);
    assert_eq!(
        (rig.read(0x3a, 2), rig.read(0x1c, 2), rig.read(0x20, 4)),
        (0, 0, 0)
    );
    rig.write(0x18, 2, 16);
    let mut queue = rig.enable_queue(0, 4 * RINGS);
    assert_eq!(queue.size, 16);
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    assert_eq!(rig.complete(&mut queue).1, 8);
}

#[test]
fn a_saved_device_goes_on_in_another() {
    let rig = rig();
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    rig.use_msix(1);
    for _ in 0..3 {
        queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
        rig.complete(queue);
    }
    let state = rig.pci.save();
    let text = serde_json::to_string(&state).unwrap();
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    assert_eq!(rig.complete(queue).1, 8, "it goes on itself");

    let other = self::rig();
    for at in (RINGS..RINGS + 0x2000).step_by(8) {
        let word: u64 = rig.ram.load(at).unwrap();
        other.ram.store(at, word).unwrap();
    }
    // As it was when it was saved: three requests, all used.
    other.ram.store(queue.avail() + 2, 3u16).unwrap();
    other.ram.store(queue.used() + 2, 3u16).unwrap();
    assert!(other.pci.restore(&serde_json::from_str(&text).unwrap()));
    let mut again = other.pci.save();
    again.config.clone_from(&state.config);
    assert_eq!(again, state);
    other.ram.store(queue.avail() + 2, 4u16).unwrap();
    other.notify(queue);
    while other.ram.load::<u16>(queue.used() + 2) != Some(4) {
        std::thread::yield_now();
    }
    assert!(!other.pci.restore(&doppel_virtio::PciState {
        version: 2,
        ..state
    }));
}

#[test]
fn a_function_that_is_no_bus_master_leaves_memory_alone() {
    let rig = rig();
    rig.pci.config_write(4, 2, 0x0002);
    let mut queue = rig.start(EVENT_IDX, RINGS).remove(0);
    rig.use_msix(1);
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 64)]);
    let nothing_happens = |queue: &mut DriverQueue| {
        rig.notify(queue);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert!(queue.take(&rig.ram).is_none());
        assert!(bytes(&rig, BUFFER, 64).iter().all(|b| *b == 0));
        assert_eq!(rig.messages.take(), []);
    };
    nothing_happens(&mut queue);
    rig.pci.config_write(4, 2, 0x0006);
    assert_eq!(queue.wait(&rig.ram), Some((0, 64)));
    assert!(is_random(&bytes(&rig, BUFFER, 64)));
    assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x41)]);
    // What is saved is saved, and goes on where it is allowed to.
    rig.pci.config_write(4, 2, 0x0002);
    rig.ram.write_from_device(BUFFER, &[0; 64]);
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 64)]);
    queue.interrupt_after(&rig.ram, 1);
    let state = rig.pci.save();
    nothing_happens(&mut queue);
    assert!(rig.pci.restore(&state));
    nothing_happens(&mut queue);
    rig.pci.config_write(4, 2, 0x0006);
    assert_eq!(queue.wait(&rig.ram).map(|used| used.1), Some(64));
    assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x41)]);
}

#[test]
fn the_bar_goes_where_the_guest_puts_it() {
    let rig = rig();
    assert_eq!(rig.read(0x12, 2), 1);
    rig.pci.config_write(0x10, 4, 0xd123_8000);
    assert_eq!(rig.read(0x12, 2), 0xffff);
    assert_eq!(rig.bus.read(0xd123_8012, 2), 1);
    rig.pci.config_write(0x04, 2, 0);
    assert_eq!(rig.bus.read(0xd123_8012, 2), 0xffff);
    rig.pci.config_write(0x10, 4, BAR_AT as u32);
    rig.pci.config_write(0x04, 2, 6);
    assert_eq!(rig.read(0x12, 2), 1);
    rig.pci.config_write(0x10, 4, 0);
    assert_eq!(rig.read(0x12, 2), 0xffff, "not placed");
}

#[test]
fn the_window_in_the_configuration_space_leads_to_the_bar() {
    let rig = rig();
    let mut at = rig.pci.config_read(0x34, 1) as u16;
    while rig.pci.config_read(at, 1) != 9 || rig.pci.config_read(at + 3, 1) != 5 {
        at = rig.pci.config_read(at + 1, 1) as u16;
    }
    let point = |offset, length| {
        rig.pci.config_write(at + 4, 1, 0);
        rig.pci.config_write(at + 8, 4, offset);
        rig.pci.config_write(at + 12, 4, length);
    };
    point(0x14, 1);
    rig.pci.config_write(at + 16, 1, 1);
    assert_eq!((rig.status(), rig.pci.config_read(at + 16, 1)), (1, 1));
    point(0x12, 2);
    assert_eq!(rig.pci.config_read(at + 16, 2), 1);
    for (offset, length) in [(0x8000, 4), (0x7ffe, 4), (0, 3), (0, 0), (u32::MAX, 1)] {
        point(offset, length);
        rig.pci.config_write(at + 16, 4, u32::MAX);
        assert_eq!(rig.pci.config_read(at + 16, 4), 0, "{offset:#x} {length}");
    }
}
