//! Tests of the interpreter: small programs in flat memory, and the host's processor as the oracle.

mod caches;
mod makers;
mod oracle;

use std::sync::Arc;

use doppel_memory::GuestRam;

use super::step;
use crate::{Cpu, Cr0, Cr4, Efer, EmptyBus, Outcome, Rflags, Seg, Segment};

pub(super) const CODE: u64 = 0x1000;
pub(super) const DATA: u64 = 0x8000;
pub(super) const STACK: u64 = 0x7000;

/// A CPU in flat memory without paging; `bits` is 16 (real mode), 32 or 64. All of the extended state is switched on.
pub(super) fn machine(bits: u32) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
    let mut cpu = Cpu::new(0, ram);
    let flat = |attributes| Segment {
        base: 0,
        limit: if bits == 16 { 0xffff } else { u32::MAX },
        attributes,
        selector: 8,
    };
    let code = match bits {
        64 => 0x9b | Segment::L,
        32 => 0x9b | Segment::DB,
        _ => 0x9b,
    };
    cpu.seg = [flat(if bits == 32 { 0x93 | Segment::DB } else { 0x93 }); 6];
    cpu.seg[Seg::Cs as usize] = flat(code);
    if bits != 16 {
        cpu.cr0 |= Cr0::PE;
    }
    if bits == 64 {
        cpu.efer |= Efer::LMA | Efer::LME;
    }
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    cpu.xcr0 = super::vector::Layout::of_host().supported & 0xe7;
    cpu.rip = CODE;
    cpu.gpr[4] = STACK;
    cpu
}

pub(super) fn put(cpu: &Cpu, at: u64, bytes: &[u8]) {
    cpu.ram.ptr(at).unwrap().write(bytes);
}

pub(super) fn get<const N: usize>(cpu: &Cpu, at: u64) -> [u8; N] {
    let mut out = [0; N];
    cpu.ram.ptr(at).unwrap().read(&mut out);
    out
}

/// Puts `code` at RIP and steps until RIP is behind it.
pub(super) fn run(cpu: &mut Cpu, code: &[u8]) {
    let start = cpu.rip;
    put(cpu, start, code);
    for _ in 0..100_000 {
        if cpu.rip == start + code.len() as u64 {
            return;
        }
        assert_eq!(
            step(cpu, &mut EmptyBus),
            Outcome::Continue,
            "at {:#x}",
            cpu.rip
        );
    }
    panic!("no end");
}

#[test]
fn pushes_and_pops_follow_the_mode() {
    for (bits, width) in [(16, 2), (32, 4), (64, 8)] {
        let mut cpu = machine(bits);
        cpu.gpr[0] = 0x1122_3344_5566_7788;
        run(&mut cpu, &[0x50, 0x5b]); // push ax/eax/rax; pop bx/ebx/rbx
        assert_eq!(cpu.gpr[4], STACK);
        let mask = u64::MAX >> (64 - 8 * width);
        assert_eq!(cpu.gpr[3], 0x1122_3344_5566_7788 & mask, "{bits}");
        assert_eq!(get::<2>(&cpu, STACK - width), [0x88, 0x77]);
    }
}

#[test]
fn pop_to_memory_sees_the_stack_pointer_incremented() {
    let mut cpu = machine(64);
    put(&cpu, STACK, &7u64.to_le_bytes());
    run(&mut cpu, &[0x8f, 0x04, 0x24]); // pop [rsp]
    assert_eq!(get::<8>(&cpu, STACK + 8), 7u64.to_le_bytes());
}

#[test]
fn calls_return() {
    for bits in [16, 32, 64] {
        let mut cpu = machine(bits);
        // call over a jump to a ret: e8 is rel16 in 16-bit code.
        let code: &[u8] = if bits == 16 {
            &[0xe8, 0x02, 0x00, 0xeb, 0x01, 0xc3]
        } else {
            &[0xe8, 0x02, 0x00, 0x00, 0x00, 0xeb, 0x01, 0xc3]
        };
        run(&mut cpu, code);
        assert_eq!(cpu.gpr[4], STACK);
    }
}

