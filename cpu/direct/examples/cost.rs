//! What leaving a child and entering it again costs, in microseconds: `cargo run --release -p doppel-direct --example cost`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use doppel_direct::{Change, Child, KickFlag, Stop, UserState, Zygote};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const RAM: u64 = 512 << 20;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x1000_0000;
/// SYSCALL, and back to it.
const SYSTEM_CALLS: &[u8] = &[0x0f, 0x05, 0xeb, 0xfc];
/// MOV [RBX], EAX; ADD RBX, 4096; and again.
const TOUCHES: &[u8] = &[0x89, 0x03, 0x48, 0x81, 0xc3, 0, 0x10, 0, 0, 0xeb, 0xf5];

const ENDLESS: &[u8] = &[0xeb, 0xfe];
/// Where data begins in RAM.
const OFFSET: u64 = 0x10000;

fn map(at: u64, offset: u64, len: u64, populate: bool) -> Change {
    Change::Map {
        at,
        offset,
        len,
        write: at != CODE,
        execute: at == CODE,
        populate,
    }
}

/// The least of twenty rounds, in microseconds for each.
fn each(count: u32, mut round: impl FnMut(u32)) -> f64 {
    let mut least = f64::MAX;
    for n in 0..20 {
        let start = Instant::now();
        for m in 0..count {
            round(n * count + m);
        }
        least = least.min(start.elapsed().as_secs_f64() * 1e6 / f64::from(count));
    }
    least
}

fn system_calls(child: &mut Child, changes: impl Fn(u32) -> Vec<Change>) -> f64 {
    let kick = KickFlag::new();
    let mut user = UserState::new(CODE);
    each(400, |n| {
        user.rip = CODE;
        let stop = child.run(&mut user, &changes(n), &kick).expect("run");
        assert!(matches!(stop, Stop::SystemCall(_)), "{stop:?}");
    })
}

fn faults(child: &mut Child, run: u64, populate: bool) -> f64 {
    let kick = KickFlag::new();
    let mut user = UserState::new(CODE + 0x100);
    let mut next = DATA;
    user.gprs[3] = DATA;
    let mut changes = vec![Change::Unmap {
        at: DATA,
        len: RAM - OFFSET,
    }];
    each(1600 / run as u32, |_| {
        let stop = child.run(&mut user, &changes, &kick).expect("run");
        let Stop::Trap { address, .. } = stop else {
            panic!("{stop:?}");
        };
        assert_eq!(address, next);
        changes = vec![map(next, next - DATA + OFFSET, run * 4096, populate)];
        next += run * 4096;
    })
}

/// From a kick by another thread to the end of the run.
fn kicks(child: &mut Child) -> f64 {
    let kick = KickFlag::new();
    let mut user = UserState::new(CODE + 0x200);
    let mut least = f64::MAX;
    for _ in 0..50 {
        let kicked = std::thread::scope(|s| {
            let thread = s.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(2));
                let now = Instant::now();
                kick.kick();
                now
            });
            let stop = child.run(&mut user, &[], &kick).expect("run");
            let after = Instant::now();
            assert_eq!(stop, Stop::Kicked);
            after - thread.join().expect("kick")
        });
        least = least.min(kicked.as_secs_f64() * 1e6);
        kick.clear();
    }
    least
}

fn main() {
    let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd"));
    ftruncate(&ram, RAM).expect("size");
    ram.write_all_at(SYSTEM_CALLS, 0).expect("code");
    ram.write_all_at(TOUCHES, 0x100).expect("code");
    ram.write_all_at(ENDLESS, 0x200).expect("code");
    let start = Instant::now();
    let zygote = Zygote::new(&ram, RAM).expect("zygote");
    let row = |name: &str, us: f64| println!("{name:30} {us:9.2}");
    row("zygote", start.elapsed().as_secs_f64() * 1e6);
    row(
        "spawn and drop",
        each(20, |_| drop(zygote.spawn().expect("spawn"))),
    );
    let mut child = zygote.spawn().expect("spawn");
    child.apply(&[map(CODE, 0, 0x1000, false)]).expect("map");
    let page = |n: u32| map(DATA + u64::from(n % 2) * 4096, OFFSET, 4096, false);
    row("system call", system_calls(&mut child, |_| vec![]));
    row(
        "system call, one map",
        system_calls(&mut child, |n| vec![page(n)]),
    );
    row(
        "system call, 16 maps",
        system_calls(&mut child, |n| (n..n + 16).map(page).collect()),
    );
    for populate in [false, true] {
        let how = if populate { ", populated" } else { "" };
        for run in [1, 16, 64] {
            row(
                &format!("fault, {run} new pages{how}"),
                faults(&mut child, run, populate),
            );
            row(
                &format!("fault, {run} known pages{how}"),
                faults(&mut child, run, populate),
            );
        }
    }
    // On one processor, what is measured is the scheduler.
    if std::thread::available_parallelism().is_ok_and(|n| n.get() > 1) {
        row("kick", kicks(&mut child));
    }
}
