//! 16-bit code, stacks and addresses, code segments with a base and a limit, and CPL 1 and 2: what wraps, what faults, and where.

use doppel_conformance::*;
use doppel_x86::{Gpr, Rflags, Seg};
use iced_x86::code_asm::*;

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x3_0000;
const ALL: [Legacy; 5] = [
    Legacy::Real,
    Legacy::V86(3),
    Legacy::Protected(0),
    Legacy::Protected(1),
    Legacy::Protected(3),
];

type Instructions = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

fn each_mode(test: impl Fn(&mut LegacyMachine)) {
    for mode in ALL {
        each_legacy(mode, &test);
    }
}

fn fault(vector: u64, error: u64, ip: u64) -> End {
    End {
        vector: Some(vector),
        error,
        ip,
    }
}

#[test]
fn addresses_of_16_bits_wrap_and_accesses_across_the_end_fault() {
    each_mode(|m| {
        m.put(DATA + 0x10, 0xbeefu16);
        m.put(DATA + 0xfffe, 0x1234u16);
        m.finish(0x100, |a| {
            a.mov(ebx, 0x5555_f000)?;
            a.mov(esi, 0x7777_1008)?;
            a.mov(ax, word_ptr(bx + si + 8))?;
            a.mov(di, 2)?;
            a.mov(cx, word_ptr(di - 4))?;
            // The upper halves neither count nor change.
            a.add(word_ptr(bx + si + 8), 1)?;
            a.lea(dx, word_ptr(bx + si + 8))
        });
        assert_eq!(
            [Gpr::Rax, Gpr::Rcx, Gpr::Rdx].map(|r| m.reg(r) as u16),
            [0xbeef, 0x1234, 0x10]
        );
        assert_eq!(
            (m.reg(Gpr::Rbx), m.reg(Gpr::Rsi)),
            (0x5555_f000, 0x7777_1008)
        );
        assert_eq!(m.get::<u16>(DATA + 0x10), 0xbef0);
    });
    each_mode(|m| {
        m.set(Gpr::Rdi, 0xffff);
        let end = m.fault(0x200, |a| a.mov(word_ptr(di), ax));
        assert_eq!(end, fault(13, 0, 0x200));
    });
}

#[test]
fn a_16_bit_stack_wraps_and_keeps_what_is_above_sp() {
    each_mode(|m| {
        m.set(Gpr::Rsp, 0x5a5a_0000);
        m.finish(0x100, |a| {
            let mut routine = a.create_label();
            let mut over = a.create_label();
            a.push(0x7788)?;
            a.mov(bp, sp)?;
            a.mov(ax, word_ptr(bp))?;
            a.call(routine)?;
            a.pop(bx)?;
            a.jmp(over)?;
            a.set_label(&mut routine)?;
            a.mov(cx, sp)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.mov(edx, esp)
        });
        assert_eq!(m.get::<u16>(STACK + 0xfffe), 0x7788);
        assert_eq!(
            [Gpr::Rax, Gpr::Rbx, Gpr::Rcx].map(|r| m.reg(r) as u16),
            [0x7788, 0x7788, 0xfffc]
        );
        assert_eq!(m.reg(Gpr::Rdx), 0x5a5a_0000);
    });
    // At CPL 0 the frame would meet the same end.
    for mode in [Legacy::V86(0), Legacy::Protected(1), Legacy::Protected(3)] {
        each_legacy(mode, |m| {
            m.set(Gpr::Rsp, 1);
            assert_eq!(m.fault(0x100, |a| a.push(ax)), fault(12, 0, 0x100));
        });
    }
}

