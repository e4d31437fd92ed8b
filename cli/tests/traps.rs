//! What user code sees of its traps, and of the instructions that do not trap, is the same on the host's own processor and on every engine.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;
use support::{Boot, CLOUD, PASSED, Scratch};

const LIMIT: Duration = Duration::from_secs(300);
/// What the guest's lines begin with, so that the kernel's are told apart.
const MARK: &str = "traps| ";

/// One machine's account of every case, in order: its name, and what was seen.
type Account = Vec<(String, String)>;

fn account(text: &str, mark: &str) -> Account {
    let mut account = Account::new();
    for line in text
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix(mark))
    {
        match line.split_once(": ") {
            // It belongs to the case before.
            Some(_) if line.starts_with(' ') => account.last_mut().unwrap().1 += line,
            Some((name, said)) => account.push((name.to_owned(), said.to_owned())),
            None => {}
        }
    }
    assert!(account.len() > 200, "too short:\n{text}");
    account
}

/// The program's own account, on the host.
fn native(program: &[u8], arguments: &str) -> Account {
    let scratch = Scratch::new();
    let path = scratch.path("traps");
    fs::write(&path, program).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let finished = support::run(Command::new(&path).args(arguments.split(' ')), LIMIT).expect(0);
    account(&finished.console, "")
}

/// The same in a guest.
fn guest(program: &[u8], arguments: &str, engine: &str, flags: &str) -> Account {
    let script =
        format!("/doppel/traps {arguments} > /tmp/traps || exit 1; sed 's/^/{MARK}/' /tmp/traps");
    let boot = Boot::script(CLOUD, &script).file("doppel/traps", 0o755, program);
    // Addresses of the kernel's are among what is told.
    let boot = boot.cmdline("quiet nokaslr vsyscall=xonly").flag(flags);
    let finished = boot.doppel(engine, LIMIT).expect(PASSED);
    account(&finished.console, MARK)
}

/// Where translation leaves arithmetic flags open (docs/testing.md): the instruction that faults would have overwritten them.
const OVERWRITTEN_FLAGS: [&str; 3] = [
    "a locked addition to a page for reading",
    "a comparison and exchange that would not write",
    "a read that would write",
];
/// Where the interpreter is known to differ (docs/testing.md): PE at an overflow that is not masked.
const PRECISION_FLAG: &str = "sse, an overflow";

/// What is left out of a comparison.
#[derive(Clone, Copy)]
struct LeftOut {
    /// What the version of the kernel decides.
    kernel: bool,
    flags: bool,
    precision: bool,
}

/// Kernels differ, and nothing else.
const DIRECT: LeftOut = LeftOut {
    kernel: true,
    flags: false,
    precision: false,
};
const INTERPRETED: LeftOut = LeftOut {
    precision: true,
    ..DIRECT
};
const TRANSLATED: LeftOut = LeftOut {
    flags: true,
    ..INTERPRETED
};

impl LeftOut {
    fn has(&self, name: &str) -> bool {
        self.kernel && name.starts_with("kernel ")
            || self.flags && OVERWRITTEN_FLAGS.contains(&name)
            || self.precision && name == PRECISION_FLAG
    }
}

/// Every line of the one that the other has not.
fn differences(expected: &Account, got: &Account, left_out: LeftOut) -> Vec<String> {
    let mut complaints = Vec::new();
    if expected
        .iter()
        .map(|(name, _)| name)
        .ne(got.iter().map(|(name, _)| name))
    {
        complaints.push("they tell of different cases".to_owned());
    }
    for ((name, right), (_, said)) in expected.iter().zip(got) {
        if right != said && !left_out.has(name) {
            complaints.push(format!("{name}:\n  {right}\n  {said}"));
        }
    }
    complaints
}

#[track_caller]
fn expect_equal(expected: &Account, got: &Account, left_out: LeftOut) {
    let complaints = differences(expected, got, left_out);
    assert!(
        complaints.is_empty(),
        "{} differ\n{}",
        complaints.len(),
        complaints.join("\n")
    );
}

fn program() -> Vec<u8> {
    support::program("traps_unsafe", &[])
}

#[test]
fn user_code_executed_directly_sees_what_it_sees_on_the_host() {
    let program = program();
    let native = native(&program, "20");
    let always = guest(&program, "20", "direct", "--direct always");
    expect_equal(&native, &always, DIRECT);
    // Long enough between traps to go direct by the policy, on two processors.
    let usual = guest(&program, "4 60000", "direct", "--cpus 2");
    expect_equal(&native, &usual, TRANSLATED);
    let translated = guest(&program, "20", "translate", "");
    expect_equal(&native, &translated, TRANSLATED);
    let same_kernel = LeftOut {
        kernel: false,
        ..TRANSLATED
    };
    expect_equal(&translated, &always, same_kernel);
}

#[test]
fn user_code_that_is_interpreted_sees_what_it_sees_on_the_host() {
    let program = program();
    let interpreted = guest(&program, "2", "interpret", "");
    expect_equal(&native(&program, "2"), &interpreted, INTERPRETED);
}
