//! x87, SSE and AVX state: saved and restored whole, by the kernel between programs too; what the XSAVE family refuses.

use std::ops::Range;

use doppel_conformance::paging::{P, RW};
use doppel_conformance::*;
use doppel_x86::{CpuModel, Cr0, Cr4, Gpr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Where state is saved: aligned, with room.
const AREA: u64 = DATA + 0x1000;

/// With XSAVE and all that the processor offers in XCR0; false where the host has no XSAVE.
fn enable_xsave(m: &mut Machine) -> bool {
    if !m.cpu().cpuid.has_xsave() {
        return false;
    }
    m.enable(Cr4::OSXSAVE);
    m.cpu_mut().xcr0 = m.cpu().cpuid.xcr0();
    m.put_bytes(AREA, &[0; 0x1000]);
    m.put_bytes(AREA + 0x1000, &[0; 0x1000]);
    true
}

fn has_avx(m: &Machine) -> bool {
    m.cpu().cpuid.has_xsave() && m.cpu().cpuid.xcr0() & 4 != 0
}

#[test]
fn xcr0_takes_what_makes_sense() {
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        let all = m.cpu().cpuid.xcr0();
        for (index, value, fine) in [
            (0u32, all, true),
            (0, 1, true),
            (0, 3, true),
            (0, 0, false),
            (0, 2, false),
            (0, 5, false),
            (0, all | 1 << 62, false),
            (1, 3, false),
        ] {
            println!("{index} {value:x}");
            m.to_kernel();
            m.forget();
            m.set_reg(Gpr::R15, 0);
            m.run_code(|a| {
                a.mov(r15, STOPPED_AT)?;
                a.mov(ecx, index)?;
                a.mov(eax, value as u32)?;
                a.mov(edx, (value >> 32) as u32)?;
                a.xsetbv()?;
                a.xor(ecx, ecx)?;
                a.xgetbv()
            });
            if fine {
                assert!(m.records().is_empty());
                assert_eq!(m.reg(Gpr::Rax) | m.reg(Gpr::Rdx) << 32, value);
            } else {
                assert_eq!(m.vectors(), [13]);
            }
        }
        m.forget();
        m.to_user();
        let r = m.faults(|a| a.xor(ecx, ecx), |a| a.xsetbv());
        assert_eq!((r.vector, r.error), (13, 0));
    });
}

#[test]
fn avx_needs_its_bit_in_xcr0() {
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        let codes: [Emit; 3] = [
            |a| a.vaddps(ymm0, ymm1, ymm2),
            |a| a.vmovups(xmmword_ptr(DATA), xmm0),
            |a| a.vzeroupper(),
        ];
        for code in codes {
            m.forget();
            m.to_kernel();
            m.cpu_mut().xcr0 = 3;
            let r = m.faults(|_| Ok(()), code);
            assert_eq!(r.vector, 6);
            m.forget();
            m.to_kernel();
            m.cpu_mut().xcr0 = 7;
            m.run_code(code);
            assert!(m.records().is_empty());
        }
    });
}

#[test]
fn state_comes_back_by_fxsave_and_xsave() {
    let forms: [(Emit, Emit); 3] = [
        (|a| a.fxsave64(ptr(AREA)), |a| a.fxrstor64(ptr(AREA))),
        (|a| a.xsave64(ptr(AREA)), |a| a.xrstor64(ptr(AREA))),
        (|a| a.xsaveopt64(ptr(AREA)), |a| a.xrstor64(ptr(AREA))),
    ];
    each_engine(|m| {
        let xsave = enable_xsave(m);
        for (n, (save, restore)) in forms.iter().enumerate().take(if xsave { 3 } else { 1 }) {
            println!("form {n}");
            m.to_kernel();
            m.put_bytes(AREA, &[0; 0x1000]);
            m.run_code(|a| {
                a.mov(rax, 0x1122_3344_5566_7788u64)?;
                a.movq(xmm0, rax)?;
                a.movq(xmm15, rax)?;
                a.fninit()?;
                a.fldpi()?;
                a.mov(dword_ptr(DATA), 0x1f80 | 0x6000)?;
                a.ldmxcsr(dword_ptr(DATA))?;
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                save(a)?;
                a.pxor(xmm0, xmm0)?;
                a.pxor(xmm15, xmm15)?;
                a.fninit()?;
                a.mov(dword_ptr(DATA), 0x1f80)?;
                a.ldmxcsr(dword_ptr(DATA))?;
                restore(a)?;
                a.movq(rbx, xmm0)?;
                a.movq(rcx, xmm15)?;
                a.stmxcsr(dword_ptr(DATA))?;
                a.fstp(tword_ptr(DATA + 16))
            });
            assert_eq!(
                [m.reg(Gpr::Rbx), m.reg(Gpr::Rcx)],
                [0x1122_3344_5566_7788; 2]
            );
            assert_eq!(m.data(0) & 0xffff_ffff, 0x7f80);
            assert_eq!(m.data(2), 0xc90f_daa2_2168_c235, "pi");
        }
    });
}

