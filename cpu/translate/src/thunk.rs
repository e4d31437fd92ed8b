//! The code at the start of the cache through which everything enters and leaves translated code.
//!
//! * `enter`: called by Rust; saves what the C calling convention preserves, loads the guest's registers and jumps to `entry`.
//! * `exit`: jumped to by blocks with the exit's number in the context; the reverse.
//! * `lookup`: an indirect branch whose target the first level of the jump cache does not know.
//! * `slow`: a memory access was turned away by its check. Where it only crosses into a page that lies next to the first in the host
//!   too, it goes on; else the monitor is called, and it goes on where that says, or leaves.
//!
//! S0 and S1 (r10, r11) are scratch: the guest's values of them are always in their slots.
//!
//! The guest's x87 and vector state is *lazy*: saving and loading it costs more than everything else here. `simd_live` says whether
//! it is in the host's registers. It is not after `enter`; the first block that uses such an instruction loads it (every block that
//! does asks at its start), and whatever calls into Rust saves it where it is live. A kernel hardly ever touches it, so
//! most of its exits move general registers only. The blocks that have asked already and rely on it have slow paths of their own.

use std::collections::BTreeMap;

use doppel_memory::{Privilege, TLB_SLOT_SHIFT, Tlb};

use crate::asm::*;
use crate::blocks::NARROW_USER;
use crate::code_map;
use crate::context::{self as ctx, JUMP_CACHES};
use crate::engine::TranslateOptions;
use crate::flags::FlagPlace;
use crate::jump_cache::{FIRST_INDEX_MASK, FIRST_SHIFT, KICKED_MASK, SECOND_FACTOR, SECOND_SHIFT};
use crate::rewrite::{TLB_INDEX_MASK, check_len};

/// Exit numbers that are not indices of the exit table.
pub(crate) const EXIT_FAULT: u32 = u32::MAX;
/// The target of an indirect jump is not in the jump cache; it stands in the `rip` slot.
pub(crate) const EXIT_INDIRECT: u32 = u32::MAX - 1;
/// A memory access has to be interpreted; its site is in `fault_pc`.
pub(crate) const EXIT_ACCESS: u32 = u32::MAX - 2;

/// State components that XSAVE saves: x87, SSE, AVX, AVX-512.
pub(crate) const XSAVE_MASK: u32 = 0xe7;

const GUEST_IN_HOST: [Reg; 14] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15];
const CALLEE_SAVED: [Reg; 6] = [3, 5, 12, 13, 14, 15];

/// What the numbers of [`Privilege`] stand for.
pub(crate) const PRIVILEGE_NAMES: [&str; 3] = ["user", "kernel", "kernel_ac"];

/// Host addresses of the thunks.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Thunks {
    pub enter: u64,
    pub exit: u64,
    slow: [[[[u64; 2]; 2]; 3]; 2],
    /// By whether vectors are live: asks the monitor for an access.
    ask: [u64; 2],
    /// By the number of the jump cache.
    pub lookup: [u64; JUMP_CACHES],
    /// By where the flags are: a direct branch to another page that is not linked.
    cross: Option<[u64; 2]>,
}

/// What the thunks depend on.
#[derive(Clone, Copy)]
pub(crate) struct How {
    pub xsaveopt: bool,
    /// Victims of the TLB are looked at.
    pub victims: bool,
    /// The vector state is loaded when a block asks for it.
    pub lazy_vectors: bool,
    /// The second level of the jump cache is looked at.
    pub second_jump_cache: bool,
    /// The code map is looked at.
    pub code_map: bool,
    /// Accesses across two pages go on without the monitor.
    pub cross_pages: bool,
    /// Bytes of a check.
    pub check_len: usize,
}

impl How {
    pub fn new(options: &TranslateOptions, xsaveopt: bool) -> Self {
        How {
            xsaveopt,
            victims: options.victims,
            lazy_vectors: options.lazy_vectors,
            second_jump_cache: options.second_jump_cache,
            code_map: options.code_map,
            cross_pages: options.cross_pages,
            check_len: check_len(options.rorx),
        }
    }
}