#[test]
fn branches_of_16_bit_code_wrap_and_count_with_cx() {
    each_mode(|m| {
        // Backwards over IP 0, there on to below 64 KiB, and back the other way.
        m.place(16, CODE, 0xff00, |a| {
            a.inc(bx)?;
            a.db(&[0xe9, 0x0d, 0x02])
        });
        m.place(16, CODE, 0x100, |a| {
            a.xor(bx, bx)?;
            a.mov(ecx, 0x0003_0005)?;
            a.db(&[0xe9, 0xf5, 0xfd])
        });
        let end = m.place(16, CODE, 0x111, |a| {
            let (mut again, mut out) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.add(bx, 2)?;
            a.loop_(again)?;
            a.jcxz(out)?;
            a.hlt()?;
            a.set_label(&mut out)?;
            a.inc(bx)?;
            a.hlt()
        });
        let ended = m.run(0x100);
        assert!(ended.ip == end || ended == fault(13, 0, end - 1));
        assert_eq!(m.reg(Gpr::Rbx) as u16, 1 + 10 + 1);
        assert_eq!(m.reg(Gpr::Rcx), 0x0003_0000);
    });
}

#[test]
fn the_last_byte_of_16_bit_code_is_its_end() {
    each_mode(|m| {
        m.place(16, CODE, 0xfffe, |a| {
            a.nop()?;
            a.nop()
        });
        // The next would begin at IP 10000.
        let end = m.fault(0x100, |a| {
            a.mov(ax, 0xfffe)?;
            a.jmp(ax)
        });
        assert_eq!((end.vector, end.error), (Some(13), 0));
    });
}

#[test]
fn code_knows_its_ip_and_not_where_its_segment_begins() {
    // The same bytes through several bases, with far jumps between them.
    for mode in [Legacy::Real, Legacy::V86(0)] {
        each_legacy(mode, |m| {
            m.place(16, CODE, 0x500, |a| {
                let mut next = a.create_label();
                a.call(next)?;
                a.set_label(&mut next)?;
                a.pop(ax)?;
                a.add(bx, ax)?;
                a.retf()
            });
            m.finish(0x100, |a| {
                let mut again = a.create_label();
                a.mov(cx, 5)?;
                a.xor(bx, bx)?;
                a.set_label(&mut again)?;
                for (ip, base) in [
                    (0x500u16, 0x1000u16),
                    (0x4f0, 0x1001),
                    (0x10, 0x104f),
                    (0xf500, 0x100),
                ] {
                    let ([i0, i1], [c0, c1]) = (ip.to_le_bytes(), base.to_le_bytes());
                    a.db(&[0x9a, i0, i1, c0, c1])?;
                }
                a.loop_(again)
            });
            let ips = 0x500 + 0x4f0 + 0x10 + 0xf500 + 4 * 3u64;
            assert_eq!(m.reg(Gpr::Rbx) & 0xffff, (5 * ips) & 0xffff);
        });
    }
}

#[test]
fn code_ends_at_the_limit_of_its_segment() {
    for bits in [16, 32] {
        let big = if bits == 32 { kind::BIG } else { 0 };
        for cpl in [1, 3] {
            let with_limit = |m: &mut LegacyMachine, limit| {
                m.set_segment(Seg::Cs, CODE + 0x30, limit, kind::CODE | big);
            };
            each_legacy(Legacy::Protected(cpl), |m| {
                // On from instruction to instruction, the last of which does not fit.
                with_limit(m, 0x104);
                m.place(bits, CODE + 0x30, 0x100, |a| {
                    a.inc(eax)?;
                    a.inc(ebx)?;
                    a.inc(ecx)?;
                    a.inc(edx)
                });
                let end = m.run(0x100);
                assert_eq!((end.vector, end.ip), (Some(13), 0x104));
            });
            each_legacy(Legacy::Protected(cpl), |m| {
                // A branch beyond it faults where it stands, a call before it pushes.
                with_limit(m, 0xfff);
                m.place(bits, CODE + 0x30, 0x100, |a| a.call(0x1000));
                assert_eq!(m.run(0x100), fault(13, 0, 0x100));
            });
            each_legacy(Legacy::Protected(cpl), |m| {
                with_limit(m, 0xfff);
                m.place(bits, CODE + 0x30, 0x100, |a| {
                    a.mov(ax, 0x1000)?;
                    a.movzx(eax, ax)?;
                    match bits {
                        16 => a.jmp(ax),
                        _ => a.jmp(eax),
                    }
                });
                let end = m.run(0x100);
                assert_eq!((end.vector, end.error), (Some(13), 0));
                assert!((0x103..0x10a).contains(&end.ip), "{:x}", end.ip);
            });
        }
    }
}

