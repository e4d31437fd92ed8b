//! A bytecode interpreter: a loop around an indirect jump to the code of each operation.

use anyhow::Result;
use std::hint::black_box;

#[derive(Clone, Copy)]
enum Op {
    Push(u32),
    Load(u8),
    Store(u8),
    Add,
    Subtract,
    Multiply,
    Xor,
    ShiftRight(u8),
    Duplicate,
    Swap,
    Drop,
    JumpIfZero(u16),
    Jump(u16),
    Halt,
}

/// Counts local 0 down to nothing; on the way local 1 goes through a Collatz-like step.
const PROGRAM: &[Op] = &[
    Op::Load(0),
    Op::JumpIfZero(29),
    Op::Load(0),
    Op::Push(1),
    Op::Subtract,
    Op::Store(0),
    Op::Load(1),
    Op::Duplicate,
    Op::Push(1),
    Op::Swap,
    Op::Drop,
    Op::Multiply,
    Op::Load(2),
    Op::Add,
    Op::Duplicate,
    Op::ShiftRight(3),
    Op::Xor,
    Op::Duplicate,
    Op::Store(2),
    Op::ShiftRight(31),
    Op::JumpIfZero(25),
    Op::Load(1),
    Op::Push(3),
    Op::Multiply,
    Op::Store(1),
    Op::Load(1),
    Op::Push(12345),
    Op::Add,
    Op::Jump(30),
    Op::Halt,
    Op::Store(1),
    Op::Jump(0),
];

pub fn run(count: u64) -> Result<u64> {
    Ok(execute(black_box(PROGRAM), count as u32))
}

#[inline(never)]
fn execute(program: &[Op], count: u32) -> u64 {
    let mut locals = [count, 1, 0, 0];
    let mut stack = [0u32; 16];
    let (mut top, mut at, mut steps) = (0usize, 0usize, 0u64);
    loop {
        let op = program[at];
        at += 1;
        steps += 1;
        match op {
            Op::Push(number) => {
                stack[top] = number;
                top += 1;
            }
            Op::Load(local) => {
                stack[top] = locals[usize::from(local) & 3];
                top += 1;
            }
            Op::Store(local) => {
                top -= 1;
                locals[usize::from(local) & 3] = stack[top];
            }
            Op::Add => binary(&mut stack, &mut top, u32::wrapping_add),
            Op::Subtract => binary(&mut stack, &mut top, u32::wrapping_sub),
            Op::Multiply => binary(&mut stack, &mut top, u32::wrapping_mul),
            Op::Xor => binary(&mut stack, &mut top, |a, b| a ^ b),
            Op::ShiftRight(by) => stack[top - 1] >>= by & 31,
            Op::Duplicate => {
                stack[top] = stack[top - 1];
                top += 1;
            }
            Op::Swap => stack.swap(top - 1, top - 2),
            Op::Drop => top -= 1,
            Op::JumpIfZero(to) => {
                top -= 1;
                if stack[top] == 0 {
                    at = usize::from(to);
                }
            }
            Op::Jump(to) => at = usize::from(to),
            Op::Halt => return steps << 32 | u64::from(locals[1] ^ locals[2]),
        }
    }
}

#[inline(always)]
fn binary(stack: &mut [u32; 16], top: &mut usize, operation: impl Fn(u32, u32) -> u32) {
    *top -= 1;
    stack[*top - 1] = operation(stack[*top - 1], stack[*top]);
}