/// Assembles the thunks for a cache that begins at `base`.
pub(crate) fn assemble(asm: &mut Asm, base: u64, how: How) -> Thunks {
    let xsaveopt = how.xsaveopt;
    asm.reset(base);
    let enter = base;
    for r in CALLEE_SAVED {
        push(asm, r);
    }
    asm.lea(RSP, RSP, -8);
    asm.store(ctx::HOST_RSP, RSP);
    if !how.lazy_vectors {
        load_simd(asm);
    }
    load_guest(asm);
    asm.jmp_gs(ctx::ENTRY);

    let exit = base + asm.pos() as u64;
    store_guest(asm);
    asm.load(RSP, ctx::HOST_RSP);
    asm.raw(&[0x9c, 0x58]); // pushfq; pop rax
    asm.store(ctx::EXIT_FLAGS, RAX);
    park_simd(asm, xsaveopt);
    let leave = asm.pos();
    asm.lea(RSP, RSP, 8);
    for r in CALLEE_SAVED.into_iter().rev() {
        pop(asm, r);
    }
    asm.raw(&[0xc3]);

    let mut asks = [0; 2];
    let slow = [false, true].map(|simd| {
        let ask = asm.pos();
        asks[usize::from(simd)] = base + ask as u64;
        ask_monitor(asm, simd || !how.lazy_vectors, xsaveopt, leave);
        [0, 1, 2].map(|privilege| {
            [false, true].map(|write| {
                [false, true].map(|alone| {
                    let at = base + asm.pos() as u64;
                    crossing(
                        asm,
                        Check {
                            privilege,
                            write,
                            alone,
                        },
                        ask,
                        how,
                    );
                    at
                })
            })
        })
    });
    let lookup = std::array::from_fn(|number| {
        let at = base + asm.pos() as u64;
        lookup(asm, number as u8, (base, exit), how);
        at
    });
    let cross = how.code_map.then(|| {
        [FlagPlace::Saved, FlagPlace::Registers].map(|place| {
            let at = base + asm.pos() as u64;
            cross(asm, place, (base, exit));
            at
        })
    });
    Thunks {
        enter,
        exit,
        slow,
        ask: asks,
        lookup,
        cross,
    }
}

impl Thunks {
    /// The slow path of a check. S0 holds the linear address, S1 the host address behind the check, and `slow_site` is set.
    pub fn slow(&self, simd: bool, check: Check) -> u64 {
        let of_privilege = &self.slow[usize::from(simd)][usize::from(check.privilege)];
        of_privilege[usize::from(check.write)][usize::from(check.alone)]
    }

    /// The part of that which asks the monitor whatever the TLB has.
    pub fn ask(&self, simd: bool) -> u64 {
        self.ask[usize::from(simd)]
    }

    /// Where a direct branch of user code goes on whose target in the page at `PAGE_BASE` stands in S0, and whose exit in the context.
    pub fn cross(&self, flags: FlagPlace) -> Option<u64> {
        let number = usize::from(flags == FlagPlace::Registers);
        self.cross.map(|cross| cross[number])
    }

    /// Each with a name, by address.
    pub fn names(&self) -> BTreeMap<u64, String> {
        let fixed = [(self.enter, "enter"), (self.exit, "exit")];
        let mut names: BTreeMap<_, _> = fixed.map(|(at, n)| (at, n.to_owned())).into();
        let narrow = self.lookup[usize::from(NARROW_USER)];
        names.insert(narrow, "lookup_user_32".to_owned());
        for (at, flags) in self.cross.into_iter().flatten().zip(["", "_with_flags"]) {
            names.insert(at, format!("cross_user{flags}"));
        }
        for (simd, vectors) in ["", "_vectors"].iter().enumerate() {
            names.insert(self.ask[simd], format!("ask{vectors}"));
        }
        for (privilege, of) in PRIVILEGE_NAMES.iter().enumerate() {
            names.insert(self.lookup[privilege], format!("lookup_{of}"));
            for (simd, vectors) in ["", "_vectors"].iter().enumerate() {
                for (write, access) in ["read", "write"].iter().enumerate() {
                    for (alone, run) in ["_run", ""].iter().enumerate() {
                        let at = self.slow[simd][privilege][write][alone];
                        names.insert(at, format!("slow_{of}_{access}{run}{vectors}"));
                    }
                }
            }
        }
        names
    }
}

