//! The x87 environment of real-address and virtual-8086 mode, which FSTENV, FSAVE, FLDENV and FRSTOR use there (Intel SDM vol. 1,
//! figures 8-11 and 8-12).
//!
//! The host's processor, in 64-bit mode, knows the protected formats alone: offsets and selectors. Those here have linear addresses in two
//! pieces, the upper beside the opcode. Selectors are zero, as with CPUID's ZERO_FCS_FDS, so the address is the offset.

use iced_x86::{Code, Instruction, Mnemonic};

use super::vector::{self, component};
use crate::{Cpu, CpuMode, FpuArea};

/// Where one of the two sizes has what, all in bytes; the high piece is in bits 12 and up of `opcode` and of `data_high`.
struct Format {
    instruction: usize,
    opcode: usize,
    data: usize,
    data_high: usize,
    /// Bits of an address's upper half.
    high: u32,
}

const BYTES_14: Format = Format {
    instruction: 6,
    opcode: 8,
    data: 10,
    data_high: 12,
    high: 0xf,
};
const BYTES_28: Format = Format {
    instruction: 12,
    opcode: 16,
    data: 20,
    data_high: 24,
    high: 0xffff,
};

const OPCODE: u32 = 0x7ff;
const HIGH_SHIFT: u32 = 12;
/// Beside the low piece of an address; ones, as in the other reserved halves.
const RESERVED: u32 = 0xffff_0000;

impl Format {
    /// That of an instruction which stores or loads an environment in a mode with formats of its own.
    fn of(cpu: &Cpu, i: &Instruction) -> Option<&'static Self> {
        use Code::*;
        let format = match i.code() {
            Fnstenv_m14byte | Fstenv_m14byte | Fldenv_m14byte | Fnsave_m94byte | Fsave_m94byte
            | Frstor_m94byte => &BYTES_14,
            Fnstenv_m28byte | Fstenv_m28byte | Fldenv_m28byte | Fnsave_m108byte
            | Fsave_m108byte | Frstor_m108byte => &BYTES_28,
            _ => return None,
        };
        matches!(cpu.mode(), CpuMode::Real | CpuMode::V86).then_some(format)
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from(bytes[at]) | u32::from(bytes[at + 1]) << 8
    }

    fn wide(&self) -> bool {
        self.high > 0xf
    }

    fn get(&self, bytes: &[u8], at: usize) -> u32 {
        let low = Self::word(bytes, at);
        if self.wide() {
            low | Self::word(bytes, at + 2) << 16
        } else {
            low
        }
    }

    fn put(&self, bytes: &mut [u8], at: usize, value: u32) {
        let size = if self.wide() { 4 } else { 2 };
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }

    /// FIP, FDP and FOP.
    fn pointers(&self, bytes: &[u8]) -> [u32; 3] {
        let opcode = self.get(bytes, self.opcode);
        let address =
            |low, high: u32| Self::word(bytes, low) | (high >> HIGH_SHIFT & self.high) << 16;
        [
            address(self.instruction, opcode),
            address(self.data, self.get(bytes, self.data_high)),
            opcode,
        ]
    }
}

/// The addresses of the last x87 instruction and of its operand, and its opcode, of an environment in one of these formats.
pub(super) struct Environment {
    format: &'static Format,
    loads: bool,
    instruction: u32,
    data: u32,
    opcode: u32,
}

impl Environment {
    /// That which an instruction is about to store, or to load from `operand`; `None` where it has none of these formats.
    pub fn before(cpu: &Cpu, i: &Instruction, operand: &[u8]) -> Option<Self> {
        let format = Format::of(cpu, i)?;
        let loads = matches!(i.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor);
        let [instruction, data, opcode] = match loads {
            true => format.pointers(operand),
            false => pointers_of(&cpu.fpu),
        };
        Some(Environment {
            format,
            loads,
            instruction,
            data,
            opcode: opcode & OPCODE,
        })
    }

    /// Puts it where the host's processor has loaded or stored what it takes for it.
    pub fn settle(&self, fpu: &mut FpuArea, operand: &mut [u8]) {
        if self.loads {
            fpu.set_fip(self.instruction.into());
            fpu.set_fdp(self.data.into());
            fpu.set_fop(self.opcode as u16);
            let in_use = vector::in_use(fpu);
            vector::set_in_use(fpu, in_use | component::X87);
        } else {
            self.store(operand);
        }
    }

    fn store(&self, bytes: &mut [u8]) {
        let format = self.format;
        let high = |address: u32| (address >> 16 & format.high) << HIGH_SHIFT;
        let (instruction, data) = (self.instruction, self.data);
        format.put(bytes, format.instruction, instruction | RESERVED);
        format.put(bytes, format.opcode, high(instruction) | self.opcode);
        format.put(bytes, format.data, data | RESERVED);
        format.put(bytes, format.data_high, high(data));
    }
}

/// FIP, FDP and FOP.
fn pointers_of(fpu: &FpuArea) -> [u32; 3] {
    if vector::in_use(fpu) & component::X87 == 0 {
        return [0; 3];
    }
    [fpu.fip() as u32, fpu.fdp() as u32, fpu.fop().into()]
}

