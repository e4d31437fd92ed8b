//! Threads in the guest: mutexes, channels, atomics and condition variables under contention.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex, mpsc};
use std::thread;

const THREADS: u64 = 8;
const ROUNDS: u64 = 2000;

fn main() {
    counters();
    ping_pong();
    channel();
    println!("threads: passed");
}

fn counters() {
    let (atomic, mutex) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(0)));
    let barrier = Arc::new(Barrier::new(THREADS as usize));
    let spawn = |_| {
        let (atomic, mutex, barrier) = (atomic.clone(), mutex.clone(), barrier.clone());
        thread::spawn(move || {
            barrier.wait();
            for _ in 0..ROUNDS {
                atomic.fetch_add(1, Ordering::Relaxed);
                *mutex.lock().unwrap() += 1;
            }
        })
    };
    let threads: Vec<_> = (0..THREADS).map(spawn).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(atomic.load(Ordering::Relaxed), THREADS * ROUNDS);
    assert_eq!(*mutex.lock().unwrap(), THREADS * ROUNDS);
}

/// Two threads hand a turn to and fro: every hand-over is a futex wait and wake.
fn ping_pong() {
    let turn = Arc::new((Mutex::new(0u64), Condvar::new()));
    let play = |me: u64| {
        let turn = turn.clone();
        move || {
            let (number, changed) = &*turn;
            for _ in 0..ROUNDS {
                let number = number.lock().unwrap();
                let mut number = changed.wait_while(number, |n| *n % 2 != me).unwrap();
                *number += 1;
                changed.notify_one();
            }
        }
    };
    let other = thread::spawn(play(1));
    play(0)();
    other.join().unwrap();
    assert_eq!(*turn.0.lock().unwrap(), 2 * ROUNDS);
}

fn channel() {
    let (sender, receiver) = mpsc::sync_channel(4);
    let sender = thread::spawn(move || (0..ROUNDS).for_each(|n| sender.send(n).unwrap()));
    assert_eq!(receiver.iter().sum::<u64>(), ROUNDS * (ROUNDS - 1) / 2);
    sender.join().unwrap();
}
