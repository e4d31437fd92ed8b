//! The mappings of a process, as the host's kernel tells of them (proc(5), /proc/PID/smaps).

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
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (&words[..], mappings.last_mut()) {
            (["Size:", kib, "kB"], Some(m)) => m.size = bytes(kib),
            (["Pss:", kib, "kB"], Some(m)) => m.pss = bytes(kib),
            (["Anonymous:", kib, "kB"], Some(m)) => m.anonymous = bytes(kib),
            ([range, permissions, _, _, inode, name @ ..], _) => {
                let mapping = addresses(range).map(|range| Mapping {
                    range,
                    permissions: (*permissions).to_owned(),
                    inode: inode.parse().unwrap_or_default(),
                    name: name.join(" "),
                    ..Mapping::default()
                });
                mappings.extend(mapping);
            }
            _ => {}
        }
    }
    mappings
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
