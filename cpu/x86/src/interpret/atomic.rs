//! Compare and exchange, exchange and add.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::flags::{self, ZF};
use super::operand::{linear, linear_unchecked, modify, modify_linear, operand_size};
use super::register::{mask, read_gpr, read_register, write_gpr, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Gpr};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Cmpxchg => cmpxchg,
        Mnemonic::Cmpxchg8b => cmpxchg8b,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        Mnemonic::Xadd => xadd,
        _ => return None,
    })
}

const RAX: usize = Gpr::Rax as usize;
const RCX: usize = Gpr::Rcx as usize;
const RDX: usize = Gpr::Rdx as usize;
const RBX: usize = Gpr::Rbx as usize;

fn cmpxchg(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let expected = read_gpr(cpu, RAX, size);
    let new = read_register(cpu, i.op1_register());
    let old = if i.op0_kind() == OpKind::Register {
        // A register that differs is not written: its upper half stays.
        let r = i.op0_register();
        let old = read_register(cpu, r);
        if old == expected {
            write_register(cpu, r, new);
        }
        old
    } else {
        modify(cpu, bus, i, 0, |old| {
            (if old == expected { new } else { old }, old)
        })?
    };
    if old != expected {
        write_gpr(cpu, RAX, size, old);
    }
    flags::set(cpu, flags::sub(expected, old, 0, size).1);
    Ok(Flow::Next)
}

/// The value of a register pair of `size` bytes each.
fn pair(cpu: &Cpu, high: usize, low: usize, size: usize) -> u128 {
    u128::from(read_gpr(cpu, high, size)) << (8 * size) | u128::from(read_gpr(cpu, low, size))
}

fn commit(cpu: &mut Cpu, expected: u128, old: u128, size: usize) -> Step {
    if old != expected {
        write_gpr(cpu, RAX, size, old as u64 & mask(size));
        write_gpr(cpu, RDX, size, (old >> (8 * size)) as u64 & mask(size));
    }
    flags::set_some(cpu, ZF, flags::zero_if(old == expected));
    Ok(Flow::Next)
}

fn cmpxchg8b(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let expected = pair(cpu, RDX, RAX, 4);
    let new = pair(cpu, RCX, RBX, 4) as u64;
    let at = linear(cpu, i, 8, true)?;
    let lock = i.has_lock_prefix();
    let old = modify_linear(cpu, bus, at, 8, lock, |old| {
        (
            if u128::from(old) == expected {
                new
            } else {
                old
            },
            old,
        )
    })?;
    commit(cpu, expected, old.into(), 4)
}

fn cmpxchg16b(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let expected = pair(cpu, RDX, RAX, 8);
    let new = pair(cpu, RCX, RBX, 8);
    let at = linear(cpu, i, 16, true);
    // A misaligned address is #GP whatever else it is.
    if at.unwrap_or_else(|_| linear_unchecked(cpu, i)) & 15 != 0 {
        return Err(Exception::gp(0));
    }
    let at = at?;
    let privilege = cpu.privilege();
    let old = match cpu.rmw_ptr(at, 16, privilege)? {
        Some(p) => match p.compare_exchange_16(expected, new) {
            Ok(old) | Err(old) => old,
        },
        None => exchange_on_device(cpu, bus, at, expected, new)?,
    };
    commit(cpu, expected, old, 8)
}

fn exchange_on_device(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    at: u64,
    expected: u128,
    new: u128,
) -> Result<u128, Exception> {
    let privilege = cpu.privilege();
    let mut bytes = [0; 16];
    cpu.load_bytes(bus, at, privilege, &mut bytes)?;
    let old = u128::from_le_bytes(bytes);
    let stored = if old == expected { new } else { old };
    cpu.store_bytes(bus, at, privilege, &stored.to_le_bytes())?;
    Ok(old)
}

fn xadd(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let source = i.op1_register();
    let b = read_register(cpu, source);
    let add = |a| {
        let (sum, new) = flags::add(a, b, 0, size);
        (sum, (a, sum, new))
    };
    let (old, sum, new) = modify(cpu, bus, i, 0, add)?;
    write_register(cpu, source, old);
    if i.op0_kind() == OpKind::Register {
        // Of two equal registers the sum stays.
        write_register(cpu, i.op0_register(), sum);
    }
    flags::set(cpu, new);
    Ok(Flow::Next)
}
