//! Protection keys of user pages, on a processor that was asked to have them: which accesses they forbid, when a change counts, and what PKRU is
//! in an XSAVE area.

use std::sync::Arc;

use doppel_conformance::paging::{P, RW, US, error};
use doppel_conformance::*;
use doppel_x86::{CpuChoice, CpuFeatures, CpuModel, CpuidModel, Cr0, Cr4, Gpr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const UD: u64 = 6;
const GP: u64 = 13;
const PF: u64 = 14;
/// The key of the page at [`X`], and its two bits of PKRU.
const KEY: u64 = 5;
const NO_ACCESS: u32 = 1 << (2 * KEY);
const NO_WRITE: u32 = 2 << (2 * KEY);
/// The bit of XCR0.
const PKRU: u64 = 1 << 9;
/// Where state is saved: aligned, with room.
const AREA: u64 = USER_DATA + 0x1000;

/// `None`, said aloud, where the host has no protection keys.
fn with_keys() -> Option<Arc<CpuidModel>> {
    let choice = CpuChoice {
        model: CpuModel::Host,
        features: CpuFeatures::PKU,
    };
    let model = Machine::cpu_of(choice);
    model.inspect_err(|e| eprintln!("SKIPPED: {e}")).ok()
}

fn each_engine_with_keys(test: impl Fn(&mut Machine)) {
    if let Some(model) = with_keys() {
        each_engine_with(&model, test);
    }
}

/// The page at [`X`] with its key.
fn map(m: &Machine, bits: u64) {
    m.map(0, SPARE, P | bits | KEY << 59);
    // RET, for fetches.
    m.put_bytes(SPARE, &[0xc3; 0x40]);
}

fn set_pkru(a: &mut CodeAssembler, v: u32) -> Result<(), IcedError> {
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.mov(eax, v)?;
    a.wrpkru()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Fetch,
}
use Access::{Fetch, Read, Write};

fn emit(a: &mut CodeAssembler, access: Access) -> Result<(), IcedError> {
    match access {
        Read => a.mov(esi, dword_ptr(rbx)),
        Write => a.mov(dword_ptr(rbx), esi),
        Fetch => a.call(rbx),
    }
}

/// With the page in the TLB, all keys allowed: sets PKRU, and tries. The fault's record, if there is one.
fn attempt(m: &mut Machine, pkru: u32, access: Access) -> Option<Record> {
    m.forget();
    let base = m.fault_at() - 0x800;
    let (at, recover) = (m.fault_at(), base + 0xc00);
    m.place(64, base, |a: &mut CodeAssembler| {
        a.mov(r15, recover)?;
        a.mov(rbx, X)?;
        set_pkru(a, 0)?;
        a.mov(esi, dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx), esi)?;
        set_pkru(a, pkru)?;
        a.jmp(at)
    });
    let end = m.place(64, at, |a: &mut CodeAssembler| emit(a, access));
    for at in [end, recover] {
        m.place(64, at, machine::stop);
    }
    m.go(base);
    m.run();
    assert_eq!(m.cpu().pkru, pkru);
    let records = m.records();
    assert!(records.len() <= 1, "{records:x?}");
    records.first().copied()
}

/// The error code that the manual wants.
fn expected(user: bool, wp: bool, pkru: u32, access: Access) -> Option<u64> {
    let forbidden = match access {
        Fetch => false,
        Read => pkru & NO_ACCESS != 0,
        Write => pkru & NO_ACCESS != 0 || (pkru & NO_WRITE != 0 && (user || wp)),
    };
    let write = if access == Write { error::W } else { 0 };
    let user = if user { error::U } else { 0 };
    forbidden.then_some(error::P | error::PK | write | user)
}

#[test]
fn a_key_forbids_data_and_a_change_counts_at_once() {
    each_engine_with_keys(|m| {
        map(m, RW | US);
        for (user, wp) in [(true, true), (true, false), (false, true), (false, false)] {
            for pkru in [
                0,
                NO_ACCESS,
                NO_WRITE,
                NO_ACCESS | NO_WRITE,
                !(NO_ACCESS | NO_WRITE),
            ] {
                // All but the key's: the user's stack has key 0.
                let pkru = pkru & !3;
                for access in [Read, Write, Fetch] {
                    println!("user {user}, WP {wp}, PKRU {pkru:x}, {access:?}");
                    m.to_kernel();
                    if user {
                        m.to_user();
                    }
                    m.enable(Cr4::PKE);
                    m.cpu_mut().cr0.set(Cr0::WP, wp);
                    m.cpu_mut().flush_tlb(true);
                    let record = attempt(m, pkru, access);
                    let found = record.map(|r| (r.vector, r.error, r.rip, r.cr2));
                    let wanted = expected(user, wp, pkru, access);
                    let at = if user { USER_CODE } else { CODE } + 0x800;
                    assert_eq!(found, wanted.map(|error| (PF, error, at, X)));
                }
            }
        }
    });
}