#[test]
fn repeated_moves_cross_pages_and_overlap() {
    let mut cpu = machine(64);
    for n in 0..3 * 4096u64 {
        put(&cpu, 0x20_000 + n, &[(n % 251) as u8]);
    }
    (cpu.gpr[6], cpu.gpr[7], cpu.gpr[1]) = (0x20_001, 0x30_003, 3 * 4096 - 1);
    run(&mut cpu, &[0xf3, 0xa4]); // rep movsb
    for n in 0..3 * 4096u64 - 1 {
        assert_eq!(get::<1>(&cpu, 0x30_003 + n), [((n + 1) % 251) as u8], "{n}");
    }
    assert_eq!(cpu.gpr[1], 0);
    // Source and destination a byte apart: the first byte spreads.
    (cpu.rip, cpu.gpr[6], cpu.gpr[7], cpu.gpr[1]) = (CODE, 0x20_000, 0x20_001, 100);
    put(&cpu, 0x20_000, &[0x5a]);
    run(&mut cpu, &[0xf3, 0xa4]);
    assert_eq!(get::<101>(&cpu, 0x20_000), [0x5a; 101]);
}

#[test]
fn repeated_stores_and_scans() {
    let mut cpu = machine(64);
    (cpu.gpr[0], cpu.gpr[7], cpu.gpr[1]) = (0x1122_3344, 0x20_002, 5000);
    run(&mut cpu, &[0xf3, 0xab]); // rep stosd
    assert_eq!(cpu.gpr[7], 0x20_002 + 20_000);
    assert_eq!(get::<4>(&cpu, 0x20_002 + 19_996), [0x44, 0x33, 0x22, 0x11]);
    put(&cpu, 0x20_002 + 4000, &[0]);
    (cpu.rip, cpu.gpr[0], cpu.gpr[7], cpu.gpr[1]) = (CODE, 0, 0x20_002, u64::MAX);
    run(&mut cpu, &[0xf2, 0xae]); // repne scasb
    assert_eq!(cpu.gpr[7], 0x20_002 + 4001);
    assert!(cpu.rflags.contains(Rflags::ZF));
}

/// What `rep movs` does, unit by unit.
fn moved(memory: &mut [u8], from: usize, to: usize, unit: usize, count: usize, down: bool) {
    for n in 0..count {
        let n = if down { -(n as isize) } else { n as isize } * unit as isize;
        let (from, to) = (from.wrapping_add_signed(n), to.wrapping_add_signed(n));
        memory.copy_within(from..from + unit, to);
    }
}

#[test]
fn repeated_moves_are_those_of_single_units() {
    const AT: u64 = 0x20_000;
    for (opcode, unit) in [(0xa4, 1), (0xa5, 4)] {
        for down in [false, true] {
            for distance in [-4100i64, -9, -4, -1, 0, 1, 4, 7, 4093, 8192] {
                let mut cpu = machine(64);
                let mut memory: Vec<u8> = (0..0x8000u32).map(|n| (n % 253) as u8).collect();
                put_all(&cpu, AT, &memory);
                let (from, count) = (0x3003u64, 1500);
                let to = from.wrapping_add_signed(distance);
                (cpu.gpr[6], cpu.gpr[7], cpu.gpr[1]) = (AT + from, AT + to, count);
                cpu.rflags.set(Rflags::DF, down);
                run(&mut cpu, &[0xf3, opcode]);
                moved(
                    &mut memory,
                    from as usize,
                    to as usize,
                    unit,
                    count as usize,
                    down,
                );
                for (n, expected) in memory.iter().enumerate() {
                    let got = get::<1>(&cpu, AT + n as u64)[0];
                    assert_eq!(got, *expected, "{unit} {down} {distance} at {n:#x}");
                }
            }
        }
    }
}

fn put_all(cpu: &Cpu, at: u64, bytes: &[u8]) {
    for (n, page) in bytes.chunks(4096).enumerate() {
        put(cpu, at + 4096 * n as u64, page);
    }
}

