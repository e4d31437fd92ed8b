//! MSI-X: the vector table of a PCI function and its pending bits.
//!
//! A vector is a message to a local APIC. While it is masked, by itself or with all the others, an interrupt waits as a pending bit, and is
//! sent when the mask goes.
//!
//! Source: PCI Local Bus Specification 3.0, 6.8.2.

/// Bytes of a table entry: address, data, control.
pub const MSIX_ENTRY: u64 = 16;
/// ID of the capability.
pub const MSIX_CAPABILITY: u8 = 0x11;
/// Message control: the function uses MSI-X.
pub const MSIX_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const MSIX_FUNCTION_MASK: u16 = 1 << 14;

const MASKED: u32 = 1;

/// A message: address and data.
pub type MsiMessage = (u64, u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Vector {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// The vectors of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Msix {
    vectors: Vec<Vector>,
    control: u16,
    /// The function may not send: it is no bus master.
    silent: bool,
}

impl Msix {
    /// A table of `vectors` (1 to 2048) vectors, all masked, not in use.
    pub fn new(vectors: u16) -> Self {
        let vector = Vector {
            address: 0,
            data: 0,
            control: MASKED,
            pending: false,
        };
        let vectors = vec![vector; vectors.clamp(1, 2048).into()];
        Msix {
            control: vectors.len() as u16 - 1,
            vectors,
            silent: false,
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// There is always a vector.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The body of the capability, for [`crate::ConfigSpace::add_capability`], and which bits of it can be written. Table and pending
    /// bits are at these offsets of BAR `bar`.
    pub fn capability(&self, bar: u32, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
        let (mut body, mut writable) = ([0; 10], [0; 10]);
        body[..2].copy_from_slice(&self.control.to_le_bytes());
        body[2..6].copy_from_slice(&(table | bar).to_le_bytes());
        body[6..].copy_from_slice(&(pending | bar).to_le_bytes());
        writable[..2].copy_from_slice(&(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes());
        (body, writable)
    }

    /// True where the function uses MSI-X and not its pin.
    pub fn is_enabled(&self) -> bool {
        self.control & MSIX_ENABLE != 0
    }

    /// The message control register was written; messages that are due now.
    pub fn set_control(&mut self, control: u16) -> Vec<MsiMessage> {
        self.control = control;
        self.due()
    }

    /// Whether the function may send messages, which are stores to memory; those that are due now. While it may not, they wait.
    pub fn set_silent(&mut self, silent: bool) -> Vec<MsiMessage> {
        self.silent = silent;
        self.due()
    }

    fn is_open(&self, vector: &Vector) -> bool {
        !self.silent
            && self.is_enabled()
            && self.control & MSIX_FUNCTION_MASK == 0
            && vector.control & MASKED == 0
    }

    fn due(&mut self) -> Vec<MsiMessage> {
        let mut due = Vec::new();
        for n in 0..self.vectors.len() {
            let vector = self.vectors[n];
            if vector.pending && self.is_open(&vector) {
                self.vectors[n].pending = false;
                due.push((vector.address, vector.data));
            }
        }
        due
    }

    /// An interrupt on `vector`: the message to send now, if it is to be sent now.
    pub fn trigger(&mut self, vector: u16) -> Option<MsiMessage> {
        let found = *self.vectors.get(usize::from(vector))?;
        if self.is_open(&found) {
            return Some((found.address, found.data));
        }
        self.vectors[usize::from(vector)].pending = self.is_enabled();
        None
    }

    /// A load of 4 bytes from the table.
    pub fn read_table(&self, offset: u64) -> u32 {
        let Some(vector) = self.vectors.get((offset / MSIX_ENTRY) as usize) else {
            return 0;
        };
        match offset % MSIX_ENTRY / 4 {
            0 => vector.address as u32,
            1 => (vector.address >> 32) as u32,
            2 => vector.data,
            _ => vector.control,
        }
    }

    /// A store of 4 bytes to the table; messages that are due now.
    pub fn write_table(&mut self, offset: u64, value: u32) -> Vec<MsiMessage> {
        let Some(vector) = self.vectors.get_mut((offset / MSIX_ENTRY) as usize) else {
            return Vec::new();
        };
        let wide = u64::from(value);
        match offset % MSIX_ENTRY / 4 {
            0 => vector.address = vector.address >> 32 << 32 | wide & !3,
            1 => vector.address = vector.address & u64::from(u32::MAX) | wide << 32,
            2 => vector.data = value,
            _ => vector.control = value & MASKED,
        }
        self.due()
    }

    /// A load of 4 bytes from the pending bits.
    pub fn read_pending(&self, offset: u64) -> u32 {
        let first = usize::try_from(offset / 4)
            .unwrap_or(usize::MAX)
            .saturating_mul(32);
        let vectors = self.vectors.iter().skip(first).take(32).enumerate();
        vectors.fold(0, |bits, (n, v)| bits | u32::from(v.pending) << n)
    }

    /// Table, control and pending bits as words, to be saved.
    pub fn save(&self) -> Vec<u32> {
        let words = |v: &Vector| {
            let (low, high) = (v.address as u32, (v.address >> 32) as u32);
            [low, high, v.data, v.control | u32::from(v.pending) << 1]
        };
        let vectors = self.vectors.iter().flat_map(words);
        [u32::from(self.control)]
            .into_iter()
            .chain(vectors)
            .collect()
    }

    /// Takes back what [`Msix::save`] gave; false where it is that of another table.
    pub fn restore(&mut self, words: &[u32]) -> bool {
        let Some((control, words)) = words.split_first() else {
            return false;
        };
        if words.len() != 4 * self.vectors.len() {
            return false;
        }
        self.control = *control as u16;
        for (vector, w) in self.vectors.iter_mut().zip(words.chunks_exact(4)) {
            *vector = Vector {
                address: u64::from(w[1]) << 32 | u64::from(w[0]),
                data: w[2],
                control: w[3] & MASKED,
                pending: w[3] & 2 != 0,
            };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Msix {
        let mut msix = Msix::new(40);
        for (offset, value) in [(0, 0xfee0_1003), (4, 0), (8, 0x4041)] {
            assert_eq!(msix.write_table(35 * MSIX_ENTRY + offset, value), []);
        }
        msix
    }

    #[test]
    fn a_vector_is_sent_when_nothing_masks_it() {
        let mut msix = table();
        assert_eq!(msix.trigger(35), None);
        assert_eq!(msix.read_pending(4), 0, "not in use");
        assert_eq!(msix.set_control(MSIX_ENABLE | MSIX_FUNCTION_MASK), []);
        assert_eq!((msix.trigger(35), msix.read_pending(4)), (None, 1 << 3));
        assert_eq!(msix.set_silent(true), []);
        assert_eq!(msix.set_silent(false), [], "masked still");
        assert_eq!(msix.write_table(35 * MSIX_ENTRY + 12, 0), []);
        let message = (0xfee0_1000, 0x4041);
        assert_eq!(msix.set_control(MSIX_ENABLE), [message]);
        assert_eq!((msix.trigger(35), msix.read_pending(4)), (Some(message), 0));
        assert_eq!(msix.write_table(35 * MSIX_ENTRY + 12, 1), []);
        assert_eq!((msix.trigger(35), msix.trigger(35)), (None, None));
        assert_eq!(msix.write_table(35 * MSIX_ENTRY + 12, 0), [message], "once");
    }

    #[test]
    fn what_is_beyond_the_table_is_nothing() {
        let mut msix = table();
        msix.set_control(MSIX_ENABLE);
        assert_eq!((msix.trigger(40), msix.trigger(u16::MAX)), (None, None));
        assert_eq!(msix.write_table(40 * MSIX_ENTRY, 7), []);
        assert_eq!(msix.read_table(40 * MSIX_ENTRY), 0);
        assert_eq!((msix.read_pending(8), msix.read_pending(u64::MAX)), (0, 0));
    }

    #[test]
    fn a_saved_table_comes_back() {
        let mut msix = table();
        msix.set_control(MSIX_ENABLE | MSIX_FUNCTION_MASK);
        msix.trigger(35);
        let mut other = Msix::new(40);
        assert!(other.restore(&msix.save()));
        assert_eq!(other, msix);
        assert!(!Msix::new(39).restore(&msix.save()) && !other.restore(&[]));
    }

    #[test]
    fn the_capability_says_where_the_table_is() {
        let (body, writable) = Msix::new(3).capability(1, 0x4000, 0x5000);
        assert_eq!(body, [2, 0, 1, 0x40, 0, 0, 1, 0x50, 0, 0]);
        assert_eq!(writable, [0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
}
