//! How long a campaign goes on.

use std::time::{Duration, Instant};

/// Until one of these is reached.
#[derive(Clone, Debug)]
pub struct Limits {
    pub cases: Option<u64>,
    pub time: Option<Duration>,
    /// Failures that do not look alike.
    pub failures: usize,
}

impl Limits {
    /// As they are asked for; a minute where neither cases nor time are.
    pub fn asked(cases: Option<u64>, seconds: Option<u64>, failures: usize) -> Self {
        let unbounded = seconds.is_none() && cases.is_none();
        let seconds = seconds.or(unbounded.then_some(60));
        Limits {
            cases,
            time: seconds.map(Duration::from_secs),
            failures,
        }
    }

    /// Whether a campaign that `began` then and has come so far is to end.
    pub fn are_reached(&self, began: Instant, cases: u64, failures: usize) -> bool {
        self.cases.is_some_and(|most| cases >= most)
            || self.time.is_some_and(|most| began.elapsed() >= most)
            || failures >= self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_limit_ends_a_campaign_and_a_minute_does_where_none_is_asked_for() {
        let now = Instant::now();
        let cases = Limits::asked(Some(3), None, 5);
        assert_eq!(cases.time, None);
        assert!(!cases.are_reached(now, 2, 4));
        assert!(cases.are_reached(now, 3, 0) && cases.are_reached(now, 0, 5));
        assert!(Limits::asked(None, Some(0), 5).are_reached(now, 0, 0));
        let none = Limits::asked(None, None, 5);
        assert_eq!(none.time, Some(Duration::from_secs(60)));
        assert!(!none.are_reached(now, 1000, 4));
    }
}
