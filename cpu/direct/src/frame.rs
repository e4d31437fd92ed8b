//! The signal frame of x86-64 Linux: how a child's registers reach the monitor, and how they get back.
//!
//! Problem: on a trap all registers must come to the monitor, and on the way back all must be set, XSAVE image included. Idea: the kernel does
//! both. It writes them to the frame of the signal that the trap raises, and `rt_sigreturn` loads them from it; with the alternate signal
//! stack in the exchange area the frame is in memory that the monitor shares. With SS_AUTODISARM it is always at the same place.
//!
//! Invariant: a frame is read once, into memory of the monitor's own, and made harmless there: whatever the guest wrote over it, the state
//! that comes out can be loaded into the processor. A frame that goes back is written whole, from that state and from what the
//! first process' first frame has shown of the kernel's layout ([`Template`]).
//! Cost: copying 0.5 to 2.7 KiB each way, after which components of the state are in use.
//!
//! Layout: `struct rt_sigframe`, `ucontext`, `sigcontext_64` and `_fpx_sw_bytes` of Linux (arch/x86/include/asm/sigframe.h and
//! uapi/asm/sigcontext.h); Intel SDM vol. 1, 13.4 for the XSAVE area.

use doppel_x86::{FpuArea, XCR0_MASK};
use raw_cpuid::native_cpuid::cpuid_count;

use crate::arch_stub::{BASES, EXCHANGE_SIZE, FLAGS, FRAME, SELECTORS, SIGNAL_STACK};
use crate::exchange::Shared;
use crate::signals::HANDLED_MASK;
use crate::state::{UserState, is_possible};

/// Bytes of the frame below the XSAVE area.
const FRAME_SIZE: usize = 440;
const UC_FLAGS: usize = 8;
const UC_STACK: usize = 24;
const REGISTERS: usize = 48;
const RIP: usize = 176;
const RFLAGS: usize = 184;
const SEGMENTS: usize = 192;
const ERROR: usize = 200;
const VECTOR: usize = 208;
const CR2: usize = 224;
const FPSTATE: usize = 232;
const SIGNAL_MASK: usize = 304;
const SIGNAL: usize = 312;
const CODE: usize = 320;
const ADDRESS: usize = 328;
const CALL_ARCHITECTURE: usize = 340;

/// Where the general registers are, in the order of their encoding.
const GPRS: [usize; 16] = [
    152, 160, 144, 136, 168, 128, 120, 112, 48, 56, 64, 72, 80, 88, 96, 104,
];

const LEGACY: usize = 512;
const XSTATE_BV: usize = 512;
const EXTENDED: usize = 576;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const SOFTWARE: usize = 464;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
const SS_AUTODISARM: u64 = 1 << 31;

/// The protection keys' component of the XSAVE area, and what it is while user code runs: nothing but key 0 may be read or written, so that what is mapped to be
/// executed alone, for which Linux takes another key, cannot be read. The guest's own is not here: a guest that has protection keys is translated.
const PKRU: u32 = 9;
const ONLY_KEY_0: u64 = 0x5555_5554;

/// A component of the XSAVE area.
#[derive(Clone, Copy, Debug)]
struct Component {
    bit: u64,
    offset: usize,
    size: usize,
}

/// What the kernel's frames look like, from a first one.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    /// Places in the exchange area.
    frame: usize,
    fpstate: usize,
    /// Where the area is in the child.
    exchange_at: u64,
    uc_flags: u64,
    software: [u8; 48],
    xstate_size: usize,
    /// Components that may be in use: the guest's. All others are in their initial state whenever it runs.
    features: u64,
    mxcsr_mask: u32,
    components: Vec<Component>,
    /// Where PKRU is in the area, on a host that has it.
    pkru: Option<usize>,
}

/// Why a process stopped, from its frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cause {
    pub signal: u32,
    /// Not positive where another process sent the signal.
    pub code: i32,
    pub vector: u64,
    pub error: u64,
    pub cr2: u64,
    /// For SIGSYS: the call's address and architecture.
    pub call_address: u64,
    pub call_architecture: u32,
}

