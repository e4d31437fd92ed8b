//! What was measured, and what follows from it.

use crate::BOOT;
use crate::contestant::{Contestant, Kind};
use crate::memory::Footprint;
use crate::qemu;
use crate::session::Run;
use anyhow::{Result, bail};
use serde::Serialize;

/// Everything of one call of the command; the JSON file.
#[derive(Serialize)]
pub struct Results {
    pub host: String,
    pub qemu: Option<String>,
    pub columns: Vec<Column>,
    pub rows: Vec<Row>,
    pub groups: Vec<Group>,
}

/// A contestant with all its runs, one a round.
#[derive(Serialize)]
pub struct Column {
    pub name: String,
    pub role: Role,
    pub command: String,
    pub runs: Vec<Run>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Native,
    Tcg,
    Doppel,
}

#[derive(Serialize)]
pub struct Row {
    pub group: String,
    pub name: String,
    /// Median seconds of each column; none where it was not measured.
    pub seconds: Vec<Option<f64>>,
    pub ratios: Vec<Ratio>,
}

/// How much longer one column takes than another.
#[derive(Clone, Serialize)]
pub struct Ratio {
    pub over: usize,
    pub under: usize,
    pub median: f64,
    /// The extremes of the ratios of single rounds.
    pub least: f64,
    pub most: f64,
}

#[derive(Serialize)]
pub struct Group {
    pub name: String,
    /// Geometric means; the extremes are those of the means of single rounds.
    pub ratios: Vec<Ratio>,
}

impl Results {
    pub fn new(
        contestants: &[Contestant],
        known: &[(String, String)],
        engine: &str,
    ) -> Result<Results> {
        let column = |contestant: &Contestant| Column {
            name: contestant.name.clone(),
            role: role(&contestant.kind),
            command: describe(&contestant.kind, engine),
            runs: Vec::new(),
        };
        let row = |group: &str, name: &str| Row {
            group: group.to_owned(),
            name: name.to_owned(),
            seconds: Vec::new(),
            ratios: Vec::new(),
        };
        let mut rows: Vec<Row> = known.iter().map(|(group, name)| row(group, name)).collect();
        rows.push(row(BOOT, BOOT));
        Ok(Results {
            host: host(),
            qemu: qemu::version().ok(),
            columns: contestants.iter().map(column).collect(),
            rows,
            groups: Vec::new(),
        })
    }

    pub fn add(&mut self, column: usize, run: Run) {
        self.columns[column].runs.push(run);
    }

    /// Compares checksums, and computes medians, ratios and means.
    pub fn finish(&mut self) -> Result<()> {
        self.rows.retain(|row| {
            self.columns
                .iter()
                .any(|c| c.rounds(&row.name).next().is_some())
        });
        for row in &self.rows {
            self.agree(&row.name)?;
        }
        let pairs = self.pairs();
        let columns = &self.columns;
        for row in &mut self.rows {
            let names = [row.name.as_str()];
            row.seconds = columns.iter().map(|c| c.median(&row.name)).collect();
            row.ratios = pairs
                .iter()
                .filter_map(|pair| ratio(columns, *pair, &names))
                .collect();
        }
        let mut names: Vec<String> = self.rows.iter().map(|row| row.group.clone()).collect();
        names.dedup();
        self.groups = names
            .into_iter()
            .map(|name| self.group(name, &pairs))
            .collect();
        Ok(())
    }

    fn group(&self, name: String, pairs: &[(usize, usize)]) -> Group {
        let rows: Vec<&str> = self
            .rows
            .iter()
            .filter(|r| r.group == name)
            .map(|r| r.name.as_str())
            .collect();
        let ratios = pairs
            .iter()
            .filter_map(|pair| ratio(&self.columns, *pair, &rows));
        Group {
            ratios: ratios.collect(),
            name,
        }
    }

