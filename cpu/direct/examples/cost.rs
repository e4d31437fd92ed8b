//! What leaving a child and entering it again costs, in microseconds: `cargo run --release -p doppel-direct --example cost`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use doppel_direct::{Change, Child, KickFlag, Stop, UserState, Zygote};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::thread::{CpuSet, sched_setaffinity};

const RAM: u64 = 512 << 20;
const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x1000_0000;
/// SYSCALL, and back to it.
const SYSTEM_CALLS: &[u8] = &[0x0f, 0x05, 0xeb, 0xfc];
/// MOV [RBX], EAX; ADD RBX, 4096; and again.
const TOUCHES: &[u8] = &[0x89, 0x03, 0x48, 0x81, 0xc3, 0, 0x10, 0, 0, 0xeb, 0xf5];

fn pin(pid: u32, cpu: Option<usize>) {
    let mut set = CpuSet::new();
    match cpu {
        Some(cpu) => set.set(cpu),
        None => (0..16).for_each(|n| set.set(n)),
    }
    let pid = rustix::process::Pid::from_raw(pid as i32);
    sched_setaffinity(pid, &set).expect("affinity");
}

fn map(at: u64, offset: u64, len: u64) -> Change {
    Change::Map {
        at,
        offset,
        len,
        write: at != CODE,
        execute: at == CODE,
        populate: false,
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

fn faults(child: &mut Child, run: u64) -> f64 {
    let kick = KickFlag::new();
    let mut user = UserState::new(CODE + 0x100);
    let mut next = DATA;
    user.gprs[3] = DATA;
    let mut changes = vec![Change::Unmap {
        at: DATA,
        len: RAM - 0x10000,
    }];
    each(1600 / run as u32, |_| {
        let stop = child.run(&mut user, &changes, &kick).expect("run");
        let Stop::Trap { address, .. } = stop else {
            panic!("{stop:?}");
        };
        assert_eq!(address, next);
        changes = vec![map(next, next - DATA + 0x10000, run * 4096)];
        next += run * 4096;
    })
}

fn main() {
    let ram = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).expect("memfd"));
    ftruncate(&ram, RAM).expect("size");
    ram.write_all_at(SYSTEM_CALLS, 0).expect("code");
    ram.write_all_at(TOUCHES, 0x100).expect("code");
    let start = Instant::now();
    let zygote = Zygote::new(&ram, RAM).expect("zygote");
    println!(
        "zygote            {:9.2}",
        start.elapsed().as_secs_f64() * 1e6
    );
    println!(
        "spawn and drop    {:9.2}",
        each(20, |_| drop(zygote.spawn().expect("spawn")))
    );
    let mut child = zygote.spawn().expect("spawn");
    child.apply(&[map(CODE, 0, 0x1000)]).expect("map");
    let none = |_| Vec::new();
    for (name, own, other) in [
        ("unpinned", None, None),
        ("one core", Some(0), Some(0)),
        ("two cores", Some(0), Some(1)),
    ] {
        pin(0, own);
        pin(child.pid(), other);
        for (monitor, stub) in [(0, 0), (200, 200), (2000, 2000), (20000, 20000)] {
            child.set_spin(monitor, stub);
            println!(
                "{name:9} spin {monitor:5}: system call {:6.2}, with a map {:6.2}, fault of 1 page {:6.2}, of 16 {:6.2}",
                system_calls(&mut child, none),
                system_calls(&mut child, |n| vec![map(
                    DATA + u64::from(n % 2) * 4096,
                    0,
                    4096
                )]),
                faults(&mut child, 1),
                faults(&mut child, 16),
            );
        }
    }
}
