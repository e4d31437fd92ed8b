//! IRETQ from the kernel to 64-bit user code, as page faults and interrupts end, and to itself, as interrupts of it do and as Linux serializes.
//!
//! Problem: IRET checks a frame of five words, two descriptors in memory and four segment registers, and the interpreter takes longer
//! for it than for the rest of the way back.
//! Idea: Linux comes back to the same two pairs of selectors each time. When the interpreter has executed such an IRET, the host addresses of the
//! two descriptors are noted (`interrupt_return`), and from then on the code here only looks whether everything is as usual: those selectors,
//! flat descriptors, ordinary flags, no data segment that would have to be dropped. The kernel's SS may be null as well, as an interrupt of
//! user code leaves it.
//! Invariant: what is not as usual is found before anything has changed, and is interpreted.
//! Cost: 50 instructions, once an IRET.

use doppel_x86::{Segment, flat_attributes};

use super::system::{CR4_TSD, CS, SS, TF, VIF_VIP};
use super::*;

/// Bytes of the frame.
const FRAME: u16 = 40;
const NEW_RIP: i32 = 0;
const NEW_CS: i32 = 8;
const FLAGS: i32 = 16;
const NEW_RSP: i32 = 24;
const NEW_SS: i32 = 32;

const NT: i32 = 1 << 14;
const IOPL: i32 = 3 << 12;
const VM: i32 = 1 << 17;
const ID: i32 = 1 << 21;
/// Flags that nobody usually comes back with. (RF says nothing where there is no breakpoint.)
const UNUSUAL: i32 = TF | NT | IOPL | VM | VIF_VIP;

/// What an IRET goes back to.
struct To {
    kernel: bool,
    /// Its flat segments: two halves of each descriptor, 64-bit code and data, accessed.
    code: [u32; 2],
    data: [u32; 2],
    /// As the segment registers have them.
    attributes: (u32, u32),
    unusual: i32,
}

const DPL: u32 = 3 << 5;
const USER: To = To {
    kernel: false,
    code: [0xffff, 0x00af_fb00],
    data: [0xffff, 0x00cf_f300],
    attributes: (flat_attributes::CODE64 | DPL, flat_attributes::DATA | DPL),
    unusual: UNUSUAL | AC,
};
const KERNEL: To = To {
    kernel: true,
    code: [0xffff, 0x00af_9b00],
    data: [0xffff, 0x00cf_9300],
    attributes: (flat_attributes::CODE64, flat_attributes::DATA),
    unusual: UNUSUAL,
};

/// Jumps to the exit to the interpreter.
type Leave = Vec<Fixup>;

