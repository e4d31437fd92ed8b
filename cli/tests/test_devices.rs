//! A program without an operating system finds the devices that test programs for QEMU rely on.

mod support;

use iced_x86::code_asm::*;
use std::fs;
use std::process::Command;
use std::time::Duration;
use support::pvh::{LOAD, kernel};
use support::{DOPPEL, Finished, Scratch, run};

const PASSED: u32 = 0x20;

/// Ends with the number of the first thing that is not as it should be.
fn program(cpus: u8) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let mut end = a.create_label();
    let step = |a: &mut CodeAssembler, n: u32| a.mov(ebx, n);
    let output = |a: &mut CodeAssembler, port: u32| a.mov(edx, port);

    step(&mut a, 1)?; // fw_cfg: the signature, selected at reset
    output(&mut a, 0x511)?;
    for letter in b"QEMU" {
        a.in_(al, dx)?;
        a.cmp(al, i32::from(*letter))?;
        a.jne(end)?;
    }
    step(&mut a, 2)?; // fw_cfg: the number of processors
    output(&mut a, 0x510)?;
    a.mov(eax, 5)?;
    a.out(dx, ax)?;
    a.inc(edx)?;
    a.in_(al, dx)?;
    a.cmp(al, i32::from(cpus))?;
    a.jne(end)?;
    step(&mut a, 3)?; // the storage behind the ports
    output(&mut a, 0xe0)?;
    a.mov(eax, 0x1234_5678)?;
    a.out(dx, eax)?;
    output(&mut a, 0xe9)?;
    a.in_(al, dx)?;
    a.cmp(al, 0x56)?;
    a.jne(end)?;
    step(&mut a, 4)?; // the memory
    a.mov(esi, 0xff00_fff8u32)?;
    a.mov(dword_ptr(esi), 0x1122_3344)?;
    a.cmp(byte_ptr(esi + 1), 0x33)?;
    a.jne(end)?;
    for (n, (level, expected)) in [(0, 0), (1, 0x20)].into_iter().enumerate() {
        step(&mut a, 5 + n as u32)?; // interrupt line 5, as the 8259's request register sees it
        output(&mut a, 0x2005)?;
        a.mov(eax, level)?;
        a.out(dx, al)?;
        a.mov(eax, 0x0a)?;
        a.out(0x20, al)?;
        a.in_(al, 0x20)?;
        a.and(al, 0x20)?;
        a.cmp(al, expected)?;
        a.jne(end)?;
    }
    step(&mut a, PASSED)?;
    a.set_label(&mut end)?;
    a.mov(eax, ebx)?;
    output(&mut a, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()?;
    a.assemble(LOAD.into())
}

fn execute(kernel: Vec<u8>, flags: &[&str]) -> Finished {
    let scratch = Scratch::new();
    let path = scratch.path("kernel");
    fs::write(&path, kernel).unwrap();
    let mut command = Command::new(DOPPEL);
    command.args(["run", "--memory", "16M", "--net", "none", "--cpus", "2"]);
    command.args(["--engine", "translate"]);
    command.arg("--kernel").arg(&path).args(flags);
    run(&mut command, Duration::from_secs(20))
}

#[test]
fn they_are_there_when_asked_for_and_not_otherwise() {
    let status = |value: u32| (value as i32) << 1 | 1;
    let program = || kernel(&program(2).unwrap());
    execute(program(), &["--test-devices"]).expect(status(PASSED));
    execute(program(), &["--debug-exit"]).expect(status(1));
}

/// A Multiboot kernel that writes its command line to the serial port.
fn echo() -> Result<Vec<u8>, IcedError> {
    const MAGIC: u32 = 0x1bad_b002;
    const HAS_ADDRESSES: u32 = 1 << 16;
    const CMDLINE: u32 = 16;
    let mut a = CodeAssembler::new(32)?;
    let (mut next, mut end) = (a.create_label(), a.create_label());
    a.mov(esi, dword_ptr(ebx + CMDLINE))?;
    a.mov(edx, 0x3f8)?;
    a.set_label(&mut next)?;
    a.lodsb()?;
    a.test(al, al)?;
    a.jz(end)?;
    a.out(dx, al)?;
    a.jmp(next)?;
    a.set_label(&mut end)?;
    a.mov(eax, i32::from(b']'))?;
    a.out(dx, al)?;
    a.xor(eax, eax)?;
    a.mov(edx, 0xf4)?;
    a.out(dx, eax)?;
    a.hlt()?;
    let entry = LOAD + 32;
    let sum = 0u32.wrapping_sub(MAGIC + HAS_ADDRESSES);
    let header = [MAGIC, HAS_ADDRESSES, sum, LOAD, LOAD, 0, 0, entry];
    let mut kernel: Vec<_> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend(a.assemble(entry.into())?);
    Ok(kernel)
}

#[test]
fn words_for_a_multiboot_kernel_are_those_that_were_given() {
    let words = |flags: &[&str]| {
        let finished = execute(echo().unwrap(), &[&["--debug-exit"], flags].concat()).expect(1);
        let console = finished.console;
        let (_, words) = console
            .split_once("kernel")
            .unwrap_or_else(|| panic!("{console}"));
        words.trim_end().to_owned()
    };
    assert_eq!(words(&[]), "]");
    assert_eq!(words(&["--append", "one two"]), " one two]");
    assert_eq!(
        words(&["--cmdline", "zero", "--append", "one"]),
        " zero one]"
    );
}
