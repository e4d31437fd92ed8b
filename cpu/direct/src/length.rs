//! How long an instruction of 64-bit code is, by tables (SDM volume 2, appendix A and section 2; AMD volume 3 for XOP and 3DNow!).
//!
//! Problem: whether two bytes in a page of code are an instruction or part of another is asked of the code before them, decoded from each of some
//! hundred and sixty bytes (`hazard`), several times in a page. A full decoder takes 20 to 30 ns for each; all that was a quarter of the time of a
//! Perl script. Idea: nothing is wanted but the length and a rough kind, and those are a table look-up for each opcode. What it relies on: agreement with the full
//! decoder, which a test looks for at every opcode. Cost: 2 to 4 ns.

/// What an instruction is, as far as anybody asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ordinary,
    /// It tells of the host, and its bytes are often part of others (`hazard`).
    Common,
    /// What no code of user programs has: undefined, for kernels, or two zero bytes.
    NoCode,
}

/// An instruction: its bytes, of which there may be more than were given, and its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Length {
    pub(crate) bytes: u8,
    pub(crate) kind: Kind,
}

/// What follows an opcode, as bits.
type Form = u16;
/// ModRM with what belongs to it.
const M: Form = 1;
const IMM8: Form = 2;
const IMM16: Form = 4;
/// Two bytes with 66, else four.
const IMMZ: Form = 8;
/// Four bytes whatever prefix there is.
const REL32: Form = 16;
/// An address: eight bytes, four with 67.
const MOFFS: Form = 32;
/// As IMMZ, but eight bytes with REX.W.
const IMMV: Form = 64;
/// Its immediate is there if the register field is 0 or 1.
const TEST: Form = 128;
/// The register field matters to the kind: [`group_kind`].
const GROUP: Form = 256;
const COMMON: Form = 512;
const NO_CODE: Form = 1024;
/// The operand is a register, whatever ModRM says of memory.
const REGISTER: Form = 2048;

const fn fill(mut table: [Form; 256], first: usize, last: usize, form: Form) -> [Form; 256] {
    let mut at = first;
    while at <= last {
        table[at] = form;
        at += 1;
    }
    table
}

const fn each(mut table: [Form; 256], opcodes: &[u8], form: Form) -> [Form; 256] {
    let mut n = 0;
    while n < opcodes.len() {
        table[opcodes[n] as usize] = form;
        n += 1;
    }
    table
}

/// One-byte opcodes. Prefixes, escapes, VEX, EVEX and XOP are seen to before.
const ONE: [Form; 256] = {
    let mut t = [0; 256];
    let mut row = 0;
    while row < 0x40 {
        t = fill(t, row, row + 3, M);
        t[row + 4] = IMM8;
        t[row + 5] = IMMZ;
        t[row + 6] = NO_CODE;
        t[row + 7] = NO_CODE;
        row += 8;
    }
    t = each(
        t,
        &[0x60, 0x61, 0x82, 0x9a, 0xce, 0xd4, 0xd5, 0xd6, 0xea],
        NO_CODE,
    );
    t = each(t, &[0x63, 0xd0, 0xd1, 0xd2, 0xd3], M);
    t = each(t, &[0x68, 0xa9], IMMZ);
    t = each(t, &[0x69, 0x81], M | IMMZ);
    t = each(t, &[0x6b, 0x80, 0x83, 0xc0, 0xc1], M | IMM8);
    t = each(t, &[0x6a, 0xa8, 0xcd, 0xeb], IMM8);
    t = fill(t, 0x6c, 0x6f, NO_CODE);
    t = fill(t, 0x70, 0x7f, IMM8);
    t = fill(t, 0x84, 0x8e, M);
    t = each(t, &[0x8c, 0x8e, 0x8f, 0xfe, 0xff], M | GROUP);
    t[0x8d] = M | GROUP;
    t = fill(t, 0xa0, 0xa3, MOFFS);
    t = fill(t, 0xb0, 0xb7, IMM8);
    t = fill(t, 0xb8, 0xbf, IMMV);
    t = each(t, &[0xc2, 0xca], IMM16);
    t[0xc6] = M | IMM8 | GROUP;
    t[0xc7] = M | IMMZ | GROUP;
    t[0xc8] = IMM16 | IMM8;
    t = fill(t, 0xd8, 0xdf, M);
    t = fill(t, 0xe0, 0xe3, IMM8);
    t = fill(t, 0xe4, 0xe7, IMM8 | NO_CODE);
    t = each(t, &[0xe8, 0xe9], REL32);
    t = each(t, &[0xec, 0xed, 0xee, 0xef, 0xf4, 0xfa, 0xfb], NO_CODE);
    t[0xf6] = M | IMM8 | TEST;
    t[0xf7] = M | IMMZ | TEST;
    t
};

