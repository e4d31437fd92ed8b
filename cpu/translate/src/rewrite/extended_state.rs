//! Saving and restoring the extended state: XSAVE, XSAVEC, XRSTOR.
//!
//! Problem: a kernel saves and restores the vector registers at each context switch and signal, and they are in the host's registers
//! already; left to the monitor, they would go through memory twice.
//! Idea: the instruction itself, on the host address of its area.
//! Invariant: it asks for no component but those that the guest's XCR0 has, which the block's mode tells; an area whose header names
//! others, which the host might have, is left to the interpreter, as is one that is not aligned. The area is as long as these components
//! may take it, and all of it is checked before.
//! A state with an address of the code cache in it is the interpreter's too.
//! Cost: the check is for the whole area, so one at the end of a page whose neighbour is elsewhere in the host is interpreted.

use doppel_x86::FpuArea;
use doppel_x86::interpret::extended_area_size;

use super::*;
use crate::asm::CC_B;

/// The components that the guest's XCR0 has, and the bytes of their area.
#[derive(Clone, Copy, Debug)]
struct Area {
    components: i32,
    size: u16,
}

/// By the mode of a block, where the host has them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Areas {
    avx: Option<Area>,
    avx512: Option<Area>,
}

const AVX: i32 = 7;
const AVX512: i32 = 0xe7;
/// Where XSTATE_BV and XCOMP_BV stand in an area.
const XSTATE_BV: i32 = 512;

impl Areas {
    pub fn of_host() -> Self {
        let area = |components: i32| {
            let size = extended_area_size(components as u64)?;
            let fits = size <= 4096;
            fits.then_some(Area {
                components,
                size: size as u16,
            })
        };
        Areas {
            avx: area(AVX),
            avx512: area(AVX512),
        }
    }

    fn of(&self, simd: Simd) -> Option<Area> {
        match simd {
            Simd::Avx => self.avx,
            Simd::Avx512 => self.avx512,
            _ => None,
        }
    }
}

impl Work<'_> {
    pub(super) fn extended_state(&mut self, i: &GuestInstruction, write: bool) {
        let Some(area) = self.r.areas.of(self.s.simd) else {
            let jump = self.asm().jmp();
            return self.leave_exit(i64::from(i.offset), jump, None, true);
        };
        self.before_check(i);
        // RAX is about to be borrowed.
        self.unpin();
        self.boundary(i);
        self.address(&i.decoded, true);
        let all = Part {
            from: 0,
            size: 0,
            write,
            repeats: false,
        };
        self.check_stretch(i, area.size, write, all, false);
        self.asm().test_imm32(S0, 63);
        self.leave_if(CC_NE, i);
        if !write {
            let a = self.asm();
            a.load_mem(S1, S0, XSTATE_BV);
            a.or_mem(S1, S0, XSTATE_BV + 8);
            a.shl64(S1, 1); // but for the bit of the compacted format
            a.shr64(S1, 1);
            a.test_imm64(S1, !area.components);
            self.leave_if(CC_NE, i);
        }
        let a = self.asm();
        a.store(ctx::PINNED, RAX);
        a.alu_imm32(Alu::And, RAX, area.components);
        self.boundary_with(i, Some(RAX));
        let own = own_bytes(&i.decoded);
        let a = self.asm();
        a.raw(&own);
        a.load(RAX, ctx::PINNED);
        if write {
            self.leave_if_of_host(i);
        }
        self.out.state_moves += 1;
    }

    /// Leaves to the interpreter where the saved FIP is an address of the code cache (see `x87_pointers`).
    fn leave_if_of_host(&mut self, i: &GuestInstruction) {
        const FIP: i32 = FpuArea::FIP as i32;
        let a = self.asm();
        if is_wide(&i.decoded) {
            a.load_mem(S1, S0, FIP);
            a.add_gs(S1, ctx::CODE_BEFORE);
        } else {
            a.load_mem32(S1, S0, FIP);
            a.add_gs32(S1, ctx::CODE_BEFORE);
        }
        a.cmp_gs(S1, ctx::CODE_LEN);
        self.leave_if(CC_B, i);
    }
}

/// The form with 64-bit FIP and FDP.
fn is_wide(d: &Instruction) -> bool {
    use iced_x86::Mnemonic::*;
    matches!(d.mnemonic(), Xsave64 | Xsavec64 | Xrstor64)
}

/// The instruction with `[r10]` for its operand.
fn own_bytes(d: &Instruction) -> [u8; 4] {
    use iced_x86::Mnemonic::*;
    let (opcode, extension) = match d.mnemonic() {
        Xsavec | Xsavec64 => (0xc7, 4),
        Xrstor | Xrstor64 => (0xae, 5),
        _ => (0xae, 4),
    };
    let rex = 0x41 | u8::from(is_wide(d)) << 3;
    [rex, 0x0f, opcode, extension << 3 | (S0 & 7)]
}
