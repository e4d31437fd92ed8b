//! A small assembler for the fixed sequences that the translator adds around the guest's instructions.
//!
//! Only the forms that are needed, each one method, all in 64-bit mode. The guest's own instructions
//! do not come through here: they are copied, or re-encoded by iced-x86.

/// Host registers by their encoding.
pub(crate) type Reg = u8;
pub(crate) const RAX: Reg = 0;
pub(crate) const RCX: Reg = 1;
pub(crate) const RDX: Reg = 2;
pub(crate) const RSP: Reg = 4;
pub(crate) const RBP: Reg = 5;
pub(crate) const RSI: Reg = 6;
pub(crate) const RDI: Reg = 7;
/// First scratch register: addresses.
pub(crate) const S0: Reg = 10;
/// Second scratch register: TLB index, operands.
pub(crate) const S1: Reg = 11;

/// Arithmetic of the `81 /n` group.
#[derive(Clone, Copy)]
pub(crate) enum Alu {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Cmp = 7,
}

/// Condition codes as in `jcc`.
pub(crate) const CC_NE: u8 = 5;
pub(crate) const CC_E: u8 = 4;
pub(crate) const CC_BE: u8 = 6;
pub(crate) const CC_A: u8 = 7;
pub(crate) const CC_S: u8 = 8;
pub(crate) const CC_AE: u8 = 3;
pub(crate) const CC_B: u8 = 2;
pub(crate) const CC_G: u8 = 15;

/// `[base + index * scale + disp]`; base and index may be missing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub base: Option<Reg>,
    /// A register that is not RSP, and 1, 2, 4 or 8.
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

/// Machine code under construction, to be placed at `base`.
#[derive(Default)]
pub(crate) struct Asm {
    pub bytes: Vec<u8>,
    /// Host address that the first byte will have.
    pub base: u64,
}

/// A jump whose 32-bit displacement is still to be filled in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fixup(pub usize);

impl Asm {
    /// Starts anew at another place; keeps the allocation.
    pub fn reset(&mut self, base: u64) {
        self.bytes.clear();
        self.base = base;
    }

    pub fn pos(&self) -> usize {
        self.bytes.len()
    }

    pub fn raw(&mut self, b: &[u8]) {
        self.bytes.extend_from_slice(b);
    }

    /// Bytes and an immediate or displacement behind them.
    fn with_imm<const N: usize>(&mut self, head: [u8; N], v: i32) {
        let mut bytes = [0; 16];
        bytes[..N].copy_from_slice(&head);
        bytes[N..N + 4].copy_from_slice(&v.to_le_bytes());
        self.raw(&bytes[..N + 4]);
    }

    fn imm32(&mut self, v: i32) {
        self.raw(&v.to_le_bytes());
    }

    fn rex(w: bool, r: Reg, x: Reg, b: Reg) -> u8 {
        0x40 | u8::from(w) << 3 | (r >> 3) << 2 | (x >> 3) << 1 | (b >> 3)
    }

    /// `op reg, gs:[disp]` with any one-byte opcode.
    fn gs(&mut self, w: bool, op: u8, reg: Reg, disp: i32) {
        self.with_imm(
            [0x65, Self::rex(w, reg, 0, 0), op, (reg & 7) << 3 | 4, 0x25],
            disp,
        );
    }

    /// `op reg, gs:[index + disp]`.
    fn gs_indexed(&mut self, op: u8, reg: Reg, index: Reg, disp: i32) {
        self.with_imm(
            [
                0x65,
                Self::rex(true, reg, 0, index),
                op,
                0x80 | (reg & 7) << 3 | (index & 7),
            ],
            disp,
        );
    }

