//! What is changed in the copy of a page that the processor executes in its place (`patched`).
//!
//! Problem: a page with sensitive code is not executed directly, and one such instruction keeps the processor from all that stands beside it: Linux's vDSO asks the time by RDTSCP, and has RDPID besides; in a static program the
//! C library's start asks CPUID in the page through which every call of memcpy goes.
//! Idea: each of them becomes an undefined instruction, UD2, whose two bytes trap, and is then interpreted as the guest has it. Only the vDSO's RDTSCP stays what it is: behind it Linux leaves a NOP of two
//! bytes (RDTSCP takes the place of LFENCE and RDTSC), and in two bytes the number of the guest's processor can be put where the host's is: MOV CL, n.
//!
//! Invariants:
//! * only what is known to be an instruction is changed: a CPUID that was executed, and what decoding comes to for certain ([`Walk::is_certain`]). To take for one what is part of another instruction would
//!   change that one;
//! * a copy that still has a sensitive instruction is none;
//! * the NOP behind RDTSCP is only executed after it: no branch of the page goes to it;
//! * what RDTSCP leaves in ECX is the guest's once the MOV is executed, if the host's number has eight bits, which is looked at first (`host`). Where the
//!   processor is stopped between the two, [`Counters::is_before_number`] says so.
//!
//! Cost: a stop for each UD2, none for the vDSO's RDTSCP: clock_gettime takes 16 us without a patch where a stop takes so much, and some 30 ns with it.

use crate::hazard::{self, Hazards, TELLS_TIME, Verdict};
use crate::length::LONGEST;
use crate::patched::Code;
use crate::ways::Walk;

const CPUID: &[u8] = &[0x0f, 0xa2];
const UD2: [u8; 2] = [0x0f, 0x0b];
/// Bytes of RDTSCP.
const RDTSCP: usize = 3;
/// MOV CL, imm8.
const MOV_CL: u8 = 0xb1;

/// A copy that may be executed.
#[derive(Debug)]
pub(crate) struct Patch {
    pub code: Code,
    pub verdict: Verdict,
    pub counters: Counters,
}

/// Where an RDTSCP is executed in a copy.
#[derive(Debug, Default)]
pub(crate) struct Counters(Vec<u16>);

impl Patch {
    /// Of a page in which these CPUIDs were executed, on a processor of the guest with this number.
    pub fn of(
        page: &Code,
        executed: &[u16],
        hazards: Hazards,
        number: Option<u8>,
    ) -> Option<Patch> {
        let mut walk = Walk::new(page);
        let (mut code, mut counters) = (*page, Vec::new());
        for at in hazard::opcodes(page, hazards) {
            let tells_time = page[at..].starts_with(TELLS_TIME);
            // Where no code is before, a function begins here, or data have five such bytes.
            let unknown = tells_time && at >= LONGEST;
            if !walk.is_certain(at).unwrap_or(unknown) {
                continue;
            }
            let number = number.filter(|_| tells_time && !is_target(page, at + RDTSCP, &mut walk));
            match number {
                Some(number) => {
                    code[at + RDTSCP..at + TELLS_TIME.len()].copy_from_slice(&[MOV_CL, number]);
                    counters.push(at as u16);
                }
                None => code[at..at + UD2.len()].copy_from_slice(&UD2),
            }
        }
        for at in executed.iter().map(|at| usize::from(*at)) {
            if page[at..].starts_with(CPUID) {
                code[at..at + UD2.len()].copy_from_slice(&UD2);
            }
        }
        let verdict = hazard::verdict_without(&code, &counters, hazards);
        let counters = Counters(counters);
        let patch = Patch {
            code,
            verdict,
            counters,
        };
        (code != *page && verdict != Verdict::Sensitive).then_some(patch)
    }

    /// Code that is no copy of any.
    pub fn as_is(code: Code) -> Patch {
        Patch {
            code,
            verdict: Verdict::Harmless,
            counters: Counters::default(),
        }
    }
}