/// What a check is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Check {
    pub privilege: u8,
    pub write: bool,
    /// The explicit operand of one instruction, of 64 bytes at most, and nothing else.
    pub alone: bool,
}

/// Registers that the slow path uses before it knows whether it has to ask the monitor.
const SLOW_SAVED: [(Reg, i32); 3] = [
    (RAX, ctx::SLOW_SPILL),
    (RCX, ctx::SLOW_SPILL + 8),
    (RDX, ctx::SLOW_SPILL + 16),
];

fn restore_slow_saved(asm: &mut Asm) {
    for (r, slot) in SLOW_SAVED {
        asm.load(r, slot);
    }
}

/// Where the page at RAX is the victim of its slot, that becomes the entry, and the entry the victim; the check is done again.
fn recall_victim(asm: &mut Asm, tlb: i32, tag: i32, check_len: usize) {
    let victims = Tlb::VICTIMS as i32;
    asm.mov32(RCX, RAX);
    asm.shr32(RCX, (12 - TLB_SLOT_SHIFT) as u8);
    asm.alu_imm32(Alu::And, RCX, TLB_INDEX_MASK);
    asm.cmp_indexed(RAX, RCX, tag + victims);
    let no = asm.jcc(CC_NE);
    for at in Tlb::ENTRY.map(|at| at as i32) {
        asm.load_indexed(RAX, RCX, tlb + at);
        asm.load_indexed(RDX, RCX, tlb + victims + at);
        asm.store_indexed(RCX, tlb + at, RDX);
        asm.store_indexed(RCX, tlb + victims + at, RAX);
    }
    asm.load(RAX, ctx::VICTIMS_RECALLED);
    asm.lea(RAX, RAX, 1);
    asm.store(ctx::VICTIMS_RECALLED, RAX);
    restore_slow_saved(asm);
    asm.lea(S1, S1, -(check_len as i32));
    asm.jmp_reg(S1);
    asm.bind(no);
}

/// An access whose two pages are both in the TLB goes on without the monitor.
fn crossing(asm: &mut Asm, check: Check, ask: usize, how: How) {
    let tlb = ctx::tlb(check.privilege);
    let tag = tlb + Tlb::tag(check.write) as i32;
    let host = tlb + Tlb::HOST as i32;
    for (r, slot) in SLOW_SAVED {
        asm.store(slot, r);
    }
    asm.store(ctx::SLOW_LINEAR, S0);
    asm.mov(RAX, S0);
    asm.alu_imm64(Alu::And, RAX, -4096);
    let mut out = Vec::new();
    if how.victims {
        recall_victim(asm, tlb, tag, how.check_len);
    }
    if !how.cross_pages {
        out.push(asm.jmp());
    }
    for page in [RDX, RCX] {
        asm.mov32(RCX, RAX);
        asm.shr32(RCX, (12 - TLB_SLOT_SHIFT) as u8);
        asm.alu_imm32(Alu::And, RCX, TLB_INDEX_MASK);
        asm.cmp_indexed(RAX, RCX, tag);
        out.push(asm.jcc(CC_NE));
        asm.load_indexed(page, RCX, host);
        asm.alu_imm64(Alu::Add, RAX, 4096);
    }
    // RDX and RCX are the two pages in the host; S0 and RAX then point to the bytes in the first, and to its end.
    asm.alu_imm32(Alu::And, S0, 4095);
    asm.lea(RAX, RDX, 4096);
    asm.add64(S0, RDX);
    asm.cmp64(RAX, RCX);
    let apart = asm.jcc(CC_NE);
    asm.count(ctx::CROSSINGS);
    restore_slow_saved(asm);
    asm.jmp_reg(S1);
    asm.bind(apart);
    match check {
        Check { alone: false, .. } => {}
        Check { write: false, .. } => read_copy(asm),
        Check { write: true, .. } => write_copy(asm, &mut out),
    }
    for jump in out {
        asm.bind(jump);
    }
    asm.load(S0, ctx::SLOW_LINEAR);
    restore_slow_saved(asm);
    let on = asm.jmp();
    asm.bind_at(on, ask);
}

