//! How a test ended, and what a monitor's console says of it.

use serde::Serialize;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    Pass,
    Fail,
    Skip,
    /// It took longer than it may.
    Late,
    /// Its guest ended, or said nothing more.
    Dead,
}

/// A test that ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub end: End,
    /// By the clock of whoever ran it.
    pub seconds: f64,
}

/// Exit statuses of Linux's tests: skipped (kselftest.h). Python's have none such.
const SKIPPED: i32 = 4;
/// Of timeout(1): busybox's, which tells of the signal, coreutils', and both after SIGKILL.
const LATE: [i32; 3] = [124, 137, 143];

/// What an exit status means, of a test that took so long, and may take `limit`.
pub fn outcome(status: i32, seconds: f64, limit: f64) -> Outcome {
    let end = match status {
        0 => End::Pass,
        SKIPPED => End::Skip,
        _ if LATE.contains(&status) && seconds >= limit * 0.99 => End::Late,
        _ => End::Fail,
    };
    Outcome { end, seconds }
}

/// One line of the script in the guest.
#[derive(Debug, PartialEq)]
pub enum Line<'a> {
    Begin,
    /// With status and hundredths of seconds.
    End(i32, u32),
    /// The kernel complained.
    Complaint(&'a str),
    Done,
    Other,
}

/// Reads one. What the kernel says may stand before it.
pub fn line(text: &str) -> Line<'_> {
    let Some((_, said)) = text.split_once("suites: ") else {
        return Line::Other;
    };
    let words: Vec<&str> = said.split_whitespace().collect();
    let end = |status: &str, hundredths: &str| {
        Some(Line::End(status.parse().ok()?, hundredths.parse().ok()?))
    };
    match words[..] {
        ["begin", _] => Line::Begin,
        ["end", _, status, hundredths] => end(status, hundredths).unwrap_or(Line::Other),
        ["done"] => Line::Done,
        ["kernel:", ..] => Line::Complaint(said.trim_start_matches("kernel:").trim()),
        _ => Line::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_script_are_read_and_others_are_not() {
        assert_eq!(line("suites: begin 7"), Line::Begin);
        assert_eq!(
            line("[ 1.0] x suites: end 7 143 2001"),
            Line::End(143, 2001)
        );
        assert_eq!(line("suites: end 7 x 2001"), Line::Other);
        assert_eq!(
            line("suites: kernel: BUG: a b"),
            Line::Complaint("BUG: a b")
        );
        assert_eq!(line("suites: done"), Line::Done);
        assert_eq!(line("suites> suites"), Line::Other);
    }

    #[test]
    fn a_status_means_what_kselftest_and_timeout_say() {
        let end = |status, seconds| outcome(status, seconds, 10.0).end;
        assert_eq!(end(0, 1.0), End::Pass);
        assert_eq!(end(1, 1.0), End::Fail);
        assert_eq!(end(4, 1.0), End::Skip);
        assert_eq!(end(143, 10.0), End::Late);
        assert_eq!(end(143, 2.0), End::Fail, "it ended itself by a signal");
    }
}
