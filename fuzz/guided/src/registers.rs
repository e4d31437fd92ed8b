//! Accesses of a vCPU to the ports, the device memory and the APIC registers of a whole machine, its timers running (`machine/src/hostile.rs`).

use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "registers",
    longest: 2 << 10,
    words: &[
        b"\x0c\x00",
        b"\x80\x00\x00\x80",
        b"\xf8\x0c",
        b"\x00\x01\x02\x03",
    ],
    seeds,
    open,
};

fn open() -> anyhow::Result<Take> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![0; 1 << 20])?;
    Ok(Box::new(move |bytes| {
        let _keep = &folder;
        doppel_machine::hostile::run_bytes(bytes, &disk);
    }))
}

/// Bytes without a pattern, for either transport.
fn seeds() -> Vec<Vec<u8>> {
    let bytes = |n: u32| {
        let step = |at: u32| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
        let rest = (0..600).map(move |at| step(at + 1000 * n));
        [n as u8].into_iter().chain(rest).collect()
    };
    (0..16).map(bytes).collect()
}
