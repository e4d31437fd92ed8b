//! Sizes of memory as people write them: `512M`, `2G`.

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
}
