//! Accesses that cross pages: both pages are checked before either changes; the address reported is that of the page
//! that is to blame.

use doppel_conformance::paging::{A, D, P, RW, error};
use doppel_conformance::*;
use doppel_x86::Gpr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Eight bytes wide, at RBX; what it does to memory that holds 0x1111… with RAX = 0x2222…; whether it writes.
const CODES: &[(&str, Emit, u64, bool)] = &[
    (
        "load",
        |a| a.mov(rcx, qword_ptr(rbx)),
        0x1111_1111_1111_1111,
        false,
    ),
    (
        "store",
        |a| a.mov(qword_ptr(rbx), rax),
        0x2222_2222_2222_2222,
        true,
    ),
    (
        "add",
        |a| a.add(qword_ptr(rbx), rax),
        0x3333_3333_3333_3333,
        true,
    ),
    (
        "lock add",
        |a| a.lock().add(qword_ptr(rbx), rax),
        0x3333_3333_3333_3333,
        true,
    ),
    (
        "xchg",
        |a| a.xchg(qword_ptr(rbx), rax),
        0x2222_2222_2222_2222,
        true,
    ),
    (
        "lock cmpxchg",
        |a| a.lock().cmpxchg(qword_ptr(rbx), rax),
        0x1111_1111_1111_1111,
        true,
    ),
    (
        "lock xadd",
        |a| a.lock().xadd(qword_ptr(rbx), rax),
        0x3333_3333_3333_3333,
        true,
    ),
    (
        "lock btc",
        |a| a.lock().btc(qword_ptr(rbx), 63),
        0x9111_1111_1111_1111,
        true,
    ),
    (
        "movq store",
        |a| {
            a.movq(xmm3, rax)?;
            a.movq(qword_ptr(rbx), xmm3)
        },
        0x2222_2222_2222_2222,
        true,
    ),
    (
        "movsq",
        |a| {
            a.mov(rdi, rbx)?;
            a.movsq()
        },
        0x2222_2222_2222_2222,
        true,
    ),
    (
        "stosq",
        |a| {
            a.mov(rdi, rbx)?;
            a.stosq()
        },
        0x2222_2222_2222_2222,
        true,
    ),
];

const OLD: u64 = 0x1111_1111_1111_1111;
const OPERAND: u64 = 0x2222_2222_2222_2222;

/// The first page in physical memory.
const FIRST: u64 = SPARE + 0x5000;
/// The second: apart, and side by side.
const SECONDS: [u64; 2] = [SPARE + 0x2000, FIRST + 0x1000];

fn prepare(m: &mut Machine, place: u64, first: u64, second: u64, offset: u64) {
    m.forget();
    m.to_kernel();
    m.map(0, FIRST, first);
    m.map(1, place, second);
    m.cpu_mut().flush_tlb(true);
    for page in [FIRST, place] {
        m.put_bytes(page, &[0x11; 4096]);
    }
    m.set_reg(Gpr::Rax, OPERAND);
    m.set_reg(Gpr::Rbx, X + 0x1000 - offset);
    m.put(DATA, OPERAND);
    m.set_reg(Gpr::Rsi, DATA);
}

/// The eight bytes that end `8 - offset` bytes into the second page.
fn across(m: &Machine, place: u64, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    for n in 0..8u64 {
        let gpa = if n < offset {
            FIRST + 0x1000 - offset + n
        } else {
            place + n - offset
        };
        bytes[n as usize] = m.ram.load(gpa).expect("RAM");
    }
    u64::from_le_bytes(bytes)
}

fn each_engine_and_place(test: impl Fn(&mut Machine, u64)) {
    each_engine(|m| {
        for place in SECONDS {
            println!("the second page at {place:x}");
            // The gates that a test replaces.
            m.gate_on_ist(14, 0);
            m.gate(STOP, STOPPED_AT, 0xe, 0, 3);
            test(m, place);
        }
    });
}

#[test]
fn both_pages_present() {
    each_engine_and_place(|m, place| {
        for (what, code, result, writes) in CODES {
            for offset in 1..8 {
                prepare(m, place, P | RW, P | RW, offset);
                m.run_code(code);
                assert!(m.records().is_empty(), "{what}: {:x?}", m.records());
                assert_eq!(across(m, place, offset), *result, "{what} at {offset}");
                let bits = if *writes { A | D } else { A };
                assert_eq!(
                    [m.entry(0) & (A | D), m.entry(1) & (A | D)],
                    [bits; 2],
                    "{what}"
                );
            }
        }
    });
}

