//! The mappings of a process, as the host's kernel tells of them (proc(5), /proc/PID/smaps).

use std::io::{self, BufRead};
use std::ops::Range;

/// One mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: Range<usize>,
    /// As `r-xp`.
    pub permissions: String,
    /// Of its file, 0 where it has none.
    pub inode: u64,
    /// Of its file, or a name in brackets, or nothing.
    pub name: String,
    /// Bytes of addresses.
    pub size: u64,
    /// Bytes of memory; what is mapped more than once counts in parts.
    pub pss: u64,
    /// Bytes of memory that are no file's, or not any more.
    pub anonymous: u64,
}

/// All mappings, in the order of their addresses.
#[must_use]
pub fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    // A string can be read.
    let _ = each(smaps.as_bytes(), |m| mappings.push(m.clone()));
    mappings
}

/// The same one by one, in next to no memory: who weighs itself would weigh that too.
///
/// # Errors
/// Where the host ends the reading.
pub fn each(smaps: impl BufRead, mut f: impl FnMut(&Mapping)) -> io::Result<()> {
    let mut mapping: Option<Mapping> = None;
    for line in smaps.lines() {
        if let Some(next) = line_of(&line?, &mut mapping) {
            mapping.replace(next).iter().for_each(&mut f);
        }
    }
    mapping.iter().for_each(f);
    Ok(())
}

/// Adds what a line tells of a mapping, or gives out the mapping that begins there.
fn line_of(line: &str, mapping: &mut Option<Mapping>) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let first = words.next()?;
    let place = match (first, mapping) {
        ("Size:", Some(m)) => &mut m.size,
        ("Pss:", Some(m)) => &mut m.pss,
        ("Anonymous:", Some(m)) => &mut m.anonymous,
        _ => return begin(first, words),
    };
    *place = bytes(words.next()?);
    None
}

fn begin<'a>(range: &str, mut words: impl Iterator<Item = &'a str>) -> Option<Mapping> {
    let range = addresses(range)?;
    let permissions = words.next()?.to_owned();
    let inode = words.nth(2)?.parse().unwrap_or_default();
    let name: Vec<&str> = words.collect();
    Some(Mapping {
        range,
        permissions,
        inode,
        name: name.join(" "),
        ..Mapping::default()
    })
}

fn addresses(range: &str) -> Option<Range<usize>> {
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

fn bytes(kib: &str) -> u64 {
    kib.parse::<u64>().unwrap_or_default() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let smaps = "\
1000-3000 r-xp 00002000 fe:00 17 /bin/a name
Size:  8 kB
Rss:  8 kB
Pss:  5 kB
Pss_Dirty:  1 kB
Anonymous:  4 kB
VmFlags: rd ex mr mw me sd
9000-a000 rw-p 00000000 00:00 0
Size:  4 kB
";
        let expected = Mapping {
            range: 0x1000..0x3000,
            permissions: "r-xp".to_owned(),
            inode: 17,
            name: "/bin/a name".to_owned(),
            size: 8 << 10,
            pss: 5 << 10,
            anonymous: 4 << 10,
        };
        let read = parse(smaps);
        assert_eq!((read.len(), &read[0]), (2, &expected));
        assert_eq!((read[1].name.as_str(), read[1].size), ("", 4 << 10));
        assert_eq!(parse("Pss: 4 kB\nVmFlags: rd wr mr mw me ac\n"), []);
    }
}