#[test]
fn repeated_comparisons_end_at_the_unit_that_decides() {
    for down in [false, true] {
        for at in [0u64, 1, 63, 64, 200, 299] {
            let mut cpu = machine(64);
            let n = |k: u64| if down { 299 - k } else { k };
            put(&cpu, 0x20_f00 + 2 * n(at), &[1, 0]);
            let start = |base: u64| base + 2 * n(0);
            (cpu.gpr[6], cpu.gpr[7], cpu.gpr[1]) = (start(0x20_f00), start(0x30_f02), 300);
            cpu.rflags.set(Rflags::DF, down);
            run(&mut cpu, &[0xf3, 0x66, 0xa7]); // repe cmpsw
            assert_eq!(cpu.gpr[1], 299 - at, "{down} {at}");
            assert!(!cpu.rflags.contains(Rflags::ZF) && !cpu.rflags.contains(Rflags::CF));
            (cpu.rip, cpu.gpr[7], cpu.gpr[0], cpu.gpr[1]) = (CODE, start(0x20_f00), 1, 300);
            run(&mut cpu, &[0xf2, 0x66, 0xaf]); // repne scasw
            assert_eq!(cpu.gpr[1], 299 - at, "{down} {at}");
            assert!(cpu.rflags.contains(Rflags::ZF));
        }
    }
}

#[test]
fn repeated_stores_fill_up_and_down() {
    for (opcode, unit) in [
        (&[0xf3, 0xaa][..], 1),
        (&[0xf3, 0x66, 0xab], 2),
        (&[0xf3, 0x48, 0xab], 8),
    ] {
        for down in [false, true] {
            let mut cpu = machine(64);
            cpu.gpr[0] = 0x1122_3344_5566_7788;
            let first = if down {
                0x20_ffb + 700 * unit
            } else {
                0x20_ffb
            };
            (cpu.gpr[7], cpu.gpr[1]) = (first, 701);
            cpu.rflags.set(Rflags::DF, down);
            run(&mut cpu, opcode);
            for n in 0..701 * unit {
                let expected = (cpu.gpr[0] >> (8 * (n % unit))) as u8;
                assert_eq!(
                    get::<1>(&cpu, 0x20_ffb + n),
                    [expected],
                    "{unit} {down} {n}"
                );
            }
            assert_eq!(get::<1>(&cpu, 0x20_ffa), [0]);
            assert_eq!(get::<1>(&cpu, 0x20_ffb + 701 * unit), [0]);
        }
    }
}

#[test]
fn code_that_changes_itself_takes_effect_at_once() {
    let mut cpu = machine(64);
    // mov byte [rip+1], 2; mov al, 1
    run(&mut cpu, &[0xc6, 0x05, 0x01, 0, 0, 0, 2, 0xb0, 0x01]);
    assert_eq!(cpu.gpr[0] & 0xff, 2);
    // And where the code was executed before.
    cpu.rip = CODE;
    put(&cpu, CODE + 8, &[1]);
    let code = [0xc6, 0x05, 0x01, 0, 0, 0, 3, 0xb0, 0x01];
    run(&mut cpu, &code);
    assert_eq!(cpu.gpr[0] & 0xff, 3);
}

#[test]
fn legacy_decimal_instructions() {
    let mut cpu = machine(32);
    cpu.gpr[0] = 0x79;
    cpu.gpr[3] = 0x35;
    run(&mut cpu, &[0x00, 0xd8, 0x27]); // add al, bl; daa
    assert_eq!(cpu.gpr[0] & 0xff, 0x14);
    assert!(cpu.rflags.contains(Rflags::CF));
    cpu.rip = CODE;
    cpu.gpr[0] = 53;
    run(&mut cpu, &[0xd4, 0x0a]); // aam
    assert_eq!(cpu.gpr[0] & 0xffff, 0x0503);
}

#[test]
fn wide_compare_and_exchange() {
    let mut cpu = machine(64);
    put(&cpu, DATA, &[1; 16]);
    cpu.gpr[7] = DATA;
    run(&mut cpu, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]); // lock cmpxchg16b [rdi]
    assert!(!cpu.rflags.contains(Rflags::ZF));
    assert_eq!(cpu.gpr[0], 0x0101_0101_0101_0101);
    (cpu.rip, cpu.gpr[3], cpu.gpr[1]) = (CODE, 5, 6);
    run(&mut cpu, &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]);
    assert!(cpu.rflags.contains(Rflags::ZF));
    assert_eq!(get::<8>(&cpu, DATA), 5u64.to_le_bytes());
    assert_eq!(get::<8>(&cpu, DATA + 8), 6u64.to_le_bytes());
}