#[test]
fn either_page_missing_or_read_only() {
    each_engine_and_place(|m, place| {
        for (what, code, _, writes) in CODES {
            for (first, second) in [(P | RW, 0), (0, P | RW), (0, 0), (P | RW, P), (P, P | RW)] {
                let missing = first & P == 0 || second & P == 0;
                if !missing && !writes {
                    continue;
                }
                println!("{what} {first:x} {second:x}");
                prepare(m, place, first, second, 3);
                let r = m.faults(|_| Ok(()), code);
                let right = if *writes { P | RW } else { P };
                let blame = if first & right != right {
                    X + 0xffd
                } else {
                    X + 0x1000
                };
                let present = if missing { 0 } else { error::P };
                let write = if *writes { error::W } else { 0 };
                assert_eq!((r.vector, r.cr2), (14, blame), "{what}: {r:x?}");
                assert_eq!(r.error, present | write, "{what}: {r:x?}");
                assert_eq!(across(m, place, 3), OLD, "{what}: nothing is written");
                assert_eq!(m.reg(Gpr::Rax), OPERAND, "{what}");
                for n in [0, 1] {
                    assert_eq!(m.entry(n) & D & !(first & second & D), m.entry(n) & D);
                }
            }
        }
    });
}

#[test]
fn the_stack_crosses_pages() {
    each_engine_and_place(|m, place| {
        prepare(m, place, P | RW, P | RW, 4);
        m.run_code(|a| {
            a.mov(rbp, rsp)?;
            a.lea(rsp, qword_ptr(rbx + 8))?;
            a.push(rax)?;
            a.pop(rcx)?;
            a.mov(rsp, rbp)
        });
        assert_eq!((m.reg(Gpr::Rcx), across(m, place, 4)), (OPERAND, OPERAND));
        // A call onto a stack whose second page is missing changes neither RSP nor memory.
        prepare(m, place, P | RW, 0, 4);
        m.gate_on_ist(14, 1);
        m.gate(STOP, STOPPED_AT, 0xe, 2, 3);
        let r = m.faults(|a| a.lea(rsp, qword_ptr(rbx + 8)), |a| a.call(rbx));
        assert_eq!((r.vector, r.error, r.cr2), (14, error::W, X + 0x1000));
        assert_eq!(r.rsp, X + 0x1000 + 4);
        assert_eq!(across(m, place, 4), OLD);
        // POP into memory that is missing leaves RSP alone.
        prepare(m, place, P | RW, 0, 4);
        m.cpu_mut().gpr[Gpr::Rsp as usize] = KERNEL_STACK - 0x900;
        let r = m.faults(|_| Ok(()), |a| a.pop(qword_ptr(rbx)));
        assert_eq!(
            (r.vector, r.cr2, r.rsp),
            (14, X + 0x1000, KERNEL_STACK - 0x900)
        );
    });
}

#[test]
fn wide_vectors_cross_pages() {
    each_engine_and_place(|m, place| {
        prepare(m, place, P | RW, P | RW, 4);
        m.run_code(|a| {
            a.movups(xmm0, xmmword_ptr(rbx))?;
            a.pxor(xmm1, xmm1)?;
            a.movups(xmmword_ptr(rbx), xmm1)?;
            a.movq(rcx, xmm0)
        });
        assert_eq!((m.reg(Gpr::Rcx), across(m, place, 4)), (OLD, 0));
        prepare(m, place, P | RW, 0, 4);
        let r = m.faults(|_| Ok(()), |a| a.movups(xmmword_ptr(rbx), xmm1));
        assert_eq!(
            (r.vector, r.cr2, across(m, place, 4)),
            (14, X + 0x1000, OLD)
        );
    });
}

#[test]
fn from_ram_into_a_device() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.map(1, bus::DEVICE_PAGE, P | RW);
        m.run_code(|a| {
            a.mov(rbx, X + 0x1000)?;
            a.mov(eax, dword_ptr(rbx + 4))?;
            a.mov(dword_ptr(rbx + 8), eax)?;
            a.add(byte_ptr(rbx + 3), 1)?;
            a.mov(ecx, dword_ptr(rbx - 2))
        });
        assert_eq!(m.reg(Gpr::Rax), 0x0404_0404);
        assert_eq!(m.reg(Gpr::Rcx), 0);
        let stores = [
            (bus::DEVICE_PAGE + 8, 4, 0x0404_0404),
            (bus::DEVICE_PAGE + 3, 1, 4),
        ];
        assert_eq!(m.bus.device_stores, stores);
    });
}
