//! One boot: what the machine says on its serial line, and when.

use crate::report::{Outcome, Time};
use crate::table::{COMPLAINTS, System};
use anyhow::{Context, Result};
use doppel_bench::cpu::Mark;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a monitor may take to end once its guest has passed.
const ENDING: Duration = Duration::from_secs(20);

/// After that nothing comes.
const PANIC: &str = "Kernel panic";

/// A monitor that is killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots a system until it has passed, for `limit` seconds at most: all that it said, and what came of it.
pub fn watch(
    mut command: Command,
    system: &System,
    limit: u64,
) -> Result<(String, Result<Outcome, String>)> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let child = command.spawn();
    let child = child.with_context(|| format!("{:?} cannot be started", command.get_program()))?;
    let mut process = Process(child);
    let mut listener = Listener::new(&mut process.0, start + Duration::from_secs(limit))?;
    let result = follow(&mut listener, &mut process.0, system, start, limit);
    drop(process);
    listener.rest();
    Ok((listener.said, result))
}

fn follow(
    listener: &mut Listener,
    child: &mut Child,
    system: &System,
    start: Instant,
    limit: u64,
) -> Result<Outcome, String> {
    let pid = child.id();
    let mut missing = |text: &str, why: Silence| match why {
        Silence::Late => format!("no {text:?} within {limit} s"),
        Silence::Ended => {
            let status = end(child).map_or("nothing".to_owned(), |status| status.to_string());
            format!("it ended with {status}, without {text:?}")
        }
        Silence::Panic => format!("{PANIC:?} instead of {text:?}"),
    };
    let mut time = |text: &'static str| match listener.until(text) {
        Ok(at) => Ok(Time {
            seconds: (at - start).as_secs_f64(),
            processor: processor_time(pid),
        }),
        Err(why) => Err(missing(text, why)),
    };
    let first = system.first.map(&mut time).transpose()?;
    let passed = time(system.passed)?;
    if let Some(wanted) = system.status {
        let status = end(child).ok_or("it passed, but did not end")?;
        if status.code() != Some(wanted) {
            return Err(format!("it passed, but ended with {status}"));
        }
    }
    listener.rest();
    match COMPLAINTS
        .iter()
        .find(|text| listener.said.contains(**text))
    {
        Some(complaint) => Err(format!("it passed, but said {complaint:?}")),
        None => Ok(Outcome { first, passed }),
    }
}

/// Seconds of processors that a monitor has used so far; none where it has ended already.
fn processor_time(pid: u32) -> Option<f64> {
    let mark = Mark::now(pid).ok()?;
    Some(mark.used().as_secs_f64()).filter(|seconds| *seconds > 0.0)
}

fn end(child: &mut Child) -> Option<ExitStatus> {
    let limit = Instant::now() + ENDING;
    while Instant::now() < limit {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Why a text did not come.
enum Silence {
    Late,
    Ended,
    Panic,
}

struct Listener {
    output: Receiver<(Instant, Vec<u8>)>,
    said: String,
    /// Up to where what was said has been looked at.
    seen: usize,
    end: Instant,
}

impl Listener {
    fn new(child: &mut Child, end: Instant) -> Result<Listener> {
        let (sender, output) = channel();
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        let streams: [Box<dyn Read + Send>; 2] = [Box::new(stdout), Box::new(stderr)];
        for mut stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut bytes) {
                    if sender.send((Instant::now(), bytes[..n].to_vec())).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Listener {
            output,
            said: String::new(),
            seen: 0,
            end,
        })
    }

    /// Waits for `text`: when it came.
    fn until(&mut self, text: &str) -> Result<Instant, Silence> {
        let mut last = Instant::now();
        loop {
            if let Some(at) = self.said[self.seen..].find(text) {
                self.seen += at + text.len();
                return Ok(last);
            }
            if self.said.contains(PANIC) {
                return Err(Silence::Panic);
            }
            let left = self.end.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok((at, bytes)) => {
                    last = at;
                    self.said.push_str(&String::from_utf8_lossy(&bytes));
                }
                Err(RecvTimeoutError::Timeout) => return Err(Silence::Late),
                Err(RecvTimeoutError::Disconnected) => return Err(Silence::Ended),
            }
        }
    }

    /// Takes what else was said so far.
    fn rest(&mut self) {
        while let Ok((_, bytes)) = self.output.try_recv() {
            self.said.push_str(&String::from_utf8_lossy(&bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::SYSTEMS;

    fn shell(script: &str, status: Option<i32>) -> Result<Outcome, String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let system = System {
            first: Some("begin"),
            passed: "done",
            status,
            timeout: 5,
            name: "shell",
            cmdline: "",
            ..SYSTEMS[0]
        };
        watch(command, &system, 2).unwrap().1
    }

    #[test]
    fn a_boot_passes_when_all_was_said_and_the_end_is_right() {
        let outcome = shell("echo begin; sleep 0.2; echo done; exit 33", Some(33)).unwrap();
        let (first, passed) = (outcome.first.unwrap(), outcome.passed);
        assert!(passed.seconds >= 0.2 && first.seconds < passed.seconds);
        shell("echo begin; echo done; exec sleep 60", None).unwrap();
    }

    #[test]
    fn whatever_else_is_a_failure() {
        let error = |script, status| shell(script, status).unwrap_err();
        assert!(error("echo begin", None).contains("exit status: 0, without \"done\""));
        assert!(error("echo done; echo begin", None).contains("it ended with"));
        assert!(error("echo begin; exec sleep 60", None).contains("within 2 s"));
        assert!(error("echo begin; echo done; exit 2", Some(33)).contains("ended with"));
        let panic = error("echo begin; echo Kernel panic; exec sleep 60", None);
        assert!(panic.contains("instead of"), "{panic}");
        let complaint = error("echo begin; echo kernel BUG: x; echo done", None);
        assert!(complaint.contains("said \"BUG:\""), "{complaint}");
    }
}
