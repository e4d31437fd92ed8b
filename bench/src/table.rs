//! The table: for a terminal, and for the README.

use crate::results::{Ratio, Results, Role, Row};

/// What issue-wide geometric means are to reach: group, TCG : Doppel at least, Doppel : native at most.
const GOALS: &[(&str, f64, Option<f64>)] = &[
    ("compute", 7.0, Some(2.2)),
    ("kernel", 4.0, None),
    ("boot", 3.5, None),
    ("whole", 5.0, None),
];
/// Marks a row at which TCG is faster than Doppel.
const SLOWER: &str = " <-- slower than TCG";

pub fn text(results: &Results) -> String {
    let mut lines = vec![results.host.clone()];
    lines.extend(results.qemu.clone());
    lines.push(String::new());
    lines.push(head(results));
    for group in &results.groups {
        for row in results.rows.iter().filter(|row| row.group == group.name) {
            lines.push(line(results, row));
        }
        let name = format!("= {}", group.name);
        let mut mean = format!("{name:14}{}", " ".repeat(12 * results.columns.len()));
        group
            .ratios
            .iter()
            .for_each(|ratio| mean.push_str(&cell(ratio)));
        lines.push(mean + &goal(results, &group.name, &group.ratios));
        lines.push(String::new());
    }
    lines.extend(memory(results));
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
        let text = seconds.map_or("-".to_owned(), |s| format!("{:.2}", s * 1000.0));
        line.push_str(&format!("{text:>12}"));
    }
    row.ratios
        .iter()
        .for_each(|ratio| line.push_str(&cell(ratio)));
    if is_slower(results, &row.ratios) {
        line.push_str(SLOWER);
    }
    line
}

fn cell(ratio: &Ratio) -> String {
    let spread = format!("{:.2}..{:.2}", ratio.least, ratio.most);
    format!("{:>10.2} {:15}", ratio.median, format!("({spread})"))
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
fn goal(results: &Results, group: &str, ratios: &[Ratio]) -> String {
    let Some((_, tcg, native)) = GOALS.iter().find(|(name, ..)| *name == group) else {
        return String::new();
    };
    let of = |kind: fn(&Results, &Ratio) -> bool| {
        ratios.iter().find(|r| kind(results, r)).map(|r| r.median)
    };
    let verdict = |reached| if reached { "reached" } else { "missed" };
    let mut text = String::new();
    if let Some(median) = of(is_tcg) {
        text.push_str(&format!(" goal >= {tcg}: {}", verdict(median >= *tcg)));
    }
    if let (Some(median), Some(goal)) = (of(is_native), native) {
        text.push_str(&format!(" goal <= {goal}: {}", verdict(median <= *goal)));
    }
    text
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

/// The same for the README.
pub fn markdown(results: &Results) -> String {
    text(results)
}
