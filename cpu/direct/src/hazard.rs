//! Instructions that neither trap in user mode nor behave there as in the guest: what must not be executed directly.
//!
//! Popek and Goldberg's theorem wants every sensitive instruction to trap; on x86 some do not, and tell user code of the host. Three kinds of them:
//!
//! * *Telling* ones, which hardly occur by chance (XSAVE, PTWRITE …): an instruction may begin at any byte, so every byte of the
//!   page counts as the beginning of one. An XSAVE does not tell where the code sets its mask right before, to components that host and guest both
//!   have: so the dynamic linker's lazy binding does it. An XRSTOR is as one: it would load the process's own PKRU.
//! * *Common* ones, whose bytes are part of other instructions (`0f 00`, `0f 02`, `0f 03`: SLDT, LSL, VERW and the like, which tell of
//!   descriptors that all 64-bit Linux systems have alike, and of the number of the processor; `0f 01 f9`: RDTSCP, which tells that too, or an AND with 15 and an ADD; XGETBV), and RDPID, which tells no more than RDTSCP: they count where decoding
//!   leads to them (`ways`).
//! * CPUID is between the two, and RDTSCP as Linux's vDSO has it. CPUID's two bytes stand by chance in 14 of the 5,059 pages of GCC's compiler proper, which comes by two of them all the time. It counts
//!   unless decoding leads past it from everywhere (stops at sensitive pages in a build of 17 files of C, all of it direct, 12.6 : 5.7 million).
//!
//! A page that holds one is not executed itself, but most often a copy can be that has something else in its place (`patch`).
//!
//! Instructions of the host's that no guest is offered are looked for in the same way, whether this host has them or not: transactions (XBEGIN,
//! XABORT, XSUSLDTRK, XRESLDTRK; XTEST says that there is none, and 38 of them are in the C library, in routines that are not chosen), AMX's LDTILECFG, STTILECFG and TILERELEASE (the rest of AMX traps in a process that has not asked for it), MOVDIRI,
//! MOVDIR64B, PTWRITE, UMONITOR, UMWAIT and TPAUSE; of AMD's CLZERO, MONITORX, MWAITX, MCOMMIT and 3DNow!. Other such instructions trap, since the host's kernel enables nothing of them.
//! VMCALL and VMMCALL would be a call of the host's own hypervisor. AMD's instructions for one (VMRUN, SKINIT, INVLPGB, PVALIDATE and their kin) trap in user mode, always.
//!
//! What goes on in the next page is looked at where both pages are executable ([`is_sensitive_across`]). A displacement that begins in the page before
//! looks like a common one at the beginning of a page; so the page before is asked, where there is one.
//!
//! Limit: code that jumps into the middle of its own instructions, or between an XSAVE and its mask, can execute one unnoticed. It learns a few bits about descriptors that it
//! could guess, the number of the host's processor, which components of extended state the host has, and what CPUID says there.
//!
//! Not here, for they trap or are the same in the guest: RDTSC (the guest's TSC is the host's), CPUID where the host makes it fault, PUSHF and POPF (user code changes and sees the same bits), reads of selectors (equal by condition), RDPMC,
//! far transfers and loads of selectors (a load that does not fault is looked at when user code stops).

use doppel_x86::HiddenInstructions;

use crate::hidden::{self, Where};
use crate::ways::{EARLY, LEAST, Share, Walk, is_prefix};

/// Which of them count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hazards {
    /// CPUID does not fault.
    pub cpuid: bool,
    /// Components of extended state in which the host's XCR0 is not what guests are offered, or a process has not what the guest has: XGETBV shows
    /// them, XSAVE stores and XRSTOR loads by them.
    pub components: u64,
    /// XGETBV tells which components are in use (ECX = 1), which on the guest's processor is #GP.
    pub in_use: bool,
    /// What the guest's processor does not have.
    pub hidden: HiddenInstructions,
}

/// What a byte 0x0f may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    Telling,
    /// Telling, unless its mask is known.
    Masked,
    /// Telling, unless all ways lead past it.
    Avoidable,
    Common,
}
use Found::{Avoidable, Common, Masked, Nothing, Telling};

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No code that must not be executed.
    Harmless,
    /// Common ones, so near to the beginning that the page before tells whether they are any ([`begins_sensitive`]).
    Early,
    /// Code that must not be executed.
    Sensitive,
}