impl Work<'_> {
    pub(super) fn iret(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.unpin();
        let leave = &mut Leave::new();
        self.asm().test_gs_imm32(ctx::RFLAGS, NT);
        self.unless(CC_E, leave);
        // One that is blocked may wait.
        self.asm().test_gs_imm32(ctx::NMI_BLOCKED, 0xff);
        self.unless(CC_E, leave);
        self.asm().mov(S0, RSP);
        self.check(i, FRAME, false);
        // The frame is at the host address in S0.
        let a = self.asm();
        a.load_mem32(S1, S0, NEW_CS);
        a.test_imm32(S1, 3);
        let inwards = a.jcc(CC_E);
        self.return_to_user(i, leave);
        self.asm().bind(inwards);
        self.return_to_kernel(i, leave);
        for jump in std::mem::take(leave) {
            self.asm().bind(jump);
        }
        let jump = self.asm().jmp();
        self.leave_exit(i64::from(i.offset), jump, None, true);
    }

    fn return_to_user(&mut self, i: &GuestInstruction, leave: &mut Leave) {
        self.asm().test_gs_imm32(ctx::CR4, CR4_TSD);
        self.unless(CC_E, leave);
        self.unless_data_segments_stay(leave);
        self.unless_segments_are_known(&USER, leave);
        self.unless_flat(ctx::return_code(false), USER.code, leave);
        self.unless_flat(ctx::return_stack(false), USER.data, leave);
        for (at, step) in [(NEW_CS, 0), (NEW_SS, 8)] {
            let a = self.asm();
            a.load_mem(S1, S0, at);
            a.lea(S1, S1, step);
            a.cmp_gs(S1, ctx::return_cs(false));
            self.unless(CC_E, leave);
        }
        self.unless_flags_are_usual(&USER, leave);
        let a = self.asm();
        a.load_mem(S1, S0, NEW_RIP);
        // Beyond the lower half of the linear addresses.
        a.shr64(S1, 47);
        self.unless(CC_E, leave);
        self.take_frame(&USER);
        let (code, data) = USER.attributes;
        self.flat_segments(code, data, 3);
        let a = self.asm();
        a.alu_gs_imm32(Alu::Add, ctx::USER_ENTRIES, 1);
        a.load(S0, ctx::SPILL);
        self.indirect_at(Privilege::User as u8, i);
    }

    fn return_to_kernel(&mut self, i: &GuestInstruction, leave: &mut Leave) {
        self.unless_segments_are_known(&KERNEL, leave);
        self.unless_flat(ctx::return_code(true), KERNEL.code, leave);
        let a = self.asm();
        a.load_mem(S1, S0, NEW_CS);
        a.cmp_gs(S1, ctx::return_cs(true));
        self.unless(CC_E, leave);
        self.unless_flags_are_usual(&KERNEL, leave);
        let a = self.asm();
        a.load_mem(S1, S0, NEW_RIP);
        // Above its lower 47 bits, an address is all ones or all zeros.
        a.sar64(S1, 47);
        a.alu_imm64(Alu::Add, S1, 1);
        a.alu_imm64(Alu::Cmp, S1, 1);
        self.unless(CC_BE, leave);
        self.keep_stack_segment(leave);
        self.take_frame(&KERNEL);
        self.asm().store16(ctx::segment_selector(CS), S0);
        self.flat_segment(CS, KERNEL.attributes.0);
        self.asm().test_gs_imm32(ctx::RFLAGS, AC);
        let with_ac = self.asm().jcc(CC_NE);
        self.asm().load(S0, ctx::SPILL);
        self.indirect_at(Privilege::Supervisor as u8, i);
        self.asm().bind(with_ac);
        self.asm().load(S0, ctx::SPILL);
        self.indirect_at(Privilege::SupervisorAc as u8, i);
    }

    /// Goes on on a condition, and leaves else.
    fn unless(&mut self, cc: u8, leave: &mut Leave) {
        leave.push(self.asm().jcc(cc ^ 1));
    }

    /// Those of lesser privilege would be dropped, and of null selectors the RPL.
    fn unless_data_segments_stay(&mut self, leave: &mut Leave) {
        let a = self.asm();
        a.load32(S1, ctx::segment_attributes(0));
        for segment in [3, 4, 5] {
            a.and_gs32(S1, ctx::segment_attributes(segment));
        }
        a.test_imm32(S1, Segment::UNUSABLE as i32);
        self.unless(CC_NE, leave);
        let a = self.asm();
        a.load32(S1, ctx::segment_selector(0));
        for segment in [3, 4, 5] {
            a.or_gs32(S1, ctx::segment_selector(segment));
        }
        a.test_imm32(S1, 3);
        self.unless(CC_E, leave);
    }

    /// Whether it is known where their descriptors are: in the GDT that there is.
    fn unless_segments_are_known(&mut self, to: &To, leave: &mut Leave) {
        let a = self.asm();
        a.load(S1, ctx::return_code(to.kernel));
        a.test64(S1, S1);
        if to.kernel {
            let known = a.jcc(CC_NE);
            a.store_imm32(ctx::ASKS_RETURN, 1);
            leave.push(a.jmp());
            a.bind(known);
        } else {
            self.unless(CC_NE, leave);
        }
        let a = self.asm();
        a.load(S1, ctx::GDTR_BASE);
        a.cmp_gs(S1, ctx::return_gdt_base(to.kernel));
        self.unless(CC_E, leave);
        let a = self.asm();
        a.load16(S1, ctx::GDTR_LIMIT);
        a.cmp_gs(S1, ctx::return_gdt_limit(to.kernel));
        self.unless(CC_E, leave);
    }

    /// Whether the descriptor, whose host address stands there, has these halves.
    fn unless_flat(&mut self, descriptor: i32, halves: [u32; 2], leave: &mut Leave) {
        self.asm().load(S1, descriptor);
        for (n, half) in halves.into_iter().enumerate() {
            self.asm().cmp_mem_imm32(S1, 4 * n as i32, half as i32);
            self.unless(CC_E, leave);
        }
    }

    fn unless_flags_are_usual(&mut self, to: &To, leave: &mut Leave) {
        let a = self.asm();
        a.load_mem32(S1, S0, FLAGS);
        a.test_imm32(S1, to.unusual);
        self.unless(CC_E, leave);
        let a = self.asm();
        a.test_imm32(S1, IF);
        let masked = a.jcc(CC_E);
        a.alu_gs_imm32(Alu::Cmp, ctx::INTERRUPT_WAITS, 0);
        self.unless(CC_E, leave);
        self.asm().bind(masked);
    }

    /// The frame's SS is to be what SS is: null, or the flat one of the kernel, which is loaded. (That is no change yet.)
    fn keep_stack_segment(&mut self, leave: &mut Leave) {
        let a = self.asm();
        a.load16(S1, ctx::segment_selector(SS));
        a.cmp_mem16(S1, S0, NEW_SS);
        self.unless(CC_E, leave);
        let a = self.asm();
        a.test64(S1, S1);
        let null = a.jcc(CC_E);
        a.lea(S1, S1, -8);
        a.cmp_gs(S1, ctx::return_cs(true));
        self.unless(CC_E, leave);
        self.unless_flat(ctx::return_stack(true), KERNEL.data, leave);
        self.flat_segment(SS, KERNEL.attributes.1);
        let a = self.asm();
        let kept = a.jmp();
        a.bind(null);
        a.test_gs_imm32(ctx::segment_attributes(SS), Segment::UNUSABLE as i32);
        self.unless(CC_NE, leave);
        self.asm().bind(kept);
    }

    /// Takes RSP and the flags from the frame, notes RIP in the first slot, and leaves the selector of CS in S0.
    fn take_frame(&mut self, to: &To) {
        let a = self.asm();
        a.load_mem(S1, S0, NEW_RIP);
        a.store(ctx::SPILL, S1);
        a.load_mem(RSP, S0, NEW_RSP);
        a.load_mem32(S0, S0, FLAGS);
        let taken = ARITHMETIC | DF | IF | ID | AC;
        a.alu_imm32(Alu::And, S0, taken & !to.unusual);
        a.alu_imm32(Alu::Or, S0, 2);
        a.store(ctx::RFLAGS, S0);
        a.count(ctx::INTERRUPT_RETURNS + 8 * i32::from(to.kernel));
        self.set_arithmetic_flags();
        self.asm().load(S0, ctx::return_cs(to.kernel));
    }
}