#[test]
fn xrstor_initializes_what_the_image_leaves_out() {
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        m.put(AREA + 24, 0x1f80u32);
        m.run_code(|a| {
            a.mov(rax, 77u64)?;
            a.movq(xmm3, rax)?;
            a.mov(eax, 2)?;
            a.xor(edx, edx)?;
            // XSTATE_BV is 0: SSE goes to its initial state.
            a.xrstor(ptr(AREA))?;
            a.movq(rbx, xmm3)
        });
        assert_eq!(m.reg(Gpr::Rbx), 0);
    });
}

#[test]
fn bad_images_and_addresses_are_refused() {
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        let all: Emit = |a| {
            a.mov(eax, -1)?;
            a.mov(edx, -1)
        };
        let check = |m: &mut Machine, what: &str, code: Emit| {
            println!("{what}");
            m.forget();
            m.to_kernel();
            let r = m.faults(all, code);
            assert_eq!((r.vector, r.error), (13, 0), "{what}");
        };
        check(m, "XSAVE not aligned", |a| a.xsave(ptr(AREA + 32)));
        check(m, "XRSTOR not aligned", |a| a.xrstor(ptr(AREA + 32)));
        check(m, "FXSAVE not aligned", |a| a.fxsave(ptr(AREA + 8)));
        check(m, "FXRSTOR not aligned", |a| a.fxrstor(ptr(AREA + 8)));
        let restore: Emit = |a| a.xrstor(ptr(AREA));
        for (what, at, value) in [
            ("a component that XCR0 lacks", 512, 1u64 << 61),
            ("one that the processor may have", 512, 1 << 9),
            ("a place for it", 520, 1 << 63 | 1 << 9),
            ("compaction bits in a standard image", 520, 1),
            ("reserved bytes of the header", 528, 1),
        ] {
            m.put_bytes(AREA, &[0; 0x1000]);
            m.put(AREA + at, value);
            check(m, what, restore);
        }
        m.put_bytes(AREA, &[0; 0x1000]);
        m.put(AREA + 24, 1u32 << 31);
        m.put(AREA + 512, 3u64);
        check(m, "reserved bits of MXCSR", restore);
        check(m, "FXRSTOR of them", |a| a.fxrstor(ptr(AREA)));
        check(m, "LDMXCSR of them", |a| a.ldmxcsr(dword_ptr(AREA + 24)));
    });
}

#[test]
fn images_on_missing_pages() {
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        m.map(0, SPARE, P | RW);
        m.map(1, 0, 0);
        for (what, code, write) in [
            ("xsave", (|a| a.xsave(ptr(rbx))) as Emit, 2),
            ("xrstor", |a| a.xrstor(ptr(rbx)), 0),
            ("fxsave", |a| a.fxsave(ptr(rbx)), 2),
            ("fxrstor", |a| a.fxrstor(ptr(rbx)), 0),
        ] {
            m.forget();
            m.to_kernel();
            m.put_bytes(SPARE, &[0; 0x1000]);
            m.put(SPARE + 0xf00 + 24, 0x1f80u32);
            m.set_reg(Gpr::Rbx, X + 0xf00);
            let r = m.faults(
                |a| {
                    a.mov(eax, 3)?;
                    a.xor(edx, edx)
                },
                code,
            );
            assert_eq!((r.vector, r.error), (14, write), "{what}");
            assert_eq!(r.cr2 & !0xfff, X + 0x1000, "{what}");
        }
    });
}

