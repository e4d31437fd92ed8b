//! Instructions with a memory operand.

use doppel_x86::patch::{Operand, with_operand};

use super::*;

impl Work<'_> {
    pub(super) fn memory(&mut self, i: &GuestInstruction, size: u8, write: bool) {
        let (base, disp) = if self.s.form == Form::TwoPages {
            self.before_check(i);
            self.asm().load(S0, ctx::SLOW_LINEAR);
            self.split(size);
            (S0, 0)
        } else {
            self.operand(i, size, write)
        };
        self.before_own(i);
        let mut own = i.decoded;
        let scratch = i.uses & (1 << S0 | 1 << S1) != 0;
        let operand = scratch
            .then(|| self.replace_scratch_operand(&mut own))
            .flatten();
        if let Some((n, access)) = operand
            && access != Use::WritesAll
        {
            self.asm().load(S1, ctx::gpr(n));
        }
        let register = operand.map(|_| S1);
        self.emit_with_host_address(i, &mut own, register, base, disp);
        if let Some((n, access)) = operand
            && access != Use::Reads
        {
            self.asm().store(ctx::gpr(n), S1);
        }
        if self.s.form == Form::TwoPages {
            self.copy_out();
        }
        self.after_own(i);
    }

    /// Works out how many of the bytes at S0, which lie around the middle of `bounce`, belong to each page.
    fn split(&mut self, size: u8) {
        let a = self.asm();
        a.mov32(S1, S0);
        a.alu_imm32(Alu::Or, S1, -64);
        a.neg32(S1);
        a.store(ctx::SPILL + 24, S1);
        a.neg32(S1);
        a.alu_imm32(Alu::Add, S1, size.into());
        a.store(ctx::SPILL + 32, S1);
    }

    /// Moves what the instruction has written at `bounce` to the two pages where it belongs. No flag changes.
    fn copy_out(&mut self) {
        let saved = [
            (RCX, ctx::SPILL),
            (RSI, ctx::SPILL + 8),
            (RDI, ctx::SPILL + 16),
        ];
        let a = self.asm();
        for (r, slot) in saved {
            a.store(slot, r);
        }
        a.load(RSI, ctx::SLOW_LINEAR);
        for part in 0..2 {
            a.load(RDI, ctx::COPY_TO + 8 * part);
            a.load(RCX, ctx::SPILL + 24 + 8 * part);
            a.raw(&[0xf3, 0xa4]); // rep movsb
        }
        for (r, slot) in saved {
            a.load(r, slot);
        }
    }

    /// A register operand r10 or r11 becomes S1; tells which it was and how it is used.
    pub(super) fn replace_scratch_operand(&mut self, own: &mut Instruction) -> Option<(Reg, Use)> {
        let mut found: Option<(Reg, Use)> = None;
        for op in 0..own.op_count() {
            if own.op_kind(op) != OpKind::Register || !is_scratch(own.op_register(op)) {
                continue;
            }
            let r = own.op_register(op);
            let n = if r.full_register() == Register::R10 {
                S0
            } else {
                S1
            };
            let access = Use::of(self.r.info.info(own).op_access(op), r.size());
            found = Some((n, found.map_or(access, |(_, before)| access.and(before))));
            own.set_op_register(op, scratch_one(r));
        }
        found
    }

    /// Emits the instruction with `[base + disp]` for its memory operand; `own` is it with its registers replaced, `register` the one
    /// that replaces what ModRM.reg names.
    fn emit_with_host_address(
        &mut self,
        i: &GuestInstruction,
        own: &mut Instruction,
        register: Option<Reg>,
        base: Reg,
        disp: i32,
    ) {
        if !names_high_byte(own) || base < 8 {
            self.emit_with_operand(i, own, register, base, disp);
            return;
        }
        // AH to BH cannot be named together with a base that needs a REX prefix: RBP stands in for it.
        self.asm().store(ctx::SPILL, RBP);
        self.asm().mov(RBP, base);
        self.emit_with_operand(i, own, register, RBP, disp);
        self.asm().load(RBP, ctx::SPILL);
    }

    fn emit_with_operand(
        &mut self,
        i: &GuestInstruction,
        own: &mut Instruction,
        register: Option<Reg>,
        base: Reg,
        disp: i32,
    ) {
        if self.patch(i, register, base, disp) {
            return;
        }
        explicit_form(own);
        set_host_operand(own, base, disp);
        self.encode(own);
    }

    /// Emits the instruction's own bytes with another memory operand, where they are of a plain form.
    fn patch(&mut self, i: &GuestInstruction, register: Option<Reg>, base: Reg, disp: i32) -> bool {
        if self.s.mode.width == Width::Bits16 {
            // The bytes mean something else.
            return false;
        }
        let operand = Operand {
            base,
            disp,
            renamed: register.map(|r| (1 << S0 | 1 << S1, r)),
        };
        let bytes = self.block.bytes_of(i);
        let patched = with_operand(&i.decoded, bytes, operand);
        if let Some(bytes) = &patched {
            self.r.asm.raw(bytes.get());
        }
        patched.is_some()
    }

    /// `bt m, r` and its family: the register is a signed bit offset from the operand's address.
    pub(super) fn bit_string(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        let bit = d.op1_register();
        let n = bit.full_register().number() as Reg;
        self.before_check(i);
        self.linear_address(i, 0, (0, true));
        let shift = match bit.size() {
            8 => 6,
            4 => 5,
            _ => 4,
        };
        let scratch = is_scratch(bit);
        if scratch {
            self.asm().load(S1, ctx::gpr(n));
        }
        // What holds the offset until the check destroys it.
        let at = if scratch { S1 } else { n };
        let a = self.asm();
        match bit.size() {
            8 => a.mov(S1, at),
            4 => a.raw(&[0x4c | at >> 3, 0x63, 0xc0 | (S1 & 7) << 3 | (at & 7)]), // movsxd
            _ => a.raw(&[0x4c | at >> 3, 0x0f, 0xbf, 0xc0 | (S1 & 7) << 3 | (at & 7)]), // movsx
        }
        a.sar64(S1, shift);
        let scale = bit.size().trailing_zeros() as u8;
        a.shl64(S1, scale);
        a.add64(S0, S1);
        if i.narrow {
            a.mov32(S0, S0);
        }
        let write = d.mnemonic() != iced_x86::Mnemonic::Bt;
        self.check(i, bit.size() as u16, write);
        // Flags first: the mask destroys them, so it goes through the spill slot's copy in S1.
        let bits = bit.size() as i32 * 8 - 1;
        match scratch {
            true => self.asm().load(S1, ctx::gpr(n)),
            false => self.asm().mov(S1, n),
        }
        self.asm().alu_imm32(Alu::And, S1, bits);
        if self.place == FlagPlace::Saved && self.wants_registers(i) {
            self.asm().store(ctx::SPILL, S1);
            self.restore_flags();
            self.asm().load(S1, ctx::SPILL);
            self.place = FlagPlace::Registers;
        }
        if !self.patch(i, Some(S1), S0, 0) {
            let mut own = *d;
            own.set_op1_register(scratch_one(bit));
            set_host_operand(&mut own, S0, 0);
            self.encode(&own);
        }
        self.after_own(i);
    }
}

/// True where a register operand is AH, BH, CH or DH.
pub(super) fn names_high_byte(i: &Instruction) -> bool {
    (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Register && is_high_byte(i.op_register(op)))
}

fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::BH | Register::CH | Register::DH)
}

pub(super) fn set_host_operand(i: &mut Instruction, base: Reg, disp: i32) {
    i.set_segment_prefix(Register::None);
    i.set_memory_base(pin::wide(base));
    i.set_memory_index(Register::None);
    i.set_memory_index_scale(1);
    i.set_memory_displacement64(disp as i64 as u64);
    i.set_memory_displ_size(match i8::try_from(disp) {
        Ok(0) => 0,
        Ok(_) => 1,
        Err(_) => 8,
    });
}

/// The accumulator forms with a 64-bit absolute address have no ModRM byte to put a register into.
fn explicit_form(i: &mut Instruction) {
    let code = match i.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    i.set_code(code);
}
