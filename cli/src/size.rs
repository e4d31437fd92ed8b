//! Sizes of memory as people write them (`512M`, `2G`), and how much of it a guest may have.

use anyhow::{Result, ensure};

/// Bytes from a number with a binary suffix K, M, G or T; a bare number counts mebibytes, as elsewhere (QEMU).
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "K" | "KIB" => 10,
        "" | "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err("write a number and K, M, G or T, as in 512M".to_owned()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "write a number and K, M, G or T, as in 512M".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is more than 16 EiB".to_owned())
}

/// How many times the host's memory a guest may have. Only touched pages cost, but Linux touches 64 bytes for each page of 4 KiB
/// to describe it, so that at 64 times a kernel would fill the host before its first process.
const TIMES_HOST: u64 = 16;

/// Refuses a guest whose kernel would need much of the host's memory for its own tables alone.
pub fn check(guest: u64, host: Option<u64>) -> Result<()> {
    let most = host.map_or(u64::MAX, |host| host.saturating_mul(TIMES_HOST));
    ensure!(
        guest <= most,
        "--memory: {} MiB is more than {TIMES_HOST} times this host's memory; give at most {}M",
        guest >> 20,
        most >> 20
    );
    Ok(())
}

/// Bytes of the host's memory, swap included, where it tells.
pub fn of_host() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((field("MemTotal:")? + field("SwapTotal:").unwrap_or(0)) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_and_a_bare_number_is_mebibytes() {
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("64k"), Ok(64 << 10));
        assert_eq!(parse("2G"), Ok(2 << 30));
        assert_eq!(parse("1GiB"), Ok(1 << 30));
        assert_eq!(parse("256"), Ok(256 << 20));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1M", "1.5G", "12X", "1 G", "99999999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_guest_may_have_more_memory_than_the_host_but_not_any_amount() {
        check(20 << 30, Some(4 << 30)).unwrap();
        check(64 << 30, Some(4 << 30)).unwrap();
        let message = check(1 << 40, Some(4 << 30)).unwrap_err().to_string();
        assert!(message.contains("at most 65536M"), "{message}");
        check(1 << 40, None).unwrap();
        assert!(of_host().unwrap() > 64 << 20);
    }
}
