//! Where things are in a generated kernel. Linear is physical in the first 2 MiB, which are all of RAM; those from
//! [`USER_CODE`] to [`SPARE`] are the user's pages. The experiments take place in 512 pages that have several linear
//! addresses ([`ALIASES`]) and in large pages beside them.

/// Bytes of RAM.
pub const RAM: u64 = 2 << 20;

/// All page tables.
pub const TABLES: std::ops::Range<u64> = PML4..0x1_0000;
/// Page tables of the identity map.
pub const PML4: u64 = 0x1000;
/// The root of the second address space.
pub const PML4_B: u64 = 0x2000;
/// From either root to that of five levels.
pub const TO_PML5: u64 = 0x2000;
pub const PDPT: u64 = 0x5000;
pub const PD: u64 = 0x6000;
pub const PT: u64 = 0x7000;
/// Tables of the experiments, of which there are two sets, one for each address space.
pub const X_TABLES: [[u64; 3]; 2] = [[0x8000, 0x9000, 0xa000], [0xb000, 0xc000, 0xd000]];
/// What is above them with five levels.
pub const X_PML4: [u64; 2] = [0xe000, 0xf000];
pub const IDT: u64 = 0x1_1000;
/// Task state segments of kernels without long mode.
pub const TASK_STATES: u64 = 0x1_2000;
pub const DOUBLE_FAULT_TSS: u64 = 0x1_2800;
/// Sixteen bytes for each vector.
pub const STUBS: u64 = 0x1_3000;
/// What the stubs lead to, the dispatcher, the entries of SYSCALL and SYSENTER, the end.
pub const SUPERVISOR: u64 = 0x1_4000;
pub const SYSCALL_ENTRY: u64 = SUPERVISOR + 0x800;
pub const SYSENTER_ENTRY: u64 = SUPERVISOR + 0x900;
pub const DISPATCH: u64 = SUPERVISOR + 0xa00;
/// A routine that changes the number of levels: its 64-bit and its 32-bit part.
pub const CHANGE_LEVELS: u64 = SUPERVISOR + 0xd00;
pub const CHANGE_LEVELS_32: u64 = SUPERVISOR + 0xd40;
pub const DOUBLE_FAULT_TASK_CODE: u64 = SUPERVISOR + 0xe80;
/// HLT: the kernel is done.
pub const FINISH: u64 = SUPERVISOR + 0xf00;
/// The supervisor's variables, a word each.
pub const CURSOR: u64 = 0x1_5000;
pub const SCHEDULE_END: u64 = 0x1_5008;
pub const LOG_NEXT: u64 = 0x1_5010;
pub const FLAG_MASK: u64 = 0x1_5018;
pub const FIXES_LEFT: u64 = 0x1_5020;
pub const BASE_CR0: u64 = 0x1_5028;
pub const BASE_CR4: u64 = 0x1_5030;
pub const SCRATCH: u64 = 0x1_5038;
pub const BASE_EFER: u64 = 0x1_5040;
pub const BASE_PKRU: u64 = 0x1_5048;
/// What the handler of a vector does, a word for each; those from 0x100 on are the entries of SYSCALL and SYSENTER.
pub const ACTIONS: u64 = 0x1_6000;
/// [`STEP_SIZE`] bytes for each step.
pub const STEPS: u64 = 0x1_8000;
pub const STEP_SIZE: u64 = 0x100;
pub const MOST_STEPS: u64 = 64;
/// Numbers of steps in the order in which they run.
pub const SCHEDULE: u64 = 0x1_c000;
/// Entries that a handler of page faults puts into the page tables.
pub const GOOD_ENTRIES: u64 = 0x1_d000;
pub const GDT: u64 = 0x1_e000;
pub const LDT: u64 = 0x1_f000;
/// The TSS, with an I/O permission map of all ports.
pub const TSS: u64 = 0x2_0000;
pub const TSS_LIMIT: u64 = 0x68 + 0x2000;
pub const KERNEL_STACK: u64 = 0x2_8000;
/// SYSCALL's and SYSENTER's stack.
pub const CALL_STACK: u64 = 0x2_4000;
/// Tops of the stacks of the interrupt stack table are 0x1000 apart from here.
pub const IST1: u64 = 0x2_a000;
/// The stack of steps in the kernel.
pub const STEP_STACK: u64 = 0x3_8000;
pub const KERNEL_CODE: u64 = 0x4_0000;
pub const KERNEL_DATA: u64 = 0x5_0000;
/// Code of the kernel that ends the step.
pub const KERNEL_PAD: u64 = 0x5_8000;
/// Behind either: code of a task that returns to the one before.
pub const RETURNING_PAD: u64 = 0x10;
pub const LOG: u64 = 0x8_0000;
pub const RECORD: u64 = 0x100;
pub const MOST_RECORDS: u64 = 0x400;
pub const USER_CODE: u64 = 0x10_0000;
pub const USER_DATA: u64 = 0x11_0000;
/// Top of the user's stack.
pub const USER_STACK: u64 = 0x12_0000;
/// Code of the user that ends the step.
pub const USER_PAD: u64 = 0x12_1000;
/// Pages that the experiments map; the first [`ROUTINE_PAGES`] hold routines.
pub const SPARE: u64 = 0x18_0000;
pub const SPARE_PAGES: u64 = 64;
pub const ROUTINE_PAGES: u64 = 16;
/// A page of device memory.
pub const DEVICE: u64 = 0xfed0_0000;

