//! Versions of kernels, compared as people mean them: 6.10 comes after 6.9.

use std::cmp::Ordering;

/// Compares runs of digits as numbers and all else as text. A `~` comes before everything, the end included, as Debian and the
/// Boot Loader Specification have it; so does a suffix like `-rc1`.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        let (word_a, word_b) = (take(&mut a, false), take(&mut b, false));
        let order = words(word_a, word_b);
        if order.is_ne() {
            return order;
        }
        let (number_a, number_b) = (take(&mut a, true), take(&mut b, true));
        let order = numbers(number_a, number_b);
        if order.is_ne() || (a.is_empty() && b.is_empty()) {
            return order;
        }
    }
}

/// Takes the digits, or all up to a digit, off the front.
fn take<'a>(from: &mut &'a [u8], digits: bool) -> &'a [u8] {
    let end = from.iter().position(|c| c.is_ascii_digit() != digits);
    let (front, rest) = from.split_at(end.unwrap_or(from.len()));
    *from = rest;
    front
}

fn words(a: &[u8], b: &[u8]) -> Ordering {
    let weight = |word: &[u8], at: usize| match word.get(at) {
        Some(b'~') => 0,
        None => 2,
        Some(_) if word[at..].starts_with(b"-rc") => 1,
        Some(c) => 3 + i32::from(*c),
    };
    let places = 0..a.len().max(b.len());
    let mut orders = places.map(|at| weight(a, at).cmp(&weight(b, at)));
    orders
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}

fn numbers(a: &[u8], b: &[u8]) -> Ordering {
    let value = |digits: &[u8]| {
        let zeros = digits.iter().take_while(|c| **c == b'0').count();
        digits[zeros..].to_vec()
    };
    let (a, b) = (value(a), value(b));
    a.len().cmp(&b.len()).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_of_their_making() {
        let ordered = [
            "5.10.0-9-amd64",
            "5.10.0-10-amd64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-48-cloud-amd64",
            "6.9",
            "6.10~rc2",
            "6.10-rc3",
            "6.10",
            "6.10.1",
            "6.10.1-1.fc40",
        ];
        for (n, a) in ordered.iter().enumerate() {
            for (m, b) in ordered.iter().enumerate() {
                assert_eq!(compare(a, b), n.cmp(&m), "{a} {b}");
            }
        }
        assert_eq!(compare("007", "7"), Ordering::Equal);
    }
}
