//! Text of the monitor's own messages that may hold what a stranger chose: a name in the header of an image, or on a guest's disk. On a terminal, control
//! characters would be orders.

/// Characters that turn the direction of what follows (Unicode, UAX #9): they hide what a line says.
const TURNS: [std::ops::RangeInclusive<char>; 2] =
    ['\u{202a}'..='\u{202e}', '\u{2066}'..='\u{2069}'];

/// `text` with an escape in the place of each such character; lines stay lines.
pub fn printable(text: &str) -> String {
    let orders = |c: char| c.is_control() && c != '\n' && c != '\t';
    let turns = |c: char| TURNS.iter().any(|range| range.contains(&c));
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match orders(c) || turns(c) {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_to_a_terminal_are_shown_and_not_given() {
        for (text, shown) in [
            ("a disk: ü\n\tand more", "a disk: ü\n\tand more"),
            ("\x1b[2J", "\\u{1b}[2J"),
            ("\x1b]52;c;eA==\x07", "\\u{1b}]52;c;eA==\\u{7}"),
            ("a\rb\x08c\x7f", "a\\rb\\u{8}c\\u{7f}"),
            ("\u{9b}2J", "\\u{9b}2J"),
            ("x\u{202e}y", "x\\u{202e}y"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