/// Bytes on either side of the end of a page that an access across it may touch.
const HALF_BOUNCE: i32 = 64;

/// Copies the last bytes of the page that ends at RAX, and the first of that at RCX, to `bounce`; S0 becomes the address there.
fn copy_both(asm: &mut Asm) {
    asm.alu_imm32(Alu::And, S0, HALF_BOUNCE - 1);
    for at in (0..HALF_BOUNCE).step_by(8) {
        asm.load_mem(RDX, RAX, at - HALF_BOUNCE);
        asm.store(ctx::BOUNCE + at, RDX);
    }
    for at in (0..HALF_BOUNCE).step_by(8) {
        asm.load_mem(RDX, RCX, at);
        asm.store(ctx::BOUNCE + HALF_BOUNCE + at, RDX);
    }
    asm.add_gs(S0, ctx::BOUNCE_AT);
}

/// A read goes on at a copy.
fn read_copy(asm: &mut Asm) {
    asm.count(ctx::CROSSINGS);
    copy_both(asm);
    restore_slow_saved(asm);
    asm.jmp_reg(S1);
}

/// A write goes on in the instruction's form that copies back, if that exists already.
fn write_copy(asm: &mut Asm, out: &mut Vec<Fixup>) {
    asm.store(ctx::COPY_TO, S0);
    asm.store(ctx::COPY_TO + 8, RCX);
    asm.load32(RDX, ctx::SLOW_SITE);
    asm.load(S1, ctx::FORMS);
    asm.load_mem_index8(S1, S1, RDX);
    asm.test64(S1, S1);
    out.push(asm.jcc(CC_E));
    asm.count(ctx::CROSSINGS);
    copy_both(asm);
    asm.store(ctx::SLOW_LINEAR, S0);
    restore_slow_saved(asm);
    asm.jmp_reg(S1);
}

/// Asks the monitor for the access at S0; goes on at the address that it returns, or leaves where that is 0.
fn ask_monitor(asm: &mut Asm, simd: bool, xsaveopt: bool, leave: usize) {
    store_guest(asm);
    asm.store(ctx::SLOW_LINEAR, S0);
    asm.load(RSP, ctx::HOST_RSP);
    if simd {
        save_simd(asm, xsaveopt);
    } else {
        park_simd(asm, xsaveopt);
    }
    asm.load(RDI, ctx::TRANSLATOR);
    asm.load(RSI, ctx::SLOW_LINEAR);
    asm.load32(RDX, ctx::SLOW_SITE);
    asm.call_gs(ctx::SLOW_ACCESS);
    if simd {
        asm.mov(RBP, RAX);
        load_simd(asm);
        asm.mov(RAX, RBP);
    }
    asm.store(ctx::ENTRY, RAX);
    asm.test64(RAX, RAX);
    let again = asm.jcc(CC_NE);
    if simd {
        asm.store_imm32(ctx::SIMD_LIVE, 0);
        host_mxcsr(asm);
    }
    let out = asm.jmp();
    asm.bind_at(out, leave);
    asm.bind(again);
    load_guest(asm);
    asm.load(S0, ctx::SLOW_LINEAR);
    asm.jmp_gs(ctx::ENTRY);
}

