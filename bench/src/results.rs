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
    /// Whether times are without those in which a process waited for a processor.
    pub corrected: bool,
    pub columns: Vec<Column>,
    pub rows: Vec<Row>,
    pub groups: Vec<Group>,
    /// Group and name of every row there is, measured or not.
    #[serde(skip)]
    known: Vec<(String, String)>,
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
    /// Whether all its rows were measured.
    pub complete: bool,
    /// Geometric means; the extremes are those of the means of single rounds.
    pub ratios: Vec<Ratio>,
}

impl Results {
    pub fn new(contestants: &[Contestant], known: &[(String, String)]) -> Results {
        let column = |contestant: &Contestant| Column {
            command: describe(&contestant.kind),
            ..Column::empty(&contestant.name, role(&contestant.kind))
        };
        let row = |(group, name): &(String, String)| Row {
            group: group.clone(),
            name: name.clone(),
            seconds: Vec::new(),
            ratios: Vec::new(),
        };
        let boot = (BOOT.to_owned(), BOOT.to_owned());
        let known = [known, &[boot]].concat();
        Results {
            host: host(),
            qemu: qemu::version().ok(),
            corrected: false,
            columns: contestants.iter().map(column).collect(),
            rows: known.iter().map(row).collect(),
            groups: Vec::new(),
            known,
        }
    }

    #[cfg(test)]
    pub fn empty(columns: Vec<Column>) -> Results {
        Results {
            columns,
            ..Results::new(&[], &[])
        }
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
            complete: rows.len()
                == self
                    .known
                    .iter()
                    .filter(|(group, _)| *group == name)
                    .count(),
            ratios: ratios.collect(),
            name,
        }
    }

    /// The pairs (over, under) that are compared: TCG over Doppel, Doppel over native, other Doppels over the first.
    pub fn pairs(&self) -> Vec<(usize, usize)> {
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
    pub fn empty(name: &str, role: Role) -> Column {
        Column {
            name: name.to_owned(),
            role,
            command: String::new(),
            runs: Vec::new(),
        }
    }

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

fn describe(kind: &Kind) -> String {
    match kind {
        Kind::Native => "the host, on one CPU".to_owned(),
        Kind::Qemu => "qemu-system-x86_64 -accel tcg -cpu max -smp 1".to_owned(),
        Kind::Doppel { program, flags } => {
            let name = program.file_name().unwrap_or_default();
            format!("{} run {}", name.to_string_lossy(), flags.join(" "))
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Measured;

    fn run(rows: &[(&str, &[f64], &str)]) -> Run {
        let measured = |(name, passes, sum): &(&str, &[f64], &str)| {
            let checksum = sum.to_string();
            (
                name.to_string(),
                Measured {
                    checksum,
                    passes: passes.to_vec(),
                    cpu_share: None,
                },
            )
        };
        Run {
            rows: rows.iter().map(measured).collect(),
            ..Run::default()
        }
    }

    fn results(rounds: &[[Run; 3]]) -> Results {
        let doppel = Kind::Doppel {
            program: "doppel".into(),
            flags: vec![],
        };
        let kinds = [
            ("native", Kind::Native),
            ("TCG", Kind::Qemu),
            ("Doppel", doppel),
        ];
        let contestants = kinds.map(|(name, kind)| Contestant {
            name: name.to_owned(),
            kind,
        });
        let known = ["a", "b"].map(|row| ("group".to_owned(), row.to_owned()));
        let mut results = Results::new(&contestants, &known);
        for round in rounds {
            round
                .iter()
                .enumerate()
                .for_each(|(column, run)| results.add(column, run.clone()));
        }
        results
    }

    fn both(a: f64, b: f64) -> Run {
        run(&[("a", &[9.0, a, 0.1], "x"), ("b", &[b], "y")])
    }

    #[test]
    fn ratios_are_of_the_same_round_and_means_are_geometric() {
        let mut results = results(&[
            [both(1.0, 1.0), both(9.0, 4.0), both(2.0, 2.0)],
            [both(3.0, 3.0), both(9.0, 30.0), both(6.0, 3.0)],
        ]);
        results.finish().unwrap();
        assert_eq!(results.rows.len(), 2, "nobody booted");
        assert_eq!(results.rows[0].seconds, [Some(2.0), Some(9.0), Some(4.0)]);
        let [tcg, native] = &results.rows[0].ratios[..] else {
            panic!()
        };
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert_eq!((tcg.over, tcg.under), (1, 2));
        assert!(close(tcg.least, 1.5) && close(tcg.median, 3.0) && close(tcg.most, 4.5));
        assert_eq!((native.over, native.under), (2, 0));
        assert!(close(native.median, 2.0));
        assert!(results.groups[0].complete);
        let mean = &results.groups[0].ratios[0];
        assert!(
            close(mean.least, 3.0) && close(mean.most, 15f64.sqrt()),
            "{} {}",
            mean.least,
            mean.most
        );
    }

    #[test]
    fn another_result_is_an_error() {
        let other = run(&[("a", &[1.0], "z"), ("b", &[1.0], "y")]);
        let error = results(&[[both(1.0, 1.0), both(1.0, 1.0), other]])
            .finish()
            .unwrap_err();
        assert!(error.to_string().contains("row a"), "{error}");
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
    }
}