/// Looks a page through.
pub fn verdict(page: &[u8], hazards: Hazards) -> Verdict {
    verdict_without(page, &[], hazards)
}

/// The same, but for what is known to stand at these bytes.
pub fn verdict_without(page: &[u8], known: &[u16], hazards: Hazards) -> Verdict {
    let mut verdict = Verdict::Harmless;
    for (at, found) in that_count(page, hazards) {
        match found {
            _ if known.iter().any(|known| usize::from(*known) == at) => {}
            Masked | Avoidable | Common if at < EARLY => verdict = Verdict::Early,
            _ => return Verdict::Sensitive,
        }
    }
    match hidden::find(page, hazards.hidden) {
        Where::Nowhere => verdict,
        Where::Beginning => Verdict::Early,
        Where::Inside => Verdict::Sensitive,
    }
}

/// The bytes where the opcodes of sensitive instructions begin.
pub fn opcodes(page: &[u8], hazards: Hazards) -> impl Iterator<Item = usize> {
    that_count(page, hazards).map(|(at, _)| at)
}

fn that_count(page: &[u8], hazards: Hazards) -> impl Iterator<Item = (usize, Found)> {
    let mut walk = Walk::new(page);
    suspects(page, hazards).filter(move |(at, found)| counts(&mut walk, *at, *found, hazards))
}

/// Whether what was found at the byte is to be reckoned with.
fn counts(walk: &mut Walk, at: usize, found: Found, hazards: Hazards) -> bool {
    match found {
        Nothing => false,
        Telling => true,
        Masked => walk
            .mask_before(at)
            .is_none_or(|mask| mask & hazards.components != 0),
        Avoidable => walk.leads_to(at, Share::Any),
        Common => walk.leads_to(at, Share::Half),
    }
}

/// Bytes of a page that matter to the page beside it: so many at its end, and at its beginning.
pub const AROUND: (usize, usize) = (96, 160);

/// The end of a page, and the beginning of the one behind it.
pub type Border = ([u8; AROUND.0], [u8; AROUND.1]);

/// True where such code begins at the end of a page and goes on at the beginning of another, or begins there.
pub fn is_sensitive_across(border: &Border, hazards: Hazards) -> bool {
    // Those that begin behind the border have little before them in their page.
    is_sensitive_until(LEAST, border, hazards)
}

/// True where what makes a page [`Verdict::Early`] is such code, as the end of the page before tells.
pub fn begins_sensitive(border: &Border, hazards: Hazards) -> bool {
    is_sensitive_until(EARLY, border, hazards)
}

/// Whether such code begins on the border, or up to so many bytes behind it.
fn is_sensitive_until(behind: usize, (end, beginning): &Border, hazards: Hazards) -> bool {
    let code: Vec<u8> = end.iter().chain(beginning).copied().collect();
    let around = end.len() - BEHIND_OPCODE..end.len() + behind;
    let mut walk = Walk::new(&code);
    let mut suspects = suspects(&code, hazards).filter(|(at, _)| around.contains(at));
    suspects.any(|(at, found)| counts(&mut walk, at, found, hazards))
        || hidden::is_across(&code, end.len(), hazards.hidden)
}

/// Where the last of the bytes may be that tell such an instruction.
const BEHIND_OPCODE: usize = 3;

/// What may be one, by the byte where its opcode begins.
fn suspects(code: &[u8], hazards: Hazards) -> impl Iterator<Item = (usize, Found)> {
    let last = code.len().saturating_sub(1);
    let pieces = (0..last)
        .step_by(PIECE)
        .map(move |from| from..last.min(from + PIECE));
    let pieces =
        pieces.filter(|piece| has_suspects(&code[piece.clone()], &code[piece.start + 1..]));
    let found = pieces
        .flatten()
        .map(move |at| (at, found_at(code, at, hazards)));
    found.filter(|(_, found)| *found != Nothing)
}