/// Goes on at the guest address in S0, which the first level of the jump cache does not know. The code cache begins at `base`.
fn lookup(asm: &mut Asm, number: u8, (base, exit): (u64, u64), how: How) {
    let (first, second) = (ctx::jump_cache(number), ctx::second_jump_cache(number));
    asm.alu_gs_imm32(Alu::Cmp, ctx::JUMP_MASK, KICKED_MASK as i32);
    let kicked = asm.jcc(CC_E);
    let unasked = (!how.second_jump_cache).then(|| asm.jmp());
    asm.imul_imm32(S1, S0, SECOND_FACTOR);
    asm.shr32(S1, SECOND_SHIFT);
    asm.lea_index_only(S1, S1, 4);
    asm.cmp_indexed8(S0, S1, second);
    let here = asm.jcc(CC_E);
    asm.alu_imm32(Alu::Add, S1, 2);
    asm.cmp_indexed8(S0, S1, second);
    let miss = asm.jcc(CC_NE);
    asm.bind(here);
    asm.count(ctx::SECOND_JUMPS);
    asm.store(ctx::SPILL, RAX);
    asm.load32_indexed8(RAX, S1, second + 8);
    asm.mov_imm(S1, base);
    asm.add64(RAX, S1);
    let stays_empty = enter_first(asm, first);
    asm.bind(stays_empty);
    let stays = asm.pos();
    if number == Privilege::User as u8 || number == NARROW_USER {
        asm.alu_imm64(Alu::And, S0, -4096);
        asm.store(ctx::PAGE_BASE, S0);
    }
    asm.mov(S1, RAX);
    asm.load(RAX, ctx::SPILL);
    asm.jmp_reg(S1);
    for jump in [Some(miss), unasked].into_iter().flatten() {
        asm.bind(jump);
    }
    if how.code_map && number == Privilege::User as u8 {
        look_at_code_map(asm, number, (base, stays));
    }
    asm.bind(kicked);
    asm.store(ctx::SPILL + 8, S0);
    asm.store_imm32(ctx::EXIT, EXIT_INDIRECT);
    asm.jmp_to(exit);
}

/// Enters that the linear address in S0 leads to RAX; the jump that is returned is taken where its slot stays empty. S1 is the slot's place.
fn enter_first(asm: &mut Asm, first: i32) -> Fixup {
    asm.mov32(S1, S0);
    asm.alu_imm32(Alu::And, S1, FIRST_INDEX_MASK);
    asm.alu_imm32(Alu::Cmp, S1, KICKED_MASK as i32);
    let stays_empty = asm.jcc(CC_BE);
    asm.store_indexed4(S1, first, S0);
    asm.store_indexed4(S1, first + 8, RAX);
    stays_empty
}

/// RAX = the host address of user code at the linear address in S0; where the code map does not know it, a jump is taken of those that are
/// returned. Destroys S1. The code cache begins at `base`.
fn find_in_map(asm: &mut Asm, base: u64) -> [Fixup; 2] {
    asm.mov32(S1, S0);
    asm.shr32(S1, code_map::PAGE_SHIFT);
    asm.alu_imm32(Alu::And, S1, code_map::PAGE_INDEX_MASK);
    asm.mov(RAX, S0);
    asm.alu_imm64(Alu::And, RAX, -4096);
    asm.cmp_indexed8(RAX, S1, ctx::MAP_PAGES);
    let no_page = asm.jcc(CC_NE);
    asm.load_indexed8(S1, S1, ctx::MAP_PAGES + 8);
    asm.mov32(RAX, S0);
    asm.alu_imm32(Alu::And, RAX, 4095);
    asm.add64(S1, RAX);
    asm.imul_imm32(RAX, S1, code_map::FACTOR);
    asm.shr32(RAX, code_map::SHIFT);
    asm.cmp_indexed8(S1, RAX, ctx::MAP_TAGS);
    let no_block = asm.jcc(CC_NE);
    asm.load32_indexed4(RAX, RAX, ctx::MAP_OFFSETS);
    asm.mov_imm(S1, base);
    asm.add64(RAX, S1);
    asm.count(ctx::MAP_JUMPS);
    [no_page, no_block]
}

/// Goes on at `found` with the host address in RAX where the code map knows the target, which it brings to the first level of the jump
/// cache. The code cache begins at `base`.
fn look_at_code_map(asm: &mut Asm, number: u8, (base, found): (u64, usize)) {
    let first = ctx::jump_cache(number);
    asm.store(ctx::SPILL, RAX);
    let unknown = find_in_map(asm, base);
    let stays_empty = enter_first(asm, first);
    asm.shr32(S1, FIRST_SHIFT);
    asm.set_bit_gs(S1, ctx::brought(number));
    for jump in [asm.jmp(), stays_empty] {
        asm.bind_at(jump, found);
    }
    for jump in unknown {
        asm.bind(jump);
    }
    asm.load(RAX, ctx::SPILL);
}