    /// The pairs (over, under) that are compared: TCG over Doppel, Doppel over native, other Doppels over the first.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let of = |role| self.columns.iter().position(|c| c.role == role);
        let doppels: Vec<usize> = (0..self.columns.len())
            .filter(|n| self.columns[*n].role == Role::Doppel)
            .collect();
        let mut pairs = Vec::new();
        let first = doppels.first().copied();
        pairs.extend(of(Role::Tcg).zip(first));
        pairs.extend(first.zip(of(Role::Native)));
        pairs.extend(doppels.iter().skip(1).filter_map(|n| Some((*n, first?))));
        pairs
    }

    /// All runs of a row have one result.
    fn agree(&self, row: &str) -> Result<()> {
        let all = self
            .columns
            .iter()
            .flat_map(|c| c.runs.iter().map(move |run| (c, run)));
        let sums: Vec<(&str, &str)> = all
            .filter_map(|(c, run)| Some((c.name.as_str(), run.rows.get(row)?.checksum.as_str())))
            .collect();
        match sums.iter().find(|(_, sum)| *sum != sums[0].1) {
            Some(other) => bail!("row {row}: different results: {:?} and {other:?}", sums[0]),
            None => Ok(()),
        }
    }

    /// The memory that a column took in its last run: after boot, after all.
    pub fn memory(&self, column: usize) -> Option<(Footprint, Footprint)> {
        let run = self.columns[column].runs.last()?;
        run.after_boot.zip(run.after_all)
    }
}

impl Column {
    /// Seconds of a row, round by round: the median of each run's passes.
    fn rounds(&self, row: &str) -> impl Iterator<Item = f64> {
        self.runs
            .iter()
            .filter_map(move |run| median(&run.rows.get(row)?.passes))
    }

    fn median(&self, row: &str) -> Option<f64> {
        median(&self.rounds(row).collect::<Vec<_>>())
    }
}

/// The geometric mean over the rows of one column over another, by round; none where something was not measured.
fn ratio(columns: &[Column], (over, under): (usize, usize), rows: &[&str]) -> Option<Ratio> {
    let count = columns[over].runs.len().min(columns[under].runs.len());
    let mut rounds = vec![0.0; count];
    for row in rows {
        let pairs = columns[over].rounds(row).zip(columns[under].rounds(row));
        let logs: Vec<f64> = pairs.map(|(a, b)| (a / b).ln()).collect();
        if logs.len() != count {
            return None;
        }
        rounds
            .iter_mut()
            .zip(logs)
            .for_each(|(sum, log)| *sum += log / rows.len() as f64);
    }
    let rounds: Vec<f64> = rounds.into_iter().map(f64::exp).collect();
    Some(Ratio {
        over,
        under,
        median: median(&rounds)?,
        least: rounds.iter().copied().fold(f64::INFINITY, f64::min),
        most: rounds.iter().copied().fold(0.0, f64::max),
    })
}

pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

fn role(kind: &Kind) -> Role {
    match kind {
        Kind::Native => Role::Native,
        Kind::Qemu => Role::Tcg,
        Kind::Doppel { .. } => Role::Doppel,
    }
}

fn describe(kind: &Kind, engine: &str) -> String {
    match kind {
        Kind::Native => "the host".to_owned(),
        Kind::Qemu => "qemu-system-x86_64 -accel tcg -cpu max".to_owned(),
        Kind::Doppel { flags, .. } if flags.len() > 2 => format!("doppel run {}", flags.join(" ")),
        Kind::Doppel { .. } => format!("doppel run --engine {engine}"),
    }
}

/// Processor and kernel of the host.
fn host() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map_or("?", |(_, value)| value.trim())
    };
    let processors = cpuinfo
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    format!(
        "{} (family {}, model {}), {processors} CPUs, Linux {}",
        field("model name"),
        field("cpu family"),
        field("model\t"),
        read("/proc/sys/kernel/osrelease").trim()
    )
}
