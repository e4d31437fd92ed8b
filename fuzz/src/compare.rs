//! What differs between two outcomes.

use doppel_x86::Rflags;

use crate::layout::REGIONS;
use crate::state::{Ending, Outcome};
use crate::xsave::Vectors;

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Strictness {
    /// Flags that nobody specifies.
    pub ignored_flags: u64,
    /// Arithmetic flags in the frame of an exception other than the one that ends every program.
    pub flags_at_faults: bool,
    /// Of a page fault's address only the page.
    pub page_of_address: bool,
    /// At a fault leave out TOP, tags and x87 registers, and the flags of MXCSR.
    pub early_state: bool,
    /// At a fault leave out the word below RSP.
    pub return_address: bool,
    /// At a fault leave out memory.
    pub partial_store: bool,
}

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
/// Flags that user code can see, RF in the frame of an exception included.
const FLAGS: u64 = Rflags::ARITHMETIC.bits()
    | Rflags::DF.bits()
    | Rflags::TF.bits()
    | Rflags::IF.bits()
    | Rflags::IOPL.bits()
    | Rflags::NT.bits()
    | Rflags::AC.bits()
    | Rflags::ID.bits();
const INVALID_OPCODE: u8 = 6;
const PRESENT: u64 = 1;

/// The first half of the addresses is the user's.
fn kernels(address: u64) -> bool {
    address >= 0x7fff_ffff_f000
}

/// The host's kernel tells nobody what it has mapped for itself: it says that all of it is present.
fn as_the_kernel_tells(ending: Ending, how: Strictness) -> Ending {
    let ending = match ending {
        Ending::Exception {
            vector,
            error,
            address: Some(address),
        } if how.page_of_address => Ending::Exception {
            vector,
            error,
            address: Some(address & !0xfff),
        },
        e => e,
    };
    match ending {
        Ending::Exception {
            vector,
            error,
            address: Some(address),
        } if kernels(address) => Ending::Exception {
            vector,
            error: error | PRESENT,
            address: Some(address),
        },
        e => e,
    }
}

/// A line for each difference: what the engine has, and what the processor.
pub fn differences(engine: &Outcome, native: &Outcome, how: Strictness) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |name: &str, a: u64, b: u64| {
        if a != b {
            found.push(format!("{name}: {a:#x}, processor {b:#x}"));
        }
    };
    for (n, name) in NAMES.iter().enumerate() {
        check(name, engine.gpr[n], native.gpr[n]);
    }
    check("rip", engine.rip, native.rip);
    check("fs base", engine.fs, native.fs);
    check("gs base", engine.gs, native.gs);
    let mask = FLAGS & !ignored_flags(native, how);
    check("flags", engine.flags & mask, native.flags & mask);
    let (a, b) = (
        as_the_kernel_tells(engine.ending, how),
        as_the_kernel_tells(native.ending, how),
    );
    if a != b {
        found.push(format!("ending: {a:x?}, processor {b:x?}"));
    }
    let at_fault =
        matches!(native.ending, Ending::Exception { vector, .. } if vector != INVALID_OPCODE);
    let simplify = |v: &Vectors| match native.ending {
        _ if how.early_state && at_fault => late(v),
        Ending::Exception { vector: 19, .. } => imprecise(v),
        _ => v.clone(),
    };
    vectors(
        &mut found,
        &simplify(&engine.vectors),
        &simplify(&native.vectors),
    );
    if !(how.partial_store && at_fault) {
        memory(&mut found, engine, native);
    }
    if how.return_address && at_fault {
        let below = native.gpr[4].wrapping_sub(8);
        let prefix = |n| format!("byte {:#x}", below.wrapping_add(n));
        found.retain(|d| !(0..8).any(|n| d.starts_with(&prefix(n))) && !d.starts_with("and "));
    }
    found
}

fn ignored_flags(native: &Outcome, how: Strictness) -> u64 {
    let fault = !matches!(
        native.ending,
        Ending::Exception {
            vector: INVALID_OPCODE,
            ..
        }
    );
    if fault && !how.flags_at_faults {
        how.ignored_flags | Rflags::ARITHMETIC.bits()
    } else {
        how.ignored_flags
    }
}

/// Without what an instruction may change before it faults.
fn late(v: &Vectors) -> Vectors {
    Vectors {
        status: 0,
        tags: 0,
        st: [[0; 10]; 8],
        mxcsr: v.mxcsr & !0x3f,
        ..v.clone()
    }
}

/// At an overflow or underflow that is not masked, PE says whether the result but for its exponent is inexact: the
/// interpreter, which lets the processor run masked, cannot know.
fn imprecise(v: &Vectors) -> Vectors {
    const MASKS: u32 = 0x400 | 0x800;
    const PRECISION: u32 = 0x20;
    let mut v = v.clone();
    if v.mxcsr & MASKS != MASKS {
        v.mxcsr &= !PRECISION;
    }
    v
}

fn vectors(found: &mut Vec<String>, a: &Vectors, b: &Vectors) {
    let mut check = |name: String, a: String, b: String| {
        if a != b {
            found.push(format!("{name}: {a}, processor {b}"));
        }
    };
    let number = |n: u64| format!("{n:#x}");
    check(
        "mxcsr".into(),
        number(a.mxcsr.into()),
        number(b.mxcsr.into()),
    );
    check(
        "fcw".into(),
        number(a.control.into()),
        number(b.control.into()),
    );
    check(
        "fsw".into(),
        number(a.status.into()),
        number(b.status.into()),
    );
    check("ftw".into(), number(a.tags.into()), number(b.tags.into()));
    for n in 0..8 {
        check(format!("st{n}"), hex(&a.st[n]), hex(&b.st[n]));
        check(format!("k{n}"), number(a.k[n]), number(b.k[n]));
    }
    for n in 0..32 {
        if a.zmm[n] != b.zmm[n] {
            check(format!("zmm{n}"), hex(&a.zmm[n]), hex(&b.zmm[n]));
        }
    }
}

/// Most significant byte first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// Differing bytes that are told one by one.
const MOST_BYTES: usize = 4;

fn memory(found: &mut Vec<String>, engine: &Outcome, native: &Outcome) {
    let regions = REGIONS.iter().zip(&engine.memory.0).zip(&native.memory.0);
    for ((region, a), b) in regions {
        if a == b {
            continue;
        }
        let differ = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b);
        for (n, (a, b)) in differ.clone().take(MOST_BYTES) {
            let at = region.base + n as u64;
            found.push(format!("byte {at:#x}: {a:#04x}, processor {b:#04x}"));
        }
        let count = differ.count();
        if count > MOST_BYTES {
            found.push(format!("and {} bytes more", count - MOST_BYTES));
        }
    }
}