/// Goes on in the page at `PAGE_BASE` at the offset in S0 where the code map knows that place; else the exit is taken, as is one in
/// [`code_map::CROSSINGS_A_LINK`], for the monitor to link it.
fn cross(asm: &mut Asm, flags: FlagPlace, (base, exit): (u64, u64)) {
    asm.store(ctx::SPILL, RAX);
    if flags == FlagPlace::Registers {
        asm.flags_to_ax();
        asm.store32(ctx::FLAGS, RAX);
    }
    asm.alu_gs_imm32(Alu::Sub, ctx::CROSSINGS_TO_LINK, 1);
    let link = asm.jcc(CC_S);
    asm.add_gs(S0, ctx::PAGE_BASE);
    let unknown = find_in_map(asm, base);
    asm.mov(S1, RAX);
    asm.load(RAX, ctx::SPILL);
    asm.jmp_reg(S1);
    for jump in unknown.into_iter().chain([link]) {
        asm.bind(jump);
    }
    if flags == FlagPlace::Registers {
        asm.load32(RAX, ctx::FLAGS);
        asm.flags_from_ax();
    }
    asm.load(RAX, ctx::SPILL);
    asm.jmp_to(exit);
}

/// Saves the vector state where it is live; it is not afterwards. Destroys RAX, RDX and the flags.
fn park_simd(asm: &mut Asm, xsaveopt: bool) {
    asm.alu_gs_imm32(Alu::Cmp, ctx::SIMD_LIVE, 0);
    let parked = asm.jcc(CC_E);
    save_simd(asm, xsaveopt);
    asm.store_imm32(ctx::SIMD_LIVE, 0);
    asm.bind(parked);
}

/// Loads the vector state. Destroys RAX and RDX, but no flags.
pub(crate) fn load_simd(asm: &mut Asm) {
    asm.load(RAX, ctx::VECTOR_LOADS);
    asm.lea(RAX, RAX, 1);
    asm.store(ctx::VECTOR_LOADS, RAX);
    xsave_mask(asm);
    asm.raw(&[0x65, 0x48, 0x0f, 0xae, 5 << 3 | 4, 0x25]); // xrstor64
    asm.raw(&ctx::FPU.to_le_bytes());
    asm.store_imm32(ctx::SIMD_LIVE, 1);
}

fn save_simd(asm: &mut Asm, xsaveopt: bool) {
    xsave_mask(asm);
    // xsaveopt64 is 0F AE /6, xsave64 is 0F AE /4.
    let extension = if xsaveopt { 6 << 3 } else { 4 << 3 };
    asm.raw(&[0x65, 0x48, 0x0f, 0xae, extension | 4, 0x25]);
    asm.raw(&ctx::FPU.to_le_bytes());
    host_mxcsr(asm);
}

fn xsave_mask(asm: &mut Asm) {
    asm.mov_imm(RAX, u64::from(XSAVE_MASK));
    asm.mov_imm(RDX, 0);
}

fn host_mxcsr(asm: &mut Asm) {
    asm.raw(&[0x65, 0x0f, 0xae, 0x14, 0x25]); // ldmxcsr gs:[]
    asm.raw(&ctx::HOST_MXCSR.to_le_bytes());
}

fn push(asm: &mut Asm, r: Reg) {
    asm.raw(&[0x40 | r >> 3, 0x50 | (r & 7)]);
}

fn pop(asm: &mut Asm, r: Reg) {
    asm.raw(&[0x40 | r >> 3, 0x58 | (r & 7)]);
}

fn store_guest(asm: &mut Asm) {
    for r in GUEST_IN_HOST {
        asm.store(ctx::gpr(r), r);
    }
}

fn load_guest(asm: &mut Asm) {
    for r in GUEST_IN_HOST {
        asm.load(r, ctx::gpr(r));
    }
}
