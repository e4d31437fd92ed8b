//! Processes: what they hold, how they end, how many there may be.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::rig::{CODE, DATA, Rig, breakpoint, map_code, maps};
use doppel_direct::{Change, DirectError, KickFlag, Stop, UserState};
use rustix::process::{Pid, Signal, kill_process};

const PAGE: u64 = 4096;

fn one_page(at: u64, offset: u64) -> Change {
    Change::Map {
        at,
        offset,
        len: PAGE,
        write: true,
        execute: false,
        populate: false,
    }
}

/// What there is of a process: "" where there is none, or it is dead and not waited for.
fn state_of(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|l| l.strip_prefix("State:\t"));
    state.filter(|s| !s.starts_with('Z')).unwrap_or("").into()
}

fn wait_for_the_end(pid: u32) {
    let start = Instant::now();
    while !state_of(pid).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(10), "{pid} lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_child_holds_its_stub_its_exchange_area_and_two_files() {
    let rig = Rig::new();
    let child = rig.zygote.spawn().unwrap();
    let range = rig.zygote.reserved();
    for (pid, files) in [
        (
            rig.zygote.pid(),
            &["ram", "doppel-direct-exchange", "doppel-direct-orders"][..],
        ),
        (child.pid(), &["ram", "doppel-direct-orders"]),
    ] {
        let all = maps(pid);
        let mapped: Vec<&str> = all.lines().filter(|l| !l.contains("[vsyscall]")).collect();
        assert_eq!(mapped.len(), 2, "{mapped:?}");
        let stub = format!("{:x}-{:x} r-xp", range.start, range.start + PAGE);
        let exchange = format!("{:x}-{:x} rw-s", range.start + PAGE, range.end);
        assert!(mapped[0].starts_with(&stub), "{mapped:?}");
        assert!(mapped[1].starts_with(&exchange), "{mapped:?}");
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let mut open: Vec<String> = open
            .map(|e| std::fs::read_link(e.unwrap().path()).unwrap())
            .map(|p| p.to_string_lossy().into_owned())
            .collect();
        open.sort();
        let mut expected: Vec<String> = files
            .iter()
            .map(|f| format!("/memfd:{f} (deleted)"))
            .collect();
        expected.sort();
        assert_eq!(open, expected);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        let filtered = if pid == child.pid() { "2" } else { "0" };
        assert!(
            status.contains(&format!("Seccomp:\t{filtered}")),
            "{status}"
        );
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        assert!(environment.is_empty());
    }
}

#[test]
fn a_child_that_somebody_kills_is_gone_and_another_is_made() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&[0xeb, 0xfe]);
    let pid = r.child.pid();
    let before = r.user.gprs;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        let at = Instant::now();
        kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
        at
    });
    assert_eq!(r.run(), Stop::Gone { lost: true });
    let noticed = killer.join().unwrap().elapsed();
    assert!(noticed < Duration::from_secs(2), "{noticed:?}");
    assert_eq!(r.user.gprs, before);
    // It stays gone, and nothing is lost by asking.
    assert_eq!(r.run(), Stop::Gone { lost: false });
    assert!(matches!(
        r.child.apply(&[one_page(DATA, 0)]),
        Err(DirectError::Gone)
    ));
    let mut r = rig.runner_of(&[0xcc]);
    assert_eq!(r.run(), breakpoint());
    // And one that is killed between two runs has lost nothing either.
    let pid = r.child.pid();
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
    wait_for_the_end(pid);
    assert_eq!(r.run(), Stop::Gone { lost: false });
}

#[test]
fn a_zygote_that_somebody_kills_takes_its_children_along() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&[0xeb, 0xfe]);
    let (zygote, child) = (rig.zygote.pid(), r.child.pid());
    kill_process(Pid::from_raw(zygote as i32).unwrap(), Signal::KILL).unwrap();
    assert!(matches!(r.run(), Stop::Gone { .. }));
    wait_for_the_end(child);
    assert!(matches!(rig.zygote.spawn(), Err(DirectError::Zygote)));
}

#[test]
fn dropping_ends_every_process() {
    let rig = Rig::new();
    let zygote = rig.zygote.pid();
    let children: Vec<_> = (0..8).map(|_| rig.zygote.spawn().unwrap()).collect();
    let pids: Vec<u32> = children.iter().map(|c| c.pid()).collect();
    drop(rig);
    assert!(!state_of(zygote).is_empty(), "children keep it");
    drop(children);
    for pid in pids.into_iter().chain([zygote]) {
        assert!(maps(pid).is_empty(), "{pid}");
        wait_for_the_end(pid);
    }
}

/// The end of the monitor is shown on another monitor: this program once more, with only this test and a word in its environment.
#[test]
fn no_process_outlives_a_monitor_that_is_killed() {
    const WORD: &str = "DOPPEL_DIRECT_TEST_VICTIM";
    if std::env::var_os(WORD).is_some() {
        be_killed();
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "lifetime::no_process_outlives_a_monitor_that_is_killed",
        ])
        .arg("--nocapture")
        .env(WORD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    let pids: Vec<u32> = lines
        .map_while(Result::ok)
        .find_map(|l| Some(l.strip_prefix("processes ")?.to_owned()))
        .expect("it says which")
        .split(' ')
        .map(|n| n.parse().unwrap())
        .collect();
    assert_eq!(pids.len(), 4);
    assert!(pids.iter().all(|pid| !state_of(*pid).is_empty()));
    victim.kill().unwrap();
    victim.wait().unwrap();
    pids.into_iter().for_each(wait_for_the_end);
}

