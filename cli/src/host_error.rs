//! What a user can do about an error of the host.

/// Numbers of errors (errno(3)), and what helps.
const ADVICE: &[(i32, &str)] = &[
    (
        11,
        "raise the limit of processes and threads (ulimit -u), or give it more memory (ulimit -v)",
    ),
    (
        12,
        "ask for less with --memory or --code-cache, or raise the limit (ulimit -v, the control group)",
    ),
    (
        23,
        "the host has too many open files: end something, or raise fs.file-max",
    ),
    (24, "raise the limit of open files (ulimit -n)"),
    (
        27,
        "raise the limit on the size of files (ulimit -f), which is one on guest memory and code too",
    ),
    (28, "make room there"),
];

/// What helps against the error that `text` tells of.
pub fn advice(text: &str) -> Option<&'static str> {
    let is_it = |(number, _): &&(i32, &str)| text.contains(&format!("(os error {number})"));
    ADVICE.iter().find(is_it).map(|(_, advice)| *advice)
}

/// `text` with what helps.
pub fn with_advice(text: &str) -> String {
    match advice(text) {
        Some(advice) => format!("{text}; {advice}"),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Error;

    #[test]
    fn an_error_that_a_limit_causes_names_the_limit() {
        for (number, limit) in [
            (24, "ulimit -n"),
            (27, "ulimit -f"),
            (12, "ulimit -v"),
            (11, "ulimit -u"),
        ] {
            let text = format!("a disk: {}", Error::from_raw_os_error(number));
            assert!(with_advice(&text).contains(limit), "{text}");
        }
        assert_eq!(advice("a disk: (os error 2)"), None);
    }
}
