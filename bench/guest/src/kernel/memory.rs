//! Address space: fresh pages, and mappings that come and go.

use super::system_unsafe::{Access, Mapping};
use anyhow::Result;

const PAGE: usize = 4096;

/// Touches each page of a fresh 8 MiB mapping.
pub fn fault(count: u64) -> Result<u64> {
    let mut sum = 0;
    for n in 0..count {
        let mut mapping = Mapping::new(8 << 20)?;
        let bytes = mapping.bytes();
        for at in (0..bytes.len()).step_by(PAGE) {
            bytes[at] = n as u8 + 1;
        }
        sum += bytes
            .iter()
            .step_by(PAGE)
            .map(|b| u64::from(*b))
            .sum::<u64>();
    }
    Ok(sum)
}

/// Maps 16 pages, writes to one, takes the right to write away, unmaps.
pub fn map(count: u64) -> Result<u64> {
    let mut sum = 0;
    for n in 0..count {
        let mut mapping = Mapping::new(16 * PAGE)?;
        mapping.bytes()[3 * PAGE] = n as u8;
        mapping.protect(Access::Read)?;
        mapping.protect(Access::ReadWrite)?;
        sum += u64::from(mapping.bytes()[3 * PAGE]);
    }
    Ok(sum)
}
