//! Conformance of the CPU engines: small bare-metal guests, written once and run on every engine.
//!
//! A test is a closure on a [`Machine`], which [`each_engine`] hands it once for every row of [`engines::ENGINES`]. The
//! machine starts in 64-bit mode with a map of memory ([`layout`]), a GDT, and a handler behind every vector that notes
//! what it was called with ([`Record`]). The test places code, runs it until it stops, and asks what happened.
//! A guest that does not stop fails its test within seconds, whatever it does: the watchdog kicks the engine, and ends the process
//! if that does not help.

use std::sync::Arc;

use doppel_x86::CpuidModel;

pub mod bus;
mod crowd;
pub mod engines;
pub mod hostile;
pub mod layout;
pub mod legacy;
pub mod machine;
pub mod paging;
mod watchdog;

pub use bus::{Lines, TestBus};
pub use crowd::{Crowd, each_crowd, each_crowd_with};
pub use engines::{ENGINES, Row};
pub use layout::*;
pub use legacy::{End, Legacy, LegacyMachine, each_legacy, kind};
pub use machine::{Action, Machine, Record};

/// Runs a test on every engine.
pub fn each_engine(test: impl Fn(&mut Machine)) {
    for row in ENGINES {
        // Shown by the test harness where the test fails.
        println!("on {}", row.name);
        test(&mut Machine::new(row));
    }
}

/// The same with this processor.
pub fn each_engine_with(model: &Arc<CpuidModel>, test: impl Fn(&mut Machine)) {
    for row in ENGINES {
        println!("on {}", row.name);
        test(&mut Machine::with_model(row, model.clone()));
    }
}

/// Runs a test on every engine as a processor of each vendor, where vendors differ.
pub fn each_engine_and_vendor(test: impl Fn(&mut Machine)) {
    for row in ENGINES {
        for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
            println!("on {} as {}", row.name, vendor.escape_ascii());
            test(&mut Machine::of_vendor(row, vendor));
        }
    }
}
