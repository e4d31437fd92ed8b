//! What the vCPUs of a machine share: the zygote of their children, and what is known of the host.

use std::sync::OnceLock;

use doppel_memory::GuestRam;
use doppel_x86::{CpuidModel, host_xcr0};

use crate::hazard::Hazards;
use crate::prices::Prices;
use crate::{Child, DirectError, Zygote};

/// Mappings that a process can have, unless the host says otherwise.
const USUAL_MAPPINGS: usize = 65_530;
/// Left over for what a change may split.
const MAPPINGS_MARGIN: usize = 1_000;

/// What the vCPUs of a machine share.
#[derive(Debug)]
pub struct DirectHost {
    zygote: Zygote,
    most_mappings: usize,
    prices: OnceLock<Prices>,
}

impl DirectHost {
    /// For a machine with this RAM.
    pub fn new(ram: &GuestRam) -> Result<Self, DirectError> {
        let file = ram.file().ok_or(DirectError::NotShared)?;
        let zygote = Zygote::new(file, ram.size())?;
        Ok(DirectHost {
            zygote,
            most_mappings: most_mappings(),
            prices: OnceLock::new(),
        })
    }

    /// What a stop costs here, measured the first time that it is asked.
    pub fn prices(&self) -> Prices {
        let measured = || Prices::measure(&self.zygote).unwrap_or(Prices::USUAL);
        *self.prices.get_or_init(measured)
    }

    /// A child with nothing mapped.
    pub(crate) fn spawn(&self) -> Result<Child, DirectError> {
        self.zygote.spawn()
    }

    pub(crate) fn reserved(&self) -> std::ops::Range<u64> {
        self.zygote.reserved()
    }

    /// What must not be executed for guests whose processor is this.
    pub(crate) fn hazards(&self, guest: &CpuidModel) -> Hazards {
        Hazards {
            cpuid: !self.zygote.cpuid_faults(),
            components: host_xcr0() ^ guest.xcr0(),
            hidden: guest.hidden(),
        }
    }

    /// Mappings in a child from which on all are removed.
    pub(crate) fn most_mappings(&self) -> usize {
        self.most_mappings
    }
}

fn most_mappings() -> usize {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    let most = text.trim().parse().unwrap_or(USUAL_MAPPINGS);
    most.saturating_sub(MAPPINGS_MARGIN).max(MAPPINGS_MARGIN)
}
