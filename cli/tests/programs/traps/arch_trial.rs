//! One trial: code is entered with a known state, and what the signal handler sees of the state in the end is kept.
//!
//! Everything lies at fixed addresses, so that what comes out is the same wherever it runs. Code ends in a trap; the handler copies the whole
//! state and leads back into Rust. While [`Watch::step`] is set, a SIGTRAP ends nothing, but leaves a line behind.

use crate::system::{self, Context, SignalInfo, place};
use std::arch::naked_asm;
use std::ffi::c_int;
use std::fmt::Write;
use std::ptr::addr_of_mut;

/// Where code lies, one page for each trial.
pub const CODE: u64 = 0x1000_0000;
/// Where data lies: see [`prepare`].
pub const DATA: u64 = 0x2000_0000;
/// The end of the stack.
pub const STACK: u64 = 0x3000_0000;
const STACK_PAGES: usize = 8;

/// Signals that a trap can become.
const TRAPS: [c_int; 5] = [system::SIGILL, system::SIGTRAP, system::SIGBUS, system::SIGFPE, system::SIGSEGV];
/// Bytes of an XSAVE area up to AVX-512's.
const AREA: usize = 2688;
const STEPS: usize = 64;

/// Extended state in the standard format.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Area(pub [u8; AREA]);

/// What is kept of a signal.
#[derive(Clone, Copy)]
pub struct Seen {
    signal: c_int,
    code: c_int,
    address: u64,
    registers: [u64; 23],
    area: Area,
}

/// What the handler has to do with.
struct Watch {
    /// What code is entered with.
    entry: [u64; 16],
    target: u64,
    area: Area,
    mask: u64,
    /// Where to return to.
    stack: u64,
    bases: [u64; 2],
    /// What came of it.
    seen: Seen,
    step: bool,
    steps: [(u64, u64, c_int); STEPS],
    count: usize,
}

static mut WATCH: Watch = Watch {
    entry: [0; 16],
    target: 0,
    area: Area([0; AREA]),
    mask: 0,
    stack: 0,
    bases: [0; 2],
    seen: Seen { signal: 0, code: 0, address: 0, registers: [0; 23], area: Area([0; AREA]) },
    step: false,
    steps: [(0, 0, 0); STEPS],
    count: 0,
};

/// Loads the state and goes to the code; [`landing`] returns to the caller.
#[unsafe(naked)]
extern "C" fn enter() {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "lea rcx, [rip + {watch}]",
        "rdfsbase rax", "mov [rcx + {bases}], rax",
        "rdgsbase rax", "mov [rcx + {bases} + 8], rax",
        "mov [rcx + {stack}], rsp",
        "mov eax, [rcx + {mask}]", "xor edx, edx", "xrstor64 [rcx + {area}]",
        "push 0x202", "popfq",
        "mov rax, [rcx]", "mov rdx, [rcx + 16]", "mov rbx, [rcx + 24]", "mov rsp, [rcx + 32]", "mov rbp, [rcx + 40]",
        "mov rsi, [rcx + 48]", "mov rdi, [rcx + 56]", "mov r8, [rcx + 64]", "mov r9, [rcx + 72]", "mov r10, [rcx + 80]",
        "mov r11, [rcx + 88]", "mov r12, [rcx + 96]", "mov r13, [rcx + 104]", "mov r14, [rcx + 112]", "mov r15, [rcx + 120]",
        "mov rcx, [rcx + 8]",
        "jmp [rip + {watch} + {target}]",
        watch = sym WATCH,
        bases = const std::mem::offset_of!(Watch, bases),
        stack = const std::mem::offset_of!(Watch, stack),
        mask = const std::mem::offset_of!(Watch, mask),
        area = const std::mem::offset_of!(Watch, area),
        target = const std::mem::offset_of!(Watch, target),
    )
}

/// Where the handler leads to: the state that Rust expects, and back.
#[unsafe(naked)]
extern "C" fn landing() {
    naked_asm!(
        "cld",
        "xor eax, eax", "mov ds, eax", "mov es, eax", "mov fs, eax", "mov gs, eax",
        "lea rcx, [rip + {watch}]",
        "mov rax, [rcx + {bases}]", "wrfsbase rax",
        "mov rax, [rcx + {bases} + 8]", "wrgsbase rax",
        "fninit", "push 0x1f80", "ldmxcsr [rsp]", "pop rax", "vzeroall",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        watch = sym WATCH,
        bases = const std::mem::offset_of!(Watch, bases),
    )
}

/// Where a signal leads to: Linux leaves alignment checks on, and AMD's processors check the vectors that compiled code copies with.
#[unsafe(naked)]
extern "C" fn entry(_: c_int, _: *mut SignalInfo, _: *mut Context) {
    naked_asm!(
        "pushfq", "and dword ptr [rsp], -0x40001", "popfq",
        "jmp {handler}",
        handler = sym handler,
    )
}

