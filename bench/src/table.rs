//! The table: for a terminal, and for the README.

use crate::results::{Column, Ratio, Results, Role, Row};

/// What geometric means are to reach: group, TCG : Doppel at least, Doppel : native at most.
const GOALS: &[(&str, f64, Option<f64>)] = &[
    ("compute", 7.0, Some(2.2)),
    ("kernel", 4.0, None),
    ("boot", 3.5, None),
    ("whole", 5.0, None),
];
const CORRECTED: &str =
    "the host was busy: times (boot's aside) are without what a process waited for a processor";
/// Marks a row at which TCG is faster than Doppel.
const SLOWER: &str = " <-- slower than TCG";

pub fn text(results: &Results) -> String {
    let mut lines = vec![results.host.clone()];
    lines.extend(results.qemu.clone());
    lines.extend(
        results
            .columns
            .iter()
            .map(|c| format!("{}: {}", c.name, c.command)),
    );
    if results.corrected {
        lines.push(CORRECTED.to_owned());
    }
    lines.push(String::new());
    lines.push(head(results));
    for group in &results.groups {
        for row in results.rows.iter().filter(|row| row.group == group.name) {
            lines.push(line(results, row));
        }
        let name = format!("= {}", group.name);
        let mut mean = format!("{name:14}{}", " ".repeat(12 * results.columns.len()));
        mean.push_str(&cells(results, &group.ratios));
        if group.complete {
            mean.push_str(&goal(results, &group.name, &group.ratios).join(", "));
        }
        lines.push(mean);
        lines.push(String::new());
    }
    lines.extend(memory(results));
    lines.extend(clocks(results));
    lines.join("\n")
}

fn head(results: &Results) -> String {
    let mut head = format!("{:14}", "ms");
    for column in &results.columns {
        head.push_str(&format!("{:>12}", column.name));
    }
    let ratios = results
        .rows
        .iter()
        .map(|row| &row.ratios)
        .max_by_key(|r| r.len());
    for ratio in ratios.into_iter().flatten() {
        head.push_str(&format!("{:>26}", pair(results, ratio)));
    }
    head
}

fn pair(results: &Results, ratio: &Ratio) -> String {
    let name = |n: usize| results.columns[n].name.as_str();
    format!("{} : {}", name(ratio.over), name(ratio.under))
}

fn line(results: &Results, row: &Row) -> String {
    let mut line = format!("{:14}", row.name);
    for seconds in &row.seconds {
        let text = milliseconds(*seconds);
        line.push_str(&format!("{text:>12}"));
    }
    line.push_str(&cells(results, &row.ratios));
    if is_slower(results, &row.ratios) {
        line.push_str(SLOWER);
    }
    line
}

fn milliseconds(seconds: Option<f64>) -> String {
    seconds.map_or("-".to_owned(), |s| format!("{:.2}", s * 1000.0))
}

/// A cell for each pair that is compared, empty where this row has none.
fn cells(results: &Results, ratios: &[Ratio]) -> String {
    let cell = |pair| {
        let ratio = ratios.iter().find(|r| (r.over, r.under) == pair);
        ratio.map_or(" ".repeat(26), |r| {
            let spread = format!("({:.2}..{:.2})", r.least, r.most);
            format!("{:>10.2} {spread:15}", r.median)
        })
    };
    results.pairs().into_iter().map(cell).collect()
}

fn is_tcg(results: &Results, ratio: &Ratio) -> bool {
    results.columns[ratio.over].role == Role::Tcg
}

fn is_native(results: &Results, ratio: &Ratio) -> bool {
    results.columns[ratio.under].role == Role::Native
}

fn is_slower(results: &Results, ratios: &[Ratio]) -> bool {
    ratios
        .iter()
        .any(|ratio| is_tcg(results, ratio) && ratio.median < 1.0)
}

/// The goals of a group, and whether they are reached.
fn goal(results: &Results, group: &str, ratios: &[Ratio]) -> Vec<String> {
    let Some((_, tcg, native)) = GOALS.iter().find(|(name, ..)| *name == group) else {
        return Vec::new();
    };
    let of = |kind: fn(&Results, &Ratio) -> bool| {
        ratios.iter().find(|r| kind(results, r)).map(|r| r.median)
    };
    let verdict = |reached| if reached { "reached" } else { "missed" };
    let mut goals = Vec::new();
    if let Some(median) = of(is_tcg) {
        goals.push(format!("goal >= {tcg}: {}", verdict(median >= *tcg)));
    }
    if let (Some(median), Some(goal)) = (of(is_native), native) {
        goals.push(format!("goal <= {goal}: {}", verdict(median <= *goal)));
    }
    goals
}

