//! IRETQ from the kernel to 64-bit user code, as page faults and interrupts end.
//!
//! Problem: IRET checks a frame of five words, two descriptors in memory and four segment registers, and the interpreter takes longer
//! for it than for the rest of the way back.
//! Idea: Linux comes back to the same two selectors each time. When the interpreter has executed such an IRET, the host addresses of the
//! two descriptors are noted (`user_return`), and from then on the code here only looks whether everything is as usual: those selectors,
//! flat descriptors, flags of an ordinary program, no data segment that would have to be dropped.
//! Invariant: what is not as usual is found before anything has changed, and is interpreted.
//! Cost: 50 instructions, once an IRET.

use doppel_x86::{Segment, flat_attributes};

use super::system::{CR4_TSD, TF};
use super::*;

/// Bytes of the frame.
const FRAME: u16 = 40;
const RIP: i32 = 0;
const CS: i32 = 8;
const FLAGS: i32 = 16;
const NEW_RSP: i32 = 24;
const SS: i32 = 32;

const NT: i32 = 1 << 14;
const IOPL: i32 = 3 << 12;
const VM: i32 = 1 << 17;
const VIF_VIP: i32 = 3 << 19;
const ID: i32 = 1 << 21;
/// Flags that a program does not usually come back with. (RF says nothing where there is no breakpoint.)
const UNUSUAL: i32 = TF | NT | IOPL | VM | AC | VIF_VIP;

/// The descriptors of flat 64-bit code and of flat data at DPL 3, accessed, as two halves.
const CODE: [u32; 2] = [0xffff, 0x00af_fb00];
const DATA: [u32; 2] = [0xffff, 0x00cf_f300];

impl Work<'_> {
    pub(super) fn iret(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().test_gs_imm32(ctx::CR4, CR4_TSD);
        self.leave_if(CC_NE, i);
        self.asm().test_gs_imm32(ctx::RFLAGS, NT);
        self.leave_if(CC_NE, i);
        self.leave_with_data_segments(i);
        self.leave_unless_descriptors_are_flat(i);
        self.asm().mov(S0, RSP);
        self.check(i, FRAME, false);
        self.leave_unless_frame_is_usual(i);
        self.return_to_user(i);
    }

    /// Those of lesser privilege would be dropped, and of null selectors the RPL.
    fn leave_with_data_segments(&mut self, i: &GuestInstruction) {
        let a = self.asm();
        a.load32(S1, ctx::segment_attributes(0));
        for segment in [3, 4, 5] {
            a.and_gs32(S1, ctx::segment_attributes(segment));
        }
        a.test_imm32(S1, Segment::UNUSABLE as i32);
        self.leave_if(CC_E, i);
        let a = self.asm();
        a.load32(S1, ctx::segment_selector(0));
        for segment in [3, 4, 5] {
            a.or_gs32(S1, ctx::segment_selector(segment));
        }
        a.test_imm32(S1, 3);
        self.leave_if(CC_NE, i);
    }

    fn leave_unless_descriptors_are_flat(&mut self, i: &GuestInstruction) {
        let a = self.asm();
        a.load(S1, ctx::GDTR_BASE);
        a.cmp_gs(S1, ctx::RETURN_GDT_BASE);
        self.leave_if(CC_NE, i);
        let a = self.asm();
        a.load16(S1, ctx::GDTR_LIMIT);
        a.cmp_gs(S1, ctx::RETURN_GDT_LIMIT);
        self.leave_if(CC_NE, i);
        for (at, halves) in [(ctx::RETURN_CODE, CODE), (ctx::RETURN_STACK, DATA)] {
            let a = self.asm();
            a.load(S1, at);
            a.test64(S1, S1);
            self.leave_if(CC_E, i);
            for (n, half) in halves.into_iter().enumerate() {
                self.asm().cmp_mem_imm32(S1, 4 * n as i32, half as i32);
                self.leave_if(CC_NE, i);
            }
        }
    }

    /// The frame is at the host address in S0.
    fn leave_unless_frame_is_usual(&mut self, i: &GuestInstruction) {
        for (at, step) in [(CS, 0), (SS, 8)] {
            let a = self.asm();
            a.load_mem(S1, S0, at);
            a.lea(S1, S1, step);
            a.cmp_gs(S1, ctx::RETURN_CS);
            self.leave_if(CC_NE, i);
        }
        let a = self.asm();
        a.load_mem32(S1, S0, FLAGS);
        a.test_imm32(S1, UNUSUAL);
        self.leave_if(CC_NE, i);
        self.asm().test_imm32(S1, IF);
        let masked = self.asm().jcc(CC_E);
        self.leave_if_interrupt_waits(i);
        let a = self.asm();
        a.bind(masked);
        a.load_mem(S1, S0, RIP);
        // Beyond the lower half of the linear addresses.
        a.shr64(S1, 47);
        self.leave_if(CC_NE, i);
    }

    fn return_to_user(&mut self, i: &GuestInstruction) {
        let a = self.asm();
        a.load_mem(S1, S0, RIP);
        a.store(ctx::SPILL, S1);
        a.load_mem(RSP, S0, NEW_RSP);
        a.load_mem32(S0, S0, FLAGS);
        a.alu_imm32(Alu::And, S0, ARITHMETIC | DF | IF | ID);
        a.alu_imm32(Alu::Or, S0, 2);
        a.store(ctx::RFLAGS, S0);
        a.alu_gs_imm32(Alu::Add, ctx::USER_ENTRIES, 1);
        a.count(ctx::INTERRUPT_RETURNS);
        a.store_imm8(ctx::NMI_BLOCKED, 0);
        self.set_arithmetic_flags();
        self.asm().load(S0, ctx::RETURN_CS);
        let user = 3 << 5;
        let code = flat_attributes::CODE64 | user;
        self.flat_segments(code, flat_attributes::DATA | user, 3);
        self.asm().load(S0, ctx::SPILL);
        self.indirect_at(Privilege::User as u8, i);
    }
}
