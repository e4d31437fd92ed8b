//! A program without an operating system hears of an x87 error by interrupt 13, as programs for the PC AT do, and goes on.

mod support;

use iced_x86::code_asm::*;
use std::fs;
use std::process::Command;
use std::time::Duration;
use support::pvh::{LOAD, kernel};
use support::{DOPPEL, Scratch, run};

const GDT: u32 = 0x8000;
const IDT: u32 = 0x9000;
const STACK: u32 = 0x7000;
/// For the operands of LGDT, LIDT and FLDCW.
const TABLES: u32 = 0x8020;
const CONTROL_WORD: u32 = 0x8030;
const CODE: u32 = 8;
const DATA: u32 = 16;
/// Where the second 8259's inputs are told of, and interrupt 13 among them.
const SLAVE: u32 = 0x28;
const VECTOR: u32 = SLAVE + 5;
const LOCAL_APIC: u32 = 0xfee0_0000;
const PASSED: u32 = 0x20;

/// Counts in ESI.
fn handler(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.inc(esi)?;
    a.out(0xf0, al)?;
    // These wait for errors, and are executed.
    a.fld1()?;
    a.fstp(st0)?;
    a.fnclex()?;
    a.mov(al, 0x20)?;
    a.out(0xa0, al)?;
    a.out(0x20, al)?;
    a.iretd()
}

fn set_tables(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let words = [
        (GDT + CODE, 0x0000_ffff),
        (GDT + CODE + 4, 0x00cf_9b00),
        (GDT + DATA, 0x0000_ffff),
        (GDT + DATA + 4, 0x00cf_9300),
        (TABLES, GDT << 16 | 0x17),
        (TABLES + 4, GDT >> 16),
        (TABLES + 8, IDT << 16 | 0x7ff),
        (TABLES + 12, IDT >> 16),
        // Division by zero is not masked.
        (CONTROL_WORD, 0x37b),
    ];
    for (at, word) in words {
        a.mov(dword_ptr(at), word)?;
    }
    a.mov(esp, STACK)?;
    // What a call pushes is where the handler is, or the next instruction.
    let mut behind = a.create_label();
    a.call(behind)?;
    handler(a)?;
    a.set_label(&mut behind)?;
    a.pop(eax)?;
    let gate = IDT + 8 * VECTOR;
    a.mov(word_ptr(gate), ax)?;
    a.mov(word_ptr(gate + 2), CODE)?;
    a.shr(eax, 16)?;
    a.mov(word_ptr(gate + 4), 0x8e00)?;
    a.mov(word_ptr(gate + 6), ax)?;
    a.lgdt(ptr(TABLES))?;
    a.lidt(ptr(TABLES + 8))?;
    const ADD_AND_RETF: i32 = 4 + 1;
    let mut here = a.create_label();
    a.push(CODE as i32)?;
    a.call(here)?;
    a.set_label(&mut here)?;
    a.add(dword_ptr(esp), ADD_AND_RETF)?;
    a.retf()?;
    a.mov(eax, DATA)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)
}

/// Interrupt 13 alone comes through the 8259s to LINT0.
fn set_controllers(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(LOCAL_APIC + 0xf0), 0x1ff)?;
    a.mov(dword_ptr(LOCAL_APIC + 0x350), 0x700)?;
    for (port, bytes) in [
        (0x20, [0x11].as_slice()),
        (0x21, &[0x20, 4, 1, !(1u32 << 2) & 0xff]),
        (0xa0, &[0x11]),
        (0xa1, &[SLAVE, 2, 1, !(1u32 << 5) & 0xff]),
    ] {
        for byte in bytes {
            a.mov(eax, *byte)?;
            a.out(port, al)?;
        }
    }
    Ok(())
}

/// Ends with the number of the first step that did not go as it should.
fn program() -> Result<Vec<u8>, IcedError> {
    const NE_TS_EM: i32 = 0x2c;
    const OSFXSR: i32 = 1 << 9;
    let mut a = CodeAssembler::new(32)?;
    let mut end = a.create_label();
    set_tables(&mut a)?;
    set_controllers(&mut a)?;
    a.mov(eax, cr0)?;
    a.and(eax, !NE_TS_EM)?;
    a.mov(cr0, eax)?;
    // As an operating system of today has it: without it a translator leaves such instructions to the interpreter anyway.
    a.mov(eax, cr4)?;
    a.or(eax, OSFXSR)?;
    a.mov(cr4, eax)?;
    a.xor(esi, esi)?;
    a.fninit()?;
    a.fldcw(word_ptr(CONTROL_WORD))?;
    a.sti()?;
    for n in 1..=3 {
        a.mov(ebx, n)?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.cmp(esi, n - 1)?;
        a.jne(end)?;
        a.wait()?;
        a.cmp(esi, n)?;
        a.jne(end)?;
        a.fninit()?;
        a.fldcw(word_ptr(CONTROL_WORD))?;
    }
    a.mov(ebx, PASSED)?;
    a.set_label(&mut end)?;
    a.mov(eax, ebx)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()?;
    a.assemble(LOAD.into())
}

#[test]
fn an_x87_error_is_interrupt_13_where_no_exception_is_wanted() {
    let scratch = Scratch::new();
    let path = scratch.path("kernel");
    fs::write(&path, kernel(&program().unwrap())).unwrap();
    for engine in ["interpret", "translate", "direct"] {
        let mut command = Command::new(DOPPEL);
        command.args(["run", "--memory", "16M", "--net", "none", "--debug-exit"]);
        command
            .args(["--engine", engine])
            .arg("--kernel")
            .arg(&path);
        run(&mut command, Duration::from_secs(20)).expect((PASSED as i32) << 1 | 1);
    }
}
