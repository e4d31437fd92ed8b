//! What translated code reaches through the GS base: the CPU's state and the translator's own slots.
//!
//! The layout is `repr(C)`; the constants below are the displacements that generated code uses. Everything stays at one
//! address for the life of the engine, since GS base and the displacements point to it.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

use doppel_memory::Tlb;
use doppel_x86::{Cpu, Segment};

use crate::code_map::{self, CodeMap};
use crate::jump_cache::{JumpCache, JumpEntry, SecondEntry};
use crate::rewrite::hold::SLOTS as HELD_SLOTS;
use crate::table_unsafe::NAMED;

/// One a privilege, and one for user code of other modes than 64-bit mode.
pub(crate) const JUMP_CACHES: usize = 4;

/// See [`Context::bounce`].
#[repr(C, align(64))]
pub(crate) struct Bounce(pub [u8; 128]);

/// See [`crate::interrupt_return`]. Zero in `code`: nothing is known.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ReturnSegments {
    /// Host addresses of the descriptors.
    pub code: u64,
    pub stack: u64,
    /// The selector of the code segment; that of the stack is 8 less of user code, 8 more of the kernel.
    pub cs: u64,
    pub gdt_base: u64,
    pub gdt_limit: u64,
}

/// The memory behind the GS base.
#[repr(C, align(64))]
pub(crate) struct Context {
    pub cpu: Cpu,
    /// Arithmetic flags of the guest while generated code has saved them (see `flags`).
    pub flags: u64,
    /// Where a register is kept for a moment.
    pub spill: [u64; 5],
    /// The guest's value of a register that a block has borrowed (see `rewrite::pin`).
    pub pinned: u64,
    /// Host addresses that a block comes back to (see `rewrite::hold`).
    pub held: [u64; HELD_SLOTS],
    /// Where the code cache begins, negated, and its bytes.
    pub code_before: u64,
    pub code_len: u64,
    /// Linear address of the guest page that executes, for position-independent blocks.
    pub page_base: u64,
    /// Loaded through at each back edge; a kick makes it point where no memory is.
    pub poll: AtomicU64,
    pub poll_target: u64,
    /// What indirect branches mask their target's address with; a kick makes it [`KICKED_MASK`](crate::jump_cache::KICKED_MASK), so that they find nothing.
    pub jump_mask: AtomicU32,
    pub host_rsp: u64,
    pub host_mxcsr: u32,
    /// Not 0 while the host's x87 and vector registers hold the guest's values (see `thunk`).
    pub simd_live: u32,
    /// Which exit was taken: an index of the exit table or one of the constants in `thunk`.
    pub exit: u32,
    /// Which indirect branch missed the first level of the jump cache last.
    pub branch: u32,
    /// Host flags at the exit.
    pub exit_flags: u64,
    /// Where to enter (and re-enter) translated code.
    pub entry: u64,
    /// Host address at which a fault was raised in translated code.
    pub fault_pc: u64,
    /// What was accessed there.
    pub fault_address: u64,
    /// Host address of physical address 0, where a window is open to it ([`doppel_memory::Window`]).
    pub window: u64,
    /// Not 0 while an interrupt waits for IF: STI and POPF leave to the monitor then.
    pub interrupt_waits: u32,
    /// The address that a check failed for, while the monitor looks at it.
    pub slow_linear: u64,
    pub slow_access: u64,
    /// Number of the access site that the check belongs to.
    pub slow_site: u32,
    /// Where the slow path keeps registers.
    pub slow_spill: [u64; 3],
    /// Where a load that crosses pages finds its bytes; twice as long as the longest, to keep its alignment.
    pub bounce: Bounce,
    /// Address of `bounce`.
    pub bounce_at: u64,
    /// Where the bytes belong that an instruction writes to `bounce`: those up to its middle, and those from there on.
    pub copy_to: [u64; 2],
    /// By the number of an access site: host address of its form for two pages, or 0.
    pub forms: u64,
    pub translator: u64,
    /// Counted by the blocks themselves where [`crate::TranslateOptions::count`] asks for it.
    pub blocks_run: u64,
    pub instructions_run: u64,
    pub tlb_lookups: u64,
    /// How often a TLB entry changed places with its victim.
    pub victims_recalled: u64,
    /// Accesses across two pages that went on without the monitor.
    pub crossings: u64,
    /// Targets that the second level of the jump cache knew, and not the first.
    pub second_jumps: u64,
    /// Branches to another page that are still taken before one is linked.
    pub crossings_to_link: u32,
    /// Targets that the code map knew.
    pub map_jumps: u64,
    /// How often the vector state was loaded.
    pub vector_loads: u64,
    /// SYSRETs and IRETs to user code executed by translated code.
    pub user_entries: u64,
    /// IRETs executed by translated code, to user code and to the kernel.
    pub interrupt_returns: [u64; 2],
    /// Of user code and of the kernel.
    pub returns: [ReturnSegments; 2],
    /// Not 0 where an IRET to the kernel is left to the interpreter since nothing is known of its segments.
    pub asks_return: u32,
    /// The last offset that may be read, and written, through each segment register (see `narrow`).
    pub segment_ends: [[i64; 6]; 2],
    pub jump_cache: [JumpCache; JUMP_CACHES],
    pub code_map: CodeMap,
}