fn found_at(code: &[u8], at: usize, hazards: Hazards) -> Found {
    match code[at] {
        0x0f => found(code, at, hazards),
        0xc4 => when(is_of_tiles(&code[at..]), Telling),
        // XABORT and XBEGIN, C6 F8 and C7 F8.
        0xc6 | 0xc7 => when(code[at + 1] == 0xf8, Common),
        _ => Nothing,
    }
}

/// Bytes that are looked at at once.
const PIECE: usize = 64;

/// Whether there may be some: by their first two bytes, without a branch, so that a compiler looks at many at a time.
fn has_suspects(first: &[u8], second: &[u8]) -> bool {
    let pairs = first.iter().zip(second);
    pairs.fold(false, |any, (a, b)| any | may_begin_one(*a, *b))
}

/// The cases of [`found_at`] and of [`found`].
fn may_begin_one(a: u8, b: u8) -> bool {
    let low = (b < 0x04) | (b == 0x0e) | (b == 0x0f) | (b == 0x34) | (b == 0x38);
    let escaped = low | (b == 0xa2) | (b == 0xae) | (b == 0xc7);
    (a == 0x0f) & escaped | (a & 0xfe == 0xc6) & (b == 0xf8) | (a == 0xc4) & (b & 0x1f == 2)
}

/// LDTILECFG, STTILECFG, TILERELEASE: opcode 49 of VEX's map 0F 38, without W, L and another operand.
fn is_of_tiles(code: &[u8]) -> bool {
    matches!(code, [_, map, 0x78..=0x7b, 0x49, ..] if map & 0x1f == 2)
}

fn when(condition: bool, found: Found) -> Found {
    if condition { found } else { Nothing }
}

fn found(page: &[u8], at: usize, h: Hazards) -> Found {
    let byte = |n: usize| page.get(at + n).copied();
    let Some(opcode) = byte(1) else {
        return Nothing;
    };
    let has_operand = matches!(opcode, 0x00 | 0x01 | 0x38 | 0xae | 0xc7);
    let modrm = match byte(2) {
        Some(modrm) => modrm,
        None if has_operand => return Nothing,
        None => 0,
    };
    let (reg, memory) = (modrm >> 3 & 7, modrm < 0xc0);
    match opcode {
        // SLDT, STR; VERR, VERW.
        0x00 => when(matches!(reg, 0 | 1 | 4 | 5), Common),
        0x01 if matches!(modrm, 0xe8 | 0xe9) => when(may_have(page, at, 0xf2), Common),
        0x01 if page[at..].starts_with(TELLS_TIME) => Avoidable,
        0x01 => group_7(modrm, h),
        // LAR, LSL.
        0x02 | 0x03 => Common,
        // FEMMS; what else 3DNow! has.
        0x0e | 0x0f => Common,
        // SYSENTER: afterwards nobody knows where it was.
        0x34 => Common,
        0xa2 => when(h.cpuid, Avoidable),
        // MOVDIR64B, ENQCMD; MOVDIRI.
        0x38 => when(
            matches!(modrm, 0xf8 | 0xf9) && byte(3).is_none_or(|modrm| modrm < 0xc0),
            Telling,
        ),
        // PTWRITE.
        0xae if reg == 4 && may_have(page, at, 0xf3) => Telling,
        // TPAUSE, UMWAIT, UMONITOR; without a prefix, MFENCE.
        0xae if reg == 6 && !memory => {
            let waits = [0x66, 0xf2, 0xf3];
            when(waits.iter().any(|p| may_have(page, at, *p)), Telling)
        }
        // XSAVE, XRSTOR, XSAVEOPT.
        0xae => when(h.components != 0 && memory && matches!(reg, 4..=6), Masked),
        // XSAVEC; RDPID.
        0xc7 if memory => when(h.components != 0 && reg == 4, Masked),
        0xc7 => when(reg == 7 && may_have(page, at, 0xf3), Common),
        _ => Nothing,
    }
}

/// RDTSCP, and XCHG AX, AX with which Linux's vDSO fills the place of LFENCE and RDTSC.
pub(crate) const TELLS_TIME: &[u8] = &[0x0f, 0x01, 0xf9, 0x66, 0x90];

