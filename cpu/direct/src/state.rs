//! The state of user code, as it goes into a child and comes out.

use doppel_x86::FpuArea;

/// What a 64-bit Linux kernel has in CS for 64-bit user code.
pub const CODE_64: u16 = 0x33;
/// What a 64-bit Linux kernel has in CS for 32-bit user code (compatibility mode).
pub const CODE_32: u16 = 0x23;
/// What a Linux kernel has in SS for user code.
pub const STACK: u16 = 0x2b;

/// The state of user code.
#[derive(Clone, Debug)]
pub struct UserState {
    /// General registers in the order of their encoding.
    pub gprs: [u64; 16],
    /// Address of the next instruction.
    pub rip: u64,
    /// RFLAGS. The child takes [`UserState::FLAGS`] of it; IF is always set and IOPL 0 on the way out.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// CS: [`CODE_64`] or [`CODE_32`].
    pub cs: u16,
    /// SS: [`STACK`].
    pub ss: u16,
    /// DS.
    pub ds: u16,
    /// ES.
    pub es: u16,
    /// FS.
    pub fs: u16,
    /// GS.
    pub gs: u16,
    /// x87, SSE, AVX and AVX-512 state in the standard XSAVE format.
    pub fpu: FpuArea,
}

impl UserState {
    /// Flags that user code can change: the arithmetic ones, TF, DF, NT, RF, AC and ID.
    pub const FLAGS: u64 = 0x0025_4dd5;
    /// What is set in RFLAGS besides: IF and the bit that always is.
    pub const FIXED_FLAGS: u64 = 0x202;

    /// 64-bit code about to start at `rip`, everything else zero or in its initial state.
    pub fn new(rip: u64) -> UserState {
        UserState {
            gprs: [0; 16],
            rip,
            rflags: Self::FIXED_FLAGS,
            fs_base: 0,
            gs_base: 0,
            cs: CODE_64,
            ss: STACK,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
            fpu: FpuArea::reset(),
        }
    }

    /// Whether a child can run it: segment registers hold what user code of a 64-bit Linux has, or null, and addresses are canonical
    /// and the user's.
    pub fn is_runnable(&self) -> bool {
        const END: u64 = 1 << 47;
        let null = |s: u16| s < 4;
        let data = |s: u16| null(s) || s == STACK;
        [CODE_64, CODE_32].contains(&self.cs)
            && self.ss == STACK
            && [self.ds, self.es, self.fs, self.gs].into_iter().all(data)
            && self.rip < END
            && is_canonical(self.fs_base)
            && is_canonical(self.gs_base)
    }
}

/// Whether user code can have got to these segments under the host's kernel: CS, SS, DS, ES, FS, GS, and the bases of the last two. A state that
/// has others comes from no processor.
pub(crate) fn is_possible(selectors: [u16; 6], bases: [u64; 2]) -> bool {
    /// Code, data and per-processor segments that user code may load, whatever the requested privilege level.
    const LOADABLE: [u16; 5] = [0, 0x20, 0x28, 0x30, 0x78];
    let [cs, ss, data @ ..] = selectors;
    let loadable = |s: u16| LOADABLE.contains(&(s & !3));
    [CODE_64, CODE_32].contains(&cs)
        && ss == STACK
        && data.into_iter().all(loadable)
        && bases.into_iter().all(is_canonical)
}

/// Whether bits 63:47 are equal.
pub(crate) fn is_canonical(address: u64) -> bool {
    let top = address as i64 >> 47;
    top == 0 || top == -1
}