#[test]
fn a_save_stores_what_xcr0_has() {
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        let saves: [(Emit, u64); 2] = [
            (|a| a.xsave64(ptr(AREA)), 0),
            (|a| a.xsavec64(ptr(AREA)), 1 << 63 | 7),
        ];
        for (save, compaction) in saves {
            m.to_kernel();
            m.cpu_mut().xcr0 = 7;
            m.put_bytes(AREA, &[0; 576]);
            m.put_bytes(AREA + 576 + 256, &[0x55; 0x900]);
            m.run_code(|a| {
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                a.vpcmpeqd(ymm3, ymm3, ymm3)?;
                save(a)
            });
            assert!(m.records().is_empty());
            let header: [u64; 2] = [m.get(AREA + 512), m.get(AREA + 520)];
            assert_eq!((header[0] & !3, header[1]), (4, compaction));
            assert_eq!(m.reg(Gpr::Rax), 0xffff_ffff, "the mask is not changed");
            let behind = (576 + 256..0xc00).step_by(8);
            assert!(
                behind
                    .into_iter()
                    .all(|at| m.get(AREA + at) == 0x5555_5555_5555_5555)
            );
        }
    });
}

#[test]
fn an_area_in_two_pages() {
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        for second in [SPARE + 0x1000, SPARE + 0x3000] {
            println!("the second page at {second:x}");
            m.to_kernel();
            m.map(0, SPARE, P | RW);
            m.map(1, second, P | RW);
            m.cpu_mut().flush_tlb(true);
            for page in [SPARE, second] {
                m.put_bytes(page, &[0; 0x1000]);
            }
            m.run_code(|a| {
                a.mov(rbx, X + 0xd40)?;
                a.mov(ecx, 5)?;
                a.xor(esi, esi)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                // XMM1 lies in the first page, the upper half of YMM9 in the second.
                a.movq(xmm1, rcx)?;
                a.vpbroadcastq(ymm9, xmm1)?;
                a.xsave64(ptr(rbx))?;
                a.vzeroall()?;
                a.xrstor64(ptr(rbx))?;
                a.vextracti128(xmm2, ymm9, 1)?;
                a.movq(rdi, xmm2)?;
                a.add(rsi, rdi)?;
                a.movq(rdi, xmm1)?;
                a.add(rsi, rdi)?;
                a.dec(ecx)?;
                a.jnz(again)
            });
            assert!(m.records().is_empty(), "{:x?}", m.records());
            assert_eq!(m.reg(Gpr::Rsi), 30);
            let upper = second + (0xd40 + 576 + 9 * 16) - 0x1000;
            assert_eq!(m.get(upper), 1u64);
        }
    });
}

#[test]
fn code_that_is_saved_over() {
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        m.map(0, SPARE, P | RW);
        m.put_bytes(SPARE, &[0; 0x1000]);
        m.run_code(|a| {
            // MOV EAX, ECX's value; RET, which is XMM0 where the area keeps it.
            a.mov(rbx, X)?;
            a.mov(ecx, 9)?;
            a.xor(esi, esi)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rdi, 0xc300_0000_00b8u64)?;
            a.mov(rax, rcx)?;
            a.shl(rax, 8)?;
            a.or(rdi, rax)?;
            a.movq(xmm0, rdi)?;
            a.mov(eax, -1)?;
            a.mov(edx, -1)?;
            a.xsave64(ptr(rbx))?;
            a.lea(rbp, ptr(rbx + 160))?;
            a.call(rbp)?;
            a.add(rsi, rax)?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert!(m.records().is_empty(), "{:x?}", m.records());
        assert_eq!(m.reg(Gpr::Rsi), 45);
    });
}

#[test]
fn everything_is_lazy_while_ts_is_set() {
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        let codes: [Emit; 5] = [
            |a| a.xsave(ptr(AREA)),
            |a| a.xrstor(ptr(AREA)),
            |a| a.fxrstor(ptr(AREA)),
            |a| a.ldmxcsr(dword_ptr(AREA)),
            |a| a.pxor(xmm0, xmm0),
        ];
        for code in codes {
            m.forget();
            m.to_kernel();
            m.cpu_mut().cr0.insert(Cr0::TS);
            assert_eq!(m.faults(|_| Ok(()), code).vector, 7);
        }
    });
}

#[test]
fn vector_registers_live_through_system_calls_and_faults() {
    each_engine(|m| {
        // A kernel that saves, clobbers and restores; a program that carries its sum in vector registers.
        let kernel = CODE + 0x400;
        m.place(64, kernel, |a: &mut CodeAssembler| {
            a.fxsave64(ptr(AREA))?;
            a.pxor(xmm1, xmm1)?;
            a.pcmpeqd(xmm2, xmm2)?;
            a.fxrstor64(ptr(AREA))?;
            a.iretq()
        });
        m.gate(0x80, kernel, 0xe, 0, 3);
        m.run_user(|a| {
            a.pxor(xmm1, xmm1)?;
            a.mov(ecx, 200)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.movq(xmm2, rcx)?;
            a.int(0x80)?;
            a.int3()?;
            a.paddq(xmm1, xmm2)?;
            a.movq(qword_ptr(USER_DATA), xmm1)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.movq(rax, xmm1)
        });
        assert_eq!((m.reg(Gpr::Rax), m.get(USER_DATA)), (20100, 20100));
    });
}

