//! String instructions: faults in the middle, directions, page crossings, counts, interrupts.

use doppel_conformance::paging::{D, P, RW, error};
use doppel_conformance::*;
use doppel_x86::Gpr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn registers(m: &Machine) -> (u64, u64, u64) {
    (m.reg(Gpr::Rcx), m.reg(Gpr::Rsi), m.reg(Gpr::Rdi))
}

/// Two pages of [`X`] onto scattered memory; the source's third and the destination's sixth page are missing.
fn pages(m: &Machine) {
    for (n, bits) in [(0, P), (1, P), (2, 0), (4, P | RW), (5, P | RW), (6, 0)] {
        m.map(n, SPARE + 0x1000 * (7 * n % 11), bits);
    }
}

#[test]
fn a_fault_in_the_middle_leaves_exact_registers() {
    let forms: [(Emit, u64); 4] = [
        (|a| a.rep().movsb(), 1),
        (|a| a.rep().movsw(), 2),
        (|a| a.rep().movsd(), 4),
        (|a| a.rep().movsq(), 8),
    ];
    each_engine(|m| {
        for (code, size) in forms {
            for (what, from, to, count) in [
                ("the source ends", X + 0x1fc0, X + 0x4100, 0x2000),
                ("the destination ends", X + 0x100, X + 0x5f80, 0x1000),
                ("the source is missing at once", X + 0x2000, X + 0x4000, 3),
            ] {
                m.forget();
                m.to_kernel();
                pages(m);
                m.cpu_mut().flush_tlb(true);
                for (r, v) in [(Gpr::Rsi, from), (Gpr::Rdi, to), (Gpr::Rcx, count)] {
                    m.set_reg(r, v);
                }
                let f = m.faults(|_| Ok(()), code);
                let bytes = (X + 0x2000 - from).min((X + 0x6000 - to) / size * size);
                let (at, write) = if from + bytes == X + 0x2000 {
                    (X + 0x2000, 0)
                } else {
                    (X + 0x6000, error::W)
                };
                assert_eq!((f.vector, f.cr2, f.error), (14, at, write), "{what} {size}");
                let expected = (count - bytes / size, from + bytes, to + bytes);
                assert_eq!(registers(m), expected, "{what} {size}");
                assert!(f.rf());
            }
        }
    });
}

#[test]
fn filling_stops_at_a_missing_page() {
    let forms: [(Emit, u64); 4] = [
        (|a| a.rep().stosb(), 1),
        (|a| a.rep().stosw(), 2),
        (|a| a.rep().stosd(), 4),
        (|a| a.rep().stosq(), 8),
    ];
    each_engine(|m| {
        for (code, size) in forms {
            m.forget();
            m.to_kernel();
            pages(m);
            m.cpu_mut().flush_tlb(true);
            m.set_reg(Gpr::Rax, 0x0102_0304_0506_0708);
            m.set_reg(Gpr::Rdi, X + 0x5f00);
            m.set_reg(Gpr::Rcx, 0x1000);
            let f = m.faults(|_| Ok(()), code);
            assert_eq!((f.vector, f.cr2), (14, X + 0x6000));
            assert_eq!(registers(m).0, 0x1000 - 0x100 / size);
            assert_eq!(m.reg(Gpr::Rdi), X + 0x6000);
        }
    });
}

#[test]
fn a_unit_that_crosses_into_a_missing_page_is_not_written() {
    each_engine(|m| {
        pages(m);
        m.set_reg(Gpr::Rax, u64::MAX);
        m.set_reg(Gpr::Rdi, X + 0x5ff4);
        m.set_reg(Gpr::Rcx, 5);
        let f = m.faults(|_| Ok(()), |a| a.rep().stosq());
        assert_eq!((f.vector, f.cr2, registers(m).0), (14, X + 0x6000, 4));
        assert_eq!(m.reg(Gpr::Rdi), X + 0x5ffc);
        let last = SPARE + 0x1000 * (7 * 5 % 11) + 0xff8;
        assert_eq!(m.get(last), 0xffff_ffff);
    });
}

