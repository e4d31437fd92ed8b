//! A kick stops a child soon, and none is lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::rig::{CODE, Rig, map_code};
use doppel_direct::{KickFlag, Stop, UserState};

/// JMP to itself.
const ENDLESS: [u8; 2] = [0xeb, 0xfe];

#[test]
fn a_kick_before_the_run_is_not_lost() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&ENDLESS);
    r.kick.kick();
    assert_eq!(r.run(), Stop::Kicked);
    assert_eq!(r.run(), Stop::Kicked, "until it is cleared");
    assert!(r.kick.clear());
    assert!(!r.kick.clear());
}

#[test]
fn changes_are_made_where_a_kick_prevents_the_run() {
    let rig = Rig::new();
    let mut child = rig.zygote.spawn().unwrap();
    rig.ram_write(0, &[0xcc]);
    let kick = KickFlag::new();
    kick.kick();
    let mut user = UserState::new(CODE);
    assert_eq!(
        child.run(&mut user, &[map_code()], &kick).unwrap(),
        Stop::Kicked
    );
    kick.clear();
    let stop = child.run(&mut user, &[], &kick).unwrap();
    assert_eq!(stop, crate::rig::breakpoint());
}

#[test]
fn no_kick_is_lost_in_a_race() {
    const ROUNDS: u64 = 3000;
    let rig = Rig::new();
    let mut r = rig.runner_of(&ENDLESS);
    let (kick, user, child) = (&r.kick, &mut r.user, &mut r.child);
    let stopped = &AtomicU64::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            for round in 0..ROUNDS {
                let start = Instant::now();
                while stopped.load(Ordering::SeqCst) < round {
                    assert!(start.elapsed() < Duration::from_secs(20), "{round} is lost");
                    std::hint::spin_loop();
                }
                // At all moments of going in and of running.
                for _ in 0..round * 7 % 400 {
                    std::hint::spin_loop();
                }
                kick.kick();
            }
        });
        for _ in 0..ROUNDS {
            assert_eq!(child.run(user, &[], kick).unwrap(), Stop::Kicked);
            assert_eq!(user.rip, CODE);
            kick.clear();
            stopped.fetch_add(1, Ordering::SeqCst);
        }
    });
}

#[test]
fn a_kick_takes_less_than_a_millisecond() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&ENDLESS);
    let mut least = Duration::MAX;
    // On a busy host some take longer.
    for _ in 0..500 {
        if least < Duration::from_millis(1) {
            break;
        }
        let (kick, user, child) = (&r.kick, &mut r.user, &mut r.child);
        let taken = std::thread::scope(|s| {
            let kicker = s.spawn(|| {
                std::thread::sleep(Duration::from_millis(2));
                let now = Instant::now();
                kick.kick();
                now
            });
            assert_eq!(child.run(user, &[], kick).unwrap(), Stop::Kicked);
            let end = Instant::now();
            end.duration_since(kicker.join().unwrap())
        });
        least = least.min(taken);
        kick.clear();
    }
    assert!(least < Duration::from_millis(1), "{least:?}");
}
