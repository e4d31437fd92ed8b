//! One run of one contestant: starts it, reads what it says as it says it, and looks at its memory meanwhile.

use crate::contestant::MEMORY;
use crate::memory::{self, Footprint};
use anyhow::{Context, Result, bail, ensure};
use doppel_bench::cpu::Mark;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How much the guest's clock may differ from the host's between "begin" and "end".
const CLOCK_TOLERANCE: f64 = 0.03;
/// The share of a processor below which the host is too busy to measure.
const CPU_SHARE: f64 = 0.9;
/// The statuses of a run whose program ended well: natively, and through the debug-exit port.
const PASSED: [i32; 2] = [0, (16 << 1) | 1];

/// What a run said.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Run {
    pub rows: BTreeMap<String, Measured>,
    /// The smallest step of the clock that the guest saw, in seconds.
    pub clock_step: f64,
    pub clocksource: Option<String>,
    /// The guest's time from "begin" to "end" over the host's.
    pub clock_rate: Option<f64>,
    /// Processor time from "begin" to "end" over the time that passed on the host.
    pub cpu_share: Option<f64>,
    /// The share of user code that the processor itself executed, where the monitor tells it.
    pub user_direct_share: Option<f64>,
    pub after_boot: Option<Footprint>,
    pub after_all: Option<Footprint>,
}

/// One row in one run.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub checksum: String,
    /// Seconds, one a pass.
    pub passes: Vec<f64>,
    /// The share of a processor that the process had since the row before.
    pub cpu_share: Option<f64>,
}

impl Run {
    /// Makes of each row's times what they would be had the process had a processor to itself.
    pub fn correct(&mut self) {
        for row in self.rows.values_mut() {
            let share = row.cpu_share.unwrap_or(1.0).min(1.0);
            row.passes.iter_mut().for_each(|seconds| *seconds *= share);
        }
    }
}

/// A process whose output is read a line at a time.
struct Process {
    child: Child,
    lines: Receiver<(Instant, String)>,
    transcript: String,
    end: Instant,
}

/// Whom the processor time of the work is asked of.
#[derive(Clone, Copy, PartialEq)]
pub enum CpuTime {
    /// The process that was started: a monitor, which does all the work itself.
    OfProcess,
    /// The program that does the work, which has children: it says so.
    AsTold,
}

/// Runs a contestant's program to its end.
pub fn run(command: Command, cpu_time: CpuTime, limit: Duration) -> Result<Run> {
    let mut process = Process::start(command, limit)?;
    let mut reader = Reader::new(process.child.id(), cpu_time);
    while let Some((at, line)) = process.line()? {
        let line = line.trim();
        if let Some(("bench:", word)) = line.split_once(' ') {
            let footprint = || memory::footprint(process.child.id(), MEMORY);
            match word {
                "booted" => reader.run.after_boot = Some(footprint()?),
                "done" => reader.run.after_all = Some(footprint()?),
                _ => {}
            }
        }
        reader
            .line(at, line)
            .with_context(|| format!("reading {line:?}"))?;
    }
    process.finish()?;
    ensure!(
        reader.ended,
        "it never came to its end\n{}",
        process.transcript
    );
    Ok(reader.run)
}

/// What a monitor's statistics say of that share.
pub fn user_direct_share(stats: &Path) -> Result<Option<f64>> {
    let text = std::fs::read(stats).with_context(|| stats.display().to_string())?;
    let stats: serde_json::Value = serde_json::from_slice(&text)?;
    Ok(stats["user_direct_share"].as_f64())
}

/// Seconds from the start of a machine until its init speaks; then the machine is ended.
pub fn boot(command: Command, limit: Duration) -> Result<f64> {
    let start = Instant::now();
    let mut process = Process::start(command, limit)?;
    while let Some((at, line)) = process.line()? {
        if line.trim() == "bench: init" {
            return Ok((at - start).as_secs_f64());
        }
    }
    bail!("it ended without a word of init\n{}", process.transcript)
}

/// Makes numbers of lines.
struct Reader {
    run: Run,
    process: u32,
    cpu_time: CpuTime,
    /// When the work began.
    begin: Option<Instant>,
    /// Before the first row, before the last, and after it.
    marks: Option<[Mark; 3]>,
    ended: bool,
}

impl Reader {
    fn new(process: u32, cpu_time: CpuTime) -> Reader {
        Reader {
            run: Run::default(),
            process,
            cpu_time,
            begin: None,
            marks: None,
            ended: false,
        }
    }

