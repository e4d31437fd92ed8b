//! Images that are built: what an end before the end leaves behind.

mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};
use support::{DOPPEL, Running, Scratch, wait};

const MINUTE: Duration = Duration::from_secs(60);

/// As mmdebstrap does: what it starts has to end before it cleans up, which takes its time.
const TOOL: &str = "#!/bin/sh
trap : INT TERM
mkdir \"$TMPDIR/tree\" && touch \"$TMPDIR/left\"
echo $$ > \"$0.pid\"
sleep 60
sleep 0.5
rmdir \"$TMPDIR/tree\" && touch \"$0.cleaned\"
";

/// In the place of mmdebstrap a program that takes its time.
#[test]
fn a_build_that_is_interrupted_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let [tools, out, temporary] = ["tools", "out", "tmp"].map(|name| scratch.path(name));
    for folder in [&tools, &out, &temporary] {
        fs::create_dir_all(folder).unwrap();
    }
    let tool = tools.join("mmdebstrap");
    fs::write(&tool, TOOL).unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    let sources = scratch.path("sources");
    fs::write(&sources, "deb http://localhost bookworm main\n").unwrap();
    let mut paths = vec![tools.clone()];
    paths.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    let mut command = Command::new(DOPPEL);
    command.args(["image", "build", "debian:bookworm", "--sources"]);
    command.arg(&sources).arg(out.join("disk.qcow2"));
    command.env("PATH", std::env::join_paths(paths).unwrap());
    command.env("TMPDIR", &temporary);
    let mut doppel = Running::start(&mut command);
    let pid = tools.join("mmdebstrap.pid");
    let start = Instant::now();
    while fs::read_to_string(&pid).unwrap_or_default().is_empty() {
        assert!(start.elapsed() < MINUTE, "it was not started");
        std::thread::sleep(Duration::from_millis(10));
    }
    let entries = |folder| fs::read_dir(folder).unwrap().count();
    assert_eq!((entries(&out), entries(&temporary)), (1, 1));
    kill(Pid::from_raw(doppel.child.id() as i32), Signal::SIGINT).unwrap();
    assert!(wait(&mut doppel.child, MINUTE));
    assert_eq!(doppel.child.wait().unwrap().code(), Some(1));
    assert_eq!(
        (entries(&out), entries(&temporary)),
        (0, 0),
        "something is left"
    );
    assert!(
        tools.join("mmdebstrap.cleaned").exists(),
        "it was not waited for"
    );
    let tool = fs::read_to_string(&pid).unwrap();
    let start = Instant::now();
    while runs(tool.trim()) {
        assert!(start.elapsed() < MINUTE, "mmdebstrap goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Nobody may have waited for it yet.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().unwrap_or_default();
    !state.is_empty() && !state.starts_with(['Z', 'X'])
}