impl Counters {
    /// Whether there are any, so that the number of the processor is part of the copy.
    pub fn any(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether this is right behind an RDTSCP, where ECX is the host's yet.
    pub fn is_before_number(&self, at: u16) -> bool {
        let counter = at.checked_sub(RDTSCP as u16);
        counter.is_some_and(|counter| self.0.contains(&counter))
    }
}

/// Whether code of the page branches to the byte.
fn is_target(page: &Code, to: usize, walk: &mut Walk) -> bool {
    let target = |at: usize| match page[at..] {
        [0x70..=0x7f | 0xe0..=0xe3 | 0xeb, short, ..] => {
            Some(at + 2).zip(Some(i32::from(short as i8)))
        }
        [0xe8 | 0xe9, a, b, c, d, ..] => Some(at + 5).zip(Some(i32::from_le_bytes([a, b, c, d]))),
        [0x0f, 0x80..=0x8f, a, b, c, d, ..] => {
            Some(at + 6).zip(Some(i32::from_le_bytes([a, b, c, d])))
        }
        _ => None,
    };
    let branches = |at: &usize| {
        target(*at).is_some_and(|(end, by)| end.wrapping_add_signed(by as isize) == to)
    };
    (0..page.len())
        .filter(branches)
        .any(|at| walk.is_certain(at) != Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hazard::tests::{ALL, BEFORE};
    use doppel_memory::PAGE_SIZE;

    /// What is no code, wherever it begins.
    const DATA: &[u8] = &[0x06];

    /// A page with this behind code that fills it to the byte, or behind zeros.
    fn page(before: &[u8], at: usize, code: &[u8]) -> Code {
        let mut page = [0; PAGE_SIZE as usize];
        let mut filled = 0;
        while !before.is_empty() && filled + before.len() <= at {
            page[filled..filled + before.len()].copy_from_slice(before);
            filled += before.len();
        }
        if !before.is_empty() {
            page[filled..at].fill(0x90);
        }
        page[at..at + code.len()].copy_from_slice(code);
        page[at + code.len()] = 0xc3;
        page
    }

    /// The bytes that are changed, and to what.
    fn changes(page: &Code, number: Option<u8>) -> Option<Vec<(usize, u8)>> {
        let patch = Patch::of(page, &[], ALL, number)?;
        let changed = patch.code.iter().zip(page).enumerate();
        let changed = changed.filter(|(_, (new, old))| new != old);
        Some(changed.map(|(at, (new, _))| (at, *new)).collect())
    }

    #[test]
    fn what_is_an_instruction_for_certain_traps_in_the_copy() {
        let codes: [&[u8]; 6] = [
            &[0x0f, 0xa2],       // cpuid
            &[0x0f, 0x01, 0xd0], // xgetbv
            &[0x0f, 0x01, 0xf9], // rdtscp
            &[0x0f, 0x03, 0xc1], // lsl eax, ecx
            &[0x0f, 0x01, 0xee], // rdpkru
            &[0x0f, 0xae, 0x27], // xsave [rdi]
        ];
        for code in codes {
            for at in [50, 200, 2000] {
                let page = page(BEFORE, at, code);
                assert_eq!(
                    changes(&page, Some(3)),
                    Some(vec![(at + 1, UD2[1])]),
                    "{code:x?}"
                );
            }
        }
        // RDPID EAX, whose opcode is behind a prefix; XBEGIN.
        let rdpid = page(BEFORE, 2000, &[0xf3, 0x0f, 0xc7, 0xf8]);
        assert_eq!(changes(&rdpid, None), Some(vec![(2002, UD2[1])]));
        let xbegin = page(BEFORE, 2000, &[0xc7, 0xf8, 1, 0, 0, 0]);
        let ud2 = vec![(2000, UD2[0]), (2001, UD2[1])];
        assert_eq!(changes(&xbegin, None), Some(ud2));
    }

    #[test]
    fn what_might_be_part_of_something_else_stays() {
        // Nothing tells.
        assert_eq!(changes(&page(&[], 2000, &[0x0f, 0xa2]), None), None);
        // ADD EAX, imm32, again and again: decoding never falls into step.
        let ambiguous = [0x05; 200];
        assert_eq!(changes(&page(&ambiguous, 2000, &[0x0f, 0xa2]), None), None);
        // CALL, over CPUID.
        let call = [0xe8, 0x0f, 0xa2, 0x10, 0xff];
        assert_eq!(changes(&page(BEFORE, 2000, &call), None), None);
        // AND ECX, 15; ADD ECX, EDI; XCHG AX, AX.
        let and_add = [0x83, 0xe1, 0x0f, 0x01, 0xf9, 0x66, 0x90];
        for at in [40, 200, 2000] {
            assert_eq!(changes(&page(BEFORE, at, &and_add), Some(3)), None);
        }
    }

    #[test]
    fn the_time_is_told_with_the_guests_number() {
        for (before, at) in [(BEFORE, 2000), (BEFORE, 100), (DATA, 2000), (DATA, 15)] {
            let page = page(before, at, TELLS_TIME);
            let number = vec![(at + 3, MOV_CL), (at + 4, 7)];
            assert_eq!(changes(&page, Some(7)), Some(number), "{at}");
            let ud2 = vec![(at + 1, UD2[1])];
            assert_eq!(changes(&page, None), Some(ud2), "no number: {at}");
            let patch = Patch::of(&page, &[], ALL, Some(7)).unwrap();
            let behind = (0..PAGE_SIZE as u16).filter(|at| patch.counters.is_before_number(*at));
            assert_eq!(behind.collect::<Vec<_>>(), [at as u16 + 3]);
            assert!(patch.counters.any());
        }
        for (before, at) in [(DATA, 14), (&[][..], 2000)] {
            let page = page(before, at, TELLS_TIME);
            assert_eq!(
                changes(&page, Some(7)),
                None,
                "it may be part of another: {at}"
            );
            assert_ne!(hazard::verdict(&page, ALL), Verdict::Harmless);
        }
    }

    /// What a branch comes to with another ECX must leave it as it is.
    #[test]
    fn a_nop_that_is_branched_to_stays() {
        // The branch, and where its displacement is.
        let branches: [(&[u8], usize); 3] = [
            (&[0x75, 0xfa], 1),
            (&[0xe9, 0xf7, 0xff, 0xff, 0xff], 1),
            (&[0x0f, 0x85, 0xf6, 0xff, 0xff, 0xff], 2),
        ];
        for (branch, displacement) in branches {
            // INC EAX is between.
            let mut code = [TELLS_TIME, &[0xff, 0xc0], branch].concat();
            let to_nop = page(BEFORE, 2000, &code);
            assert_eq!(changes(&to_nop, Some(7)), Some(vec![(2001, UD2[1])]));
            code[TELLS_TIME.len() + 2 + displacement] += 2;
            let behind = changes(&page(BEFORE, 2000, &code), Some(7));
            assert_eq!(behind, Some(vec![(2003, MOV_CL), (2004, 7)]));
        }
    }

    #[test]
    fn one_that_stays_keeps_the_page_from_being_executed() {
        let mut page = page(BEFORE, 2000, &[0x0f, 0xa2]);
        page[3000..3004].copy_from_slice(&[0x0f, 0x38, 0xf9, 0x07]);
        assert!(
            Patch::of(&page, &[], ALL, None).is_none(),
            "movdiri among zeros"
        );
    }
}