/// SGDT, SIDT, SMSW, and instructions without operands.
fn group_7(modrm: u8, h: Hazards) -> Found {
    const XGETBV: u8 = 0xd0;
    /// VMCALL, VMMCALL, RDPKRU, WRPKRU, RDTSCP, MONITORX and MCOMMIT, MWAITX, CLZERO, RDPRU.
    const OTHERS: [u8; 9] = [0xc1, 0xd9, 0xee, 0xef, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd];
    let reg = modrm >> 3 & 7;
    match modrm {
        XGETBV => when(h.components != 0 || h.in_use, Common),
        byte if OTHERS.contains(&byte) => Common,
        _ => when(reg == 4 || (modrm < 0xc0 && reg < 2), Common),
    }
}

/// Whether a prefix may stand before the opcode, with others in between.
fn may_have(page: &[u8], at: usize, prefix: u8) -> bool {
    let before = page[..at].iter().rev();
    let mut prefixes = before.take_while(|byte| is_prefix(**byte));
    let all = prefixes.clone().count() == at;
    prefixes.any(|byte| *byte == prefix) || all
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::ways::has_mask;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    pub(crate) const ALL: Hazards = Hazards {
        cpuid: true,
        components: 0x200,
        in_use: true,
        hidden: HiddenInstructions::NONE,
    };
    const NONE: Hazards = Hazards {
        cpuid: false,
        components: 0,
        in_use: false,
        hidden: HiddenInstructions::NONE,
    };

    /// Code of a usual density, without any of them.
    pub(crate) const BEFORE: &[u8] = &[
        0x48, 0x89, 0xe5, // mov rbp, rsp
        0x48, 0x8b, 0x47, 0x10, // mov rax, [rdi + 16]
        0x83, 0xf8, 0x05, // cmp eax, 5
        0x0f, 0x84, 0x10, 0x0f, 0x00, 0x00, // je, with 0f 00 in its displacement
        0xe8, 0x12, 0x0f, 0x02, 0x00, // call
        0x41, 0xc7, 0x44, 0x24, 0x08, 0x0f, 0x03, 0, 0, // mov dword [r12 + 8], 0x30f
    ];

    fn page(code: &[u8], at: usize) -> Vec<u8> {
        let mut page: Vec<u8> = BEFORE.iter().copied().cycle().take(4096).collect();
        // In step with what comes before.
        let at = at / BEFORE.len() * BEFORE.len();
        page[at..].fill(0x90);
        page[at..at + code.len()].copy_from_slice(code);
        page
    }

    #[test]
    fn two_bytes_tell_where_to_look() {
        const PREFIXES: [u8; 4] = [0x90, 0x66, 0xf2, 0xf3];
        let all = 0..=u8::MAX;
        for (first, second) in all.clone().flat_map(|a| all.clone().map(move |b| (a, b))) {
            if may_begin_one(first, second) {
                continue;
            }
            for (prefix, third) in PREFIXES
                .into_iter()
                .flat_map(|p| all.clone().map(move |t| (p, t)))
            {
                let mut code = [prefix, first, second, third, 0x49, 0x90];
                assert_eq!(found_at(&code, 1, ALL), Nothing, "{code:02x?}");
                code[4] = 0x90;
                assert_eq!(found_at(&code, 1, ALL), Nothing, "{code:02x?}");
            }
        }
    }

    const CODES: &[&[u8]] = &[
        &[0x0f, 0xa2],                         // cpuid
        &[0x0f, 0x01, 0xf9],                   // rdtscp
        &[0xf3, 0x0f, 0xc7, 0xf8],             // rdpid rax
        &[0xf3, 0x48, 0x0f, 0xc7, 0xff],       // rdpid rdi
        &[0x0f, 0x03, 0xc1],                   // lsl eax, ecx
        &[0x66, 0x0f, 0x02, 0x07],             // lar ax, [rdi]
        &[0x0f, 0x00, 0xe1],                   // verr cx
        &[0x0f, 0x00, 0x2f],                   // verw [rdi]
        &[0x0f, 0x01, 0x07],                   // sgdt [rdi]
        &[0x0f, 0x01, 0x4d, 0xf0],             // sidt [rbp - 16]
        &[0x0f, 0x00, 0xc0],                   // sldt eax
        &[0x0f, 0x00, 0xc8],                   // str eax
        &[0x0f, 0x01, 0xe0],                   // smsw eax
        &[0x0f, 0x34],                         // sysenter
        &[0x0f, 0x01, 0xd0],                   // xgetbv
        &[0x0f, 0xae, 0x27],                   // xsave [rdi]
        &[0x0f, 0xae, 0x37],                   // xsaveopt [rdi]
        &[0x48, 0x0f, 0xc7, 0x64, 0x24, 0x40], // xsavec64 [rsp + 64]
        &[0x0f, 0xae, 0x6c, 0x24, 0x40],       // xrstor [rsp + 64]
        &[0x0f, 0x01, 0xee],                   // rdpkru
        &[0x0f, 0x01, 0xef],                   // wrpkru
        &[0x0f, 0x01, 0xc1],                   // vmcall
        &[0x0f, 0x01, 0xd9],                   // vmmcall
        &[0xf3, 0x0f, 0x01, 0xd9],             // vmgexit
        &[0x0f, 0x01, 0xfa],                   // monitorx
        &[0xf3, 0x0f, 0x01, 0xfa],             // mcommit
        &[0x0f, 0x01, 0xfb],                   // mwaitx
        &[0x0f, 0x01, 0xfc],                   // clzero
        &[0x0f, 0x01, 0xfd],                   // rdpru
        &[0x0f, 0x0e],                         // femms
        &[0x0f, 0x0f, 0xc1, 0x9e],             // pfadd mm0, mm1
        &[0xf3, 0x0f, 0xae, 0xf7],             // umonitor rdi
        &[0xf2, 0x0f, 0xae, 0xf0],             // umwait eax
        &[0x66, 0x41, 0x0f, 0xae, 0xf0],       // tpause r8d
        &[0xc7, 0xf8, 0x10, 0, 0, 0],          // xbegin
        &[0xc6, 0xf8, 0x07],                   // xabort 7
        &[0xf2, 0x0f, 0x01, 0xe8],             // xsusldtrk
        &[0xf2, 0x0f, 0x01, 0xe9],             // xresldtrk
        &[0xc4, 0xe2, 0x78, 0x49, 0x07],       // ldtilecfg [rdi]
        &[0xc4, 0xc2, 0x79, 0x49, 0x04, 0x24], // sttilecfg [r12]
        &[0xc4, 0xe2, 0x78, 0x49, 0xc0],       // tilerelease
        &[0x48, 0x0f, 0x38, 0xf9, 0x07],       // movdiri [rdi], rax
        &[0x66, 0x0f, 0x38, 0xf8, 0x07],       // movdir64b rax, [rdi]
        &[0xf3, 0x48, 0x0f, 0xae, 0xe0],       // ptwrite rax
    ];

    #[test]
    fn every_one_of_them_is_found_wherever_it_stands() {
        for code in CODES {
            for at in [0, 40, 777, 2000, 4060] {
                let verdict = verdict(&page(code, at), ALL);
                assert_ne!(verdict, Verdict::Harmless, "{code:x?} at {at}");
                assert!(
                    at < EARLY || verdict == Verdict::Sensitive,
                    "{code:x?} at {at}"
                );
            }
        }
    }

    /// ADD EAX with an immediate of four such opcodes: decoding never falls into step, and one way of five leads to what follows.
    #[test]
    fn cpuid_counts_if_any_way_leads_to_it() {
        let of = |code: &[u8]| verdict(&page(&[&[0x05; 200], code].concat(), 2000), ALL);
        assert_eq!(of(&[0x0f, 0xa2, 0x31, 0xc0, 0xc3]), Verdict::Sensitive);
        let xgetbv = [0x0f, 0x01, 0xd0, 0x31, 0xc0, 0xc3];
        assert_eq!(of(&xgetbv), Verdict::Harmless, "most ways count");
    }

    #[test]
    fn xgetbv_counts_where_it_tells_more_than_the_guests() {
        let of = |hazards| verdict(&page(&[0x0f, 0x01, 0xd0], 2000), hazards);
        assert_eq!(of(NONE), Verdict::Harmless);
        let in_use = true;
        assert_eq!(of(Hazards { in_use, ..NONE }), Verdict::Sensitive);
    }

    #[test]
    fn one_that_goes_on_in_the_next_page_is_found() {
        for code in CODES {
            let is_opcode = |b: &u8| matches!(b, 0x0f | 0xc4 | 0xc6 | 0xc7);
            let opcode = code.iter().position(is_opcode).unwrap();
            let needed = match (code[opcode], code[opcode + 1]) {
                (0xc6 | 0xc7, _) | (0x0f, 0x02 | 0x03 | 0x0e | 0x0f | 0x34 | 0xa2) => 2,
                (0x0f, _) => 3,
                _ => 4,
            };
            for cut in opcode + 1..opcode + needed {
                let before: Vec<u8> = BEFORE
                    .iter()
                    .copied()
                    .cycle()
                    .take(BEFORE.len() * 4)
                    .collect();
                let whole = [
                    &before[before.len() - AROUND.0 + cut..],
                    code,
                    &[0x90; AROUND.1],
                ]
                .concat();
                let (end, beginning) = whole.split_at(AROUND.0);
                let border = (
                    end.try_into().unwrap(),
                    beginning[..AROUND.1].try_into().unwrap(),
                );
                assert!(is_sensitive_across(&border, ALL), "{code:x?} cut at {cut}");
            }
        }
        assert!(!is_sensitive_across(
            &([0x90; AROUND.0], [0x90; AROUND.1]),
            ALL
        ));
    }

    #[test]
    fn others_are_not() {
        let codes: &[&[u8]] = &[
            &[0x90],
            &[0x0f, 0x31],                                     // rdtsc
            &[0x0f, 0x05],                                     // syscall
            &[0x0f, 0x0b],                                     // ud2
            &[0x0f, 0xaf, 0xc1],                               // imul
            &[0x0f, 0x84, 1, 2, 3, 4],                         // je
            &[0x0f, 0xc7, 0x0f],                               // cmpxchg8b
            &[0x0f, 0xc7, 0xf8],                               // rdseed
            &[0x0f, 0xae, 0xf8],                               // sfence
            &[0x0f, 0xae, 0xf0],                               // mfence
            &[0x0f, 0xae, 0x3f],                               // clflush
            &[0x0f, 0x38, 0xf9, 0xff], // movdiri of a register, which is undefined
            &[0x0f, 0x01, 0x17],       // lgdt, which traps
            &[0x0f, 0x01, 0xd6],       // xtest
            &[0x0f, 0x01, 0xe8],       // serialize
            &[0x89, 0xc7, 0xf8, 0xf5], // mov edi, eax; clc; cmc
            &[0xc7, 0x45, 0xf8, 0xc7, 0xf8, 0, 0], // mov dword [rbp - 8], 0xf8c7
            &[0xf3, 0x0f, 0xae, 0xd0], // wrfsbase eax
            &[0xe8, 0x0f, 0xa2, 0x10, 0xff], // call, over CPUID
            &[0x48, 0x8b, 0x3d, 0x4a, 0x0f, 0xa2, 0x01], // mov rdi, [rip + 0x1a20f4a]
            &[0x83, 0xe2, 0x0f, 0x01, 0xd0, 0x0f, 0xbe, 0xc0], // and edx, 15; add eax, edx
            &[0x83, 0xe1, 0x0f, 0x01, 0xf9, 0x0f, 0xbe, 0xc0], // and ecx, 15; add ecx, edi
        ];
        for code in codes {
            assert_eq!(
                verdict(&page(code, 2000), ALL),
                Verdict::Harmless,
                "{code:x?}"
            );
        }
        for code in [
            &[0x0f, 0xa2, 0x90][..],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0xae, 0x27],
        ] {
            assert_eq!(verdict(&page(code, 100), NONE), Verdict::Harmless);
        }
    }

    /// As glibc's dynamic linker has it.
    fn lazy_binding(mask: &[u8], between: &[u8]) -> Vec<u8> {
        let store = [0x48, 0x89, 0x94, 0x24, 0x50, 0x02, 0x00, 0x00]; // mov [rsp + 0x250], rdx
        let xsavec = [0x0f, 0xc7, 0x64, 0x24, 0x40]; // xsavec [rsp + 0x40]
        [mask, &store, &store, between, &xsavec].concat()
    }

    #[test]
    fn a_save_whose_mask_is_known_tells_nothing_but_what_it_masks() {
        let known = [0xb8, 0xee, 0, 0, 0, 0x31, 0xd2]; // mov eax, 0xee; xor edx, edx
        let more = [0xb8, 0xee, 0x02, 0, 0, 0x31, 0xd2];
        let half = [0xb8, 0xee, 0, 0, 0, 0x89, 0xc2]; // mov edx, eax
        let of =
            |mask: &[u8], between: &[u8]| verdict(&page(&lazy_binding(mask, between), 2000), ALL);
        assert_eq!(of(&known, &[]), Verdict::Harmless);
        assert_eq!(
            of(&more, &[]),
            Verdict::Sensitive,
            "a component that differs"
        );
        assert_eq!(of(&half, &[]), Verdict::Sensitive, "an unknown half");
        assert_eq!(of(&known, &[0xff, 0xc0]), Verdict::Sensitive, "inc eax");
        assert_eq!(of(&known, &[0xff, 0xd1]), Verdict::Sensitive, "call rcx");
        assert_eq!(of(&known, &[0x75, 0x02]), Verdict::Sensitive, "jne");
        // mov dword [rsp], 0x2464c70f: no save, unless somebody jumps into it.
        let inside = [&known[..], &[0xc7, 0x04, 0x24, 0x0f, 0xc7, 0x64, 0x24]].concat();
        assert_eq!(verdict(&page(&inside, 2000), ALL), Verdict::Sensitive);
    }

    #[test]
    fn what_begins_a_page_is_judged_by_the_page_before() {
        let second = page(&[0x0f, 0x02, 0x00, 0x00, 0x90, 0x90], 0);
        assert_eq!(verdict(&second, ALL), Verdict::Early);
        let mut border: Border = ([0x90; AROUND.0], second[..AROUND.1].try_into().unwrap());
        assert!(is_sensitive_across(&border, ALL), "lar rax, [rax]");
        assert!(begins_sensitive(&border, ALL), "lar rax, [rax]");
        border.0[AROUND.0 - 2..].copy_from_slice(&[0x0f, 0x84]);
        assert!(!is_sensitive_across(&border, ALL), "je");
        assert!(!begins_sensitive(&border, ALL), "je");
    }

    /// The page of GCC's compiler proper that was taken for one: few starts lie before, and half of them lead to SLDT.
    #[test]
    fn what_lies_near_the_beginning_of_a_page_is_judged_by_the_page_before() {
        let before = [
            0xb6, 0x40, 0x02, 0x3c, 0x10, 0x74, 0x15, 0x3c, 0x0f, // ... cmp al, 15
            0x0f, 0x85, 0x83, 0xf3, 0xff, 0xff, // jne
            0x80, 0x3d, 0x5d, 0x9d, 0xe2, 0x00, 0x00, // cmp byte [rip + 0xe29d5d], 0
            0x0f, 0x84, 0x0e, 0x05, 0x00, 0x00, // je
            0x5b, 0x48, 0x89, 0xef, // pop rbx; mov rdi, rbp
            0xbe, 0x60, 0x0c, 0x4a, 0x02, // mov esi, 0x24a0c60
            0x5d, 0x41, 0x5c, 0x41, 0x5d, 0xe9, 0x88, 0xd1, 0xc4, 0xff, // pops; jmp
            0x4c, 0x89, 0xe7, 0xe8, 0x80, 0xd1, 0xe9, 0xff, // mov rdi, r12; call
        ];
        let code = [
            0x83, 0xf8, 0x06, 0x0f, 0x87, 0xc6, 0xdb, 0xff, 0xff, // cmp eax, 6; ja
            0x89, 0xc0, 0xff, 0x24, 0xc5, 0xe8, 0xbd, 0x05, 0x02, // jmp [rax * 8 + 0x205bde8]
            0xbe, 0x0f, 0x00, 0x00, 0x00, 0x4c, 0x89, 0xe7, // mov esi, 15; mov rdi, r12
            0xe8, 0x71, 0xd2, 0xe9, 0xff, 0x85, 0xc0, 0x0f, 0x85, 0xa8, 0xdb, 0xff, 0xff,
        ];
        let (second, first) = (page(&code, 0), [&[0x90; AROUND.0][..], &before].concat());
        let border = |beginning: &[u8]| {
            let end = first[before.len()..].try_into().unwrap();
            (end, beginning[..AROUND.1].try_into().unwrap())
        };
        assert_eq!(verdict(&second, ALL), Verdict::Early);
        assert!(!begins_sensitive(&border(&second), ALL));
        let lar = page(
            &[&[0x90; 40][..], &[0x0f, 0x02, 0x00], &[0x90; 40]].concat(),
            0,
        );
        assert_eq!(verdict(&lar, ALL), Verdict::Early);
        assert!(begins_sensitive(&border(&lar), ALL));
    }

    #[test]
    fn a_mask_may_be_set_in_the_page_before() {
        let known = [0xb8, 0xee, 0, 0, 0, 0x31, 0xd2]; // mov eax, 0xee; xor edx, edx
        let half = [0xb8, 0xee, 0, 0, 0, 0x89, 0xc2]; // mov edx, eax
        for (mask, is_sensitive) in [(known, false), (half, true)] {
            let second = page(&lazy_binding(&[], &[]), 0);
            assert_eq!(verdict(&second, ALL), Verdict::Early);
            let mut border: Border = ([0x90; AROUND.0], second[..AROUND.1].try_into().unwrap());
            border.0[AROUND.0 - mask.len()..].copy_from_slice(&mask);
            assert_eq!(begins_sensitive(&border, ALL), is_sensitive);
        }
    }

    fn is_common(mnemonic: Mnemonic) -> bool {
        use Mnemonic::{Lar, Lsl, Sgdt, Sidt, Sldt, Smsw, Str, Sysenter, Verr, Verw};
        matches!(
            mnemonic,
            Lar | Lsl | Sysenter | Verr | Verw | Sgdt | Sidt | Sldt | Smsw | Str
        )
    }

    /// What the decoder knows by name.
    fn is_one(mnemonic: Mnemonic) -> bool {
        use Mnemonic::{Clzero, Femms, Mcommit, Monitorx, Mwaitx, Tpause, Umonitor, Umwait};
        use Mnemonic::{Cpuid, Rdpid, Rdpkru, Rdpru, Rdtscp, Vmcall, Vmmcall, Wrpkru, Xgetbv};
        use Mnemonic::{Movdir64b, Movdiri, Ptwrite, Vmgexit, Xresldtrk, Xsusldtrk};
        let telling = [
            Cpuid, Rdpid, Rdpkru, Rdpru, Rdtscp, Vmcall, Vmmcall, Wrpkru, Xgetbv, Movdir64b,
            Movdiri, Ptwrite, Xresldtrk, Xsusldtrk, Vmgexit, Clzero, Femms, Mcommit, Monitorx,
            Mwaitx, Tpause, Umonitor, Umwait,
        ];
        telling.contains(&mnemonic) || has_mask(mnemonic) || is_common(mnemonic)
    }

    #[test]
    fn whatever_opcode_the_decoder_takes_for_one_is_found() {
        let prefixes: [&[u8]; 8] = [
            &[],
            &[0x66],
            &[0xf3],
            &[0xf2],
            &[0x48],
            &[0xf3, 0x48],
            &[0x66, 0xf3],
            &[0xf3, 0x2e, 0x41],
        ];
        let mut count = 0;
        for prefix in prefixes {
            for (opcode, modrm) in (0..=0xffffu32).map(|n| ((n >> 8) as u8, n as u8)) {
                let mut code = vec![0x90; 64];
                code.extend(prefix);
                let at = code.len();
                code.extend([0x0f, opcode, modrm]);
                code.extend([0; 12]);
                let instruction = Decoder::new(64, &code[64..], DecoderOptions::NONE).decode();
                if is_one(instruction.mnemonic()) {
                    count += 1;
                    let found = found(&code, at, ALL);
                    let counts = counts(&mut Walk::new(&code), at, found, ALL);
                    assert!(counts, "{:x?}", &code[64..]);
                }
            }
        }
        assert!(count > 1000, "{count}");
    }
}
