//! Memory type range registers and the page attribute table: stored and checked, but without effect, since all guest RAM is
//! write-back memory of the host (Intel SDM vol. 3A, chapter 13).

use crate::Cpu;
use crate::state::Msrs;

/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
pub(crate) const CAPABILITIES: u64 = 0x508;
const VARIABLE: u32 = 0x200;
const VARIABLE_LAST: u32 = 0x20f;
/// The fixed-range MSRs in the order of [`Msrs::mtrr_fixed`].
const FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];
pub(crate) const DEF_TYPE: u32 = 0x2ff;
const DEF_TYPE_BITS: u64 = 0xcff;

const UNCACHEABLE: u64 = 0;
const WRITE_BACK: u64 = 6;
const MTRR_ENABLE: u64 = 1 << 11;
const FIXED_ENABLE: u64 = 1 << 10;
const RANGE_VALID: u64 = 1 << 11;

fn valid_type(t: u64) -> bool {
    matches!(t, 0 | 1 | 4 | 5 | 6)
}

/// A PAT entry may also be UC- (7).
pub(crate) fn valid_pat(v: u64) -> bool {
    v.to_le_bytes()
        .into_iter()
        .all(|t| t == 7 || valid_type(t.into()))
}

/// True for the MSRs that this module knows.
pub(crate) fn is_mtrr(msr: u32) -> bool {
    matches!(msr, VARIABLE..=VARIABLE_LAST | DEF_TYPE) || FIXED.contains(&msr)
}

fn slot(msrs: &mut Msrs, msr: u32) -> Option<&mut u64> {
    match msr {
        VARIABLE..=VARIABLE_LAST => {
            let pair = msrs
                .mtrr_physical
                .get_mut(((msr - VARIABLE) / 2) as usize)?;
            Some(if msr & 1 == 0 {
                &mut pair.0
            } else {
                &mut pair.1
            })
        }
        DEF_TYPE => Some(&mut msrs.mtrr_def_type),
        _ => {
            let n = FIXED.iter().position(|f| *f == msr)?;
            msrs.mtrr_fixed.get_mut(n)
        }
    }
}

/// RDMSR.
pub(crate) fn read(cpu: &mut Cpu, msr: u32) -> Option<u64> {
    slot(&mut cpu.msr, msr).map(|v| *v)
}

/// WRMSR; `None` for reserved bits and memory types.
pub(crate) fn write(cpu: &mut Cpu, msr: u32, v: u64) -> Option<()> {
    let physical = (1u64 << cpu.physical_bits) - 1;
    let valid = match msr {
        VARIABLE..=VARIABLE_LAST if msr & 1 == 0 => {
            v & !(physical & !0xfff | 0xff) == 0 && valid_type(v & 0xff)
        }
        VARIABLE..=VARIABLE_LAST => v & !(physical & !0xfff | RANGE_VALID) == 0,
        DEF_TYPE => v & !DEF_TYPE_BITS == 0 && valid_type(v & 0xff),
        _ => v.to_le_bytes().into_iter().all(|t| valid_type(t.into())),
    };
    if !valid {
        return None;
    }
    *slot(&mut cpu.msr, msr)? = v;
    Some(())
}

impl Cpu {
    /// The MTRRs as a PC's firmware leaves them: write-back by default, the device hole below 4 GiB (from `hole` on)
    /// uncacheable. Linux takes MTRRs that are off as a reason to have no PAT either.
    pub fn set_firmware_mtrrs(&mut self, hole: u64) {
        let size = (1u64 << 32).wrapping_sub(hole);
        let physical = (1u64 << self.physical_bits) - 1;
        self.msr.mtrr_def_type = MTRR_ENABLE | FIXED_ENABLE | WRITE_BACK;
        self.msr.mtrr_fixed = [0x0606_0606_0606_0606; 11];
        // The VGA window: 0xa0000 to 0xbffff.
        self.msr.mtrr_fixed[2] = UNCACHEABLE;
        if size.is_power_of_two() && hole.is_multiple_of(size) {
            let mask = physical & !(size - 1) | RANGE_VALID;
            self.msr.mtrr_physical[0] = (hole | UNCACHEABLE, mask);
        }
    }
}