/// A frame read into the monitor's memory.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }
    fn u32(&self, at: usize) -> u32 {
        self.u64(at) as u32
    }
}

impl Template {
    /// Learns the layout from the frame in the exchange area of a process that was just stopped by a signal and has not run guest code.
    pub fn learn(exchange: &Shared, exchange_at: u64) -> Option<Template> {
        let place = |address: u64, size: usize| {
            let offset = usize::try_from(address.checked_sub(exchange_at)?).ok()?;
            let fits = offset >= SIGNAL_STACK && offset + size <= EXCHANGE_SIZE as usize;
            fits.then_some(offset)
        };
        let frame = place(exchange.load64(FRAME), FRAME_SIZE)?;
        let mut bytes = [0; FRAME_SIZE];
        exchange.read(frame, &mut bytes);
        let bytes = Bytes(&bytes);
        let fpstate = place(bytes.u64(FPSTATE), EXTENDED + 4)?;
        let mut software = [0; 48];
        exchange.read(fpstate + SOFTWARE, &mut software);
        let words = Bytes(&software);
        let (magic, features, xstate_size) = (words.u32(0), words.u64(8), words.u32(16) as usize);
        place(bytes.u64(FPSTATE), xstate_size + 4)?;
        if magic != MAGIC1 || exchange.load32(fpstate + xstate_size) != MAGIC2 {
            return None;
        }
        let pkru = (features >> PKRU & 1 != 0).then(|| cpuid_count(0xd, PKRU).ebx as usize);
        let pkru = pkru.filter(|at| (EXTENDED..xstate_size - 7).contains(at));
        let features = features & XCR0_MASK;
        let mxcsr_mask = match exchange.load32(fpstate + MXCSR_MASK) {
            0 => 0xffbf,
            mask => mask,
        };
        Some(Template {
            frame,
            fpstate,
            exchange_at,
            uc_flags: bytes.u64(UC_FLAGS),
            software,
            xstate_size,
            features,
            mxcsr_mask,
            components: components(features, xstate_size)?,
            pkru,
        })
    }

