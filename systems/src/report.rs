//! What came out, as a table and as JSON.

use crate::monitor::{self, Monitor};
use crate::table::System;
use serde::Serialize;
use std::fmt::Write;

/// One call of the command.
#[derive(Serialize)]
pub struct Report {
    pub host: String,
    pub qemu: Option<String>,
    pub rows: Vec<Row>,
}

/// One system with a number of CPUs.
#[derive(Serialize)]
pub struct Row {
    pub system: &'static str,
    pub cpus: u32,
    /// MiB.
    pub memory: u32,
    /// Why it was not booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    pub doppel: Column,
    pub qemu: Column,
    /// How many times longer QEMU takes until the first mark, which is the first process of a Linux.
    pub ratio_first: Option<f64>,
    /// The same until the system has passed.
    pub ratio_passed: Option<f64>,
    /// The same in processor time until the system has passed, which a busy host changes less.
    pub ratio_processor: Option<f64>,
}

/// What one monitor made of it.
#[derive(Default, Serialize)]
pub struct Column {
    /// The least of all rounds.
    pub best: Option<Outcome>,
    /// The first failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// A boot that passed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Outcome {
    pub first: Option<Time>,
    pub passed: Time,
}

/// What it took from the start of the monitor.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Time {
    pub seconds: f64,
    /// Seconds of processors, of all threads and processes of the monitor.
    pub processor: Option<f64>,
}

impl Time {
    fn least(self, other: Time) -> Time {
        Time {
            seconds: self.seconds.min(other.seconds),
            processor: least(self.processor, other.processor, f64::min),
        }
    }
}

impl Outcome {
    fn least(self, other: Outcome) -> Outcome {
        Outcome {
            first: least(self.first, other.first, Time::least),
            passed: self.passed.least(other.passed),
        }
    }
}

fn least<T>(one: Option<T>, other: Option<T>, least: fn(T, T) -> T) -> Option<T> {
    [one, other].into_iter().flatten().reduce(least)
}

impl Row {
    pub fn new(system: &System, cpus: u32) -> Row {
        Row {
            system: system.name,
            cpus,
            memory: system.memory,
            skipped: None,
            doppel: Column::default(),
            qemu: Column::default(),
            ratio_first: None,
            ratio_passed: None,
            ratio_processor: None,
        }
    }

    /// Adds the outcome of one boot.
    pub fn add(&mut self, monitor: &Monitor, outcome: Result<Outcome, String>) {
        let column = match monitor {
            Monitor::Doppel { .. } => &mut self.doppel,
            Monitor::Qemu => &mut self.qemu,
        };
        match outcome {
            Ok(outcome) => {
                column.best = Some(column.best.map_or(outcome, |best| best.least(outcome)));
            }
            Err(failure) => {
                column.failure.get_or_insert(failure);
            }
        }
        if let (Some(qemu), Some(doppel)) = (self.qemu.best, self.doppel.best) {
            let ratio = |of: fn(&Outcome) -> Option<f64>| Some(of(&qemu)? / of(&doppel)?);
            self.ratio_first = ratio(|o| Some(o.first?.seconds));
            self.ratio_passed = ratio(|o| Some(o.passed.seconds));
            self.ratio_processor = ratio(|o| o.passed.processor);
        }
    }

    fn failed(&self) -> bool {
        self.doppel.failure.is_some()
    }

    /// One line of the table, with what went wrong.
    pub fn line(&self) -> String {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.2}"));
        let of = |column: &Column| {
            let first = column.best.and_then(|best| best.first);
            let passed = column.best.map(|best| best.passed);
            [first, passed].map(|time| number(time.map(|time| time.seconds)))
        };
        let (doppel, qemu) = (of(&self.doppel), of(&self.qemu));
        let verdict = match (&self.skipped, &self.doppel.failure, &self.qemu.failure) {
            (Some(why), ..) => format!("SKIPPED: {why}"),
            (_, Some(why), _) => format!("FAILED: {why}"),
            (.., Some(why)) => format!("passed; QEMU: {why}"),
            _ => "passed".to_owned(),
        };
        format!(
            "{:<14} {:>4} {:>6} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>6}  {verdict}",
            self.system,
            self.cpus,
            self.memory,
            doppel[0],
            qemu[0],
            doppel[1],
            qemu[1],
            number(self.ratio_first),
            number(self.ratio_passed),
            number(self.ratio_processor),
        )
    }
}