/// A monitor with a child that runs, one that waits, and one that has just been made.
fn be_killed() -> ! {
    let rig = Rig::new();
    let mut running = rig.runner_of(&[0xeb, 0xfe]);
    let waiting = rig.zygote.spawn().unwrap();
    let fresh = rig.zygote.spawn().unwrap();
    // A line of its own, whatever the harness has printed.
    println!(
        "\nprocesses {} {} {} {}",
        rig.zygote.pid(),
        running.child.pid(),
        waiting.pid(),
        fresh.pid()
    );
    let stop = running.run();
    panic!("{stop:?} {}", waiting.pid() + fresh.pid());
}

#[test]
fn many_children_run_at_once() {
    const CHILDREN: u64 = 64;
    let rig = Rig::new();
    // ADD [RBX], EAX; DEC ECX; JNZ; INT3.
    rig.ram_write(0, &[0x01, 0x03, 0xff, 0xc9, 0x75, 0xfa, 0xcc]);
    std::thread::scope(|s| {
        for n in 0..CHILDREN {
            let rig = &rig;
            s.spawn(move || {
                let mut child = rig.zygote.spawn().unwrap();
                child
                    .apply(&[map_code(), one_page(DATA, 0x10_0000 + n * PAGE)])
                    .unwrap();
                for _ in 0..20 {
                    let mut user = UserState::new(CODE);
                    user.gprs[0] = n + 1;
                    user.gprs[1] = 1000;
                    user.gprs[3] = DATA;
                    let stop = child.run(&mut user, &[], &KickFlag::new()).unwrap();
                    assert_eq!(stop, breakpoint());
                }
            });
        }
    });
    for n in 0..CHILDREN {
        assert_eq!(rig.load(0x10_0000 + n * PAGE), 20_000 * (n + 1));
    }
}

#[test]
fn children_come_and_go() {
    let rig = Rig::new();
    let mut kept = Vec::new();
    for n in 0..200 {
        let mut child = rig.zygote.spawn().unwrap();
        child.apply(&[map_code()]).unwrap();
        if n % 20 == 0 {
            kept.push(child);
        }
    }
    for mut child in kept {
        rig.ram_write(0, &[0xcc]);
        let stop = child.run(&mut UserState::new(CODE), &[], &KickFlag::new());
        assert_eq!(stop.unwrap(), breakpoint());
    }
}

#[test]
fn a_host_with_no_room_for_more_mappings_says_which_was_too_many() {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    if limit > 1 << 20 {
        eprintln!("skipped: vm.max_map_count is {limit}");
        return;
    }
    let rig = Rig::new();
    let mut child = rig.zygote.spawn().unwrap();
    // Every other page of RAM to every other page: no two can be joined.
    let changes: Vec<Change> = (0..limit + 100)
        .map(|n| one_page(0x1_0000_0000 + n * 2 * PAGE, n % 0x1000 * PAGE))
        .collect();
    let Err(DirectError::Change { index, source }) = child.apply(&changes) else {
        panic!("there was room for {}", changes.len());
    };
    assert_eq!(source.raw_os_error(), Some(12), "ENOMEM");
    assert!(
        (limit - 10..limit + 10).contains(&(index as u64)),
        "{index}"
    );
    // The run that asks for too much says so as well, and has not run.
    let mut user = UserState::new(CODE);
    let asked = [map_code(), changes[index]];
    let outcome = child.run(&mut user, &asked, &KickFlag::new());
    assert!(matches!(
        outcome,
        Err(DirectError::Change { index: 0 | 1, .. })
    ));
    assert_eq!(user.rip, CODE);
    // With room made, it goes on.
    let room = Change::Unmap {
        at: 0x1_0000_0000,
        len: 2000 * PAGE,
    };
    rig.ram_write(0, &[0xcc]);
    let stop = child.run(&mut user, &[room, map_code()], &KickFlag::new());
    assert_eq!(stop.unwrap(), breakpoint());
}

#[test]
fn changes_out_of_bounds_are_refused() {
    let rig = Rig::new();
    let mut child = rig.zygote.spawn().unwrap();
    let range = child.reserved();
    let map = |at, offset, len| Change::Map {
        at,
        offset,
        len,
        write: true,
        execute: true,
        populate: false,
    };
    for change in [
        map(range.start, 0, PAGE),
        map(range.end - PAGE, 0, PAGE),
        map(range.start - PAGE, 0, 2 * PAGE),
        map(DATA, crate::rig::RAM, PAGE),
        map(DATA, crate::rig::RAM - PAGE, 2 * PAGE),
        map(DATA, u64::MAX - PAGE + 1, PAGE),
        map(DATA + 1, 0, PAGE),
        map(DATA, 1, PAGE),
        map(DATA, 0, PAGE - 1),
        map(DATA, 0, 0),
        map((1 << 47) - PAGE, 0, 2 * PAGE),
        map(0xffff_8000_0000_0000, 0, PAGE),
        Change::Unmap {
            at: 0,
            len: 1 << 47,
        },
        Change::Unmap {
            at: u64::MAX - PAGE + 1,
            len: PAGE,
        },
        Change::Protect {
            at: range.start,
            len: PAGE,
            write: true,
            execute: true,
        },
    ] {
        let outcome = child.apply(&[map(DATA, 0, PAGE), change]);
        let refused = matches!(outcome, Err(DirectError::Invalid { index: 1, .. }));
        assert!(refused, "{change:?}: {outcome:?}");
    }
    let around = [
        Change::Unmap {
            at: 0,
            len: range.start,
        },
        Change::Unmap {
            at: range.end,
            len: (1 << 47) - PAGE - range.end,
        },
    ];
    child.apply(&around).unwrap();
}