#[test]
fn a_page_of_the_supervisors_has_no_key() {
    each_engine_with_keys(|m| {
        map(m, RW);
        m.enable(Cr4::PKE);
        for access in [Read, Write, Fetch] {
            m.to_kernel();
            assert_eq!(attempt(m, NO_ACCESS, access), None, "{access:?}");
        }
    });
}

#[test]
fn a_page_that_is_not_there_or_not_writable_is_told_as_well() {
    each_engine_with_keys(|m| {
        m.enable(Cr4::PKE);
        m.to_user();
        m.map(0, SPARE, P | US | KEY << 59);
        let prepare = |a: &mut CodeAssembler| {
            a.mov(rbx, X)?;
            set_pkru(a, NO_WRITE)
        };
        let r = m.faults(prepare, |a: &mut CodeAssembler| emit(a, Write));
        let both = error::P | error::W | error::U | error::PK;
        assert_eq!((r.vector, r.error), (PF, both));
        m.map(0, SPARE, US | KEY << 59);
        m.cpu_mut().flush_tlb(true);
        m.forget();
        m.to_user();
        let r = m.faults(prepare, |a: &mut CodeAssembler| emit(a, Write));
        assert_eq!((r.vector, r.error), (PF, error::W | error::U));
    });
}

#[test]
fn the_instructions_want_their_bit_of_cr4_and_zeros() {
    each_engine_with_keys(|m| {
        let cases: [(Emit, bool); 2] = [(|a| a.rdpkru(), false), (|a| a.wrpkru(), true)];
        for (instruction, writes) in cases {
            for user in [false, true] {
                for (on, low, high, vector) in [
                    (false, 0i64, 0i64, UD),
                    (false, 1, 1, UD),
                    (true, 1, 0, GP),
                    (true, 0x8000_0000, 0, GP),
                    (true, 0, 1, GP),
                    (true, 1 << 32, 1 << 32, 0),
                ] {
                    m.to_kernel();
                    if user {
                        m.to_user();
                    }
                    m.forget();
                    m.cpu_mut().cr4.set(Cr4::PKE, on);
                    m.cpu_mut().pkru = 0x8000_0010;
                    let vector = if vector == GP && low == 0 && !writes {
                        0
                    } else {
                        vector
                    };
                    let registers = move |a: &mut CodeAssembler| {
                        a.mov(rcx, low)?;
                        a.mov(rdx, high)?;
                        a.mov(rax, -1i64)?;
                        a.mov(eax, 0x4000_0040)
                    };
                    println!("user {user}, PKE {on}, rcx {low:x}, rdx {high:x}");
                    if vector != 0 {
                        let r = m.faults(registers, instruction);
                        assert_eq!(r.vector, vector);
                        assert_eq!(m.cpu().pkru, 0x8000_0010);
                        continue;
                    }
                    let code = move |a: &mut CodeAssembler| {
                        registers(a)?;
                        instruction(a)
                    };
                    match user {
                        true => m.run_user(code),
                        false => m.run_code(code),
                    }
                    assert!(m.records().is_empty());
                    if writes {
                        assert_eq!(m.cpu().pkru, 0x4000_0040);
                    } else {
                        assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rdx)), (0x8000_0010, 0));
                    }
                }
            }
        }
    });
}

#[test]
fn a_guest_that_is_not_offered_keys_cannot_have_them() {
    each_engine(|m| {
        let set = |a: &mut CodeAssembler| {
            a.mov(rax, cr4)?;
            a.or(eax, Cr4::PKE.bits() as i32)
        };
        let r = m.faults(set, |a: &mut CodeAssembler| a.mov(cr4, rax));
        assert_eq!((r.vector, r.error), (GP, 0));
        assert_eq!(m.cpu().cpuid(7, 0).ecx & 0x18, 0);
    });
}