#[cfg(test)]
mod tests {
    use crate::testing::{INTEL, TestBus, protected_mode, put, reset};
    use crate::{Cpu, Outcome, Seg, interpret};

    const CODE: u64 = 0x1000;
    const AREA: u64 = 0x2000;
    const FSTENV: [u8; 2] = [0xd9, 0x36];
    const FLDENV: [u8; 2] = [0xd9, 0x26];
    const FSAVE: [u8; 2] = [0xdd, 0x36];
    const FRSTOR: [u8; 2] = [0xdd, 0x26];

    /// In real mode, with the x87 component in use; DS and CS begin at 0.
    fn real_mode() -> Box<Cpu> {
        let mut cpu = reset(INTEL);
        cpu.seg[Seg::Cs as usize].selector = 0;
        cpu.seg[Seg::Cs as usize].base = 0;
        cpu.rip = CODE;
        cpu.fpu.bytes[512] = 1;
        cpu.fpu.set_fip(0x8abc_1234);
        cpu.fpu.set_fdp(0xfdef_5678);
        cpu.fpu.set_fop(0x5a5);
        cpu
    }

    /// Executes an instruction of which this is the opcode, on `area`, with 32-bit operands if `wide`.
    fn execute(cpu: &mut Cpu, opcode: [u8; 2], wide: bool) {
        cpu.rip = CODE;
        let code = [0x66].into_iter().filter(|_| wide).chain(opcode);
        let code = code.chain((AREA as u16).to_le_bytes());
        for (n, byte) in code.enumerate() {
            put(cpu, CODE + n as u64, byte);
        }
        assert_eq!(
            interpret::step(cpu, &mut TestBus::default()),
            Outcome::Continue
        );
    }

    fn pointers(cpu: &Cpu) -> (u64, u64, u16) {
        (cpu.fpu.fip(), cpu.fpu.fdp(), cpu.fpu.fop())
    }

    fn area<const N: usize>(cpu: &Cpu) -> [u8; N] {
        std::array::from_fn(|n| cpu.ram.load(AREA + n as u64).expect("RAM"))
    }

    fn dwords(cpu: &Cpu) -> [u32; 4] {
        let all: [u8; 28] = area(cpu);
        std::array::from_fn(|n| {
            u32::from_le_bytes(*all[12 + 4 * n..].first_chunk().expect("a doubleword"))
        })
    }

    fn words(cpu: &Cpu) -> [u16; 4] {
        let all: [u8; 14] = area(cpu);
        std::array::from_fn(|n| {
            u16::from_le_bytes(*all[6 + 2 * n..].first_chunk().expect("a word"))
        })
    }

    #[test]
    fn environments_of_32_bit_operands_have_addresses_of_32_bits() {
        for opcode in [FSTENV, FSAVE] {
            let mut cpu = real_mode();
            execute(&mut cpu, opcode, true);
            assert_eq!(
                dwords(&cpu),
                [0xffff_1234, 0x08ab_c5a5, 0xffff_5678, 0x0fde_f000]
            );
            assert_eq!(pointers(&cpu).0 == 0, opcode == FSAVE);
        }
    }

    #[test]
    fn environments_of_16_bit_operands_have_addresses_of_20_bits() {
        for opcode in [FSTENV, FSAVE] {
            let mut cpu = real_mode();
            execute(&mut cpu, opcode, false);
            assert_eq!(words(&cpu), [0x1234, 0xc5a5, 0x5678, 0xf000]);
        }
    }

    #[test]
    fn what_was_stored_can_be_loaded() {
        for (store, load) in [(FSTENV, FLDENV), (FSAVE, FRSTOR)] {
            for (wide, mask) in [(true, 0xffff_ffff), (false, 0xf_ffff)] {
                let mut cpu = real_mode();
                let (instruction, data, opcode) = pointers(&cpu);
                execute(&mut cpu, store, wide);
                cpu.fpu = crate::FpuArea::reset();
                execute(&mut cpu, load, wide);
                let expected = (instruction & mask, data & mask, opcode);
                assert_eq!(pointers(&cpu), expected);
                let again: [u8; 28] = area(&cpu);
                execute(&mut cpu, store, wide);
                assert_eq!(area::<28>(&cpu), again);
            }
        }
    }

    #[test]
    fn the_initial_state_has_no_pointers() {
        let mut cpu = real_mode();
        cpu.fpu.bytes[512] = 0;
        execute(&mut cpu, FSTENV, true);
        assert_eq!(dwords(&cpu), [0xffff_0000, 0, 0xffff_0000, 0]);
    }

    #[test]
    fn protected_mode_has_offsets_alone() {
        let mut cpu = protected_mode();
        cpu.fpu.bytes[512] = 1;
        cpu.fpu.set_fip(0x8abc_1234);
        cpu.fpu.set_fop(0x5a5);
        // fnstenv [0x2000]
        for (n, byte) in [0xd9, 0x35, 0, 0x20, 0, 0].into_iter().enumerate() {
            put::<u8>(&cpu, cpu.rip + n as u64, byte);
        }
        assert_eq!(
            interpret::step(&mut cpu, &mut TestBus::default()),
            Outcome::Continue
        );
        assert_eq!(dwords(&cpu), [0x8abc_1234, 0x05a5_0000, 0, 0xffff_0000]);
    }
}