/// Linear addresses of the experiments' first page: an ordinary one, below 4 GiB, the last before the canonical addresses
/// end, the first after they begin again.
pub const ALIASES: [u64; 4] = [
    0x80_0000_0000,
    0x4000_0000,
    0x7fff_ffe0_0000,
    0xffff_8000_0000_0000,
];
/// The same and others on a processor with five levels: an ordinary one, the last before the canonical addresses end, the first after
/// they begin again.
pub const WIDE_ALIASES: [u64; 7] = [
    ALIASES[0],
    ALIASES[1],
    ALIASES[2],
    ALIASES[3],
    (1 << 48) + ALIASES[0],
    0x00ff_ffff_ffe0_0000,
    0xff00_0000_0000_0000,
];
/// With five levels the identity map is here, too.
pub const WIDE: u64 = 0xffff_0000_0000_0000;
/// Large pages of the experiments: of 2 MiB from here on, and of 1 GiB.
pub const LARGE: u64 = ALIASES[0] + (1 << 21);
pub const HUGE: u64 = ALIASES[0] + (1 << 30);
pub const LARGE_PAGES: u64 = 7;
pub const HUGE_PAGES: u64 = 3;

pub const K64: u16 = 0x10;
pub const KDS: u16 = 0x18;
pub const U32: u16 = 0x23;
pub const UDS: u16 = 0x2b;
pub const U64: u16 = 0x33;
pub const U16: u16 = 0x3b;
pub const TR: u16 = 0x40;
pub const LDTR: u16 = 0x50;
pub const K32: u16 = 0x60;
/// The same task state segment, but short.
pub const SHORT_TR: u16 = 0x70;
/// Where there is no long mode: the task of double faults.
pub const DOUBLE_FAULT_TR: u16 = 0x78;
/// Random descriptors, then random call gates.
pub const RANDOM_DESCRIPTORS: std::ops::Range<u16> = 0x80..0x200;
pub const CALL_GATES: std::ops::Range<u16> = 0x200..0x300;

/// 64 KiB of the user's data and of its stack, whose pointer is SP; 16-bit code, data and stack of the kernel.
pub const D16: u16 = 0x303;
pub const S16: u16 = 0x30b;
pub const K16: u16 = 0x310;
pub const KD16: u16 = 0x318;
pub const KS16: u16 = 0x320;
/// Code with a base and data for CPL 1, code with a limit and data for CPL 2.
pub const C1: u16 = 0x329;
pub const DS1: u16 = 0x331;
pub const C2: u16 = 0x33a;
pub const DS2: u16 = 0x342;
/// Where the stacks of 16 bits begin.
pub const S16_BASE: u64 = USER_STACK - 0x1_0000;
pub const KS16_BASE: u64 = STEP_STACK - 0x8000;

/// The descriptors of these.
pub const SHORT_DESCRIPTORS: [(u16, u64); 9] = [
    (D16, short(USER_DATA, 0xffff, 0xf3)),
    (S16, short(S16_BASE, 0xffff, 0xf3)),
    (K16, short(KERNEL_CODE, 0xffff, 0x9b)),
    (KD16, short(KERNEL_DATA, 0x7fff, 0x93)),
    (KS16, short(KS16_BASE, 0xffff, 0x93)),
    (C1, short(KERNEL_CODE, 0xffff, 0x40bb)),
    (DS1, short(0, 0xf_ffff, 0xc0b3)),
    (C2, short(0, 0xe_ffff, 0xc0db)),
    (DS2, short(0, 0xf_ffff, 0xc0d3)),
];

const fn short(base: u64, limit: u64, attributes: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | attributes << 40 | (limit >> 16) << 48
}

/// Whether an instruction is the supervisor's, by either map.
pub fn is_supervisors(rip: u64) -> bool {
    (STUBS..CURSOR).contains(&(rip & !WIDE))
}

/// INT with this vector ends a step.
pub const END_STEP: u8 = 0x81;
/// Vectors whose gates are random.
pub const RANDOM_GATES: std::ops::Range<u8> = 0x90..0xa0;

/// Ports that act.
pub const PORT_INTERRUPT: u16 = 0x80;
pub const PORT_NMI: u16 = 0x84;
pub const PORT_DMA: u16 = 0x88;

/// The words that a step's description has.
pub mod step {
    pub const RIP: u64 = 0;
    pub const CS: u64 = 8;
    pub const FLAGS: u64 = 16;
    pub const RSP: u64 = 24;
    pub const SS: u64 = 32;
    /// RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8 to R15.
    pub const REGISTERS: u64 = 40;
    pub const CR3: u64 = 160;
    /// Bit 0: CR0, CR4 and EFER are put back before; bit 1: DR7.
    pub const RESTORES: u64 = 168;
    /// DS and ES.
    pub const DATA: u64 = 176;
}

/// What a handler does after its note.
pub mod action {
    /// Begins the next step.
    pub const NEXT: u64 = 0;
    /// Returns.
    pub const RETURN: u64 = 1;
    /// Makes the page of CR2 a good one, so often, and returns; then begins the next step.
    pub const FIX: u64 = 2;
    /// Returns with RF.
    pub const RESUME: u64 = 3;
    /// Returns with TF cleared.
    pub const STOP_STEPPING: u64 = 4;
    /// Returns by SYSRET or SYSEXIT, with the operand size.
    pub const SYSRET: u64 = 5;
    pub const SYSRET32: u64 = 6;
    pub const SYSEXIT: u64 = 7;
}