    /// Writes the frame from which `rt_sigreturn` loads `user`, and what the stub loads itself.
    pub fn write(&self, exchange: &Shared, user: &UserState) {
        let mut frame = [0; SIGNAL];
        let mut put = |at: usize, value: u64| {
            frame[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(UC_FLAGS, self.uc_flags);
        put(UC_STACK, self.exchange_at + SIGNAL_STACK as u64);
        put(UC_STACK + 8, SS_AUTODISARM);
        put(UC_STACK + 16, EXCHANGE_SIZE - SIGNAL_STACK as u64);
        for (at, value) in GPRS.into_iter().zip(user.gprs) {
            put(at, value);
        }
        let flags = user.rflags & UserState::FLAGS | UserState::FIXED_FLAGS;
        put(RIP, user.rip);
        put(RFLAGS, flags);
        put(SEGMENTS, u64::from(user.cs) | u64::from(user.ss) << 48);
        put(SIGNAL_MASK, !HANDLED_MASK);
        put(FPSTATE, self.exchange_at + self.fpstate as u64);
        exchange.write(self.frame + UC_FLAGS, &frame[UC_FLAGS..]);
        self.write_fpu(exchange, &user.fpu);
        // The kernel takes the frame's address for one above the return address.
        exchange.store64(FRAME, self.exchange_at + self.frame as u64 + 8);
        // ID and NT; the rest is in the frame.
        exchange.store64(FLAGS, flags & 0x0020_4000 | UserState::FIXED_FLAGS);
        exchange.store64(BASES[0], user.fs_base);
        exchange.store64(BASES[1], user.gs_base);
        for (at, value) in SELECTORS
            .into_iter()
            .zip([user.ds, user.es, user.fs, user.gs])
        {
            exchange.store32(at, value.into());
        }
    }

    fn write_fpu(&self, exchange: &Shared, fpu: &FpuArea) {
        let at = self.fpstate;
        let in_use = Bytes(&fpu.bytes).u64(XSTATE_BV) & self.features;
        let mut legacy = [0; EXTENDED];
        legacy[..SOFTWARE].copy_from_slice(&fpu.bytes[..SOFTWARE]);
        legacy[MXCSR..MXCSR + 4].copy_from_slice(&(fpu.mxcsr() & self.mxcsr_mask).to_le_bytes());
        legacy[SOFTWARE..LEGACY].copy_from_slice(&self.software);
        let keys = u64::from(self.pkru.is_some()) << PKRU;
        legacy[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(in_use | keys).to_le_bytes());
        exchange.write(at, &legacy);
        if let Some(pkru) = self.pkru {
            exchange.store64(at + pkru, ONLY_KEY_0);
        }
        for c in self.components.iter().filter(|c| in_use & c.bit != 0) {
            exchange.write(at + c.offset, &fpu.bytes[c.offset..c.offset + c.size]);
        }
        exchange.store32(at + self.xstate_size, MAGIC2);
    }

    /// Reads the frame of a stop; `None`, with `user` as it was, where the state is none of user code's.
    pub fn read(&self, exchange: &Shared, user: &mut UserState) -> Option<Cause> {
        let mut bytes = [0; FRAME_SIZE];
        exchange.read(self.frame + REGISTERS, &mut bytes[REGISTERS..]);
        let frame = Bytes(&bytes);
        let [ds, es, fs, gs] = SELECTORS.map(|at| exchange.load32(at) as u16);
        let cs = frame.u64(SEGMENTS) as u16;
        let ss = (frame.u64(SEGMENTS) >> 48) as u16;
        let bases = BASES.map(|at| exchange.load64(at));
        if !is_possible([cs, ss, ds, es, fs, gs], bases) {
            return None;
        }
        for (register, at) in user.gprs.iter_mut().zip(GPRS) {
            *register = frame.u64(at);
        }
        user.rip = frame.u64(RIP);
        user.rflags = frame.u64(RFLAGS) & UserState::FLAGS | UserState::FIXED_FLAGS;
        (user.cs, user.ss) = (cs, ss);
        (user.ds, user.es, user.fs, user.gs) = (ds, es, fs, gs);
        [user.fs_base, user.gs_base] = bases;
        self.read_fpu(exchange, &mut user.fpu);
        Some(Cause {
            signal: frame.u32(SIGNAL),
            code: frame.u32(CODE) as i32,
            vector: frame.u64(VECTOR),
            error: frame.u64(ERROR),
            cr2: frame.u64(CR2),
            call_address: frame.u64(ADDRESS),
            call_architecture: (frame.u64(CALL_ARCHITECTURE - 4) >> 32) as u32,
        })
    }

    fn read_fpu(&self, exchange: &Shared, fpu: &mut FpuArea) {
        exchange.read(self.fpstate, &mut fpu.bytes[..XSTATE_BV + 8]);
        let in_use = Bytes(&fpu.bytes).u64(XSTATE_BV) & self.features;
        let mxcsr = fpu.mxcsr() & self.mxcsr_mask;
        fpu.bytes[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        fpu.bytes[MXCSR_MASK..MXCSR_MASK + 4].copy_from_slice(&self.mxcsr_mask.to_le_bytes());
        fpu.bytes[SOFTWARE - 48..LEGACY].fill(0);
        fpu.bytes[XSTATE_BV..EXTENDED].fill(0);
        fpu.bytes[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&in_use.to_le_bytes());
        for c in &self.components {
            let bytes = &mut fpu.bytes[c.offset..c.offset + c.size];
            if in_use & c.bit != 0 {
                exchange.read(self.fpstate + c.offset, bytes);
            } else {
                bytes.fill(0);
            }
        }
    }
}

/// The components above the legacy region, by CPUID leaf 0xd.
fn components(features: u64, xstate_size: usize) -> Option<Vec<Component>> {
    let mut all = Vec::new();
    for n in (2..63).filter(|n| features >> n & 1 != 0) {
        let leaf = cpuid_count(0xd, n);
        let (size, offset) = (leaf.eax as usize, leaf.ebx as usize);
        if offset < EXTENDED || offset + size > FpuArea::SIZE.min(xstate_size) {
            return None;
        }
        all.push(Component {
            bit: 1 << n,
            offset,
            size,
        });
    }
    Some(all)
}