/// Opcodes behind 0f.
const TWO: [Form; 256] = {
    let mut t = fill([0; 256], 0x10, 0xff, M);
    t = each(t, &[0x00, 0x01], M | GROUP);
    t = each(t, &[0x02, 0x03], M | COMMON);
    t = each(
        t,
        &[0x04, 0x0a, 0x0c, 0x36, 0x39, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f],
        NO_CODE,
    );
    t = each(
        t,
        &[0x06, 0x07, 0x08, 0x09, 0x30, 0x32, 0x35, 0xaa],
        NO_CODE,
    );
    t = each(
        t,
        &[0x24, 0x25, 0x26, 0x27, 0x7a, 0x7b, 0xa6, 0xa7],
        NO_CODE,
    );
    t = each(t, &[0x05, 0x0b, 0x31, 0x33, 0x37, 0x77], 0);
    t = each(t, &[0xa0, 0xa1, 0xa8, 0xa9], 0);
    t[0x0d] = M;
    t[0x0e] = COMMON;
    t[0x0f] = M | IMM8 | COMMON;
    t = fill(t, 0x20, 0x23, M | REGISTER | NO_CODE);
    t = each(t, &[0x34, 0xa2], COMMON);
    t = each(t, &[0x70, 0xa4, 0xac, 0xc2, 0xc4, 0xc5, 0xc6], M | IMM8);
    t = each(t, &[0x71, 0x72, 0x73, 0xba], M | IMM8 | GROUP);
    t[0xc7] = M | GROUP;
    t = each(t, &[0x78, 0x79], M | NO_CODE);
    t = fill(t, 0x80, 0x8f, REL32);
    fill(t, 0xc8, 0xcf, 0)
};

/// VMCALL, XGETBV, VMMCALL, XSUSLDTRK and (without F2) SERIALIZE, XRESLDTRK, RDPKRU, WRPKRU, RDTSCP, MONITORX, MWAITX, CLZERO, RDPRU.
const GROUP_7: [u8; 12] = [
    0xc1, 0xd0, 0xd9, 0xe8, 0xe9, 0xee, 0xef, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd,
];

/// Kinds of opcodes that ModRM decides: the map (1 or 2), the opcode, ModRM.
fn group_kind(map: u8, opcode: u8, modrm: u8) -> Kind {
    let (reg, memory) = (modrm >> 3 & 7, modrm < 0xc0);
    let no_code = match (map, opcode) {
        (1, 0x8c) => reg > 5,
        (1, 0x8d) => !memory,
        (1, 0x8e) => reg > 5 || reg == 1,
        (1, 0x8f) => reg != 0,
        // XABORT, XBEGIN.
        (1, 0xc6 | 0xc7) if modrm == 0xf8 => return Kind::Common,
        (1, 0xc6 | 0xc7) => reg != 0,
        (1, 0xfe) => reg > 1,
        (1, 0xff) => reg == 7 || !memory && matches!(reg, 3 | 5),
        (2, 0x00) if matches!(reg, 0 | 1 | 4 | 5) => return Kind::Common,
        (2, 0x00) => true,
        (2, 0x01) if reg == 4 || memory && reg < 2 => return Kind::Common,
        (2, 0x01) if GROUP_7.contains(&modrm) => return Kind::Common,
        (2, 0x01) => memory && reg != 5 || reg == 6,
        (2, 0x71 | 0x72) => memory || !matches!(reg, 2 | 4 | 6),
        (2, 0x73) => memory || !matches!(reg, 2 | 3 | 6 | 7),
        (2, 0xba) => reg < 4,
        // RDPID; RDSEED, which is nothing of the kind, but nobody asks about it.
        (2, 0xc7) if reg == 7 && !memory => return Kind::Common,
        _ => false,
    };
    match no_code {
        true => Kind::NoCode,
        false => Kind::Ordinary,
    }
}