#[test]
fn a_translation_is_for_one_limit() {
    // The same code, by far jumps through two selectors; what the second has as its limit changes.
    each_legacy(Legacy::Protected(1), |m| {
        const WIDE: u16 = 0x20 | 1;
        const NARROW: u16 = 0x28 | 1;
        const DPL: u32 = 1 << 5;
        m.describe(WIDE, CODE, 0xffff, kind::CODE | DPL);
        m.describe(NARROW, CODE, 0x2ff, kind::CODE | DPL);
        m.place(16, CODE, 0x100, |a| {
            // Ten rounds through the wide one, with a call beyond the other's limit.
            a.mov(cx, 10)?;
            a.db(&[0xea, 0x10, 0x01, 0x20, 0x00])
        });
        m.put(CODE + 0x100 + 6, u16::from_le_bytes([WIDE as u8, 0]));
        m.place(16, CODE, 0x110, |a| {
            a.call(0x300)?;
            a.loop_(0x110)?;
            a.mov(cx, 10)?;
            let [low, high] = NARROW.to_le_bytes();
            a.db(&[0xea, 0x10, 0x01, low, high])
        });
        m.place(16, CODE, 0x300, |a| {
            a.inc(bx)?;
            a.ret()
        });
        let end = m.run(0x100);
        assert_eq!(end, fault(13, 0, 0x110));
        assert_eq!(
            (m.reg(Gpr::Rbx) & 0xffff, m.reg(Gpr::Rcx) & 0xffff),
            (10, 10)
        );
    });
}

#[test]
fn segments_are_read_and_written_as_their_rights_and_limits_say() {
    for (attributes, limit, at, write, good) in [
        (kind::DATA, 0xfff, 0xffe, true, true),
        (kind::DATA, 0xfff, 0xfff, false, false),
        (kind::READ_ONLY, 0xfff, 0x10, false, true),
        (kind::READ_ONLY, 0xfff, 0x10, true, false),
        (kind::CODE, 0xfff, 0x10, false, true),
        (kind::CODE, 0xfff, 0x10, true, false),
        (kind::EXPAND_DOWN, 0xfff, 0x1000, true, true),
        (kind::EXPAND_DOWN, 0xfff, 0xfff, false, false),
        (kind::EXPAND_DOWN, 0xfff, 0xffff, false, false),
    ] {
        for cpl in [1, 3] {
            each_legacy(Legacy::Protected(cpl), |m| {
                m.set_segment(Seg::Es, DATA + 0x123, limit, attributes);
                m.put(DATA + 0x123 + at, 0x4321u16);
                m.place(16, CODE, 0x100, |a| {
                    a.mov(di, at as i32)?;
                    match write {
                        true => a.mov(word_ptr(di).es(), 0x99i32),
                        false => a.mov(ax, word_ptr(di).es()),
                    }
                });
                m.put(CODE + if write { 0x108 } else { 0x106 }, 0xf4u8);
                let end = m.run(0x100);
                let stop = if write { 0x108 } else { 0x106 };
                let expected = if good { stop } else { 0x103 };
                assert_eq!(end, fault(13, 0, expected), "{attributes:x} {at:x} {write}");
                let value = m.get::<u16>(DATA + 0x123 + at);
                assert_eq!(value, if good && write { 0x99 } else { 0x4321 });
                assert_eq!(m.reg(Gpr::Rax) & 0xffff == 0x4321, good && !write);
            });
        }
    }
}