    pub fn load(&mut self, reg: Reg, disp: i32) {
        self.gs(true, 0x8b, reg, disp);
    }
    pub fn load32(&mut self, reg: Reg, disp: i32) {
        self.gs(false, 0x8b, reg, disp);
    }
    pub fn store(&mut self, disp: i32, reg: Reg) {
        self.gs(true, 0x89, reg, disp);
    }
    pub fn store32(&mut self, disp: i32, reg: Reg) {
        self.gs(false, 0x89, reg, disp);
    }
    /// `mov dword gs:[disp], imm`.
    pub fn store_imm32(&mut self, disp: i32, imm: u32) {
        self.with_imm([0x65, 0xc7, 0x04, 0x25], disp);
        self.imm32(imm as i32);
    }
    /// `mov qword gs:[disp], imm` (sign extended).
    pub fn store_imm64(&mut self, disp: i32, imm: i32) {
        self.with_imm([0x65, 0x48, 0xc7, 0x04, 0x25], disp);
        self.imm32(imm);
    }
    /// `mov byte gs:[disp], imm`.
    pub fn store_imm8(&mut self, disp: i32, imm: u8) {
        self.with_imm([0x65, 0xc6, 0x04, 0x25], disp);
        self.raw(&[imm]);
    }
    /// `mov word gs:[disp], reg`.
    pub fn store16(&mut self, disp: i32, reg: Reg) {
        self.raw(&[0x65, 0x66]);
        self.with_imm(
            [Self::rex(false, reg, 0, 0), 0x89, (reg & 7) << 3 | 4, 0x25],
            disp,
        );
    }
    /// `movzx reg, word gs:[disp]`.
    pub fn load16(&mut self, reg: Reg, disp: i32) {
        self.raw(&[0x65, Self::rex(false, reg, 0, 0), 0x0f, 0xb7]);
        self.with_imm([(reg & 7) << 3 | 4, 0x25], disp);
    }
    /// `op dword gs:[disp], imm`.
    pub fn alu_gs_imm32(&mut self, op: Alu, disp: i32, imm: i32) {
        self.with_imm([0x65, 0x81, (op as u8) << 3 | 4, 0x25], disp);
        self.imm32(imm);
    }
    /// `add qword gs:[disp], 1`.
    pub fn count(&mut self, disp: i32) {
        self.with_imm([0x65, 0x48, 0x83, (Alu::Add as u8) << 3 | 4, 0x25], disp);
        self.raw(&[1]);
    }
    /// `test dword gs:[disp], imm`.
    pub fn test_gs_imm32(&mut self, disp: i32, imm: i32) {
        self.with_imm([0x65, 0xf7, 0x04, 0x25], disp);
        self.imm32(imm);
    }
    /// `or dst, [base + disp]`.
    pub fn or_mem(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.with_imm(
            [
                Self::rex(true, dst, 0, base),
                0x0b,
                0x80 | (dst & 7) << 3 | (base & 7),
            ],
            disp,
        );
    }
    /// `test reg, imm` of 64 bits; the immediate is sign extended.
    pub fn test_imm64(&mut self, reg: Reg, imm: i32) {
        self.with_imm([Self::rex(true, 0, 0, reg), 0xf7, 0xc0 | (reg & 7)], imm);
    }
    /// `test reg, imm`.
    pub fn test_imm32(&mut self, reg: Reg, imm: i32) {
        self.with_imm([Self::rex(false, 0, 0, reg), 0xf7, 0xc0 | (reg & 7)], imm);
    }
    /// `add reg, gs:[disp]`.
    pub fn add_gs(&mut self, reg: Reg, disp: i32) {
        self.gs(true, 0x03, reg, disp);
    }
    pub fn xor_indexed(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed(0x33, reg, index, disp);
    }
    pub fn add_indexed(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed(0x03, reg, index, disp);
    }
    pub fn cmp_indexed(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed(0x3b, reg, index, disp);
    }
    pub fn load_indexed(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed(0x8b, reg, index, disp);
    }
    /// `mov gs:[index + disp], reg`.
    pub fn store_indexed(&mut self, index: Reg, disp: i32, reg: Reg) {
        self.gs_indexed(0x89, reg, index, disp);
    }
    /// `cmp reg, gs:[index * 8 + disp]`.
    pub fn cmp_indexed8(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed8(true, 0x3b, reg, index, disp);
    }
    /// `mov reg, gs:[index * 8 + disp]`.
    pub fn load_indexed8(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed8(true, 0x8b, reg, index, disp);
    }
    /// `mov reg, gs:[index * 8 + disp]` of 4 bytes.
    pub fn load32_indexed8(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_indexed8(false, 0x8b, reg, index, disp);
    }
    /// `mov reg, gs:[index * 4 + disp]` of 4 bytes.
    pub fn load32_indexed4(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_scaled(false, 0x8b, reg, (index, 2), disp);
    }
    /// `lea dst, [index * scale]`.
    pub fn lea_index_only(&mut self, dst: Reg, index: Reg, scale: u8) {
        let sib = (scale.trailing_zeros() as u8) << 6 | (index & 7) << 3 | 5;
        self.with_imm(
            [
                Self::rex(true, dst, index, 0),
                0x8d,
                (dst & 7) << 3 | 4,
                sib,
            ],
            0,
        );
    }
    /// `imul dst, src, imm`.
    pub fn imul_imm32(&mut self, dst: Reg, src: Reg, imm: i32) {
        let modrm = 0xc0 | (dst & 7) << 3 | (src & 7);
        self.with_imm([Self::rex(false, dst, 0, src), 0x69, modrm], imm);
    }
    /// `mov dst, [base + index * 8]`; `base` is not rbp or r13.
    pub fn load_mem_index8(&mut self, dst: Reg, base: Reg, index: Reg) {
        let sib = 3 << 6 | (index & 7) << 3 | (base & 7);
        self.raw(&[
            Self::rex(true, dst, index, base),
            0x8b,
            (dst & 7) << 3 | 4,
            sib,
        ]);
    }
    pub fn cmp64(&mut self, a: Reg, b: Reg) {
        self.raw(&[
            Self::rex(true, b, 0, a),
            0x39,
            0xc0 | (b & 7) << 3 | (a & 7),
        ]);
    }
    /// `lea dst, [pos]`, an earlier position in this code.
    pub fn lea_pos(&mut self, dst: Reg, pos: usize) {
        self.raw(&[Self::rex(true, dst, 0, 0), 0x8d, (dst & 7) << 3 | 5]);
        let rel = pos as i64 - (self.pos() as i64 + 4);
        self.imm32(rel as i32);
    }
    /// `bts qword gs:[disp], index`: sets a bit of those that begin there.
    pub fn set_bit_gs(&mut self, index: Reg, disp: i32) {
        let rex = Self::rex(true, index, 0, 0);
        self.with_imm([0x65, rex, 0x0f, 0xab, (index & 7) << 3 | 4, 0x25], disp);
    }
    /// `jmp reg`.
    pub fn jmp_reg(&mut self, reg: Reg) {
        self.raw(&[Self::rex(false, 0, 0, reg), 0xff, 0xe0 | (reg & 7)]);
    }
    /// `cmp reg, gs:[index * 4 + disp]`.
    pub fn cmp_indexed4(&mut self, reg: Reg, index: Reg, disp: i32) {
        self.gs_scaled(true, 0x3b, reg, (index, 2), disp);
    }
    /// `mov gs:[index * 4 + disp], reg`.
    pub fn store_indexed4(&mut self, index: Reg, disp: i32, reg: Reg) {
        self.gs_scaled(true, 0x89, reg, (index, 2), disp);
    }
    /// `jmp gs:[index * 4 + disp]`.
    pub fn jmp_indexed4(&mut self, index: Reg, disp: i32) {
        self.gs_scaled(false, 0xff, 4, (index, 2), disp);
    }
    fn gs_indexed8(&mut self, w: bool, op: u8, reg: Reg, index: Reg, disp: i32) {
        self.gs_scaled(w, op, reg, (index, 3), disp);
    }
    fn gs_scaled(&mut self, w: bool, op: u8, reg: Reg, (index, shift): (Reg, u8), disp: i32) {
        let (modrm, sib) = ((reg & 7) << 3 | 4, shift << 6 | (index & 7) << 3 | 5);
        self.with_imm([0x65, Self::rex(w, reg, index, 0), op, modrm, sib], disp);
    }
    /// `jmp gs:[disp]`.
    pub fn jmp_gs(&mut self, disp: i32) {
        self.with_imm([0x65, 0xff, 0x24, 0x25], disp);
    }
    /// `call gs:[disp]`.
    pub fn call_gs(&mut self, disp: i32) {
        self.with_imm([0x65, 0xff, 0x14, 0x25], disp);
    }