/// Bytes of the longest instruction.
pub(crate) const LONGEST: usize = 15;

/// The instruction that begins the code. What is behind the end counts as zero; the length may say that there is more.
pub(crate) fn decode(code: &[u8]) -> Length {
    let byte = |at: usize| code.get(at).copied().unwrap_or(0);
    let (mut at, mut word, mut short, mut wide) = (0, false, false, false);
    let (mut rex, mut mandatory) = (false, false);
    loop {
        match byte(at) {
            0x66 => word = true,
            0x67 => short = true,
            0xf2 | 0xf3 | 0xf0 => mandatory = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 => {}
            prefix @ 0x40..=0x4f => {
                (rex, wide) = (true, prefix & 8 != 0);
                at += 1;
                continue;
            }
            _ => break,
        }
        // REX counts only right before the opcode.
        (rex, wide) = (false, false);
        at += 1;
        if at >= LONGEST {
            break;
        }
    }
    let prefixed = rex || mandatory || word;
    let opcode = byte(at);
    let (form, map, opcode_at) = match opcode {
        0x0f if matches!(byte(at + 1), 0x38 | 0x3a) => (of_map(byte(at + 1) - 0x36, 0), 3, at + 2),
        0x0f => (of_two(byte(at + 1), mandatory || word), 2, at + 1),
        0xc5 => (vector(1, byte(at + 2), prefixed), 3, at + 2),
        0xc4 => (
            vector(byte(at + 1) & 0x1f, byte(at + 3), prefixed),
            3,
            at + 3,
        ),
        0x62 => (
            evex(byte(at + 1), byte(at + 2), byte(at + 4), prefixed),
            3,
            at + 4,
        ),
        0x8f if byte(at + 1) & 0x1f >= 8 => (xop(byte(at + 1) & 0x1f, prefixed), 3, at + 3),
        _ => (ONE[usize::from(opcode)], 1, at),
    };
    let mut end = opcode_at + 1;
    let modrm = byte(end);
    if form & M != 0 {
        end += 1 + operand(modrm, byte(end + 1), form);
    }
    let reads = form & TEST == 0 || modrm >> 3 & 7 < 2;
    end += if reads {
        immediate(form, word && !wide, short, wide)
    } else {
        0
    };
    let kind = match form {
        _ if end > LONGEST || form & NO_CODE != 0 => Kind::NoCode,
        _ if code.starts_with(&[0, 0]) => Kind::NoCode,
        _ if form & COMMON != 0 => Kind::Common,
        _ if form & GROUP != 0 => group_kind(map, byte(opcode_at), modrm),
        _ => Kind::Ordinary,
    };
    Length {
        bytes: end.min(LONGEST) as u8,
        kind,
    }
}

/// What ModRM brings along: SIB and displacement.
fn operand(modrm: u8, sib: u8, form: Form) -> usize {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    if mode == 3 || form & REGISTER != 0 {
        return 0;
    }
    let has_sib = rm == 4;
    let displacement = match mode {
        0 if rm == 5 || has_sib && sib & 7 == 5 => 4,
        0 => 0,
        1 => 1,
        _ => 4,
    };
    usize::from(has_sib) + displacement
}