    fn line(&mut self, at: Instant, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["clock", step] => self.run.clock_step = step.parse()?,
            ["clocksource", name] => self.run.clocksource = Some(name.to_owned()),
            ["begin"] => self.begin = Some(at),
            ["cpu", seconds] => self.mark(at, seconds.parse()?)?,
            ["end", seconds] => self.end(at, seconds.parse()?)?,
            ["row", name, checksum, ref times @ ..] => {
                let passes = times.iter().map(|t| t.parse()).collect::<Result<_, _>>()?;
                self.row(name, checksum, passes);
            }
            _ => {}
        }
        Ok(())
    }

    fn mark(&mut self, at: Instant, told: f64) -> Result<()> {
        let mark = match self.cpu_time {
            CpuTime::OfProcess => Mark::now(self.process)?,
            CpuTime::AsTold => Mark::told(at, Duration::try_from_secs_f64(told)?),
        };
        let [first, _, last] = self.marks.unwrap_or([mark; 3]);
        self.marks = Some([first, last, mark]);
        Ok(())
    }

    fn row(&mut self, name: &str, checksum: &str, passes: Vec<f64>) {
        let measured = Measured {
            checksum: checksum.to_owned(),
            passes,
            cpu_share: self
                .marks
                .map(|[_, before, after]| after.share_since(&before)),
        };
        self.run.rows.insert(name.to_owned(), measured);
    }

    /// A guest whose clock is slow would look fast, and whoever gets half a processor looks half as fast.
    fn end(&mut self, at: Instant, seconds: f64) -> Result<()> {
        let begin = self.begin.context("an end without a beginning")?;
        let [first, _, last] = self.marks.context("an end without processor time")?;
        let passed = (at - begin).as_secs_f64();
        let rate = seconds / passed;
        let share = last.share_since(&first);
        self.run.clock_rate = Some(rate);
        self.run.cpu_share = Some(share);
        self.ended = true;
        if passed > 1.0 && (rate - 1.0).abs() > CLOCK_TOLERANCE {
            eprintln!("bench: WARNING: the guest's clock runs at {rate:.3} of the host's");
        }
        if passed > 1.0 && share < CPU_SHARE {
            eprintln!("bench: WARNING: the host is busy: this run got {share:.2} of a processor");
        }
        Ok(())
    }
}

impl Process {
    fn start(mut command: Command, limit: Duration) -> Result<Process> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        let (sender, lines) = channel();
        let stdout = child.stdout.take().context("no stdout")?;
        let stderr = child.stderr.take().context("no stderr")?;
        for output in [
            Box::new(stdout) as Box<dyn std::io::Read + Send>,
            Box::new(stderr),
        ] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    if sender.send((Instant::now(), line)).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Process {
            child,
            lines,
            transcript: String::new(),
            end: Instant::now() + limit,
        })
    }

    /// The next line with the time it came; none at the end of the output.
    fn line(&mut self) -> Result<Option<(Instant, String)>> {
        let left = self.end.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok((at, line)) => {
                self.transcript.push_str(&line);
                self.transcript.push('\n');
                Ok(Some((at, line)))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("it takes too long\n{}", self.transcript),
        }
    }

    fn finish(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        let passed = status.code().is_some_and(|code| PASSED.contains(&code));
        ensure!(passed, "it ended with {status}\n{}", self.transcript);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_the_program_says_becomes_numbers() {
        let said = "echo clock 0.5; echo begin; echo cpu 0; sleep 0.1; echo cpu 60; echo row a 0f 1.5 2; echo noise; echo end 0.1";
        let run = run(sh(said), CpuTime::AsTold, MINUTE).unwrap();
        assert_eq!(run.clock_step, 0.5);
        assert_eq!(run.rows["a"].checksum, "0f");
        assert_eq!(run.rows["a"].passes, [1.5, 2.0]);
        assert!(run.clock_rate.is_some() && run.cpu_share.unwrap() > 2.0);
        assert!(run.rows["a"].cpu_share.unwrap() > 2.0);
    }

    #[test]
    fn a_corrected_time_is_the_share_of_it_in_which_the_process_ran() {
        let row = |cpu_share| Measured {
            checksum: String::new(),
            passes: vec![2.0, 4.0],
            cpu_share,
        };
        let rows = [("a", Some(0.5)), ("b", Some(1.1)), ("boot", None)];
        let rows = rows.map(|(name, share)| (name.to_owned(), row(share)));
        let mut run = Run {
            rows: rows.into(),
            ..Run::default()
        };
        run.correct();
        assert_eq!(run.rows["a"].passes, [1.0, 2.0]);
        assert_eq!(run.rows["b"].passes, [2.0, 4.0]);
        assert_eq!(run.rows["boot"].passes, [2.0, 4.0]);
    }

    #[test]
    fn a_run_that_fails_stops_or_hangs_is_an_error_with_its_transcript() {
        let error = |script, limit| {
            format!(
                "{:#}",
                run(sh(script), CpuTime::OfProcess, limit).unwrap_err()
            )
        };
        assert!(error("echo oops; exit 1", MINUTE).contains("oops"));
        assert!(error("echo begin; sleep 0.2", MINUTE).contains("never came"));
        assert!(error("exec sleep 60", Duration::from_millis(200)).contains("too long"));
        assert!(boot(sh("echo no"), MINUTE).is_err());
        assert!(boot(sh("echo bench: init; exec sleep 60"), MINUTE).unwrap() < 30.0);
    }
}