    pub fn mov(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x89,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn mov32(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(false, src, 0, dst),
            0x89,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    /// Loads a constant in the shortest form; flags are untouched.
    pub fn mov_imm(&mut self, dst: Reg, v: u64) {
        if let Ok(v) = u32::try_from(v) {
            self.with_imm([Self::rex(false, 0, 0, dst), 0xb8 | (dst & 7)], v as i32);
        } else if let Ok(v) = i32::try_from(v as i64) {
            self.with_imm([Self::rex(true, 0, 0, dst), 0xc7, 0xc0 | (dst & 7)], v);
        } else {
            self.raw(&[Self::rex(true, 0, 0, dst), 0xb8 | (dst & 7)]);
            self.raw(&v.to_le_bytes());
        }
    }
    /// `lea dst, [base + disp]`.
    pub fn lea(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.mem([0x8d], true, dst, base, disp);
    }
    /// `lea dst, [base + disp]`, cut to 32 bits.
    pub fn lea32(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.mem([0x8d], false, dst, base, disp);
    }
    /// `lea dst, [base + disp]`, the low 16 bits of `dst` alone.
    pub fn lea16(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.raw(&[0x66]);
        self.mem([0x8d], false, dst, base, disp);
    }
    /// `movzx dst, src` of 16 bits.
    pub fn movzx16(&mut self, dst: Reg, src: Reg) {
        let modrm = 0xc0 | (dst & 7) << 3 | (src & 7);
        self.raw(&[Self::rex(false, dst, 0, src), 0x0f, 0xb7, modrm]);
    }
    /// `mov dst, src` of 16 bits.
    pub fn mov16(&mut self, dst: Reg, src: Reg) {
        let modrm = 0xc0 | (src & 7) << 3 | (dst & 7);
        self.raw(&[0x66, Self::rex(false, src, 0, dst), 0x89, modrm]);
    }
    /// `mov dst, [base + disp]` of 2 bytes.
    pub fn load_mem16(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.raw(&[0x66]);
        self.mem([0x8b], false, dst, base, disp);
    }
    /// `movzx dst, word [base + disp]`.
    pub fn load_mem_zx16(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.mem([0x0f, 0xb7], false, dst, base, disp);
    }
    /// `mov [base + disp], src` of 2 bytes.
    pub fn store_mem16(&mut self, base: Reg, disp: i32, src: Reg) {
        self.raw(&[0x66]);
        self.mem([0x89], false, src, base, disp);
    }
    /// `mov word [base + disp], imm`.
    pub fn store_mem_imm16(&mut self, base: Reg, disp: i32, imm: i32) {
        self.raw(&[0x66]);
        self.mem([0xc7], false, 0, base, disp);
        self.raw(&(imm as u16).to_le_bytes());
    }
    /// `mov dst, [base + disp]` of 4 bytes.
    pub fn load_mem32(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.mem([0x8b], false, dst, base, disp);
    }
    /// `mov [base + disp], src` of 4 bytes.
    pub fn store_mem32(&mut self, base: Reg, disp: i32, src: Reg) {
        self.mem([0x89], false, src, base, disp);
    }
    /// `mov dword [base + disp], imm`.
    pub fn store_mem_imm32(&mut self, base: Reg, disp: i32, imm: i32) {
        self.mem([0xc7], false, 0, base, disp);
        self.imm32(imm);
    }
    /// `cmp dword [base + disp], imm`.
    pub fn cmp_mem_imm32(&mut self, base: Reg, disp: i32, imm: i32) {
        self.mem([0x81], false, Alu::Cmp as u8, base, disp);
        self.imm32(imm);
    }
    /// `cmp reg, [base + disp]` of 2 bytes.
    pub fn cmp_mem16(&mut self, reg: Reg, base: Reg, disp: i32) {
        self.raw(&[0x66]);
        self.mem([0x3b], false, reg, base, disp);
    }
    /// `add reg, gs:[disp]` of 4 bytes.
    pub fn add_gs32(&mut self, reg: Reg, disp: i32) {
        self.gs(false, 0x03, reg, disp);
    }
    /// `lea dst, [base + index * scale]`; `base` is not rbp or r13.
    pub fn lea_index(&mut self, dst: Reg, base: Reg, index: Reg, scale: u8) {
        let sib = (scale.trailing_zeros() as u8) << 6 | (index & 7) << 3 | (base & 7);
        self.raw(&[
            Self::rex(true, dst, index, base),
            0x8d,
            (dst & 7) << 3 | 4,
            sib,
        ]);
    }
    /// `lea dst, [base + index * scale + disp]`, cut to 32 bits unless it is `wide`.
    pub fn lea_address(&mut self, wide: bool, dst: Reg, at: Address) {
        let Address { base, index, disp } = at;
        // Index 4 is none, base 5 without a displacement of a byte or more is none.
        let (index, shift) = index.map_or((4, 0), |(n, scale)| (n, scale.trailing_zeros() as u8));
        let short = i8::try_from(disp);
        let (mode, low) = match (base, short) {
            (None, _) => (0, 5),
            (Some(n), Ok(0)) if n & 7 != 5 => (0, n),
            (Some(n), Ok(_)) => (1, n),
            (Some(n), Err(_)) => (2, n),
        };
        self.raw(&[Self::rex(wide, dst, index, low), 0x8d]);
        self.raw(&[mode << 6 | (dst & 7) << 3 | 4]);
        self.raw(&[shift << 6 | (index & 7) << 3 | (low & 7)]);
        match (base, mode) {
            (Some(_), 0) => {}
            (Some(_), 1) => self.raw(&[disp as u8]),
            _ => self.imm32(disp),
        }
    }
    /// `mov dst, [base + disp]`.
    pub fn load_mem(&mut self, dst: Reg, base: Reg, disp: i32) {
        self.mem([0x8b], true, dst, base, disp);
    }
    /// `mov [base + disp], src`.
    pub fn store_mem(&mut self, base: Reg, disp: i32, src: Reg) {
        self.mem([0x89], true, src, base, disp);
    }
    /// `mov qword [base + disp], imm` (sign extended).
    pub fn store_mem_imm(&mut self, base: Reg, disp: i32, imm: i32) {
        self.mem([0xc7], true, 0, base, disp);
        self.imm32(imm);
    }
    fn mem<const N: usize>(&mut self, op: [u8; N], w: bool, reg: Reg, base: Reg, disp: i32) {
        self.raw(&[Self::rex(w, reg, 0, base)]);
        self.raw(&op);
        let mode = match i8::try_from(disp) {
            Ok(0) if base & 7 != 5 => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        let modrm = mode | (reg & 7) << 3 | (base & 7);
        if base & 7 == 4 {
            self.raw(&[modrm, 0x24]);
        } else {
            self.raw(&[modrm]);
        }
        match mode {
            0x40 => self.raw(&[disp as u8]),
            0x80 => self.imm32(disp),
            _ => {}
        }
    }

    pub fn alu_imm32(&mut self, op: Alu, reg: Reg, imm: i32) {
        self.alu_imm(false, op, reg, imm);
    }
    pub fn alu_imm64(&mut self, op: Alu, reg: Reg, imm: i32) {
        self.alu_imm(true, op, reg, imm);
    }
    fn alu_imm(&mut self, w: bool, op: Alu, reg: Reg, imm: i32) {
        let modrm = 0xc0 | (op as u8) << 3 | (reg & 7);
        if let Ok(short) = i8::try_from(imm) {
            self.raw(&[Self::rex(w, 0, 0, reg), 0x83, modrm, short as u8]);
        } else {
            self.with_imm([Self::rex(w, 0, 0, reg), 0x81, modrm], imm);
        }
    }
    pub fn xor64(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x31,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn or64(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x09,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn and64(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x21,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn not32(&mut self, reg: Reg) {
        self.raw(&[Self::rex(false, 0, 0, reg), 0xf7, 0xd0 | (reg & 7)]);
    }
    pub fn sub64(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x29,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn xchg(&mut self, a: Reg, b: Reg) {
        self.raw(&[
            Self::rex(true, b, 0, a),
            0x87,
            0xc0 | (b & 7) << 3 | (a & 7),
        ]);
    }
    pub fn neg32(&mut self, reg: Reg) {
        self.raw(&[Self::rex(false, 0, 0, reg), 0xf7, 0xd8 | (reg & 7)]);
    }
    /// `and reg, gs:[disp]`.
    pub fn and_gs32(&mut self, reg: Reg, disp: i32) {
        self.gs(false, 0x23, reg, disp);
    }
    /// `or reg32, gs:[disp]`.
    pub fn or_gs32(&mut self, reg: Reg, disp: i32) {
        self.gs(false, 0x0b, reg, disp);
    }
    /// `cmp reg, gs:[disp]`.
    pub fn cmp_gs(&mut self, reg: Reg, disp: i32) {
        self.gs(true, 0x3b, reg, disp);
    }
    pub fn add64(&mut self, dst: Reg, src: Reg) {
        self.raw(&[
            Self::rex(true, src, 0, dst),
            0x01,
            0xc0 | (src & 7) << 3 | (dst & 7),
        ]);
    }
    pub fn shr32(&mut self, reg: Reg, n: u8) {
        self.raw(&[Self::rex(false, 0, 0, reg), 0xc1, 0xe8 | (reg & 7), n]);
    }
    /// `rorx dst, src, n`: no flag changes. It is of BMI2.
    pub fn rorx32(&mut self, dst: Reg, src: Reg, n: u8) {
        let registers = !(dst >> 3) << 7 | 1 << 6 | (!(src >> 3) & 1) << 5;
        let modrm = 0xc0 | (dst & 7) << 3 | (src & 7);
        self.raw(&[0xc4, registers | 3, 0x7b, 0xf0, modrm, n]);
    }
    pub fn shl32(&mut self, reg: Reg, n: u8) {
        self.raw(&[Self::rex(false, 0, 0, reg), 0xc1, 0xe0 | (reg & 7), n]);
    }
    pub fn shl64(&mut self, reg: Reg, n: u8) {
        self.raw(&[Self::rex(true, 0, 0, reg), 0xc1, 0xe0 | (reg & 7), n]);
    }
    pub fn shr64(&mut self, reg: Reg, n: u8) {
        self.raw(&[Self::rex(true, 0, 0, reg), 0xc1, 0xe8 | (reg & 7), n]);
    }
    pub fn sar64(&mut self, reg: Reg, n: u8) {
        self.raw(&[Self::rex(true, 0, 0, reg), 0xc1, 0xf8 | (reg & 7), n]);
    }
    pub fn test64(&mut self, a: Reg, b: Reg) {
        self.raw(&[
            Self::rex(true, b, 0, a),
            0x85,
            0xc0 | (b & 7) << 3 | (a & 7),
        ]);
    }

    /// The arithmetic flags into `ax` (AH as LAHF, AL = OF).
    pub fn flags_to_ax(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    }
    /// Back from `ax`; AL is destroyed.
    pub fn flags_from_ax(&mut self) {
        self.raw(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
    }

    /// Has the displacement of a jump that comes next, behind so many bytes of opcode, lie within eight aligned bytes, so that it can be
    /// patched by one store while others execute it.
    pub fn align_link(&mut self, opcode: u64) {
        let at = (self.base + self.pos() as u64 + opcode) % 8;
        let nop: &[u8] = match at {
            0..=4 => &[],
            5 => &[0x0f, 0x1f, 0x00],
            6 => &[0x66, 0x90],
            _ => &[0x90],
        };
        self.raw(nop);
    }
    pub fn jcc(&mut self, cc: u8) -> Fixup {
        self.raw(&[0x0f, 0x80 | cc, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }
    pub fn jmp(&mut self) -> Fixup {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        Fixup(self.pos() - 4)
    }
    /// `jmp rel32` to an absolute host address.
    pub fn jmp_to(&mut self, target: u64) {
        let f = self.jmp();
        self.bind_to(f, target);
    }
    /// Lets the jump go to the current position.
    pub fn bind(&mut self, f: Fixup) {
        self.bind_at(f, self.pos());
    }
    /// Lets the jump go to an earlier position in this code.
    pub fn bind_at(&mut self, f: Fixup, pos: usize) {
        let rel = pos as i64 - (f.0 as i64 + 4);
        self.bytes[f.0..f.0 + 4].copy_from_slice(&(rel as i32).to_le_bytes());
    }
    /// Lets the jump go to an absolute host address (within 2 GiB).
    pub fn bind_to(&mut self, f: Fixup, target: u64) {
        let rel = target.wrapping_sub(self.base + f.0 as u64 + 4) as i64;
        debug_assert!(i32::try_from(rel).is_ok());
        self.bytes[f.0..f.0 + 4].copy_from_slice(&(rel as i32).to_le_bytes());
    }
}
