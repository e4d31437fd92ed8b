//! The filters of system calls, from inside: whoever has taken over a thread makes every call, and none passes that is not in its table.
//!
//! Filters are for good, so that each kind of thread is tried in a process of its own: this test again, told by the environment.

#[path = "support/attempt_unsafe.rs"]
mod attempt_unsafe;

use attempt_unsafe::{call, count_refusals, is_refused_by_int_0x80};
use doppel_cli::sandbox::{self, Need, Place};
use doppel_seccomp::{Kind, REFUSED};
use std::collections::BTreeSet;
use std::env;
use std::process::{Command, Output};
use syscalls::Sysno;

/// Which kind the process is to be of, and whether it stays as it is when a call is refused.
const ATTEMPT: &str = "DOPPEL_ATTEMPT";
const LAST_CALL: i64 = 480;
const X32: i64 = 0x4000_0000;
/// A machine that has everything, in which filters are widest.
const NEEDS: [Need; 9] = [
    Need::Always,
    Need::Inet(Place::Monitor),
    Need::Inet(Place::Apart),
    Need::Unix(Place::Monitor),
    Need::Unix(Place::Apart),
    Need::Tap(Place::Monitor),
    Need::Tap(Place::Apart),
    Need::Share,
    Need::Programs,
];

/// What a process of a kind has: a disk's knows no options.
fn needs(kind: Kind) -> &'static [Need] {
    match kind {
        Kind::DiskServer => &NEEDS[..1],
        _ => &NEEDS,
    }
}

/// The kind that this process is to be of, if it is not the test itself.
fn told() -> Option<Kind> {
    let name = env::var(ATTEMPT).ok()?;
    Kind::ALL.into_iter().find(|kind| kind.name() == name)
}

/// This test again, as one of `kind`; `None` where the host's kernel has no filters.
fn again(test: &str, kind: Kind) -> Option<Output> {
    let output = Command::new("timeout")
        .arg("20")
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(ATTEMPT, kind.name())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("no seccomp filters") {
        eprintln!("SKIPPED: {said}");
        return None;
    }
    Some(output)
}

/// Confines this process.
fn enter(kind: Kind) {
    let filters = sandbox::filters(needs(kind)).unwrap();
    if let Err(error) = filters.confine(kind) {
        panic!("{error}");
    }
}

#[test]
fn no_kind_of_thread_makes_a_call_that_its_table_has_not() {
    const NAME: &str = "no_kind_of_thread_makes_a_call_that_its_table_has_not";
    if let Some(kind) = told() {
        enter(kind);
        count_refusals();
        let passed = calls_that_pass(kind);
        assert!(passed.is_empty(), "{}: {passed:?}", kind.name());
        return;
    }
    for kind in Kind::ALL {
        let Some(output) = again(NAME, kind) else {
            return;
        };
        assert!(output.status.success(), "{}: {output:?}", kind.name());
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("1 passed"), "{}: {said}", kind.name());
    }
}

/// Calls that are not in the table of `kind` and pass nevertheless.
fn calls_that_pass(kind: Kind) -> BTreeSet<String> {
    let permitted = sandbox::permitted(kind, needs(kind));
    let known: BTreeSet<i64> = permitted.keys().map(|call| call.id().into()).collect();
    let mut passed = BTreeSet::new();
    for number in (0..LAST_CALL).filter(|number| !known.contains(number)) {
        let name = Sysno::new(number as usize).map_or("?", |call| call.name());
        let denied = match Sysno::new(number as usize) {
            Some(Sysno::clone3) => Some(i64::from(-libc::ENOSYS)),
            Some(Sysno::openat) => Some(i64::from(-libc::EACCES)),
            Some(Sysno::clone) => Some(i64::from(-libc::EPERM)),
            // Linux exempts these two from all filters: they are for uprobes, and end a process that has none.
            Some(Sysno::uretprobe) => continue,
            _ if number == 336 => continue,
            _ => None,
        };
        if call(number, [0; 6]) != denied {
            passed.insert(format!("{number} {name}"));
        }
    }
    for number in (0..LAST_CALL).map(|number| X32 | number) {
        if call(number, [0; 6]).is_some() {
            passed.insert(format!("{number:#x}"));
        }
    }
    for number in 0..LAST_CALL as u32 {
        if !is_refused_by_int_0x80(number) {
            passed.insert(format!("int 0x80: {number}"));
        }
    }
    passed.extend(arguments_that_pass(kind));
    passed
}

/// Calls with arguments that no kind of thread may give them, or this one not.
fn arguments_that_pass(kind: Kind) -> Vec<String> {
    let (prctl, ioctl, own) = (
        libc::SYS_prctl,
        libc::SYS_ioctl,
        u64::from(std::process::id()),
    );
    let execute = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let mut table = vec![
        ("TIOCSTI", ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0]),
        ("BLKROSET", ioctl, [0, 0x125d, 0, 0, 0, 0]),
        ("a netlink socket", libc::SYS_socket, [16, 3, 0, 0, 0, 0]),
        ("a packet socket", libc::SYS_socket, [17, 3, 0, 0, 0, 0]),
        (
            "an Internet socket pair",
            libc::SYS_socketpair,
            [2, 1, 0, 0, 0, 0],
        ),
        (
            "a signal to another process",
            libc::SYS_tgkill,
            [1, 1, 0, 0, 0, 0],
        ),
    ];
    let programs = [Kind::Control, Kind::Zygote, Kind::Supervisor].contains(&kind);
    if !programs {
        table.extend([
            ("PR_SET_MM", prctl, [libc::PR_SET_MM as u64, 0, 0, 0, 0, 0]),
            (
                "PR_SET_DUMPABLE",
                prctl,
                [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0],
            ),
        ]);
        if [Kind::Disk, Kind::Share, Kind::DiskServer].contains(&kind) {
            table.push((
                "a process",
                libc::SYS_clone,
                [libc::SIGCHLD as u64, 0, 0, 0, 0, 0],
            ));
        }
        if kind != Kind::Vcpu {
            table.extend([
                (
                    "new code",
                    libc::SYS_mmap,
                    [0, 4096, execute, private, u64::MAX, 0],
                ),
                ("code", libc::SYS_mprotect, [0, 4096, execute, 0, 0, 0]),
            ]);
        }
    }
    // What is for this process passes, so that the table above is not refused for another reason.
    assert_eq!(
        call(libc::SYS_tgkill, [own, own, 0, 0, 0, 0]).map(|r| r <= 0),
        Some(true)
    );
    let passed = table
        .into_iter()
        .filter(|(_, number, arguments)| call(*number, *arguments).is_some());
    passed.map(|(what, ..)| what.to_owned()).collect()
}

#[test]
fn a_refused_call_ends_the_process_and_says_who_made_it() {
    const NAME: &str = "a_refused_call_ends_the_process_and_says_who_made_it";
    if let Some(kind) = told() {
        enter(kind);
        call(libc::SYS_ptrace, [0; 6]);
        return;
    }
    for kind in Kind::ALL {
        let Some(output) = again(NAME, kind) else {
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(REFUSED), "{said}");
        let who = format!("a {} thread made system call 101 (ptrace)", kind.name());
        assert!(said.contains(&who), "{said}");
    }
}
