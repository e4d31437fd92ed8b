//! Boots a guest with a script in its initramfs and tells how it ended.

#![allow(dead_code)] // each test file takes what it needs

pub mod pvh;

use doppel_cli::guest::cpio::Archive;
use doppel_cli::guest::{self, Guest, package};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub const CLOUD: &str = "linux-image-cloud-amd64";
pub const GENERIC: &str = "linux-image-amd64";
pub const DOPPEL: &str = env!("CARGO_BIN_EXE_doppel");

/// The status of a guest whose script ended with success: init writes 16 + 0 to the debug-exit port.
pub const PASSED: i32 = (16 << 1) | 1;

/// A directory that is gone after the test.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a finished run left.
#[derive(Debug)]
pub struct Finished {
    /// The exit status; `None` where it was killed.
    pub status: Option<i32>,
    pub timed_out: bool,
    pub console: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// Ends the test, with everything the guest said, unless the status is `expected`.
    #[track_caller]
    pub fn expect(self, expected: i32) -> Finished {
        assert!(
            !self.timed_out,
            "timed out after {:?}\n{}",
            self.took,
            self.transcript()
        );
        assert_eq!(self.status, Some(expected), "\n{}", self.transcript());
        self
    }

    /// Ends the test unless the console or standard error has `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Finished {
        let said = self.console.contains(text) || self.stderr.contains(text);
        assert!(said, "nothing says {text:?}\n{}", self.transcript());
        self
    }

    fn transcript(&self) -> String {
        format!(
            "--- console\n{}\n--- standard error\n{}",
            self.console, self.stderr
        )
    }
}

/// Runs a command with nothing on its input, for `limit` at most.
pub fn run(command: &mut Command, limit: Duration) -> Finished {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let console = collect(child.stdout.take().unwrap());
    let stderr = collect(child.stderr.take().unwrap());
    let timed_out = !wait(&mut child, limit);
    let status = child.wait().unwrap();
    Finished {
        status: status.code(),
        timed_out,
        console: console.join().unwrap(),
        stderr: stderr.join().unwrap(),
        took: start.elapsed(),
    }
}

