//! Names of guest kernel addresses, from a System.map.

use std::collections::HashMap;
use std::sync::Arc;

/// The symbol at which Linux enters the kernel for a system call: LSTAR holds where it really is, so it tells how far KASLR moved it.
const ENTRY: &str = "entry_SYSCALL_64";

/// Symbols of a kernel, sorted by address; none by default.
#[derive(Clone, Debug, Default)]
pub struct Symbols {
    table: Arc<Table>,
    slide: u64,
}

#[derive(Debug, Default)]
struct Table {
    by_address: Vec<(u64, String)>,
    by_name: HashMap<String, u64>,
}

impl Symbols {
    /// Reads the lines of a System.map (or of /proc/kallsyms): address, type, name. Lines of other forms, and symbols that are
    /// no code, are passed over.
    pub fn parse(map: &str) -> Symbols {
        let line = |l: &str| {
            let mut words = l.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let code = matches!(words.next()?, "t" | "T" | "w" | "W");
            code.then(|| Some((address, words.next()?.to_owned())))?
        };
        let mut by_address: Vec<_> = map.lines().filter_map(line).collect();
        by_address.sort_by_key(|(address, _)| *address);
        let by_name = by_address.iter().map(|(a, n)| (n.clone(), *a)).collect();
        let table = Table {
            by_address,
            by_name,
        };
        Symbols {
            table: Arc::new(table),
            slide: 0,
        }
    }

    /// How far a running kernel lies from where its map says, given its LSTAR.
    pub fn slide(&self, lstar: u64) -> u64 {
        let entry = self.table.by_name.get(ENTRY).filter(|_| lstar != 0);
        entry.map_or(0, |entry| lstar.wrapping_sub(*entry))
    }

    /// Takes all symbols to be that much further on.
    pub fn set_slide(&mut self, slide: u64) {
        self.slide = slide;
    }

    /// Address of a symbol.
    pub fn address(&self, name: &str) -> Option<u64> {
        let address = self.table.by_name.get(name)?;
        Some(address.wrapping_add(self.slide))
    }

    /// `symbol+0x12` for an address.
    pub fn name(&self, address: u64) -> Option<String> {
        let address = address.wrapping_sub(self.slide);
        let after = self
            .table
            .by_address
            .partition_point(|(a, _)| *a <= address);
        let (start, name) = self.table.by_address.get(after.checked_sub(1)?)?;
        // Past the last symbol everything has a symbol before it.
        self.table.by_address.get(after)?;
        Some(format!("{name}+{:#x}", address - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_names_addresses_wherever_the_kernel_lies() {
        let map = "ffffffff81000000 T _text\nffffffff81000100 T entry_SYSCALL_64\nffffffff81000200 D data\nnonsense\n\
                   ffffffff81000300 T _etext\n";
        let mut symbols = Symbols::parse(map);
        assert_eq!(
            symbols.name(0xffff_ffff_8100_0110).unwrap(),
            "entry_SYSCALL_64+0x10"
        );
        assert_eq!(symbols.name(0x1000), None);
        assert_eq!(symbols.name(0xffff_ffff_8100_0300), None);
        assert_eq!(symbols.slide(0), 0);
        symbols.set_slide(symbols.slide(0xffff_ffff_9100_0100));
        assert_eq!(symbols.address("_text"), Some(0xffff_ffff_9100_0000));
        assert_eq!(symbols.name(0xffff_ffff_9100_0008).unwrap(), "_text+0x8");
    }
}