#[test]
fn a_guest_enables_them_and_what_was_cached_before_counts_no_more() {
    each_engine_with_keys(|m| {
        map(m, RW | US);
        m.cpu_mut().pkru = NO_ACCESS;
        let prepare = |a: &mut CodeAssembler| {
            a.mov(rbx, X)?;
            a.mov(esi, dword_ptr(rbx))?;
            a.mov(rax, cr4)?;
            a.or(eax, Cr4::PKE.bits() as i32)?;
            a.mov(cr4, rax)
        };
        let r = m.faults(prepare, |a: &mut CodeAssembler| emit(a, Read));
        assert_eq!((r.vector, r.error), (PF, error::P | error::PK));
        assert_eq!(m.cpu().cpuid(7, 0).ecx & 0x18, 0x18);
    });
}

fn enable_xsave(m: &mut Machine) {
    m.enable(Cr4::OSXSAVE | Cr4::FSGSBASE);
    m.cpu_mut().xcr0 = m.cpu().cpuid.xcr0();
    m.put_bytes(AREA, &[0; 0x1000]);
}

/// `instruction` on the area, for PKRU alone.
fn on_area(a: &mut CodeAssembler, instruction: Emit) -> Result<(), IcedError> {
    a.mov(rdi, AREA)?;
    a.mov(eax, PKRU as i32)?;
    a.xor(edx, edx)?;
    instruction(a)
}

#[test]
fn pkru_is_saved_and_restored_as_a_component() {
    each_engine_with_keys(|m| {
        let standard = u64::from(m.cpu().cpuid(0xd, 9).ebx);
        let saves: [(Emit, u64, u64); 3] = [
            (|a| a.xsave64(ptr(rdi)), standard, 0),
            (|a| a.xsaveopt64(ptr(rdi)), standard, 0),
            (|a| a.xsavec64(ptr(rdi)), 576, 1 << 63 | PKRU),
        ];
        // Without CR4.PKE it has no effect but is there all the same, whatever a process of the host's has.
        for (user, on) in [(true, true), (false, true), (true, false)] {
            for (n, (save, place, xcomp_bv)) in saves.into_iter().enumerate() {
                for pkru in [0x5555_5550u32, 0] {
                    println!("user {user}, PKE {on}, save {n} of {pkru:x}");
                    m.to_kernel();
                    if user {
                        m.to_user();
                    }
                    enable_xsave(m);
                    m.cpu_mut().cr4.set(Cr4::PKE, on);
                    m.cpu_mut().pkru = pkru;
                    m.cpu_mut().flush_tlb(true);
                    let code = move |a: &mut CodeAssembler| on_area(a, save);
                    match user {
                        true => m.run_user(code),
                        false => m.run_code(code),
                    }
                    assert!(m.records().is_empty(), "{:x?}", m.records());
                    let bit = if pkru == 0 { 0 } else { PKRU };
                    assert_eq!((m.get(AREA + 512), m.get(AREA + 520)), (bit, xcomp_bv));
                    assert_eq!(m.get(AREA + place), u64::from(pkru));

                    let code = |a: &mut CodeAssembler| on_area(a, |a| a.xrstor64(ptr(rdi)));
                    m.cpu_mut().pkru = !3;
                    m.go(if user { USER_CODE } else { CODE });
                    match user {
                        true => m.run_user(code),
                        false => m.run_code(code),
                    }
                    assert!(m.records().is_empty(), "{:x?}", m.records());
                    assert_eq!(m.cpu().pkru, pkru);
                }
            }
        }
    });
}

#[test]
fn a_restore_counts_at_once() {
    each_engine_with_keys(|m| {
        map(m, RW | US);
        m.to_user();
        enable_xsave(m);
        m.enable(Cr4::PKE);
        let standard = u64::from(m.cpu().cpuid(0xd, 9).ebx);
        m.put(AREA + 512, PKRU);
        m.put(AREA + standard, u64::from(NO_WRITE) | 0xffff_ffff << 32);
        let prepare = |a: &mut CodeAssembler| {
            a.mov(rbx, X)?;
            set_pkru(a, 0)?;
            a.mov(dword_ptr(rbx), esi)?;
            on_area(a, |a| a.xrstor64(ptr(rdi)))
        };
        let r = m.faults(prepare, |a: &mut CodeAssembler| emit(a, Write));
        let error = error::P | error::W | error::U | error::PK;
        assert_eq!((r.vector, r.error), (PF, error));
        // An area without it gives the initial state, 0.
        m.put(AREA + 512, 0u64);
        m.forget();
        m.to_user();
        m.run_user(|a| {
            a.mov(rbx, X)?;
            on_area(a, |a| a.xrstor64(ptr(rdi)))?;
            a.mov(dword_ptr(rbx), esi)
        });
        assert!(m.records().is_empty(), "{:x?}", m.records());
        assert_eq!(m.cpu().pkru, 0);
    });
}