fn immediate(form: Form, word: bool, short: bool, wide: bool) -> usize {
    let z = if word { 2 } else { 4 };
    let mut bytes = 0;
    for (bit, size) in [
        (IMM8, 1),
        (IMM16, 2),
        (IMMZ, z),
        (REL32, 4),
        (MOFFS, if short { 4 } else { 8 }),
        (IMMV, if wide { 8 } else { z }),
    ] {
        bytes += if form & bit != 0 { size } else { 0 };
    }
    bytes
}

/// What follows an opcode behind 0f; some are SSE4A's with a prefix, and VMREAD and VMWRITE without.
fn of_two(opcode: u8, prefixed: bool) -> Form {
    match opcode {
        0x78 if prefixed => M | IMM16,
        0x79 if prefixed => M,
        _ => TWO[usize::from(opcode)],
    }
}

/// What follows an opcode of the maps 0f (1), 0f 38 (2), 0f 3a (3) and EVEX's 5 and 6 where the kind is not asked.
fn of_map(map: u8, opcode: u8) -> Form {
    match map {
        1 => TWO[usize::from(opcode)] & (M | IMM8),
        2 | 5 | 6 => M,
        3 | 4 => M | IMM8,
        _ => NO_CODE,
    }
}

fn vector(map: u8, opcode: u8, prefixed: bool) -> Form {
    match map {
        _ if prefixed => NO_CODE,
        1 if opcode == 0x77 => 0,
        1 => of_map(1, opcode) | M,
        2 | 3 => of_map(map, opcode),
        _ => NO_CODE,
    }
}

fn evex(first: u8, second: u8, opcode: u8, prefixed: bool) -> Form {
    match first & 7 {
        _ if prefixed || first & 8 != 0 || second & 4 == 0 => NO_CODE,
        1 => of_map(1, opcode) | M,
        map @ (2 | 3 | 5 | 6) => of_map(map, opcode),
        _ => NO_CODE,
    }
}