#[test]
fn downwards() {
    each_engine(|m| {
        pages(m);
        for n in 0..0x400u64 {
            m.put(SPARE + 8 * n, n);
        }
        let page5 = SPARE + 0x1000 * (7 * 5 % 11);
        m.run_code(|a| {
            a.std()?;
            a.mov(rsi, X + 0xff8)?;
            a.mov(rdi, X + 0x5ff8)?;
            a.mov(ecx, 512)?;
            a.rep().movsq()?;
            a.cld()
        });
        assert_eq!(registers(m), (0, X - 8, X + 0x4ff8));
        assert!((0..512).all(|n| m.get(page5 + 8 * n) == n));
        // And into a fault, from above.
        m.to_kernel();
        m.map(3, 0, 0);
        m.set_reg(Gpr::Rdi, X + 0x4008);
        m.set_reg(Gpr::Rcx, 100);
        let f = m.faults(|a| a.std(), |a| a.rep().stosq());
        assert_eq!((f.vector, f.cr2, registers(m).0), (14, X + 0x3ff8, 98));
        assert_eq!(m.reg(Gpr::Rdi), X + 0x3ff8);
    });
}

#[test]
fn overlapping_copies_repeat_a_pattern() {
    each_engine(|m| {
        m.put(DATA, 0x0807_0605_0403_0201u64);
        m.run_code(|a| {
            a.mov(rsi, DATA)?;
            a.mov(rdi, DATA + 3)?;
            a.mov(ecx, 3000)?;
            a.rep().movsb()
        });
        for n in 0..3000u64 {
            let b: u8 = m.ram.load(DATA + n).expect("RAM");
            assert_eq!(u64::from(b), n % 3 + 1, "at {n}");
        }
    });
}

#[test]
fn comparisons_and_scans_stop_where_they_must() {
    each_engine(|m| {
        m.put_bytes(SPARE, &[0x61; 0x3000]);
        m.put_bytes(SPARE + 0x1800, b"z");
        m.put_bytes(SPARE + 0x10_0000, &[0x61; 0x3000]);
        m.run_code(|a| {
            a.mov(edi, SPARE as u32)?;
            a.mov(ecx, 0x3000)?;
            a.mov(al, 0x7a)?;
            a.repne().scasb()?;
            a.mov(r8, rdi)?;
            a.mov(r9, rcx)?;
            a.mov(edi, SPARE as u32)?;
            a.mov(esi, (SPARE + 0x10_0000) as u32)?;
            a.mov(ecx, 0x3000)?;
            a.repe().cmpsb()?;
            a.seta(al)?;
            a.setne(bl)
        });
        assert_eq!((m.reg(Gpr::R8), m.reg(Gpr::R9)), (SPARE + 0x1801, 0x17ff));
        assert_eq!(registers(m), (0x17ff, SPARE + 0x10_1801, SPARE + 0x1801));
        assert_eq!((m.reg(Gpr::Rax) & 1, m.reg(Gpr::Rbx) & 1), (0, 1));
    });
}

/// As i386's kernel compares strings.
#[test]
fn strings_are_compared_an_element_at_a_time() {
    each_engine(|m| {
        for (one, other, difference) in [
            (&b"doppel\0"[..], &b"doppel\0"[..], 0u64),
            (b"doppel\0", b"dopple\0", u64::MAX),
            (b"dot\0", b"dop\0", 1),
            (b"do\0", b"dop\0", u64::MAX),
        ] {
            // Across pages that are next to each other.
            let (from, to) = (SPARE + 0xffd, SPARE + 0x10_0ffe);
            m.put_bytes(from, one);
            m.put_bytes(to, other);
            m.run_code(|a| {
                let (mut next, mut differ, mut done) =
                    (a.create_label(), a.create_label(), a.create_label());
                a.mov(rsi, from)?;
                a.mov(rdi, to)?;
                a.set_label(&mut next)?;
                a.lodsb()?;
                a.scasb()?;
                a.jne(differ)?;
                a.test(al, al)?;
                a.jne(next)?;
                a.xor(eax, eax)?;
                a.jmp(done)?;
                a.set_label(&mut differ)?;
                a.sbb(rax, rax)?;
                a.or(rax, 1)?;
                a.set_label(&mut done)?;
                a.nop()
            });
            assert_eq!(m.reg(Gpr::Rax), difference, "{one:?} {other:?}");
        }
    });
}