/// Keeps what a trap left, and leads back. It uses nothing that hangs off FS, for that is the trial's.
extern "C" fn handler(signal: c_int, info: *mut SignalInfo, context: *mut Context) {
    const AT_LANDING: u64 = 0x202;
    const SELECTORS: u64 = 0x002b_0000_0000_0033;
    let watch = addr_of_mut!(WATCH);
    // SAFETY: the kernel's structures are the handler's while it runs; this is the process's one thread, and what it was at does not use WATCH.
    unsafe {
        let registers = &mut (*context).registers;
        if (*watch).step && signal == system::SIGTRAP && (*watch).count < STEPS {
            let step = (registers[place::RIP], registers[place::FLAGS], (*info).code);
            (*watch).steps[(*watch).count] = step;
            (*watch).count += 1;
            return;
        }
        let seen = &mut (*watch).seen;
        (seen.signal, seen.code, seen.address) = (signal, (*info).code, (*info).address);
        seen.registers = *registers;
        std::ptr::copy_nonoverlapping((*context).floating, seen.area.0.as_mut_ptr(), AREA);
        registers[place::RIP] = landing as *const () as u64;
        registers[place::RSP] = (*watch).stack;
        registers[place::FLAGS] = AT_LANDING;
        registers[place::SELECTORS] = SELECTORS;
    }
}

/// Pages of [`DATA`] with fewer rights, or more, than to read and write.
pub mod page {
    pub const READ_ONLY: u64 = 1;
    pub const NOTHING: u64 = 2;
    /// May be executed, too.
    pub const ALL: u64 = 3;
}
const DATA_PAGES: usize = 4;

/// A page of a file that ends before it.
pub const BEYOND: u64 = 0x4000_1000;

/// Maps what trials use and takes the signals.
pub fn prepare() {
    const MEMFD_CREATE: i64 = 319;
    const FTRUNCATE: i64 = 77;
    system::map(DATA, DATA_PAGES, system::READ | system::WRITE);
    system::protect(DATA + (page::READ_ONLY << 12), 1, system::READ);
    system::protect(DATA + (page::NOTHING << 12), 1, system::NONE);
    system::protect(DATA + (page::ALL << 12), 1, system::READ | system::WRITE | system::EXECUTE);
    let file = system::call(MEMFD_CREATE, [c"page".as_ptr() as u64, 0, 0, 0]);
    assert_eq!(system::call(FTRUNCATE, [file as u64, 4096, 0, 0]), 0);
    system::map_file(BEYOND - 4096, 2, system::READ | system::WRITE, system::PRIVATE, file as c_int);
    system::map(STACK - ((STACK_PAGES as u64) << 12), STACK_PAGES, system::READ | system::WRITE);
    system::alternate_stack();
    TRAPS.into_iter().for_each(|signal| system::handle(signal, entry));
    let (mask, area) = entered_with();
    let watch = addr_of_mut!(WATCH);
    // SAFETY: no trial runs.
    unsafe {
        ((*watch).mask, (*watch).area) = (mask, area);
        for (n, register) in (*watch).entry.iter_mut().enumerate() {
            *register = 0x0101_0101_0101_0101 * (n as u64 + 1);
        }
        (*watch).entry[4] = STACK - 0x800;
    }
}

/// Where the components lie in the standard format: SSE's and x87's are together.
struct Components(Vec<(&'static str, u64, std::ops::Range<usize>)>);

impl Components {
    /// Those of the processor, up to AVX-512.
    fn of_the_processor() -> Self {
        let mut all = vec![("x87", 0, 0..160), ("xmm", 1, 160..416)];
        for (name, n) in [("ymm", 2), ("k", 5), ("zmm", 6), ("zmm16", 7)] {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, n);
            let start = leaf.ebx as usize;
            if leaf.eax != 0 {
                all.push((name, u64::from(n), start..start + leaf.eax as usize));
            }
        }
        Components(all)
    }
}

/// The extended state that trials begin with, and the mask that loads it.
fn entered_with() -> (u64, Area) {
    let mut area = Area([0; AREA]);
    let components = Components::of_the_processor();
    for (name, n, range) in &components.0 {
        for (at, byte) in area.0[range.clone()].iter_mut().enumerate() {
            *byte = match *name {
                // Registers of 16 bytes: a number between 1 and 2, and no more.
                "x87" => [0, 0, 0, 0, 0, 0, *n as u8, 0x80, 0xff, 0x3f, 0, 0, 0, 0, 0, 0][at % 16],
                _ => (at as u8).wrapping_mul(37) ^ 0x5a ^ *n as u8,
            };
        }
    }
    area.0[..32].fill(0);
    area.0[..2].copy_from_slice(&0x037fu16.to_le_bytes());
    area.0[4] = 0x0f;
    area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let mask = components.0.iter().map(|(_, n, _)| 1 << n).sum::<u64>();
    area.0[512..520].copy_from_slice(&mask.to_le_bytes());
    (mask, area)
}

/// As entered, but what belongs to the code's own address is left out, and a component in its initial state has its values.
fn plain(area: &Area, components: &Components) -> Area {
    const ADDRESSES: std::ops::Range<usize> = 6..24;
    let mut area = *area;
    let present = u64::from_le_bytes(area.0[512..520].try_into().unwrap());
    area.0[ADDRESSES].fill(0);
    area.0[28..32].fill(0);
    for (name, n, range) in &components.0 {
        if present >> n & 1 == 0 && *name == "x87" {
            area.0[..24].fill(0);
            area.0[..2].copy_from_slice(&0x037fu16.to_le_bytes());
            area.0[32..160].fill(0);
        } else if present >> n & 1 == 0 {
            area.0[range.clone()].fill(0);
        }
    }
    area
}

fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// How a trial is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The first trap ends it, and everything is told.
    Exactly,
    /// The same, but of the address of a page fault the page alone.
    Page,
    /// Single steps end nothing, and are listed.
    Steps,
}

