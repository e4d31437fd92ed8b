//! How much of the host's memory a monitor takes.

use anyhow::{Context, Result};
use serde::Serialize;

/// Kibibytes of a process; what is mapped twice counts once.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Footprint {
    /// Guest RAM that was touched.
    pub guest: u64,
    /// Everything else: the monitor's own.
    pub monitor: u64,
}

/// Of the process `pid`, whose guest has `mebibytes` of RAM, and of those that it started.
pub fn footprint(pid: u32, mebibytes: u64) -> Result<Footprint> {
    let all = doppel_footprint::Footprint::of_family(pid, mebibytes << 20);
    let all = all.with_context(|| format!("reading the memory of process {pid}"))?;
    let own = all.code_bytes + all.record_bytes + all.monitor_bytes;
    Ok(Footprint {
        guest: all.guest_bytes >> 10,
        monitor: own >> 10,
    })
}
