//! Loops that go on for long: state over interruptions, restartable sequences, and the instructions that do not trap.

use crate::system::{self, Context, SignalInfo};
use crate::trial::{self, Look};
use std::arch::asm;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};

const CODE: u64 = 0x1a00_0000;

static SIGNALS: AtomicU64 = AtomicU64::new(0);

/// Counts, and leaves nothing in the registers as it was.
extern "C" fn interrupted(_: c_int, _: *mut SignalInfo, _: *mut Context) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: registers are changed that the block says are.
    unsafe {
        asm!(
            "vzeroall", "fninit", "fldpi", "fldpi",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _);
    }
}

/// The bytes of instructions, at a page of their own.
macro_rules! place {
    ($page:expr, $($line:literal),* $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        let at = CODE + ($page << 12);
        // SAFETY: the instructions are jumped over; both labels are in this function, in this order.
        let code = unsafe {
            asm!("lea {0}, [rip + 2f]", "lea {1}, [rip + 3f]", "jmp 3f", "2:", $($line,)* "3:", out(reg) start, out(reg) end);
            std::slice::from_raw_parts(start, end.offset_from(start) as usize)
        };
        system::map(at, 1, system::READ | system::WRITE);
        // SAFETY: a page that was just mapped.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at as *mut u8, code.len()) };
        system::protect(at, 1, system::READ | system::EXECUTE);
        at
    }};
}

/// Loops that change all general registers, flags, x87 and vector registers, and end in a trap.
fn busy_loops() -> Vec<(&'static str, u64)> {
    let mut loops = vec![
        (
            "general registers and flags",
            place!(0, "mov ecx, 200000", "std", "4:", "adc rax, rbx", "rol rdx, 7", "xor rbx, rdx", "adc rsi, rdi", "lea r8, [r8 + r9 * 2 + 3]",
                "sbb r9, r8", "imul r10, r11, 77", "xor r11, r10", "bswap r12", "add r12, r13", "rcl r13, 3", "xchg r14, r15", "adc r14, rbp",
                "push r14", "pop rbp", "lahf", "dec ecx", "jnz 4b", "ud2"),
        ),
        (
            "x87 and mmx",
            place!(1, "mov ecx, 100000", "fld1", "fldpi", "4:", "fmul st, st(1)", "fld1", "faddp st(2), st", "fsqrt", "fxch st(1)", "dec ecx", "jnz 4b", "ud2"),
        ),
        (
            "sse and avx",
            place!(2, "mov ecx, 200000", "4:", "paddd xmm0, xmm1", "vpxor ymm2, ymm2, ymm3", "vpaddq ymm3, ymm3, ymm4", "vpermilps ymm4, ymm4, 0x1b",
                "vpsubb ymm15, ymm14, ymm15", "vpshufd ymm14, ymm15, 0x39", "pmulld xmm8, xmm9", "dec ecx", "jnz 4b", "ud2"),
        ),
        // It reads the bytes of its own CPUID now and then; what CPUID says is the guest's business.
        (
            "beside a cpuid",
            place!(4, "mov r8d, 4", "4:", "mov r9d, 100", "5:", "xor eax, eax", "xor ecx, ecx", "6:", "cpuid", "mov r11d, 500", "7:", "imul r10, r10, 77", "add r10, r11",
                "dec r11d", "jnz 7b", "dec r9d", "jnz 5b", "xor r10, [rip + 6b]", "dec r8d", "jnz 4b", "xor eax, eax", "xor ebx, ebx", "xor ecx, ecx", "xor edx, edx", "ud2"),
        ),
    ];
    if is_x86_feature_detected!("avx512bw") {
        let at = place!(3, "mov ecx, 100000", "4:", "vpaddd zmm16, zmm17, zmm16", "vprold zmm17, zmm16, 5", "vpcmpud k2, zmm16, zmm17, 1", "kxorq k1, k1, k2",
            "vpsubd zmm31{{k1}}, zmm31, zmm17", "vpternlogd zmm5, zmm16, zmm31, 0x96", "dec ecx", "jnz 4b", "ud2");
        loops.push(("avx-512", at));
    }
    loops
}