#[test]
fn code_reads_its_own_segment() {
    each_mode(|m| {
        m.put(CODE + 0x500, 0x6789u16);
        m.finish(0x100, |a| {
            a.mov(si, 0x500)?;
            a.mov(ax, word_ptr(si).cs())?;
            a.mov(bx, word_ptr(0x500).cs())
        });
        assert_eq!(
            (m.reg(Gpr::Rax) as u16, m.reg(Gpr::Rbx) as u16),
            (0x6789, 0x6789)
        );
    });
    each_legacy(Legacy::Protected(3), |m| {
        m.set_segment(Seg::Cs, CODE, 0xffff, kind::EXECUTE_ONLY);
        assert_eq!(
            m.fault(0x100, |a| a.mov(ax, word_ptr(0x500).cs())),
            fault(13, 0, 0x100)
        );
    });
}

#[test]
fn repeated_strings_wrap_with_their_pointers() {
    each_mode(|m| {
        for n in 0..0x40u64 {
            m.put(DATA + ((0xffe0 + n) & 0xffff), n as u8 + 1);
        }
        m.finish(0x100, |a| {
            a.cld()?;
            a.mov(esi, 0x1111_ffe0)?;
            a.mov(edi, 0x2222_0400)?;
            a.mov(ecx, 0x3333_0040)?;
            a.rep().movsb()?;
            a.mov(eax, 0x0a0b_0c0d)?;
            a.mov(di, 0x1ff0)?;
            a.mov(cx, 0x804)?;
            a.rep().stosd()
        });
        let copied: Vec<u8> = (0..0x40u64).map(|n| m.get(DATA + 0x400 + n)).collect();
        assert_eq!(copied, (1..=0x40).collect::<Vec<u8>>());
        assert_eq!(m.get::<u32>(DATA + 0x1ff0 + 4 * 0x803), 0x0a0b_0c0d);
        assert_eq!(m.get::<u32>(DATA + 0x1ff0 + 4 * 0x804), 0);
        assert_eq!(
            [Gpr::Rsi, Gpr::Rdi, Gpr::Rcx].map(|r| m.reg(r)),
            [0x1111_0020, 0x2222_4000, 0x3333_0000]
        );
    });
}

#[test]
fn cpl_1_and_2_ask_for_iopl_and_may_use_the_supervisors_pages() {
    for cpl in [1, 2] {
        for iopl in [0, 1, 2, 3] {
            each_legacy(Legacy::Protected(cpl), |m| {
                m.cpu_mut().rflags |= Rflags::from_bits_retain(iopl << 12);
                m.put(CODE + 0x101, 0xf4u8);
                let end = m.fault(0x100, |a| a.cli());
                let at = if iopl >= u64::from(cpl) { 0x101 } else { 0x100 };
                assert_eq!(end, fault(13, 0, at));
            });
        }
    }
}

#[test]
fn virtual_8086_mode_asks_for_iopl_where_it_has_to() {
    for (iopl, good) in [(3, true), (2, false), (0, false)] {
        let pushf: Instructions = |a| a.pushf();
        let codes: [Instructions; 3] = [pushf, |a| a.popf(), |a| a.cli()];
        for code in codes {
            each_legacy(Legacy::V86(iopl), |m| {
                m.put(CODE + 0x101, 0xf4u8);
                let end = m.fault(0x100, code);
                assert_eq!(end, fault(13, 0, if good { 0x101 } else { 0x100 }));
            });
        }
    }
}