fn memory(results: &Results) -> Vec<String> {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let mut lines = Vec::new();
    for (n, column) in results.columns.iter().enumerate() {
        if let Some((boot, all)) = results.memory(n) {
            lines.push(format!(
                "memory of {}: {:.1} MiB after boot, {:.1} MiB after all, beyond the guest's {:.1} and {:.1} MiB",
                column.name,
                mib(boot.monitor),
                mib(all.monitor),
                mib(boot.guest),
                mib(all.guest)
            ));
        }
    }
    lines
}

/// How good the clock was by which each column was measured.
fn clocks(results: &Results) -> Vec<String> {
    let line = |column: &Column| {
        let run = column.runs.last().filter(|run| !run.rows.is_empty())?;
        let source = run.clocksource.as_deref().unwrap_or("the host's");
        let shares = column.runs.iter().filter_map(|run| run.cpu_share);
        Some(format!(
            "clock of {}: {source}, steps of {:.0} ns, rate {:.3}; it got at least {:.2} of a CPU",
            column.name,
            run.clock_step * 1e9,
            run.clock_rate?,
            shares.fold(f64::INFINITY, f64::min)
        ))
    };
    results.columns.iter().filter_map(line).collect()
}

/// The same for the README: means first, then every row.
pub fn markdown(results: &Results) -> String {
    let pairs: Vec<(usize, usize)> = results.pairs();
    let qemu = results.qemu.as_deref().unwrap_or("no QEMU");
    let mut text = format!("{}; {qemu}", results.host);
    if results.corrected {
        text.push_str("; ");
        text.push_str(CORRECTED);
    }
    text.push_str(".\n\n");
    text.push_str(&markdown_head("geometric mean of", &[], results, &pairs));
    for group in &results.groups {
        let goals = match group.complete {
            true => goal(results, &group.name, &group.ratios).join(", "),
            false => String::new(),
        };
        let name = format!("{} ({goals})", group.name).replace(" ()", "");
        text.push_str(&markdown_line(&name, &[], &group.ratios, &pairs));
    }
    text.push_str("\n<details><summary>Every row (milliseconds)</summary>\n\n");
    let names: Vec<&str> = results.columns.iter().map(|c| c.name.as_str()).collect();
    text.push_str(&markdown_head("", &names, results, &pairs));
    for row in &results.rows {
        let times: Vec<String> = row.seconds.iter().map(|s| milliseconds(*s)).collect();
        let slower = is_slower(results, &row.ratios);
        let name = format!(
            "{}{}",
            row.name,
            if slower { " (slower than TCG)" } else { "" }
        );
        text.push_str(&markdown_line(&name, &times, &row.ratios, &pairs));
    }
    let memory = memory(results)
        .into_iter()
        .map(|line| format!("\n{line}\n"));
    text + "\n" + &memory.collect::<String>() + "\n</details>\n"
}

fn markdown_head(
    first: &str,
    names: &[&str],
    results: &Results,
    pairs: &[(usize, usize)],
) -> String {
    let name = |n: usize| results.columns[n].name.as_str();
    let mut head: Vec<String> = vec![first.to_owned()];
    head.extend(names.iter().map(|name| name.to_string()));
    head.extend(
        pairs
            .iter()
            .map(|(over, under)| format!("{} : {}", name(*over), name(*under))),
    );
    let rule = format!("|---|{}", "--:|".repeat(head.len() - 1));
    format!("| {} |\n{rule}\n", head.join(" | "))
}

fn markdown_line(
    name: &str,
    times: &[String],
    ratios: &[Ratio],
    pairs: &[(usize, usize)],
) -> String {
    let mut cells = vec![name.to_owned()];
    cells.extend(times.iter().cloned());
    cells.extend(pairs.iter().map(|pair| {
        let ratio = ratios.iter().find(|r| (r.over, r.under) == *pair);
        ratio.map_or(String::new(), |r| {
            format!("{:.2} ({:.2}–{:.2})", r.median, r.least, r.most)
        })
    }));
    format!("| {} |\n", cells.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_and_a_row_slower_than_tcg_are_said() {
        let ratio = |median| Ratio {
            over: 0,
            under: 1,
            median,
            least: 0.5,
            most: 9.0,
        };
        let columns = [("TCG", Role::Tcg), ("Doppel", Role::Doppel)];
        let columns = columns.map(|(name, role)| Column::empty(name, role));
        let results = Results::empty(columns.into());
        assert!(is_slower(&results, &[ratio(0.9)]) && !is_slower(&results, &[ratio(1.1)]));
        assert_eq!(
            goal(&results, "kernel", &[ratio(3.9)]),
            ["goal >= 4: missed"]
        );
        assert_eq!(
            goal(&results, "kernel", &[ratio(4.0)]),
            ["goal >= 4: reached"]
        );
    }
}