#[test]
fn upper_halves_live_through_interpreted_instructions() {
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        m.put_bytes(DATA, &[7; 64]);
        m.run_code(|a| {
            a.vmovups(ymm5, ymmword_ptr(DATA))?;
            a.mov(ecx, 20)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // A device's register and CPUID are never translated code's business.
            a.mov(r9d, ecx)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.in_(al, 0x60)?;
            a.mov(ecx, r9d)?;
            a.vpaddb(ymm5, ymm5, ymmword_ptr(DATA))?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.vmovups(ymmword_ptr(DATA + 64), ymm5)?;
            a.vzeroupper()?;
            a.vmovups(ymmword_ptr(DATA + 96), ymm5)
        });
        assert_eq!(m.data(8), 0x9393_9393_9393_9393);
        assert_eq!(m.data(11), 0x9393_9393_9393_9393);
        assert_eq!(
            (m.data(12), m.data(14), m.data(15)),
            (0x9393_9393_9393_9393, 0, 0)
        );
    });
}

#[test]
fn mxcsr_and_control_words_are_the_guests() {
    each_engine(|m| {
        // Rounding upwards in SSE, to single precision in x87: kept over faults.
        m.run_code(|a| {
            a.mov(dword_ptr(DATA), 0x1f80 | 0x4000)?;
            a.ldmxcsr(dword_ptr(DATA))?;
            a.mov(word_ptr(DATA + 8), 0x07f)?;
            a.fninit()?;
            a.fldcw(word_ptr(DATA + 8))?;
            a.int3()?;
            a.mov(eax, 1)?;
            a.cvtsi2ss(xmm0, eax)?;
            a.mov(eax, 3)?;
            a.cvtsi2ss(xmm1, eax)?;
            a.divss(xmm0, xmm1)?;
            a.movd(ebx, xmm0)?;
            a.stmxcsr(dword_ptr(DATA))?;
            a.fnstcw(word_ptr(DATA + 8))
        });
        assert_eq!(m.reg(Gpr::Rbx), 0x3eaa_aaab);
        assert_eq!(m.data(0) & 0xffff_ffff, 0x1f80 | 0x4000 | 0x20, "PE");
        assert_eq!(m.data(1) & 0xffff, 0x7f);
    });
}

#[test]
fn a_program_finds_its_own_addresses_behind_an_x87_exception() {
    const ZERO: u64 = USER_DATA + 8;
    const AREA: u64 = USER_DATA + 0x1000;
    let forms: [(Emit, bool); 6] = [
        (|a| a.fxsave64(ptr(AREA)), false),
        (|a| a.fxsave(ptr(AREA)), false),
        (|a| a.xsave64(ptr(AREA)), true),
        (|a| a.xsave(ptr(AREA)), true),
        (|a| a.xsavec64(ptr(AREA)), true),
        (|a| a.xsaveopt64(ptr(AREA)), true),
    ];
    each_engine(|m| {
        let xsave = enable_xsave(m);
        for (n, (save, needs_xsave)) in forms.into_iter().enumerate() {
            if needs_xsave && !xsave {
                continue;
            }
            for user in [false, true] {
                println!("form {n}, user {user}");
                m.put_bytes(AREA, &[0; 0x1000]);
                m.put(ZERO, 0u64);
                let code = |a: &mut CodeAssembler| {
                    let mut raises = a.create_label();
                    a.lea(r13, ptr(raises))?;
                    a.fninit()?;
                    // Nothing is masked.
                    a.mov(word_ptr(USER_DATA), 0x340)?;
                    a.fldcw(word_ptr(USER_DATA))?;
                    a.fld1()?;
                    a.set_label(&mut raises)?;
                    a.fdiv(qword_ptr(ZERO))?;
                    a.mov(eax, -1)?;
                    a.mov(edx, -1)?;
                    save(a)?;
                    a.fninit()
                };
                m.to_kernel();
                match user {
                    true => m.run_user(code),
                    false => m.run_code(code),
                }
                assert!(m.records().is_empty(), "{:?}", m.records());
                assert_eq!(m.get(AREA + 8), m.reg(Gpr::R13));
                assert!(
                    [0, ZERO].contains(&m.get(AREA + 16)),
                    "{:x}",
                    m.get(AREA + 16)
                );
            }
        }
    });
}

