//! The table in the README: what stands between two marks is replaced.

use anyhow::{Context, Result};
use std::path::Path;

const BEGIN: &str = "<!-- bench: begin -->\n";
const END: &str = "<!-- bench: end -->";

/// Puts `table` into the file.
pub fn update(path: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let text = replace(&text, table)
        .with_context(|| format!("{} has no {} and {END}", path.display(), BEGIN.trim()))?;
    Ok(std::fs::write(path, text)?)
}

fn replace(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{table}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let text = format!("a\n{BEGIN}old\n{END}\nb\n");
        let new = replace(&text, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}new\n{END}\nb\n"));
        assert_eq!(replace(&new, "new\n").unwrap(), new);
        assert_eq!(replace("a", "new"), None);
    }
}