macro_rules! displacement {
    ($($name:ident = $($field:tt).+;)*) => { $(pub(crate) const $name: i32 = offset_of!(Context, $($field).+) as i32;)* };
}
displacement! {
    GPR = cpu.gpr;
    RFLAGS = cpu.rflags;
    FPU = cpu.fpu;
    FLAGS = flags;
    SPILL = spill;
    PINNED = pinned;
    HELD = held;
    CODE_BEFORE = code_before;
    CODE_LEN = code_len;
    PAGE_BASE = page_base;
    POLL = poll;
    JUMP_MASK = jump_mask;
    HOST_RSP = host_rsp;
    HOST_MXCSR = host_mxcsr;
    SIMD_LIVE = simd_live;
    EXIT = exit;
    BRANCH = branch;
    EXIT_FLAGS = exit_flags;
    ENTRY = entry;
    WINDOW = window;
    SLOW_LINEAR = slow_linear;
    SLOW_ACCESS = slow_access;
    SLOW_SITE = slow_site;
    SLOW_SPILL = slow_spill;
    COPY_TO = copy_to;
    BOUNCE = bounce;
    BOUNCE_AT = bounce_at;
    FORMS = forms;
    INTERRUPT_WAITS = interrupt_waits;
    TRANSLATOR = translator;
    BLOCKS_RUN = blocks_run;
    INSTRUCTIONS_RUN = instructions_run;
    TLB_LOOKUPS = tlb_lookups;
    VICTIMS_RECALLED = victims_recalled;
    CROSSINGS = crossings;
    SECOND_JUMPS = second_jumps;
    CROSSINGS_TO_LINK = crossings_to_link;
    MAP_JUMPS = map_jumps;
    VECTOR_LOADS = vector_loads;
    USER_ENTRIES = user_entries;
    INTERRUPT_RETURNS = interrupt_returns;
    RETURNS = returns;
    ASKS_RETURN = asks_return;
    GDTR_BASE = cpu.gdtr.base;
    GDTR_LIMIT = cpu.gdtr.limit;
    NMI_BLOCKED = cpu.nmi_blocked;
    SEGMENT_ENDS = segment_ends;
    JUMP_CACHE = jump_cache;
    CODE_MAP = code_map;
    PAUSES_LEFT = cpu.pauses_left;
    TSC_OFFSET = cpu.tsc_offset;
    TSC_AUX = cpu.msr.tsc_aux;
    STAR = cpu.msr.star;
    LSTAR = cpu.msr.lstar;
    SFMASK = cpu.msr.sfmask;
    CR2 = cpu.cr2;
    CR3 = cpu.cr3;
    CR4 = cpu.cr4;
    EFER = cpu.efer;
    CPL = cpu.cpl;
    KERNEL_GS_BASE = cpu.msr.kernel_gs_base;
    SEG = cpu.seg;
    TLB_AT = cpu.tlb;
}

