//! What a debugger sees: single steps, breakpoints in code and in debug registers, stops at system calls, registers read and written.

use crate::system;
use std::arch::asm;
use std::ffi::c_int;
use std::fmt::Write;

const TRACEME: c_int = 0;
const PEEKTEXT: c_int = 1;
const PEEKUSER: c_int = 3;
const POKETEXT: c_int = 4;
const POKEUSER: c_int = 6;
const CONT: c_int = 7;
const KILL: c_int = 8;
const SINGLESTEP: c_int = 9;
const GETREGS: c_int = 12;
const SETREGS: c_int = 13;
const GETFPREGS: c_int = 14;
const SETFPREGS: c_int = 15;
const SYSCALL: c_int = 24;

/// Where the debug registers are in `struct user`.
const DEBUG: u64 = 848;

/// `struct user_regs_struct`.
type Registers = [u64; 27];
const RBX: usize = 5;
const RAX: usize = 10;
const RCX: usize = 11;
const RDI: usize = 14;
const ORIGINAL_RAX: usize = 15;
const RIP: usize = 16;
const FLAGS: usize = 18;
const RSP: usize = 19;
const FS_BASE: usize = 21;

const CODE: u64 = 0x1800_0000;
const DATA: u64 = 0x1900_0000;
const TURNS: u64 = 20_000;

/// A process that is traced, and has stopped before its first instruction of ours.
struct Traced(c_int);

impl Traced {
    /// It has done its first `warm` turns of the loop already.
    fn new() -> Self {
        const FORK: i64 = 57;
        const KILL: i64 = 62;
        const GETPID: i64 = 39;
        const EXIT: i64 = 231;
        let process = system::call(FORK, [0; 4]) as c_int;
        if process == 0 {
            system::trace(TRACEME, 0, 0, 0);
            let own = system::call(GETPID, [0; 4]) as u64;
            system::call(KILL, [own, system::SIGSTOP as u64, 0, 0]);
            system::call(EXIT, [1, 0, 0, 0]);
        }
        assert!(process > 0);
        system::wait(process);
        let traced = Traced(process);
        let mut registers = traced.registers();
        registers[..ORIGINAL_RAX].fill(0);
        registers[ORIGINAL_RAX] = u64::MAX;
        registers[RIP] = CODE;
        registers[FLAGS] = 0x202;
        registers[RSP] = DATA + 0x1800;
        registers[RDI] = DATA;
        registers[RCX] = TURNS;
        traced.set_registers(registers);
        traced
    }

    fn registers(&self) -> Registers {
        let mut registers = [0; 27];
        system::trace(GETREGS, self.0, 0, registers.as_mut_ptr() as u64);
        registers
    }

    fn set_registers(&self, registers: Registers) {
        assert_eq!(system::trace(SETREGS, self.0, 0, registers.as_ptr() as u64), 0);
    }

    fn set_debug(&self, n: u64, value: u64) -> i64 {
        system::trace(POKEUSER, self.0, DEBUG + 8 * n, value)
    }

    fn debug(&self, n: u64) -> i64 {
        system::trace(PEEKUSER, self.0, DEBUG + 8 * n, 0)
    }

    /// Goes on by `request`, and describes where it stops.
    fn go(&self, request: c_int) -> String {
        system::trace(request, self.0, 0, 0);
        let status = system::wait(self.0);
        let r = self.registers();
        format!(
            "[{:x} at +{:x} flags {:x} rax {:x} rcx {:x} rbx {:x}]",
            status,
            r[RIP].wrapping_sub(CODE) as i64,
            r[FLAGS],
            r[RAX],
            r[RCX],
            r[RBX]
        )
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        system::trace(KILL, self.0, 0, 0);
        system::wait(self.0);
    }
}

/// The code that is traced: a loop that reads, writes, calls, and then a system call. The offsets of the instruction after the first, and of the loop's
/// write, and of what comes behind it.
fn place_code() -> [u64; 3] {
    let places: [*const u8; 5];
    let [mut a, mut b, mut c, mut d, mut e] = [std::ptr::null(); 5];
    // SAFETY: the code is jumped over.
    unsafe {
        asm!(
            "lea {0}, [rip + 2f]", "lea {1}, [rip + 3f]", "lea {2}, [rip + 4f]", "lea {3}, [rip + 5f]", "lea {4}, [rip + 6f]", "jmp 6f",
            "2:", "lea rax, [rax + rcx * 2 + 1]",
            "3:", "mov [rdi + 8], rax",
            "4:", "adc rbx, [rdi + 16]", "push rbx", "call 7f", "pop rdx", "dec rcx", "jnz 2b",
            "mov ecx, 3", "lea rdi, [rdi + 64]", "rep stosb", "pushfq", "pop rbx", "mov eax, 24", "syscall", "mov eax, 0", "nop",
            "5:", "ud2",
            "7:", "ret",
            "6:",
            inout(reg) a, inout(reg) b, inout(reg) c, inout(reg) d, inout(reg) e);
    }
    places = [a, b, c, d, e];
    system::map(CODE, 1, system::READ | system::WRITE);
    // SAFETY: from the first label to the last, to a page mapped for it.
    let offsets = unsafe {
        let len = e.offset_from(a) as usize;
        std::ptr::copy_nonoverlapping(a, CODE as *mut u8, len);
        [b, c, d].map(|place| place.offset_from(places[0]) as u64)
    };
    system::protect(CODE, 1, system::READ | system::EXECUTE);
    system::map(DATA, 2, system::READ | system::WRITE);
    offsets
}