#[test]
fn paragraphs_are_loaded_into_segment_registers() {
    for mode in [Legacy::Real, Legacy::V86(0)] {
        each_legacy(mode, |m| {
            for n in 0..8u64 {
                m.put(DATA + 0x10 * n, 0x100 * n as u16 + 7);
            }
            m.finish(0x100, |a| {
                let mut again = a.create_label();
                a.mov(cx, 8)?;
                a.xor(bx, bx)?;
                a.mov(ax, (DATA >> 4) as i32)?;
                a.set_label(&mut again)?;
                a.mov(ds, ax)?;
                a.push(ds)?;
                a.pop(es)?;
                a.add(bx, word_ptr(0))?;
                a.mov(word_ptr(2).es(), bx)?;
                a.inc(ax)?;
                a.loop_(again)
            });
            assert_eq!(m.reg(Gpr::Rbx) & 0xffff, 0x1c00 + 8 * 7);
            assert_eq!(m.get::<u16>(DATA + 0x72), 0x1c00 + 8 * 7);
        });
    }
}

#[test]
fn code_of_16_bits_that_changes_itself_is_seen() {
    for mode in [Legacy::Real, Legacy::Protected(0)] {
        each_legacy(mode, |m| {
            m.set_segment(Seg::Ds, CODE, 0xffff, kind::DATA);
            m.finish(0x100, |a| {
                let mut again = a.create_label();
                a.mov(cx, 6)?;
                a.xor(bx, bx)?;
                a.set_label(&mut again)?;
                a.db(&[0x83, 0xc3, 0x01])?; // add bx, 1, at 105
                a.inc(byte_ptr(0x107))?;
                a.loop_(again)
            });
            assert_eq!(m.reg(Gpr::Rbx) & 0xffff, 1 + 2 + 3 + 4 + 5 + 6);
        });
    }
}

#[test]
fn an_instruction_breakpoint_is_found_where_linear_addresses_wrap() {
    each_legacy(Legacy::Protected(0), |m| {
        m.set_segment(Seg::Cs, 0xffff_0000, 0xf_ffff, kind::CODE | kind::BIG);
        m.cpu_mut().dr[0] = 0x1_0001;
        m.cpu_mut().dr[7] = 0x401;
        m.ram.ptr(0x1_0000).expect("RAM").write(&[0x90, 0x90, 0xf4]);
        let expected = End {
            vector: Some(1),
            error: 0,
            ip: 0x2_0001,
        };
        assert_eq!(m.run(0x2_0000), expected);
    });
}

#[test]
fn enter_of_32_bits_takes_all_of_esp_though_the_stack_has_16() {
    each_mode(|m| {
        m.set(Gpr::Rsp, 0x5a5a_1000);
        m.set(Gpr::Rbp, 0x7777_2000);
        m.finish(0x100, |a| {
            a.db(&[0x66, 0xc8, 8, 0, 2])?;
            a.mov(edx, esp)
        });
        assert_eq!(m.reg(Gpr::Rbp), 0x5a5a_0ffc);
        assert_eq!(m.reg(Gpr::Rdx), 0x5a5a_0ffc - 8 - 8);
        assert_eq!(m.get::<u32>(STACK + 0xffc), 0x7777_2000);
        assert_eq!(m.get::<u32>(STACK + 0xff4), 0x5a5a_0ffc);
    });
}

/// An instruction that goes beyond its segment is #GP, whatever the bytes there would make of it, and whether they are there.
#[test]
fn what_lies_beyond_a_code_segment_is_not_looked_at() {
    const LIMIT: u32 = 0xfff;
    // mov eax, imm; an opcode of two bytes of which the second would be none.
    for code in [&[0x66, 0xb8][..], &[0x0f]] {
        for mode in [Legacy::Protected(0), Legacy::Protected(3)] {
            each_legacy(mode, |m| {
                let at = u64::from(LIMIT) + 1 - code.len() as u64;
                m.set_segment(Seg::Cs, CODE, LIMIT, kind::CODE);
                for (byte, n) in code.iter().chain(&[0x04u8; 16]).zip(at..) {
                    m.put(CODE + n, *byte);
                }
                assert_eq!(m.run(at), fault(13, 0, at));
            });
        }
    }
}