#[test]
fn a_compacting_save_leaves_the_rest_of_the_header_alone() {
    let saves: [Emit; 3] = [
        |a| a.xsavec64(ptr(AREA)),
        |a| a.xsavec(ptr(AREA)),
        |a| a.xsaves64(ptr(AREA)),
    ];
    each_engine(|m| {
        if !enable_xsave(m) {
            return;
        }
        // XSAVEC and XSAVES are offered.
        let offered = m.cpu().cpuid(0xd, 1).eax;
        for (save, bit) in saves.into_iter().zip([1, 1, 3]) {
            if offered >> bit & 1 == 0 {
                continue;
            }
            m.to_kernel();
            m.put_bytes(AREA + 512, &[0x55; 64]);
            m.run_code(|a| {
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                save(a)
            });
            assert!(m.records().is_empty());
            assert_eq!(m.get(AREA + 520), 1 << 63 | m.cpu().xcr0);
            let rest: Vec<u64> = (2..8).map(|n| m.get(AREA + 512 + 8 * n)).collect();
            assert_eq!(rest, [0x5555_5555_5555_5555; 6]);
        }
    });
}

#[test]
fn xgetbv_tells_what_is_in_use_as_a_compacting_save_does() {
    const IN_USE: u32 = 1 << 2;
    let states: [Emit; 3] = [
        |_| Ok(()),
        |a| {
            a.mov(dword_ptr(DATA), 0x3f80)?;
            a.ldmxcsr(dword_ptr(DATA))
        },
        |a| {
            a.vpcmpeqd(ymm3, ymm3, ymm3)?;
            a.fld1()
        },
    ];
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) || m.cpu().cpuid(0xd, 1).eax & IN_USE == 0 {
            return;
        }
        for (state, least) in states.into_iter().zip([0, 2, 5]) {
            m.to_kernel();
            m.put_bytes(AREA, &[0; 576]);
            m.put(AREA + 24, 0x1f80u32);
            m.run_code(|a| {
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                a.xrstor64(ptr(AREA))?;
                state(a)?;
                a.mov(ecx, 1)?;
                a.xgetbv()?;
                a.mov(rbx, rax)?;
                a.mov(rbp, rdx)?;
                a.mov(eax, -1)?;
                a.mov(edx, -1)?;
                a.xsavec64(ptr(AREA))
            });
            assert!(m.records().is_empty());
            let in_use = m.reg(Gpr::Rbx) | m.reg(Gpr::Rbp) << 32;
            assert_eq!(in_use & least, least);
            assert_eq!(in_use, m.get(AREA + 512), "{least}");
        }
    });
}

#[test]
fn xgetbv_knows_no_register_that_cpuid_does_not_show() {
    let check = |m: &mut Machine, refused: &[u32]| {
        if !enable_xsave(m) {
            return;
        }
        for register in refused {
            for user in [false, true] {
                m.forget();
                m.to_kernel();
                if user {
                    m.to_user();
                }
                let r = m.faults(|a| a.mov(ecx, *register), |a| a.xgetbv());
                assert_eq!((r.vector, r.error), (13, 0), "{register} {user}");
            }
        }
    };
    each_engine(|m| check(m, &[2, 3, 1 << 31]));
    // Of leaf 0xd it has the components alone.
    match Machine::cpu_of(CpuModel::V3) {
        Ok(model) => each_engine_with(&model, |m| check(m, &[1, 2])),
        Err(e) => eprintln!("SKIPPED: {e}"),
    }
}

/// What 32-bit code has of the vectors, and what it has not: places in an area that XSAVE writes.
struct Halves {
    /// XMM0 to XMM7, and the rest of registers 0 to 7.
    xmm: Range<u64>,
    tops: Vec<Range<u64>>,
    beyond: Vec<Range<u64>>,
}