fn stops(traced: &Traced, request: c_int, count: usize) -> String {
    (0..count).map(|_| traced.go(request)).collect()
}

fn single_steps(_: [u64; 3]) -> String {
    let traced = Traced::new();
    let mut registers = traced.registers();
    registers[RCX] = 2;
    traced.set_registers(registers);
    stops(&traced, SINGLESTEP, 34)
}

/// Debug register 0 on `at`, with the kind and length of DR7; some stops, and then on without it.
fn watched(at: u64, control: u64) -> String {
    let traced = Traced::new();
    traced.set_debug(0, at);
    let accepted = traced.set_debug(7, control << 16 | 1);
    let mut text = format!("({accepted})");
    for _ in 0..3 {
        text += &traced.go(CONT);
        let _ = write!(text, " dr6 {:x}", traced.debug(6));
        traced.set_debug(6, 0);
    }
    traced.set_debug(7, 0);
    text + &traced.go(CONT)
}

fn breakpoint_by_register([_, at, _]: [u64; 3]) -> String {
    watched(CODE + at, 0)
}

fn watch_of_writes(_: [u64; 3]) -> String {
    watched(DATA + 8, 0b1001)
}

fn watch_of_reads(_: [u64; 3]) -> String {
    watched(DATA + 16, 0b1011)
}

/// One that is never reached, and a whole loop under it.
fn watch_in_vain(_: [u64; 3]) -> String {
    let traced = Traced::new();
    traced.set_debug(1, DATA + 0x100);
    traced.set_debug(7, 0b1101 << 20 | 4);
    traced.go(CONT)
}

fn breakpoint_in_code([at, _, _]: [u64; 3]) -> String {
    let traced = Traced::new();
    let place = (CODE + at) & !7;
    let shift = 8 * ((CODE + at) & 7);
    let word = system::trace(PEEKTEXT, traced.0, place, 0) as u64;
    // PEEKTEXT of the C library gives what is read.
    let stopped = word & !(0xff << shift) | 0xcc << shift;
    let mut text = String::new();
    for _ in 0..3 {
        system::trace(POKETEXT, traced.0, place, stopped);
        text += &traced.go(CONT);
        system::trace(POKETEXT, traced.0, place, word);
        let mut registers = traced.registers();
        registers[RIP] -= 1;
        traced.set_registers(registers);
        text += &traced.go(SINGLESTEP);
    }
    text + &traced.go(CONT)
}

fn system_calls([_, _, end]: [u64; 3]) -> String {
    let traced = Traced::new();
    let mut text = stops(&traced, SYSCALL, 1);
    let mut registers = traced.registers();
    let _ = write!(text, " number {}", registers[ORIGINAL_RAX]);
    registers[ORIGINAL_RAX] = 9999;
    traced.set_registers(registers);
    text += &stops(&traced, SYSCALL, 1);
    let _ = write!(text, " (the end is at +{end:x})");
    text + &stops(&traced, CONT, 1)
}

/// Registers of every kind, written while the loop is at work, are there in the end.
fn registers(_: [u64; 3]) -> String {
    let traced = Traced::new();
    stops(&traced, SINGLESTEP, 3);
    let mut area = [0u8; 512];
    system::trace(GETFPREGS, traced.0, 0, area.as_mut_ptr() as u64);
    for (n, byte) in area[160..416].iter_mut().enumerate() {
        *byte = n as u8;
    }
    area[0..2].copy_from_slice(&0x27fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x3f80u32.to_le_bytes());
    assert_eq!(system::trace(SETFPREGS, traced.0, 0, area.as_ptr() as u64), 0);
    let mut registers = traced.registers();
    registers[FS_BASE] = 0x1_2345_6000;
    registers[RBX] = 0x1000;
    traced.set_registers(registers);
    let mut text = traced.go(CONT);
    let mut after = [0u8; 512];
    system::trace(GETFPREGS, traced.0, 0, after.as_mut_ptr() as u64);
    let parts = [(0, 2), (24, 28), (160, 416)];
    let same = parts.iter().all(|(from, to)| area[*from..*to] == after[*from..*to]);
    let _ = write!(text, " vectors kept: {same}, fs {:x}", traced.registers()[FS_BASE]);
    text
}

/// Every case with what was seen.
pub fn all() -> Vec<(&'static str, String)> {
    let offsets = place_code();
    let cases: [(&str, fn([u64; 3]) -> String); 8] = [
        ("single steps", single_steps),
        ("breakpoint by a debug register", breakpoint_by_register),
        ("watch of writes", watch_of_writes),
        ("watch of reads and writes", watch_of_reads),
        ("watch in vain", watch_in_vain),
        ("breakpoint in the code", breakpoint_in_code),
        ("system calls", system_calls),
        ("registers", registers),
    ];
    cases.iter().map(|(name, case)| (*name, case(offsets))).collect()
}