#[test]
fn one_element_is_moved_loaded_stored_and_compared_in_either_direction() {
    const VALUE: u64 = 0x8877_6655_4433_2211;
    let forms: [(u64, [Emit; 5]); 4] = [
        (
            1,
            [
                |a| a.lodsb(),
                |a| a.stosb(),
                |a| a.scasb(),
                |a| a.movsb(),
                |a| a.cmpsb(),
            ],
        ),
        (
            2,
            [
                |a| a.lodsw(),
                |a| a.stosw(),
                |a| a.scasw(),
                |a| a.movsw(),
                |a| a.cmpsw(),
            ],
        ),
        (
            4,
            [
                |a| a.lodsd(),
                |a| a.stosd(),
                |a| a.scasd(),
                |a| a.movsd(),
                |a| a.cmpsd(),
            ],
        ),
        (
            8,
            [
                |a| a.lodsq(),
                |a| a.stosq(),
                |a| a.scasq(),
                |a| a.movsq(),
                |a| a.cmpsq(),
            ],
        ),
    ];
    // Within a page and over the edge of one.
    let places = [SPARE + 0x100, SPARE + 0x1fff];
    each_engine(|m| {
        for ((size, forms), at, down) in forms
            .iter()
            .flat_map(|(size, forms)| places.map(|at| ((size, forms), at)))
            .flat_map(|((size, forms), at)| [false, true].map(|down| ((size, forms), at, down)))
        {
            let (source, destination) = (at, at + 0x10_0000);
            let step = if down { size.wrapping_neg() } else { *size };
            let mask = u64::MAX >> (64 - 8 * size);
            for (n, form) in forms.iter().enumerate() {
                m.put_bytes(source, &VALUE.to_le_bytes());
                m.put_bytes(destination, &(VALUE + 1).to_le_bytes());
                m.run_code(|a| {
                    a.mov(rsi, source)?;
                    a.mov(rdi, destination)?;
                    a.mov(rax, -1i64 as u64)?;
                    if down {
                        a.std()?;
                    }
                    form(a)?;
                    a.setb(bl)?;
                    a.cld()
                });
                let what = format!("form {n} of {size} at {at:#x}, down {down}");
                let (moves_rsi, moves_rdi) = (n != 1 && n != 2, n != 0);
                let expected = |moves, from: u64| match moves {
                    true => from.wrapping_add(step),
                    false => from,
                };
                assert_eq!(m.reg(Gpr::Rsi), expected(moves_rsi, source), "{what}");
                assert_eq!(m.reg(Gpr::Rdi), expected(moves_rdi, destination), "{what}");
                let mut bytes = [0; 8];
                for (n, byte) in bytes.iter_mut().enumerate() {
                    *byte = m.ram.load(destination + n as u64).expect("RAM");
                }
                let written = match n {
                    1 => (VALUE + 1) | mask,
                    3 => ((VALUE + 1) & !mask) | (VALUE & mask),
                    _ => VALUE + 1,
                };
                assert_eq!(u64::from_le_bytes(bytes), written, "{what}");
                let loaded = match (n, size) {
                    (0, 4) => VALUE & mask,
                    (0, _) => !mask | (VALUE & mask),
                    _ => u64::MAX,
                };
                assert_eq!(m.reg(Gpr::Rax), loaded, "{what}");
                // -1 is above what is scanned; the source is below the destination.
                match n {
                    2 => assert_eq!(m.reg(Gpr::Rbx) & 1, 0, "{what}"),
                    4 => assert_eq!(m.reg(Gpr::Rbx) & 1, 1, "{what}"),
                    _ => {}
                }
            }
        }
    });
}