fn xop(map: u8, prefixed: bool) -> Form {
    match map {
        _ if prefixed => NO_CODE,
        8 => M | IMM8,
        9 => M,
        10 => M | REL32,
        _ => NO_CODE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    /// Whether there is nothing to say against the length.
    fn is_right(code: &[u8]) -> bool {
        let i = Decoder::new(64, code, DecoderOptions::NONE).decode();
        let ours = decode(code);
        i.is_invalid() || ours.kind == Kind::NoCode || usize::from(ours.bytes) == i.len()
    }

    const PREFIXES: [&[u8]; 12] = [
        &[],
        &[0x66],
        &[0x67],
        &[0xf3],
        &[0xf2],
        &[0x48],
        &[0x41],
        &[0x66, 0x48],
        &[0xf3, 0x4c],
        &[0x48, 0x66],
        &[0x64, 0x67, 0xf3],
        &[0x2e, 0x66, 0x41],
    ];

    /// Every opcode of these maps with some prefixes and every ModRM.
    fn every(escape: &[u8], mut with: impl FnMut(&[u8])) {
        for prefix in PREFIXES {
            for (opcode, modrm) in (0..=0xffffu32).map(|n| ((n >> 8) as u8, n as u8)) {
                let mut code = [prefix, escape, &[opcode, modrm, 0x25, 0x81]].concat();
                code.extend([0x11; 12]);
                with(&code);
            }
        }
    }

    #[test]
    fn lengths_are_the_full_decoders() {
        let vex: [&[u8]; 8] = [
            &[0xc5, 0xf9],
            &[0xc5, 0xfc],
            &[0xc4, 0xe1, 0xf9],
            &[0xc4, 0xe2, 0x7d],
            &[0xc4, 0xe3, 0x7d],
            &[0x62, 0xf1, 0x7d, 0x48],
            &[0x62, 0xf2, 0xfd, 0x28],
            &[0x62, 0xf3, 0x7d, 0x48],
        ];
        for escape in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]]
            .into_iter()
            .chain(vex)
        {
            every(escape, |code| assert!(is_right(code), "{code:x?}"));
        }
    }

    /// The other way round, what is undefined with some prefix only is code here.
    #[test]
    fn what_is_no_code_is_none_to_the_full_decoder() {
        /// PadLock, of processors that Doppel does not run on.
        const OTHERS: [u8; 2] = [0xa6, 0xa7];
        let mut count = 0;
        for escape in [&[][..], &[0x0f]] {
            every(escape, |code| {
                if decode(code).kind != Kind::NoCode {
                    return;
                }
                let i = Decoder::new(64, code, DecoderOptions::NONE).decode();
                let opcode = code.iter().position(|b| *b == 0x0f).map(|at| code[at + 1]);
                let other = opcode.is_some_and(|o| OTHERS.contains(&o));
                let zeros = code.starts_with(&[0, 0]);
                assert!(
                    i.is_invalid() || i.is_privileged() || zeros || other,
                    "{code:x?}"
                );
                count += 1;
            });
        }
        assert!(count > 100_000, "{count}");
    }

    #[test]
    fn common_ones_are_the_full_decoders() {
        use Mnemonic::{Clzero, Cpuid, Femms, Mcommit, Monitorx, Mwaitx, Vmgexit};
        use Mnemonic::{
            Lar, Lsl, Rdpid, Rdpkru, Rdpru, Rdseed, Rdtscp, Sgdt, Sidt, Sldt, Smsw, Str, Sysenter,
        };
        use Mnemonic::{Serialize, Verr, Verw, Vmcall, Vmmcall, Wrpkru, Xgetbv};
        use Mnemonic::{Xabort, Xbegin, Xresldtrk, Xsusldtrk};
        let descriptors = [Lar, Lsl, Sysenter, Verr, Verw, Sgdt, Sidt, Sldt, Smsw, Str];
        let others = [
            Cpuid, Vmcall, Vmmcall, Rdpid, Rdseed, Rdpkru, Wrpkru, Rdtscp, Rdpru, Xgetbv,
        ];
        let amd = [Clzero, Femms, Mcommit, Monitorx, Mwaitx, Vmgexit];
        let transactions = [Xbegin, Xabort, Xsusldtrk, Xresldtrk, Serialize];
        let common = [&descriptors[..], &others, &amd, &transactions].concat();
        let mut count = 0;
        for escape in [&[][..], &[0x0f]] {
            every(escape, |code| {
                let is_common = |code: &[u8]| {
                    let mut decoder = Decoder::new(64, code, DecoderOptions::NO_INVALID_CHECK);
                    common.contains(&decoder.decode().mnemonic())
                };
                count += u32::from(is_common(code));
                if decode(code).kind == Kind::Common {
                    // A prefix may make another of it, or nothing; and one of them needs one.
                    let is_opcode = |b: &u8| matches!(b, 0x0f | 0xc6 | 0xc7);
                    let opcode = &code[code.iter().position(is_opcode).unwrap()..];
                    let suspends = opcode.starts_with(&[0x0f, 0x01, 0xe9]);
                    // 3DNow!, if its last byte is.
                    let now = opcode.starts_with(&[0x0f, 0x0f]);
                    assert!(suspends || now || is_common(opcode), "{code:x?}");
                } else {
                    assert!(!is_common(code), "{code:x?}");
                }
            });
        }
        assert!(count > 1000, "{count}");
    }

    #[test]
    fn random_bytes_are_as_long_as_the_full_decoder_says() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut bytes = [0u8; 24];
        for _ in 0..2_000_000 {
            random.fill(&mut bytes);
            assert!(is_right(&bytes), "{bytes:x?}");
        }
    }
}