/// Waits for `child`, and kills it after `limit`; true if it ended by itself.
pub fn wait(child: &mut Child, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    while Instant::now() < end {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    false
}

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A command that runs on while the test looks at its output; it is killed in the end.
pub struct Running {
    pub child: Child,
    console: ChildStdout,
    shown: Vec<u8>,
}

impl Running {
    pub fn start(command: &mut Command) -> Running {
        Running::start_with(command, Stdio::null())
    }

    /// The same with a pipe to type into.
    pub fn start_typing(command: &mut Command) -> Running {
        Running::start_with(command, Stdio::piped())
    }

    fn start_with(command: &mut Command, input: Stdio) -> Running {
        let command = command.stdin(input).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let console = child.stdout.take().unwrap();
        Running {
            child,
            console,
            shown: Vec::new(),
        }
    }

    /// Reads the output until it has `text` so many times.
    #[track_caller]
    pub fn until(&mut self, text: &str, times: usize) {
        let mut buffer = [0; 256];
        let shown = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        while shown(&self.shown).matches(text).count() < times {
            let n = self.console.read(&mut buffer).unwrap();
            assert!(n > 0, "it ended without {text:?}:\n{}", shown(&self.shown));
            self.shown.extend(&buffer[..n]);
        }
    }
}

impl Running {
    /// All that was shown, of one that has ended.
    pub fn console(&mut self) -> String {
        self.console.read_to_end(&mut self.shown).unwrap();
        String::from_utf8_lossy(&self.shown).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processes of `--driver-domain` that serve something of this class with `text` in its description.
pub fn backends(class: &str, text: &str) -> Vec<u32> {
    let serves = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        let words: Vec<_> = line.split_terminator('\0').collect();
        match words[..] {
            [_, "backend", .., "--", of, what] => of == class && what.contains(text),
            _ => false,
        }
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(serves).collect()
}

/// How often a process of a device's back-end was followed by another, as `--stats` has it.
pub fn restarts(stats: &Path, class: &str, device: usize) -> u64 {
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    let restarts = stats[class][device]["restarts"].as_u64();
    restarts.unwrap_or_else(|| panic!("{stats}"))
}

/// A guest to boot: a Debian kernel, the default guest's initramfs and what a test adds to it.
pub struct Boot {
    guest: Guest,
    overlay: Archive,
    scratch: Scratch,
    memory: &'static str,
    cmdline: String,
    flags: Vec<String>,
}

impl Boot {
    /// The Debian kernel `package`, with a shell script that runs in place of the guest's shell.
    pub fn script(package: &str, script: &str) -> Boot {
        let mut overlay = Archive::new();
        let script = format!("#!/bin/sh\n{script}\n");
        overlay.file("doppel/script", 0o755, script.as_bytes());
        Boot {
            guest: debian(package),
            overlay,
            scratch: Scratch::new(),
            memory: "512M",
            cmdline: "console=ttyS0".to_owned(),
            flags: Vec::new(),
        }
    }

    pub fn flag(mut self, flag: &str) -> Boot {
        self.flags
            .extend(flag.split_whitespace().map(str::to_owned));
        self
    }

    pub fn cmdline(mut self, words: &str) -> Boot {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    pub fn memory(mut self, memory: &'static str) -> Boot {
        self.memory = memory;
        self
    }

    /// Adds a file.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Boot {
        self.overlay.file(path, mode, content);
        self
    }

    /// Adds those files of Debian packages that `wanted` accepts, by their path from the root.
    pub fn packages(mut self, set: &str, names: &[&str], wanted: impl Fn(&str) -> bool) -> Boot {
        let debs = guest::packages(set, names, &|line| eprintln!("{line}")).unwrap();
        for deb in debs {
            package::add(&mut self.overlay, &deb, &wanted).unwrap();
        }
        self
    }

    /// The kernel and initramfs as files, to start whatever way; they last as long as the scratch directory.
    pub fn prepare(self) -> (PathBuf, PathBuf, Scratch) {
        let mut initrd = fs::read(&self.guest.initrd).unwrap();
        initrd.extend(self.overlay.finish());
        let path = self.scratch.path("initrd");
        fs::write(&path, initrd).unwrap();
        (self.guest.kernel, path, self.scratch)
    }

    /// Runs it in Doppel, with a debug-exit port.
    pub fn doppel(self, engine: &str, limit: Duration) -> Finished {
        let (mut command, _scratch) = self.flag("--debug-exit").command(engine);
        run(&mut command, limit)
    }

    /// The command that runs it in Doppel; its files last as long as the scratch directory.
    pub fn command(self, engine: &str) -> (Command, Scratch) {
        let mut command = Command::new(DOPPEL);
        command.args(["run", "--engine", engine]);
        command.args(["--memory", self.memory]).args(&self.flags);
        command.args(["--cmdline", &self.cmdline]);
        let (kernel, initrd, scratch) = self.prepare();
        command
            .arg("--kernel")
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd);
        (command, scratch)
    }

    /// Runs it in QEMU's TCG; `None`, said aloud, where there is no QEMU.
    pub fn qemu(self, limit: Duration) -> Option<Finished> {
        const QEMU: &str = "qemu-system-x86_64";
        if Command::new(QEMU).arg("--version").output().is_err() {
            eprintln!("SKIPPED: this host has no {QEMU} to compare with");
            return None;
        }
        let mut command = Command::new(QEMU);
        command.args(
            "-accel tcg -cpu max -nodefaults -display none -serial stdio -no-reboot".split(' '),
        );
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(["-m", self.memory, "-append", &self.cmdline]);
        let (kernel, initrd, _scratch) = self.prepare();
        command
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd);
        Some(run(&mut command, limit))
    }
}

/// The guest with Debian's kernel `package`, fetched if need be.
pub fn debian(package: &str) -> Guest {
    guest::debian(package, &|line| eprintln!("{line}"))
        .unwrap_or_else(|error| panic!("the tests need Debian's {package} through apt: {error:#}"))
}

/// A program of `tests/programs`, built as a static executable for the guest.
pub fn program(name: &str, flags: &[&str]) -> Vec<u8> {
    let scratch = Scratch::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/programs/{name}.rs"));
    let executable = scratch.path(name);
    let output: Output = Command::new("rustc")
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
        ])
        .args(flags)
        .arg(source)
        .arg("-o")
        .arg(&executable)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::read(executable).unwrap()
}

/// A guest that marks its disk and boots again finds the mark.
pub fn reboots_with_its_disk(flags: &str, limit: Duration) {
    const SCRIPT: &str = "
        set -e
        if grep -q marked /dev/vda; then exit 0; fi
        echo marked | dd of=/dev/vda bs=512 count=1 conv=notrunc,sync 2>/dev/null
        sync
        reboot -f
    ";
    let scratch = Scratch::new();
    let path = scratch.path("disk");
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    Boot::script(CLOUD, SCRIPT)
        .flag(flags)
        .flag(&format!("--disk {},format=raw", path.display()))
        .doppel("translate", limit)
        .expect(PASSED);
}
