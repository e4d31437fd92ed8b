//! The code at the start of the cache through which everything enters and leaves translated code.
//!
//! * `enter`: called by Rust; saves what the C calling convention preserves, loads the guest's registers and jumps to `entry`.
//! * `exit`: jumped to by blocks with the exit's number in the context; the reverse.
//! * `slow`: a memory access missed the TLB; calls the monitor, then goes on at the same check or leaves.
//!
//! S0 and S1 (r10, r11) are scratch: the guest's values of them are always in their slots.

use crate::asm::*;
use crate::context as ctx;

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

/// Host addresses of the thunks.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Thunks {
    pub enter: u64,
    pub exit: u64,
    pub slow: u64,
}

/// Assembles the thunks for a cache that begins at `base`.
pub(crate) fn assemble(asm: &mut Asm, base: u64, xsaveopt: bool) -> Thunks {
    asm.reset(base);
    let enter = base;
    for r in CALLEE_SAVED {
        push(asm, r);
    }
    asm.lea(RSP, RSP, -8);
    asm.store(ctx::HOST_RSP, RSP);
    let resume = asm.pos();
    xrstor(asm, XSAVE_MASK);
    load_guest(asm);
    asm.load(S0, ctx::SLOW_LINEAR);
    asm.jmp_gs(ctx::ENTRY);

    let exit = base + asm.pos() as u64;
    store_guest(asm);
    asm.load(RSP, ctx::HOST_RSP);
    asm.raw(&[0x9c, 0x58]); // pushfq; pop rax
    asm.store(ctx::EXIT_FLAGS, RAX);
    xsave(asm, xsaveopt);
    let leave = asm.pos();
    asm.raw(&[0x65, 0x0f, 0xae, 0x14, 0x25]); // ldmxcsr gs:[]
    asm.raw(&ctx::HOST_MXCSR.to_le_bytes());
    asm.lea(RSP, RSP, 8);
    for r in CALLEE_SAVED.into_iter().rev() {
        pop(asm, r);
    }
    asm.raw(&[0xc3]);

    let slow = base + asm.pos() as u64;
    store_guest(asm);
    asm.store(ctx::SLOW_LINEAR, S0);
    asm.load(RSP, ctx::HOST_RSP);
    xsave(asm, xsaveopt);
    asm.raw(&[0x65, 0x0f, 0xae, 0x14, 0x25]);
    asm.raw(&ctx::HOST_MXCSR.to_le_bytes());
    asm.load(RDI, ctx::TRANSLATOR);
    asm.mov(RSI, S0);
    asm.mov32(RDX, S1);
    asm.call_gs(ctx::SLOW_ACCESS);
    asm.test64(RAX, RAX);
    let out = asm.jcc(CC_E);
    asm.bind_at(out, leave);
    asm.store(ctx::ENTRY, RAX);
    let again = asm.jmp();
    asm.bind_at(again, resume);
    Thunks { enter, exit, slow }
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

fn xsave_mask(asm: &mut Asm, mask: u32) {
    asm.mov_imm(RAX, u64::from(mask));
    asm.xor32(RDX, RDX);
}

fn xsave(asm: &mut Asm, optimized: bool) {
    xsave_mask(asm, XSAVE_MASK);
    // xsaveopt64 is 0F AE /6, xsave64 is 0F AE /4.
    let extension = if optimized { 6 << 3 } else { 4 << 3 };
    asm.raw(&[0x65, 0x48, 0x0f, 0xae, extension | 4, 0x25]);
    asm.raw(&ctx::FPU.to_le_bytes());
}

fn xrstor(asm: &mut Asm, mask: u32) {
    xsave_mask(asm, mask);
    asm.raw(&[0x65, 0x48, 0x0f, 0xae, 5 << 3 | 4, 0x25]);
    asm.raw(&ctx::FPU.to_le_bytes());
}
