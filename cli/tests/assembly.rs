//! The default guest is assembled once, by whoever comes first, and again where it is damaged.

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::{DOPPEL, Finished, Scratch, run};

fn assemble(cache: &Path) -> Finished {
    let mut command = Command::new(DOPPEL);
    command.arg("guest").env("XDG_CACHE_HOME", cache);
    run(&mut command, Duration::from_secs(300)).expect(0)
}

fn assembled(finished: &Finished) -> bool {
    finished.stderr.contains("doppel: assembling")
}

#[test]
fn two_first_runs_assemble_once_and_damage_is_repaired() {
    let scratch = Scratch::new();
    let cache = scratch.path("cache");
    let both = std::thread::scope(|scope| {
        let first = scope.spawn(|| assemble(&cache));
        let second = scope.spawn(|| assemble(&cache));
        [first.join().unwrap(), second.join().unwrap()]
    });
    assert_eq!(both.iter().filter(|f| assembled(f)).count(), 1, "{both:#?}");
    assert_eq!(both[0].console, both[1].console);

    let initrd = both[0].console.lines().nth(1).unwrap();
    let whole = fs::read(initrd).unwrap();
    fs::write(initrd, &whole[..whole.len() / 2]).unwrap();
    assert!(assembled(&assemble(&cache)));
    assert_eq!(
        fs::read(initrd).unwrap(),
        whole,
        "the same packages give the same archive"
    );
    assert!(!assembled(&assemble(&cache)));
}