#[test]
fn an_element_that_faults_changes_nothing() {
    let forms: [(Emit, u64, u64, u64, u64); 7] = [
        // Where both fault.
        (|a| a.cmpsd(), X + 0x2000, X + 0x6000, X + 0x6000, 0),
        (|a| a.movsd(), X + 0x2000, X + 0x6000, X + 0x2000, 0),
        (|a| a.lodsd(), X + 0x2000, X + 0x4000, X + 0x2000, 0),
        (|a| a.stosd(), X, X + 0x6000, X + 0x6000, error::W),
        (|a| a.scasd(), X, X + 0x5ffe, X + 0x6000, 0),
        (|a| a.movsd(), X, X + 0x6000, X + 0x6000, error::W),
        (|a| a.cmpsd(), X + 0x1ffe, X + 0x4000, X + 0x2000, 0),
    ];
    each_engine(|m| {
        for (n, (code, from, to, at, wanted)) in forms.into_iter().enumerate() {
            m.forget();
            m.to_kernel();
            pages(m);
            m.cpu_mut().flush_tlb(true);
            for (r, v) in [(Gpr::Rsi, from), (Gpr::Rdi, to), (Gpr::Rax, 0x1234)] {
                m.set_reg(r, v);
            }
            let f = m.faults(|_| Ok(()), code);
            assert_eq!((f.vector, f.cr2, f.error), (14, at, wanted), "{n}");
            assert_eq!((m.reg(Gpr::Rsi), m.reg(Gpr::Rdi)), (from, to), "{n}");
            assert_eq!(m.reg(Gpr::Rax), 0x1234, "{n}");
        }
    });
}

#[test]
fn a_count_of_zero_touches_nothing() {
    each_engine(|m| {
        m.run_code(|a| {
            a.xor(ecx, ecx)?;
            a.mov(rsi, 1u64 << 63)?;
            a.mov(rdi, 1u64 << 63)?;
            a.rep().movsb()?;
            a.rep().stosq()?;
            a.repe().cmpsb()?;
            a.rep().lodsb()
        });
        assert!(m.records().is_empty());
    });
}

#[test]
fn thirty_two_bit_addresses_wrap_and_clear() {
    each_engine(|m| {
        // A32 REP STOSB: EDI and ECX count, the upper halves are cleared.
        m.run_code(|a| {
            a.mov(rdi, DATA | 7 << 40)?;
            a.mov(rcx, 16u64 | 9 << 40)?;
            a.mov(al, 0x55)?;
            a.db(&[0x67, 0xf3, 0xaa])
        });
        assert_eq!(m.data(1), 0x5555_5555_5555_5555);
        assert_eq!((m.reg(Gpr::Rdi), m.reg(Gpr::Rcx)), (DATA + 16, 0));
    });
}