/// State over signals: what the loops leave is the same with signals and without.
fn under_signals(loops: &[(&'static str, u64)]) -> Vec<(String, String)> {
    system::handle(system::SIGALRM, interrupted);
    let under = |(name, at): &(&str, u64)| {
        let alone = trial::run(*at, Look::Exactly);
        system::timer(700);
        SIGNALS.store(0, Ordering::Relaxed);
        let mut said = format!("with signals {alone}");
        let mut rounds = 0;
        while rounds < 3 || SIGNALS.load(Ordering::Relaxed) < 3 {
            rounds += 1;
            let now = trial::run(*at, Look::Exactly);
            if now != alone {
                said += &format!("\n    but with signals: {now}");
                break;
            }
        }
        system::timer(0);
        (format!("signals, {name}"), said)
    };
    loops.iter().map(under).collect()
}

/// State over context switches: processes that keep different registers, on one processor.
fn under_switches(repeat: u64, loops: &[(&'static str, u64)]) -> Vec<(String, String)> {
    const FORK: i64 = 57;
    const EXIT: i64 = 231;
    const AFFINITY: i64 = 203;
    let alone: Vec<String> = loops.iter().map(|(_, at)| trial::run(*at, Look::Exactly)).collect();
    let one: u64 = 1;
    let children: Vec<c_int> = (0..loops.len())
        .map(|n| match system::call(FORK, [0; 4]) {
            0 => {
                system::call(AFFINITY, [0, 8, &raw const one as u64, 0]);
                let same = (0..4 * repeat.min(10)).all(|_| trial::run(loops[n].1, Look::Exactly) == alone[n]);
                system::call(EXIT, [u64::from(!same), 0, 0, 0]);
                unreachable!()
            }
            process => process as c_int,
        })
        .collect();
    let wrong = children.into_iter().filter(|process| system::wait(*process) != 0).count();
    vec![("switches".to_owned(), format!("{wrong} processes saw the registers of another"))]
}

// SAFETY: the C library says where its restartable sequence's structure is, from FS on.
unsafe extern "C" {
    static __rseq_offset: isize;
}

#[repr(C, align(32))]
struct Sequence {
    version: u32,
    flags: u32,
    start: u64,
    length: u64,
    abort: u64,
}

/// Goes around within a restartable sequence until it is aborted.
fn restartable() -> String {
    const ROUNDS: u64 = 20;
    let mut sequence = Sequence { version: 0, flags: 0, start: 0, length: 0, abort: 0 };
    // SAFETY: the C library's constant.
    let area = unsafe { __rseq_offset };
    system::timer(1500);
    let mut aborted = 0u64;
    for _ in 0..ROUNDS {
        let mut turns: u64 = 1 << 34;
        // SAFETY: the structure is the C library's, which uses no sequence of its own meanwhile; the labels are the block's.
        unsafe {
            asm!(
                "lea {t}, [rip + 2f]", "mov [{d} + 8], {t}",
                "lea {u}, [rip + 3f]", "sub {u}, {t}", "mov [{d} + 16], {u}",
                "lea {t}, [rip + 4f]", "mov [{d} + 24], {t}",
                "mov fs:[{area} + 8], {d}",
                "2:", "dec {n}", "jnz 2b",
                "3:", "jmp 5f",
                ".byte 0x0f, 0xb9, 0x3d", ".long 0x53053053",
                "4:", "inc {aborted:r}",
                "5:", "mov qword ptr fs:[{area} + 8], 0",
                t = out(reg) _, u = out(reg) _, d = in(reg) &mut sequence, area = in(reg) area, n = inout(reg) turns, aborted = inout(reg) aborted);
        }
        std::hint::black_box(&mut turns);
    }
    system::timer(0);
    let cpu: u32;
    // SAFETY: a field of the structure.
    unsafe { asm!("mov {0:e}, fs:[{1} + 4]", out(reg) cpu, in(reg) area) };
    format!("{aborted} of {ROUNDS} aborted, the processor's number is {}", cpu < processors())
}

fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// The page of the kernel's that old programs call.
fn vsyscall() -> String {
    let call = |at: u64, first: u64| -> u64 {
        let result: u64;
        // SAFETY: a function of the kernel's, which writes where its arguments say.
        unsafe { asm!("call {0}", in(reg) at, inlateout("rdi") first => _, inlateout("rsi") 0u64 => _, out("rax") result, out("rcx") _, out("r11") _, out("rdx") _) };
        result
    };
    const TIME: i64 = 201;
    let has = std::fs::read_to_string("/proc/self/maps").unwrap().contains("[vsyscall]");
    if !has {
        return "none".to_owned();
    }
    let mut value = [0u64; 2];
    let mut right = 0;
    for _ in 0..100 {
        let now = system::call(TIME, [0; 4]) as u64;
        let time = call(0xffff_ffff_ff60_0400, 0);
        let day = call(0xffff_ffff_ff60_0000, &raw mut value as u64);
        let near = |t: u64| t.wrapping_sub(now) < 3;
        right += u64::from(near(time) && day == 0 && near(value[0]) && value[1] < 1_000_000);
    }
    let read = place!(8, "movabs rdi, 0xffffffffff600000", "mov rax, [rdi]", "ud2");
    let jump = place!(9, "movabs rdi, 0xffffffffff600008", "call rdi", "ud2");
    format!("{right} of 100 right; read: {}; elsewhere: {}", trial::run(read, Look::Exactly), trial::run(jump, Look::Exactly))
}

/// Repeats an instruction, and says what it gave, if always the same.
fn same<T: PartialEq + std::fmt::LowerHex>(repeat: u64, instruction: impl Fn() -> T) -> Option<T> {
    let first = instruction();
    (0..repeat).all(|_| instruction() == first).then_some(first)
}

fn shown<T: std::fmt::LowerHex>(value: Option<T>) -> String {
    value.map_or("it changes".to_owned(), |v| format!("{v:x}"))
}

/// Instructions that store what the system has, by the operand's bytes.
macro_rules! stored {
    ($instruction:literal) => {{
        let mut value = [0u64; 2];
        // SAFETY: it writes ten bytes at most.
        unsafe { asm!(concat!($instruction, " [{0}]"), in(reg) &mut value) };
        u128::from(value[1]) << 64 | u128::from(value[0])
    }};
}

macro_rules! register {
    ($instruction:literal, $input:expr) => {{
        let mut value: u64 = $input;
        // SAFETY: registers and flags alone change.
        unsafe { asm!($instruction, inout(reg) value) };
        value
    }};
}

/// RDTSCP with the NOP that Linux's vDSO has behind it.
fn as_the_vdso_does(aux: &mut u32) -> u64 {
    let (low, high, number): (u64, u64, u64);
    // SAFETY: three registers alone change.
    unsafe { asm!("rdtscp", "xchg ax, ax", out("rax") low, out("rdx") high, out("rcx") number, options(nomem, nostack)) };
    // All 64 bits of it count.
    *aux = u32::try_from(number).unwrap_or(u32::MAX);
    high << 32 | low
}

/// Time stamps by both instructions in turns never go back.
fn time_stamps(turns: u64) -> String {
    let mut last = 0;
    for n in 0..turns {
        let mut aux = 0;
        // SAFETY: it writes to the variable.
        let now = unsafe {
            match n % 4 {
                0 => std::arch::x86_64::__rdtscp(&mut aux),
                1 => as_the_vdso_does(&mut aux),
                _ => std::arch::x86_64::_rdtsc(),
            }
        };
        if now < last {
            return format!("back by {}", last - now);
        }
        if aux >= processors() {
            return format!("the processor's number is {aux:x}");
        }
        last = now;
    }
    "never back".to_owned()
}

fn cpuid(repeat: u64) -> String {
    let leaf = |n: u32, sub: u32| {
        let l = std::arch::x86_64::__cpuid_count(n, sub);
        // The number of the local APIC, and what depends on the processor at hand.
        let ebx = if n == 1 { l.ebx & 0xff_ffff } else { l.ebx };
        [l.eax, ebx, l.ecx, l.edx]
    };
    let leaves = [(0, 0), (1, 0), (7, 0), (0xd, 0), (0xd, 2), (0x8000_0000, 0), (0x8000_0008, 0)];
    let before = leaves.map(|(n, sub)| leaf(n, sub));
    let wrong = (0..repeat).filter(|_| leaves.map(|(n, sub)| leaf(n, sub)) != before).count();
    format!("{wrong} changes")
}

/// What does not trap, in loops.
fn untrapped(repeat: u64) -> Vec<(String, String)> {
    let turns = 1000 * repeat;
    let mut lines = vec![
        ("kernel sgdt".to_owned(), shown(same(turns, || stored!("sgdt")))),
        ("kernel sidt".to_owned(), shown(same(turns, || stored!("sidt")))),
        ("kernel sldt".to_owned(), shown(same(turns, || register!("sldt {0:e}", 0)))),
        ("kernel str".to_owned(), shown(same(turns, || register!("str {0:e}", 0)))),
        ("kernel smsw".to_owned(), shown(same(turns, || register!("smsw {0:r}", 0)))),
        ("lsl of code".to_owned(), shown(same(turns, || register!("lsl {0:e}, {0:e}", 0x33)))),
        ("lar of the stack".to_owned(), shown(same(turns, || register!("lar {0:e}, {0:e}", 0x2b)))),
        ("lar of nothing".to_owned(), shown(same(turns, || register!("lar {0:e}, {0:e}", 0x1230)))),
        ("cpuid".to_owned(), cpuid(turns)),
        ("time stamps".to_owned(), time_stamps(10 * turns)),
    ];
    let processor = |n: u64| if n < u64::from(processors()) { "a processor's".to_owned() } else { format!("{n:x}") };
    lines.push(("lsl of the processor's number".to_owned(), processor(register!("lsl {0:e}, {0:e}", 0x7b))));
    if std::arch::x86_64::__cpuid_count(7, 0).ecx >> 22 & 1 == 1 {
        let wrong = (0..turns).map(|_| register!("rdpid {0:r}", 0)).find(|n| *n >= u64::from(processors()));
        lines.push(("rdpid".to_owned(), processor(wrong.unwrap_or(0))));
    }
    lines
}

/// Every case with what was seen.
pub fn all(repeat: u64) -> Vec<(String, String)> {
    let loops = busy_loops();
    let mut lines = under_signals(&loops);
    lines.extend(under_switches(repeat, &loops));
    lines.push(("restartable sequences".to_owned(), restartable()));
    lines.push(("kernel vsyscall".to_owned(), vsyscall()));
    lines.extend(untrapped(repeat));
    lines
}
