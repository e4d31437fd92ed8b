//! The picture: for each row a bar a contestant, as long as the logarithm of its time over the host's own.
//!
//! What the host has no time of (boot) is shown over Doppel's time.

use crate::results::{Results, Role, Row};
use std::fmt::Write;

const LABELS: f64 = 130.0;
const DECADE: f64 = 250.0;
/// Where the axis begins; it goes to three decades above one.
const LEAST: f64 = 0.5;
const WIDTH: f64 = LABELS + 3.3 * DECADE + 80.0;
const BAR: f64 = 9.0;
const GAP: f64 = 6.0;
const HEAD: f64 = 60.0;
const COLORS: [&str; 5] = ["#c44e52", "#4c72b0", "#55a868", "#8172b3", "#937860"];

pub fn svg(results: &Results) -> String {
    let columns: Vec<usize> = (0..results.columns.len())
        .filter(|n| results.columns[*n].role != Role::Native)
        .collect();
    let mut body = String::new();
    let mut y = HEAD;
    for row in &results.rows {
        text(&mut body, LABELS - 8.0, y + BAR, "end", &row.name);
        for (color, column) in columns.iter().enumerate() {
            bar(&mut body, results, row, *column, color, y);
            y += BAR;
        }
        y += GAP;
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        y + 30.0
    );
    legend(&mut svg, results, &columns);
    axis(&mut svg, y);
    svg + &body + "</svg>\n"
}

fn place(ratio: f64) -> f64 {
    LABELS + DECADE * (ratio.max(LEAST) / LEAST).log10()
}

fn bar(svg: &mut String, results: &Results, row: &Row, column: usize, color: usize, y: f64) {
    let (Some(seconds), Some(base)) = (row.seconds[column], base(results, row)) else {
        return;
    };
    let ratio = seconds / base;
    let (from, to) = (place(ratio.min(1.0)), place(ratio.max(1.0)));
    let _ = writeln!(
        svg,
        "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{}\"/>",
        (to - from).max(1.0),
        COLORS[color % COLORS.len()]
    );
    text(
        svg,
        to + 3.0,
        y + BAR - 1.0,
        "start",
        &format!("{ratio:.1}"),
    );
}

fn base(results: &Results, row: &Row) -> Option<f64> {
    let of = |role| {
        let column = results.columns.iter().position(|c| c.role == role)?;
        row.seconds[column]
    };
    of(Role::Native).or_else(|| of(Role::Doppel))
}

fn legend(svg: &mut String, results: &Results, columns: &[usize]) {
    text(
        svg,
        LABELS,
        16.0,
        "start",
        "time over the host's own (boot: over Doppel's); shorter is better",
    );
    for (color, column) in columns.iter().enumerate() {
        let x = LABELS + 120.0 * color as f64;
        let fill = COLORS[color % COLORS.len()];
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"24\" width=\"10\" height=\"10\" fill=\"{fill}\"/>"
        );
        text(svg, x + 14.0, 33.0, "start", &results.columns[*column].name);
    }
}

fn axis(svg: &mut String, bottom: f64) {
    for ratio in [
        0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0,
    ] {
        let x = place(ratio);
        let color = if ratio == 1.0 { "#000" } else { "#ddd" };
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{bottom:.1}\" stroke=\"{color}\"/>",
            HEAD - 8.0
        );
        text(svg, x, bottom + 14.0, "middle", &ratio.to_string());
    }
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}
