//! What the vCPUs of a machine share: the zygote of their children, and what is known of the host.

use std::sync::{Arc, OnceLock};

use doppel_memory::{GuestRam, PAGE_MASK, PAGE_SIZE};
use doppel_x86::{Cpu, CpuidModel, XCR0_PKRU, host_xcr0};
use raw_cpuid::native_cpuid::cpuid_count;

use crate::hazard::Hazards;
use crate::patch::Patch;
use crate::patched::{Code, PatchedPage, PatchedPages};
use crate::prices::Prices;
use crate::space::END_OF_USER;
use crate::{Change, Child, DirectError, KickFlag, Stop, UserState, Zygote};

/// Mappings that a process can have, unless the host says otherwise.
const USUAL_MAPPINGS: usize = 65_530;
/// Where they begin, unless it says otherwise.
const USUAL_LOWEST: u64 = 64 << 10;
/// Left over for what a change may split.
const MAPPINGS_MARGIN: usize = 1_000;

/// What the vCPUs of a machine share.
#[derive(Debug)]
pub struct DirectHost {
    zygote: Zygote,
    most_mappings: usize,
    /// Below it the host maps nothing for an ordinary process.
    lowest: u64,
    prices: OnceLock<Prices>,
    patched: Arc<PatchedPages>,
    hides_code: OnceLock<bool>,
    numbers_are_short: bool,
}

impl DirectHost {
    /// For a machine with this RAM.
    pub fn new(ram: &GuestRam) -> Result<Self, DirectError> {
        let file = ram.file().ok_or(DirectError::NotShared)?;
        let zygote = Zygote::new(file, ram.size())?;
        Ok(DirectHost {
            patched: Arc::new(PatchedPages::behind(file, ram.size())?),
            hides_code: OnceLock::new(),
            numbers_are_short: numbers_are_short(),
            zygote,
            most_mappings: most_mappings(),
            lowest: lowest(),
            prices: OnceLock::new(),
        })
    }

    /// What a stop costs here, measured the first time that it is asked.
    pub fn prices(&self) -> Prices {
        let measured = || Prices::measure(&self.zygote).unwrap_or(Prices::USUAL);
        *self.prices.get_or_init(measured)
    }

    /// A page that children execute in place of another, where this host has code that can be executed and not read, and there is room.
    pub(crate) fn patched_page(&self, patch: Patch) -> Option<PatchedPage> {
        let hides = || self.hides_code().unwrap_or(false);
        self.hides_code.get_or_init(hides).then_some(())?;
        self.patched.page(patch)
    }

    /// The number of the guest's processor, where a copy can put it in place of the host's behind RDTSCP.
    pub(crate) fn number_in_copies(&self, cpu: &Cpu) -> Option<u8> {
        let number = u8::try_from(cpu.msr.tsc_aux).ok();
        number.filter(|_| self.numbers_are_short)
    }

    /// Has a child execute code that reads itself: whether that faults, for the protection key.
    fn hides_code(&self) -> Option<bool> {
        /// MOV AL, [RIP - 6], which is where it stands; UD2.
        const READS_ITSELF: [u8; 8] = [0x8a, 0x05, 0xfa, 0xff, 0xff, 0xff, 0x0f, 0x0b];
        const PROTECTION_KEY: u32 = 1 << 5;
        let mut code: Code = [0; PAGE_SIZE as usize];
        code[..READS_ITSELF.len()].copy_from_slice(&READS_ITSELF);
        let page = self.patched.page(Patch::as_is(code))?;
        let mut child = self.spawn().ok()?;
        let at = child.reserved().end;
        let map = Change::MapPatched {
            at,
            offset: page.offset(),
        };
        let mut user = UserState::new(at);
        let stop = child.run(&mut user, &[map], &KickFlag::new()).ok()?;
        Some(matches!(
            stop,
            Stop::Trap { vector: 14, error, address } if error & PROTECTION_KEY != 0 && address & !PAGE_MASK == at
        ))
    }

    /// A child with nothing mapped.
    pub(crate) fn spawn(&self) -> Result<Child, DirectError> {
        self.zygote.spawn()
    }

    /// Whether a child can have a page there.
    pub(crate) fn can_map(&self, linear: u64) -> bool {
        (self.lowest..END_OF_USER).contains(&linear) && !self.zygote.reserved().contains(&linear)
    }

    /// What must not be executed for guests whose processor is this.
    pub(crate) fn hazards(&self, guest: &CpuidModel) -> Hazards {
        Hazards {
            cpuid: !self.zygote.cpuid_faults(),
            components: (host_xcr0() ^ guest.xcr0()) | guest.xcr0() & XCR0_PKRU,
            in_use: tells_components_in_use() && !guest.tells_components_in_use(),
            hidden: guest.hidden(),
        }
    }

    /// Mappings in a child from which on all are removed.
    pub(crate) fn most_mappings(&self) -> usize {
        self.most_mappings
    }
}

/// Whether RDTSCP tells numbers of eight bits alone here: Linux has it tell the processor's, and from the twelfth bit on its node's.
fn numbers_are_short() -> bool {
    let last = |kind: &str| {
        let all = std::fs::read_to_string(format!("/sys/devices/system/{kind}/possible")).ok()?;
        let last = all.trim().rsplit(['-', ',']).next()?;
        last.parse::<u32>().ok()
    };
    // Where it has no nodes, Linux has no such file.
    last("cpu").is_some_and(|cpu| cpu <= u8::MAX.into()) && last("node").unwrap_or(0) == 0
}

/// XGETBV of the host's processor takes ECX = 1.
fn tells_components_in_use() -> bool {
    cpuid_count(0xd, 1).eax & 1 << 2 != 0
}

/// A number that the host's kernel tells in a file.
fn setting<N: std::str::FromStr>(name: &str) -> Option<N> {
    let text = std::fs::read_to_string(format!("/proc/sys/vm/{name}")).ok()?;
    text.trim().parse().ok()
}

fn lowest() -> u64 {
    let lowest: u64 = setting("mmap_min_addr").unwrap_or(USUAL_LOWEST);
    lowest.next_multiple_of(PAGE_SIZE)
}

fn most_mappings() -> usize {
    let most: usize = setting("max_map_count").unwrap_or(USUAL_MAPPINGS);
    most.saturating_sub(MAPPINGS_MARGIN).max(MAPPINGS_MARGIN)
}
