//! Exceptions: vector, error code and what else their delivery needs (Intel SDM vol. 3A, chapter 7).

/// Exception vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    X87 = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    Simd = 19,
    ControlProtection = 21,
}

/// An exception that an instruction raised; guest misbehaviour as a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// The error code that is pushed, for the vectors that have one.
    pub error_code: Option<u32>,
    /// CR2, for page faults.
    pub address: u64,
    /// Bits to set in DR6, for debug exceptions.
    pub dr6: u64,
    /// A trap: the saved RIP is that of the next instruction, and the instruction's effects stand
    /// (#BP, #OF, single step); otherwise a fault.
    pub trap: bool,
}

impl Exception {
    const fn plain(vector: Vector, error_code: Option<u32>) -> Self {
        Exception {
            vector,
            error_code,
            address: 0,
            dr6: 0,
            trap: false,
        }
    }
    /// #DE
    pub const DE: Self = Self::plain(Vector::DivideError, None);
    /// #UD
    pub const UD: Self = Self::plain(Vector::InvalidOpcode, None);
    /// #NM
    pub const NM: Self = Self::plain(Vector::DeviceNotAvailable, None);
    /// #MF
    pub const MF: Self = Self::plain(Vector::X87, None);
    /// #XM
    pub const XM: Self = Self::plain(Vector::Simd, None);
    /// #BR
    pub const BR: Self = Self::plain(Vector::BoundRange, None);
    /// #AC(0)
    pub const AC: Self = Self::plain(Vector::AlignmentCheck, Some(0));
    /// #BP, a trap
    pub const BP: Self = Exception {
        trap: true,
        ..Self::plain(Vector::Breakpoint, None)
    };
    /// #OF, a trap
    pub const OF: Self = Exception {
        trap: true,
        ..Self::plain(Vector::Overflow, None)
    };
    /// #DF(0)
    pub const DF: Self = Self::plain(Vector::DoubleFault, Some(0));

    /// #GP with an error code (a selector, or 0).
    pub const fn gp(code: u32) -> Self {
        Self::plain(Vector::GeneralProtection, Some(code))
    }
    /// #SS
    pub const fn ss(code: u32) -> Self {
        Self::plain(Vector::StackFault, Some(code))
    }
    /// #NP
    pub const fn np(code: u32) -> Self {
        Self::plain(Vector::SegmentNotPresent, Some(code))
    }
    /// #TS
    pub const fn ts(code: u32) -> Self {
        Self::plain(Vector::InvalidTss, Some(code))
    }
    /// #PF at a linear address.
    pub const fn pf(address: u64, code: u32) -> Self {
        Exception {
            address,
            ..Self::plain(Vector::PageFault, Some(code))
        }
    }
    /// #DB with bits for DR6; `trap` as in [`Exception::trap`].
    pub const fn db(dr6: u64, trap: bool) -> Self {
        Exception {
            dr6,
            trap,
            ..Self::plain(Vector::Debug, None)
        }
    }
}
