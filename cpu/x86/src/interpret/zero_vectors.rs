//! VZEROALL and VZEROUPPER outside 64-bit mode, where they leave registers 8 to 31 alone (Intel SDM vol. 2C; measured). The host's
//! processor, in 64-bit mode, would clear 8 to 15 as well.

use iced_x86::{CodeSize, Instruction, Mnemonic};

use super::masked::begin;
use super::{Flow, Handler, Step, vector};
use crate::{Bus, Cpu};

/// Vector registers outside 64-bit mode.
const REGISTERS: usize = 8;
/// Bytes of one that VZEROUPPER leaves.
const LOWER: usize = 16;

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    let zeroes = matches!(i.mnemonic(), Mnemonic::Vzeroall | Mnemonic::Vzeroupper);
    (zeroes && i.code_size() != CodeSize::Code64).then_some(zero as Handler)
}

fn zero(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let layout = begin(cpu, i)?;
    let kept = match i.mnemonic() {
        Mnemonic::Vzeroupper => LOWER,
        _ => 0,
    };
    for n in 0..REGISTERS {
        let mut v = vector::read(&cpu.fpu, &layout, n);
        if v[kept..].iter().any(|byte| *byte != 0) {
            v[kept..].fill(0);
            vector::write(&mut cpu.fpu, &layout, n, &v);
        }
    }
    Ok(Flow::Next)
}