#[test]
fn a_long_repetition_is_interrupted_and_goes_on() {
    each_engine(|m| {
        // 4 MiB: the timer's interrupts come in the middle, and see the registers of a whole number of units.
        let handler = CODE + 0x800;
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.inc(r12)?;
            a.mov(r13, rdi)?;
            a.sub(r13, rbx)?;
            a.shr(r13, 3)?;
            a.add(r13, rcx)?;
            a.cmp(r13, r14)?;
            let mut fine = a.create_label();
            a.je(fine)?;
            a.inc(r11)?;
            a.set_label(&mut fine)?;
            a.iretq()
        });
        m.gate(0x40, handler, 0xe, 1, 0);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(rdi, rbx)?;
            a.mov(rcx, r14)?;
            a.sti()?;
            a.nop()?;
            a.rep().stosq()?;
            a.cli()?;
            a.cmp(r12, 10)?;
            a.jb(again)?;
            machine::stop(a)
        });
        m.set_reg(Gpr::Rbx, SPARE);
        m.set_reg(Gpr::R14, (4 << 20) / 8);
        m.set_reg(Gpr::Rax, 0x1234);
        m.go(CODE);
        let (lines, kicker) = (m.bus.lines.clone(), m.kicker());
        let timer = std::thread::spawn(move || {
            for _ in 0..10 {
                std::thread::sleep(std::time::Duration::from_micros(300));
                while lines.interrupt_waits() {
                    std::thread::yield_now();
                }
                lines.interrupt(0x40);
                kicker.kick();
            }
        });
        m.run();
        timer.join().expect("the timer");
        assert_eq!((m.reg(Gpr::R11), m.reg(Gpr::Rcx)), (0, 0));
        assert_eq!(m.reg(Gpr::R12), 10);
        assert!((0..(4 << 20) / 8).all(|n| m.get(SPARE + 8 * n) == 0x1234));
    });
}

#[test]
fn a_fault_does_not_make_later_pages_dirty() {
    each_engine(|m| {
        pages(m);
        m.map(7, SPARE + 0x9000, P | RW);
        m.set_reg(Gpr::Rdi, X + 0x5000);
        m.set_reg(Gpr::Rcx, 0x3000);
        m.faults(|_| Ok(()), |a| a.rep().stosb());
        assert_eq!((m.entry(5) & D, m.entry(6) & D, m.entry(7) & D), (D, 0, 0));
    });
}

#[test]
fn to_and_from_ports() {
    each_engine(|m| {
        m.put(DATA, 0x0403_0201u64);
        m.run_code(|a| {
            a.mov(edx, 0x60)?;
            a.mov(rsi, DATA)?;
            a.mov(ecx, 4)?;
            a.rep().outsb()?;
            a.mov(rdi, DATA + 0x100)?;
            a.mov(ecx, 3)?;
            a.rep().insw()
        });
        assert_eq!(m.bus.written, [(0x60, 1), (0x60, 2), (0x60, 3), (0x60, 4)]);
        assert_eq!(m.get(DATA + 0x100), 0x6060_6060_6060);
        // INS to a page that cannot be written does not read the port; registers stay.
        m.to_kernel();
        m.set_reg(Gpr::Rdi, X);
        m.set_reg(Gpr::Rcx, 3);
        let f = m.faults(|_| Ok(()), |a| a.rep().insb());
        assert_eq!((f.vector, f.cr2, registers(m).0), (14, X, 3));
    });
}

/// (In compatibility mode; nobody specifies what becomes of the upper halves there, but the processor leaves alone what it has not used.)
#[test]
fn a_32_bit_repetition_that_faults_at_once_leaves_the_registers_alone() {
    const UPPER: u64 = 0x5555_5555 << 32;
    each_engine(|m| {
        for (from, count, vector) in [(0xffff_fffd, 7, Some(13)), (USER_DATA, 0, None)] {
            m.forget();
            m.to_user32();
            m.action(13, Action::Stop);
            let before = (UPPER | count, UPPER | from, UPPER | USER_DATA);
            for (r, v) in [
                (Gpr::Rcx, before.0),
                (Gpr::Rsi, before.1),
                (Gpr::Rdi, before.2),
            ] {
                m.set_reg(r, v);
            }
            m.place(32, USER_CODE, |a: &mut CodeAssembler| {
                a.rep().movsd()?;
                a.int(0x81)
            });
            m.go(USER_CODE);
            m.run();
            assert_eq!(m.vectors().first().copied(), vector);
            assert_eq!(registers(m), before);
        }
    });
}