#[test]
fn bit_offsets_reach_beyond_the_operand() {
    let mut cpu = machine(64);
    cpu.gpr[7] = DATA + 64;
    cpu.gpr[0] = (-3i64) as u64;
    run(&mut cpu, &[0x48, 0x0f, 0xab, 0x07]); // bts [rdi], rax
    assert_eq!(get::<8>(&cpu, DATA + 56), (1u64 << 61).to_le_bytes());
}

#[test]
fn components_in_their_initial_state_are_saved_as_such_whatever_their_bytes_are() {
    const SAVES: [(&str, &[u8]); 2] = [
        ("fxsave64", &[0x48, 0x0f, 0xae, 0x07]),
        ("xsave64", &[0x48, 0x0f, 0xae, 0x27]),
    ];
    for (name, save) in SAVES {
        let mut cpu = machine(64);
        cpu.gpr[7] = DATA;
        cpu.gpr[0] = u64::MAX;
        cpu.gpr[2] = u64::MAX;
        cpu.fpu.bytes[..24].fill(0xaa);
        cpu.fpu.bytes[32..416].fill(0xaa);
        cpu.fpu.bytes[512..520].fill(0);
        run(&mut cpu, save);
        let saved: [u8; 416] = get(&cpu, DATA);
        let reset = crate::FpuArea::reset();
        assert_eq!(saved[..24], reset.bytes[..24], "{name}");
        assert_eq!(saved[32..416], reset.bytes[32..416], "{name}");
    }
}

/// Intel SDM vol. 1, 8.1.8: control instructions are none of those that the pointer is about.
#[test]
fn x87_control_instructions_leave_the_instruction_pointer() {
    let mut cpu = machine(64);
    run(&mut cpu, &[0xd9, 0x3c, 0x25, 0, 0x80, 0, 0]); // fnstcw [DATA]
    let load = cpu.rip;
    run(&mut cpu, &[0xd9, 0xe8]); // fld1
    run(&mut cpu, &[0xd9, 0x2c, 0x25, 0, 0x80, 0, 0]); // fldcw [DATA]
    assert_eq!(cpu.fpu.fip(), load);
}

/// Intel SDM vol. 1, 8.1.8: the operand's offset in its segment, at least where an exception is not masked.
#[test]
fn the_x87_operand_pointer_is_an_offset_in_the_segment() {
    const SIGNALLING: u32 = 0x7fa0_0000;
    let mut cpu = machine(64);
    cpu.cr0 |= Cr0::NE;
    cpu.seg[Seg::Gs as usize].base = DATA - 0x100;
    cpu.gpr[3] = 0x100;
    put(&cpu, DATA, &0x37e_u16.to_le_bytes());
    run(&mut cpu, &[0x65, 0xd9, 0x2b]); // fldcw [gs:rbx]: invalid operation is not masked
    put(&cpu, DATA, &SIGNALLING.to_le_bytes());
    run(&mut cpu, &[0x65, 0xd9, 0x03]); // fld dword [gs:rbx]
    assert_eq!(cpu.fpu.fdp(), 0x100);
}

#[test]
fn an_instruction_that_was_decoded_before_is_within_the_limit_of_now() {
    let mut cpu = machine(32);
    let code = [0xb8, 1, 2, 3, 4]; // mov eax, imm32
    run(&mut cpu, &code);
    cpu.rip = CODE;
    cpu.seg[Seg::Cs as usize].limit = CODE as u32 + 3;
    step(&mut cpu, &mut EmptyBus);
    assert_ne!(cpu.rip, CODE + 5);
}

/// AMD APM vol. 3, WBNOINVD: without it the prefix means nothing.
#[test]
fn wbnoinvd_is_wbinvd() {
    run(&mut machine(64), &[0xf3, 0x0f, 0x09]);
}
