//! What came out, as text and as JSON.

use crate::guest::Results;
use crate::outcome::{End, Outcome};
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One suite.
#[derive(Serialize)]
pub struct Table {
    pub suite: &'static str,
    /// The processor and the kernel that it was run on.
    pub host: String,
    /// Who knows the right outcome; none where there is no such.
    pub reference: Option<String>,
    /// Why it was not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    pub rows: Vec<Row>,
    /// What the guest's kernel complained of, by monitor.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub complaints: BTreeMap<String, Vec<String>>,
}

/// One test.
#[derive(Serialize)]
pub struct Row {
    pub test: &'static str,
    pub outcomes: BTreeMap<String, Outcome>,
}

impl Table {
    pub fn new(suite: &'static str, tests: impl Iterator<Item = &'static str>) -> Table {
        let row = |test| Row {
            test,
            outcomes: BTreeMap::new(),
        };
        Table {
            suite,
            host: host(),
            reference: None,
            skipped: None,
            rows: tests.map(row).collect(),
            complaints: BTreeMap::new(),
        }
    }

    pub fn add(&mut self, who: &str, results: Results) {
        for (row, outcome) in self.rows.iter_mut().zip(results.outcomes) {
            row.outcomes.insert(who.to_owned(), outcome);
        }
        if !results.complaints.is_empty() {
            self.complaints.insert(who.to_owned(), results.complaints);
        }
    }

    /// Who ran tests and is not the reference.
    fn tested(&self) -> impl Iterator<Item = &String> {
        let names = self
            .rows
            .first()
            .into_iter()
            .flat_map(|r| r.outcomes.keys());
        names.filter(|name| Some(*name) != self.reference.as_ref())
    }

    /// Tests that failed in Doppel and not where they are right, and complaints of the kernel that it has only there, each as a line.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        for engine in self.tested() {
            for row in &self.rows {
                let right = self.reference.as_ref().and_then(|r| row.outcomes.get(r));
                let right = right.map_or(End::Pass, |outcome| outcome.end);
                let end = row.outcomes[engine].end;
                if differs(end, right) {
                    failures.push(format!(
                        "{}, {engine}: {} is {end:?}, should be {right:?}",
                        self.suite, row.test
                    ));
                }
            }
            let known = self.reference.as_ref().and_then(|r| self.complaints.get(r));
            if known.is_none()
                && let Some(complaints) = self.complaints.get(engine)
            {
                let first = complaints.first().map_or("", String::as_str);
                failures.push(format!("{}, {engine}: the kernel said {first}", self.suite));
            }
        }
        failures
    }

    /// How many ended how, and how long they took, a line for each who ran them.
    pub fn text(&self) -> String {
        if let Some(why) = &self.skipped {
            return format!("{:<8} SKIPPED: {why}\n", self.suite);
        }
        let names = self
            .rows
            .first()
            .into_iter()
            .flat_map(|r| r.outcomes.keys());
        names.map(|who| self.line(who)).collect()
    }

    fn line(&self, who: &str) -> String {
        let outcomes: Vec<Outcome> = self.rows.iter().map(|row| row.outcomes[who]).collect();
        let count = |end| outcomes.iter().filter(|o| o.end == end).count();
        // Of those alone that passed wherever they were run, so that the sums are of the same tests.
        let everywhere = |row: &&Row| row.outcomes.values().all(|o| o.end == End::Pass);
        let passed = self.rows.iter().filter(everywhere);
        let seconds: f64 = passed.map(|row| row.outcomes[who].seconds).sum();
        format!(
            "{:<8} {who:<10} {:>4} passed {:>3} failed {:>3} skipped {:>3} late {:>3} dead  {seconds:>8.1} s\n",
            self.suite,
            count(End::Pass),
            count(End::Fail),
            count(End::Skip),
            count(End::Late),
            count(End::Dead),
        )
    }
}

/// What is no success, where one was due. Who skips a test lacks what it tests, and says so.
fn differs(end: End, right: End) -> bool {
    right == End::Pass && !matches!(end, End::Pass | End::Skip)
}

/// Puts a suite into a file of suites, in the place of what it had of that.
pub fn write(file: &Path, table: &Table) -> Result<()> {
    let mut suites: BTreeMap<String, Value> = match fs::read_to_string(file) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("{} is no file of suites", file.display()))?,
        Err(_) => BTreeMap::new(),
    };
    suites.insert(table.suite.to_owned(), serde_json::to_value(table)?);
    Ok(fs::write(
        file,
        serde_json::to_string_pretty(&suites)? + "\n",
    )?)
}

/// What the host calls itself.
fn host() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|l| l.strip_prefix("model name"));
    let model = model.map_or("", |l| l.trim_start_matches([' ', '\t', ':']));
    let release = read("/proc/sys/kernel/osrelease");
    format!("{model}, Linux {}", release.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(ends: &[(&str, [End; 2])], reference: Option<&str>) -> Table {
        let mut table = Table::new("suite", ["a", "b"].into_iter());
        table.reference = reference.map(str::to_owned);
        for (who, ends) in ends {
            let outcomes = ends.map(|end| Outcome { end, seconds: 1.0 }).to_vec();
            let complaints = Vec::new();
            table.add(
                who,
                Results {
                    outcomes,
                    complaints,
                },
            );
        }
        table
    }

    #[test]
    fn what_fails_only_in_doppel_is_a_failure() {
        let both = [
            ("auto", [End::Fail, End::Pass]),
            ("qemu", [End::Fail, End::Pass]),
        ];
        assert!(table(&both, Some("qemu")).failures().is_empty());
        let one = [
            ("auto", [End::Late, End::Skip]),
            ("qemu", [End::Pass, End::Pass]),
        ];
        let failures = table(&one, Some("qemu")).failures();
        assert_eq!(failures, ["suite, auto: a is Late, should be Pass"]);
        let worse = [
            ("auto", [End::Pass, End::Pass]),
            ("qemu", [End::Dead, End::Pass]),
        ];
        assert!(table(&worse, Some("qemu")).failures().is_empty());
    }

    #[test]
    fn without_a_reference_all_have_to_pass() {
        let alone = [("auto", [End::Fail, End::Pass])];
        assert_eq!(table(&alone, None).failures().len(), 1);
    }

    #[test]
    fn a_complaint_of_the_kernel_is_a_failure() {
        let mut table = table(&[("qemu", [End::Pass; 2])], Some("qemu"));
        let outcomes = vec![
            Outcome {
                end: End::Pass,
                seconds: 1.0
            };
            2
        ];
        let complaints = vec!["BUG: x".to_owned()];
        table.add(
            "auto",
            Results {
                outcomes,
                complaints,
            },
        );
        assert_eq!(table.failures(), ["suite, auto: the kernel said BUG: x"]);
    }
}