/// Enters the code at `target`, and describes what it left.
pub fn run(target: u64, look: Look) -> String {
    reset();
    let watch = addr_of_mut!(WATCH);
    // SAFETY: WATCH is this function's until `enter`, then the handler's, and this function's again after the landing.
    let (mut seen, steps, entry, area) = unsafe {
        (*watch).target = target;
        (*watch).step = look == Look::Steps;
        (*watch).count = 0;
        enter();
        let count = (*watch).count;
        let steps: Vec<_> = (0..count).map(|n| (*watch).steps[n]).collect();
        ((*watch).seen, steps, (*watch).entry, (*watch).area)
    };
    if look == Look::Page {
        seen.address &= !0xfff;
        seen.registers[place::CR2] &= !0xfff;
    }
    let mut text = describe(&seen, target, &entry);
    let components = Components::of_the_processor();
    let (before, after) = (plain(&area, &components), plain(&seen.area, &components));
    text += &changed(&before, &after, &components);
    text += &memory();
    for (rip, flags, code) in steps {
        let _ = write!(text, " [{} {flags:x} {code}]", place_of(rip, target));
    }
    text
}

/// Fills data and stack.
fn reset() {
    for (start, len) in [(DATA, 0x1000), (DATA + (page::ALL << 12), 0x40), (STACK - 0x1000, 0x1000u64)] {
        for at in (start..start + len).step_by(8) {
            // SAFETY: pages that are mapped for this, and no Rust object.
            unsafe { (at as *mut u64).write_volatile(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)) };
        }
    }
}

/// What is new in data and stack.
fn memory() -> String {
    let page = |at: u64, len: usize| {
        // SAFETY: pages that are mapped for this, and nobody writes to them meanwhile.
        unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
    };
    let parts = [("data", DATA, 0x1000), ("code", DATA + (page::ALL << 12), 0x40), ("stack", STACK - 0x1000, 0x1000)];
    let now = parts.map(|(name, at, len)| (name, digest(&page(at, len))));
    reset();
    let fresh = parts.map(|(_, at, len)| digest(&page(at, len)));
    let new = now.iter().zip(fresh).filter(|((_, a), b)| a != b);
    new.map(|((name, sum), _)| format!(" {name}={sum:x}")).collect()
}

fn place_of(rip: u64, target: u64) -> String {
    let page = target & !0xfff;
    match rip.checked_sub(page) {
        Some(offset) if offset <= 0x1000 => format!("+{:x}", rip.wrapping_sub(target) as i64),
        _ => format!("{rip:x}"),
    }
}

fn describe(seen: &Seen, target: u64, entry: &[u64; 16]) -> String {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    ];
    const PAGE_FAULT: u64 = 14;
    let r = &seen.registers;
    let mut text = format!(
        "signal {} {} at {} trap {} error {:x} rip {} flags {:x} cs {:x} ss {:x}",
        seen.signal,
        seen.code,
        place_of(seen.address, target),
        r[place::TRAP],
        r[place::ERROR],
        place_of(r[place::RIP], target),
        r[place::FLAGS],
        r[place::SELECTORS] & 0xffff,
        r[place::SELECTORS] >> 48,
    );
    if r[place::TRAP] == PAGE_FAULT {
        let _ = write!(text, " cr2 {}", place_of(r[place::CR2], target));
    }
    for (n, name) in NAMES.into_iter().enumerate() {
        let value = r[place::GENERAL[n]];
        if value != entry[n] {
            let _ = write!(text, " {name}={}", place_of(value, target));
        }
    }
    text
}

/// The components that have changed, by their digests.
fn changed(before: &Area, after: &Area, components: &Components) -> String {
    let mut text = String::new();
    let mxcsr = u32::from_le_bytes(after.0[24..28].try_into().unwrap());
    if after.0[24..28] != before.0[24..28] {
        let _ = write!(text, " mxcsr={mxcsr:x}");
    }
    for (name, _, range) in &components.0 {
        let parts = match *name {
            "x87" => [(0..6), (32..160)],
            _ => [range.clone(), (0..0)],
        };
        let of = |area: &Area| -> Vec<u8> { parts.iter().flat_map(|r| area.0[r.clone()].to_vec()).collect() };
        if of(before) != of(after) {
            let _ = write!(text, " {name}={:x}", digest(&of(after)));
        }
        if *name == "x87" && of(before)[..6] != of(after)[..6] {
            let _ = write!(text, " (control, status, tags {:x?})", &of(after)[..6]);
        }
    }
    text
}
