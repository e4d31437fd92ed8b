//! A suite in a guest. A guest that dies or hangs on the way costs the test that it was at, and the rest is run in another.

use crate::outcome::{End, Line, Outcome, line, outcome};
use crate::table::Test;
use anyhow::{Context, Result};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

pub const QEMU: &str = "qemu-system-x86_64";
/// MiB.
const MEMORY: u32 = 1536;
const CPUS: u32 = 2;
/// From the start of a guest to its first test, and more than a test may take.
const SLACK: Duration = Duration::from_secs(120);

/// Who runs a guest.
#[derive(Clone, Debug)]
pub enum Monitor {
    Doppel { program: PathBuf, engine: String },
    Qemu,
}

impl Monitor {
    pub fn name(&self) -> &str {
        match self {
            Monitor::Doppel { engine, .. } => engine,
            Monitor::Qemu => "qemu",
        }
    }

    /// How many times longer a test may take than on a host of its own.
    pub fn patience(&self) -> u32 {
        match self {
            Monitor::Doppel { engine, .. } if engine == "interpret" => 10,
            Monitor::Doppel { .. } => 2,
            Monitor::Qemu => 4,
        }
    }

    fn command(&self, files: &Files, words: &str) -> Command {
        let cmdline = format!("console=ttyS0 loglevel=1 {words}");
        match self {
            Monitor::Doppel { program, engine } => {
                doppel(program.as_os_str(), engine, files, &cmdline)
            }
            Monitor::Qemu => qemu(files, &cmdline),
        }
    }
}

fn doppel(program: &OsStr, engine: &str, files: &Files, cmdline: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--debug-exit", "--no-reboot", "--engine", engine]);
    command.args(["--cpus", &CPUS.to_string()]);
    command.args(["--memory", &format!("{MEMORY}M"), "--net", "none"]);
    command.arg("--kernel").arg(&files.kernel);
    command.arg("--initrd").arg(&files.initrd);
    command.args(["--cmdline", cmdline]);
    command
}

fn qemu(files: &Files, cmdline: &str) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args("-accel tcg -cpu max -nodefaults -display none -serial stdio -no-reboot".split(' '));
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.args(["-smp", &CPUS.to_string(), "-m", &MEMORY.to_string()]);
    command.arg("-kernel").arg(&files.kernel);
    command.arg("-initrd").arg(&files.initrd);
    command.args(["-append", cmdline]);
    command
}

/// What a guest is booted from.
pub struct Files {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// The list that the script in the guest reads: name, seconds, folder below `base`, command.
pub fn list(tests: &[&Test], base: &str) -> String {
    let mut list = String::new();
    for (number, test) in tests.iter().enumerate() {
        let (folder, command) = test.line.split_once(' ').unwrap_or(("", test.line));
        let _ = writeln!(list, "{number}|{}|{base}{folder}|{command}", test.seconds);
    }
    list
}

/// What came of a suite in a monitor.
pub struct Results {
    pub outcomes: Vec<Outcome>,
    /// What the kernel complained of.
    pub complaints: Vec<String>,
}

/// Runs tests in a monitor; what was said goes to `log`.
pub fn run(monitor: &Monitor, files: &Files, tests: &[&Test], log: &Path) -> Result<Results> {
    let mut log = File::create(log)?;
    let mut results = Results {
        outcomes: Vec::new(),
        complaints: Vec::new(),
    };
    while results.outcomes.len() < tests.len() {
        let before = results.outcomes.len();
        boot(monitor, files, tests, &mut results, &mut log)?;
        let after = results.outcomes.len();
        if after < tests.len() {
            let seconds = 0.0;
            let end = End::Dead;
            eprintln!(
                "{}: the guest died at {}",
                monitor.name(),
                tests[after].line
            );
            results.outcomes.push(Outcome { end, seconds });
            // One that dies at once does so again: it is not the tests'.
            anyhow::ensure!(
                after > before || after == 0 || results.outcomes[after - 1].end != End::Dead,
                "{}: guests die before their first test",
                monitor.name()
            );
        }
    }
    Ok(results)
}

/// One guest, until its tests are done, it ends or it says nothing for too long.
fn boot(
    monitor: &Monitor,
    files: &Files,
    tests: &[&Test],
    results: &mut Results,
    log: &mut File,
) -> Result<()> {
    let from = results.outcomes.len();
    let patience = monitor.patience();
    let words = format!("suites.from={from} suites.patience={patience}");
    let mut process = Process::start(monitor.command(files, &words))?;
    let lines = process.lines()?;
    while let Some(test) = tests.get(results.outcomes.len()) {
        let limit = Duration::from_secs((test.seconds * patience).into());
        let Ok(text) = lines.recv_timeout(limit + SLACK) else {
            return Ok(());
        };
        writeln!(log, "{text}")?;
        if let Line::End(status, hundredths) = line(&text) {
            let outcome = outcome(status, f64::from(hundredths) / 100.0, limit.as_secs_f64());
            writeln!(log, "{}: {outcome:?}", test.line)?;
            results.outcomes.push(outcome);
        }
    }
    while let Ok(text) = lines.recv_timeout(SLACK) {
        match line(&text) {
            Line::Complaint(text) => results.complaints.push(text.to_owned()),
            Line::Done => break,
            _ => {}
        }
    }
    Ok(())
}

/// A monitor that is killed when it is dropped.
struct Process(Child);

impl Process {
    fn start(mut command: Command) -> Result<Process> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let child = command.spawn();
        let program = command.get_program().to_owned();
        Ok(Process(child.with_context(|| {
            format!("{program:?} cannot be started")
        })?))
    }

    fn lines(&mut self) -> Result<Receiver<String>> {
        let (sender, lines) = channel();
        let stdout = self.0.stdout.take().context("no stdout")?;
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n') {
                let Ok(line) = line else { return };
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        Ok(lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