impl Report {
    pub fn new() -> Report {
        Report {
            host: host(),
            qemu: monitor::qemu_version(),
            rows: Vec::new(),
        }
    }

    pub fn failures(&self) -> usize {
        self.rows.iter().filter(|row| row.failed()).count()
    }

    /// Seconds to the first mark (a Linux's first process) and to the end of the check; how many times longer QEMU takes, and of what
    /// processor time.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<14} {:>4} {:>6} {:>17} {:>17} {:>20}\n{:<14} {:>4} {:>6} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>6}\n",
            "",
            "",
            "",
            "seconds to init",
            "seconds to pass",
            "TCG : Doppel",
            "system",
            "CPUs",
            "MiB",
            "Doppel",
            "TCG",
            "Doppel",
            "TCG",
            "init",
            "pass",
            "CPU",
        );
        for row in &self.rows {
            let _ = writeln!(text, "{}", row.line());
        }
        let count = |what: &dyn Fn(&Row) -> bool| self.rows.iter().filter(|r| what(r)).count();
        let skipped = count(&|row| row.skipped.is_some());
        let failed = self.failures();
        let passed = self.rows.len() - skipped - failed;
        let _ = write!(text, "{passed} passed, {failed} failed, {skipped} skipped");
        text
    }
}

fn host() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|l| l.strip_prefix("model name"));
    let model = model.map_or("", |l| l.trim_start_matches([' ', '\t', ':']));
    let count = cpus.lines().filter(|l| l.starts_with("processor")).count();
    format!(
        "{model}, {count} CPUs, Linux {}",
        read("/proc/sys/kernel/osrelease").trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::SYSTEMS;

    fn doppel() -> Monitor {
        Monitor::Doppel {
            program: "doppel".into(),
            engine: "auto".into(),
        }
    }

    fn outcome(first: f64, passed: f64) -> Result<Outcome, String> {
        let time = |seconds| Time {
            seconds,
            processor: Some(seconds / 2.0),
        };
        Ok(Outcome {
            first: Some(time(first)),
            passed: time(passed),
        })
    }

    #[test]
    fn the_least_of_all_rounds_is_compared() {
        let mut row = Row::new(&SYSTEMS[0], 1);
        row.add(&doppel(), outcome(1.0, 2.0));
        row.add(&Monitor::Qemu, outcome(3.0, 8.0));
        row.add(&doppel(), outcome(0.5, 3.0));
        let ratios = [row.ratio_first, row.ratio_passed, row.ratio_processor];
        assert_eq!(ratios, [Some(6.0), Some(4.0), Some(4.0)]);
        assert!(row.line().ends_with("passed"));
    }

    #[test]
    fn one_failure_among_many_rounds_is_a_failure() {
        let mut report = Report::new();
        let mut row = Row::new(&SYSTEMS[0], 1);
        row.add(&doppel(), outcome(1.0, 2.0));
        row.add(&doppel(), Err("it ended".into()));
        report.rows.push(row);
        let mut row = Row::new(&SYSTEMS[1], 1);
        row.add(&doppel(), outcome(1.0, 2.0));
        row.add(&Monitor::Qemu, Err("dead".into()));
        report.rows.push(row);
        let mut row = Row::new(&SYSTEMS[2], 1);
        row.skipped = Some("no network".into());
        report.rows.push(row);
        assert_eq!(report.failures(), 1);
        let table = report.table();
        assert!(table.contains("FAILED: it ended") && table.contains("QEMU: dead"));
        assert!(table.ends_with("1 passed, 1 failed, 1 skipped"), "{table}");
    }
}