/// Behind the context lie the *slots*: host addresses that code jumps through, where a link assumes what is right for one CPU or may have to be
/// cut often (writing code that runs costs the processor a flush of its pipeline). Each CPU has its own of every slot.
/// A page before them has a name (see `table_unsafe`).
pub(crate) const SLOTS: usize = size_of::<Context>().next_multiple_of(4096) + NAMED;

/// Displacement of a slot that code jumps through.
pub(crate) const fn slot(n: u32) -> i32 {
    SLOTS as i32 + 8 * n as i32
}

/// Displacement of a general register's slot.
pub(crate) const fn gpr(n: u8) -> i32 {
    GPR + 8 * n as i32
}

/// Displacement of the TLB of a privilege.
pub(crate) const fn tlb(privilege: u8) -> i32 {
    TLB_AT + (size_of::<Tlb>() as i32) * privilege as i32
}

macro_rules! return_displacement {
    ($($name:ident = $field:ident;)*) => { $(
        /// Displacement of this of the segments of user code or of the kernel.
        pub(crate) const fn $name(kernel: bool) -> i32 {
            let which = size_of::<ReturnSegments>() * kernel as usize;
            RETURNS + (which + offset_of!(ReturnSegments, $field)) as i32
        }
    )* };
}
return_displacement! {
    return_code = code;
    return_stack = stack;
    return_cs = cs;
    return_gdt_base = gdt_base;
    return_gdt_limit = gdt_limit;
}

macro_rules! segment_displacement {
    ($($name:ident = $field:ident;)*) => { $(
        /// Displacement of this part of a segment register.
        pub(crate) const fn $name(seg: u8) -> i32 {
            SEG + (size_of::<Segment>() * seg as usize + offset_of!(Segment, $field)) as i32
        }
    )* };
}
segment_displacement! {
    segment_base = base;
    segment_limit = limit;
    segment_attributes = attributes;
    segment_selector = selector;
}

/// Displacement of the last offset of a segment for reads or writes.
pub(crate) const fn segment_end(seg: u8, write: bool) -> i32 {
    SEGMENT_ENDS + 8 * (6 * write as i32 + seg as i32)
}

/// Displacement of the second level of a jump cache.
pub(crate) const fn second_jump_cache(number: u8) -> i32 {
    jump_cache(number) + offset_of!(JumpCache, second) as i32
}

/// Displacement of the bits of what was brought to a jump cache.
pub(crate) const fn brought(number: u8) -> i32 {
    jump_cache(number) + offset_of!(JumpCache, brought) as i32
}

/// Displacements of the tables of the code map.
pub(crate) const MAP_PAGES: i32 = CODE_MAP + code_map::PAGES_AT as i32;
pub(crate) const MAP_TAGS: i32 = CODE_MAP + code_map::TAGS_AT as i32;
pub(crate) const MAP_OFFSETS: i32 = CODE_MAP + code_map::OFFSETS_AT as i32;

/// Displacement of the first level of a jump cache, by its number ([`crate::blocks::jump_cache_of`]).
pub(crate) const fn jump_cache(number: u8) -> i32 {
    JUMP_CACHE + (size_of::<JumpCache>() as i32) * number as i32
}

const _: () = assert!(size_of::<JumpEntry>() == 16 && size_of::<SecondEntry>() == 16);
const _: () = assert!(offset_of!(SecondEntry, offset) == 8);
const _: () = assert!(size_of::<doppel_x86::Rflags>() == 8);