impl Halves {
    fn of(m: &Machine) -> Halves {
        let xcr0 = m.cpu().cpuid.xcr0();
        let mut halves = Halves {
            xmm: 160..288,
            tops: Vec::new(),
            beyond: std::iter::once(288..416).collect(),
        };
        for n in [2, 6, 7].into_iter().filter(|n| xcr0 >> n & 1 != 0) {
            let leaf = m.cpu().cpuid(0xd, n);
            let (at, size) = (u64::from(leaf.ebx), u64::from(leaf.eax));
            let half = if n == 7 { 0 } else { size / 2 };
            halves.tops.push(at..at + half);
            halves.beyond.push(at + half..at + size);
        }
        halves
    }

    fn all(&self) -> impl Iterator<Item = u64> {
        let parts = self.tops.iter().chain(&self.beyond).cloned();
        parts.chain([self.xmm.clone()]).flatten()
    }
}

/// As a processor with AVX-512 did it, in 32-bit code of a 64-bit process.
#[test]
fn vectors_that_32_bit_code_has_not_stay_as_they_are() {
    const BEFORE: u64 = USER_DATA;
    const OTHER: u64 = USER_DATA + 0x1000;
    const INITIAL: u64 = USER_DATA + 0x2000;
    const AFTER: u64 = USER_DATA + 0x3000;
    const SAVED: u64 = USER_DATA + 0x4000;
    const UNTOUCHED: u8 = 0xcc;
    const VECTORS: u32 = 0xe6;
    const HEADER: u64 = 512;
    fn restore<const AREA: u64>(a: &mut CodeAssembler) -> Result<(), IcedError> {
        a.mov(edi, AREA as u32)?;
        a.xrstor(ptr(edi))
    }
    /// What it does, what is then in XMM0 to XMM7, in the rest of registers 0 to 7, and whether it saves.
    const CODES: &[(Emit, u8, u8, bool)] = &[
        (|a| a.vzeroall(), 0, 0, false),
        (|a| a.vzeroupper(), 0x77, 0, false),
        (restore::<OTHER>, 0x55, 0x55, false),
        (restore::<INITIAL>, 0, 0, false),
        (
            |a| {
                a.mov(edi, SAVED as u32)?;
                a.xsave(ptr(edi))
            },
            0x77,
            0x77,
            true,
        ),
    ];
    each_engine(|m| {
        if !has_avx(m) || !enable_xsave(m) {
            return;
        }
        let halves = Halves::of(m);
        let held = u64::from(VECTORS) & m.cpu().cpuid.xcr0() & !0x20;
        for (n, (code, xmm, tops, saves)) in CODES.iter().enumerate() {
            println!("code {n}");
            for (area, byte) in [(BEFORE, 0x77u8), (OTHER, 0x55), (SAVED, UNTOUCHED)] {
                m.put_bytes(area, &[0; 0x1000]);
                halves.all().for_each(|at| m.put(area + at, byte));
                m.put(area + HEADER, if area == SAVED { 0 } else { held });
            }
            for area in [INITIAL, AFTER] {
                m.put_bytes(area, &[0; 0x1000]);
            }
            m.to_kernel();
            m.run_code(|a| {
                a.mov(eax, VECTORS)?;
                a.xor(edx, edx)?;
                a.mov(rdi, BEFORE)?;
                a.xrstor64(ptr(rdi))
            });
            m.to_user32();
            m.place(32, USER_CODE, |a: &mut CodeAssembler| {
                a.mov(eax, VECTORS)?;
                a.xor(edx, edx)?;
                code(a)?;
                a.int(0x81)
            });
            m.go(USER_CODE);
            m.run();
            assert!(m.records().is_empty());
            m.to_kernel();
            m.run_code(|a| {
                a.mov(eax, VECTORS)?;
                a.xor(edx, edx)?;
                a.mov(rdi, AFTER)?;
                a.xsave64(ptr(rdi))
            });
            let (area, beyond) = match saves {
                true => (SAVED, UNTOUCHED),
                false => (AFTER, 0x77),
            };
            let is = |range: &Range<u64>, byte| {
                let found = |at: &u64| m.ram.load::<u8>(area + at).expect("RAM");
                let wrong = range.clone().find(|at| found(at) != byte);
                assert_eq!(
                    wrong,
                    None,
                    "of {range:?}, {:x?}",
                    wrong.map(|at| found(&at))
                );
            };
            is(&halves.xmm, *xmm);
            halves.tops.iter().for_each(|range| is(range, *tops));
            halves.beyond.iter().for_each(|range| is(range, beyond));
            let high = m.get(area + HEADER) & 1 << 7;
            assert_eq!(high, if *saves { 0 } else { held & 1 << 7 });
        }
    });
}
