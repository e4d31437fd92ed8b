//! Instructions that the guest's processor does not have, though the host's does: where user code has them.
//!
//! Problem: a guest with `--cpu x86-64-v3` on a host with AVX-512 has #UD at AVX-512 instructions; a child process executes them. Nothing that
//! an ordinary user can ask of the host's kernel or processor takes them away. Idea: as with what tells of the host (`hazard`), a page that holds one
//! is not executed directly, and the translator meets it there. Their encodings are many, so every byte of the page counts as the beginning of an
//! instruction, decoded once, from the last to the first; a byte begins one that is executed where at least half of the starts some
//! hundred bytes before lead to it.
//! Limit: that is a good guess and no proof. Code that jumps into the middle of its own instructions, or that a table hides from the
//! decoder, executes what it likes, as under hardware virtualization; it gains no right by it, and what it leaves in registers that
//! the guest's processor does not have is gone when the child stops. Cost: some 0.2 ms for each page of code that is executed directly, of guests alone
//! whose processor lacks something.

use doppel_x86::HiddenInstructions;
use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::length::LONGEST;

/// How far before an instruction the starts lie that are asked where they lead: at most, and at least where there is so much.
const STARTS: (usize, usize) = (160, 96);
/// At the beginning of a page there is less.
const LEAST: usize = 12;

/// Where a hidden instruction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Nowhere,
    /// So near to the beginning that it may be the end of one that began in the page before.
    Beginning,
    Inside,
}

/// What was decoded at every byte.
struct Decoded {
    /// Bytes to the next instruction; 0 where there is none.
    lengths: Vec<u8>,
    /// Bytes where a hidden one would begin, descending.
    hidden: Vec<usize>,
}

impl Decoded {
    fn new(code: &[u8], hidden: HiddenInstructions) -> Self {
        let mut decoded = Decoded {
            lengths: vec![0; code.len()],
            hidden: Vec::new(),
        };
        let mut i = Instruction::default();
        for start in (0..code.len()).rev() {
            let end = code.len().min(start + LONGEST);
            let mut decoder = Decoder::with_ip(64, &code[start..end], 0, DecoderOptions::NONE);
            decoder.decode_out(&mut i);
            let data = code[start..].starts_with(&[0, 0]);
            if i.is_invalid() || i.is_privileged() || data {
                continue;
            }
            decoded.lengths[start] = i.len() as u8;
            if hidden.has(&i) {
                decoded.hidden.push(start);
            }
        }
        decoded
    }

    /// True where most ways through the code before lead to the byte.
    fn leads_to(&self, at: usize) -> bool {
        let near = LEAST.max(STARTS.1.min(at / 2)).min(at);
        let first = at.saturating_sub(STARTS.0);
        let ways = (first..=at - near).filter_map(|start| self.way(start, at));
        let (mut there, mut past) = (0, 0);
        ways.for_each(|arrives| if arrives { there += 1 } else { past += 1 });
        there > 0 && there >= past
    }

    /// Whether decoding from `start` on arrives at the byte; `None` where it meets what is no code of user programs.
    fn way(&self, start: usize, at: usize) -> Option<bool> {
        let mut here = start;
        while here < at {
            match self.lengths[here] {
                0 => return None,
                length => here += usize::from(length),
            }
        }
        Some(here == at)
    }
}

/// Where the page has an instruction that the guest's processor lacks.
pub(crate) fn find(page: &[u8], hidden: HiddenInstructions) -> Where {
    if hidden.is_empty() {
        return Where::Nowhere;
    }
    let decoded = Decoded::new(page, hidden);
    let mut met = decoded.hidden.iter().filter(|at| decoded.leads_to(**at));
    match met.next() {
        Some(at) if *at >= LEAST => Where::Inside,
        Some(_) => Where::Beginning,
        None => Where::Nowhere,
    }
}

/// True where one begins at the end of a page, of which `border` bytes are at the beginning of `code`, or just behind it.
pub(crate) fn is_across(code: &[u8], border: usize, hidden: HiddenInstructions) -> bool {
    if hidden.is_empty() {
        return false;
    }
    let decoded = Decoded::new(code, hidden);
    let near = border.saturating_sub(LONGEST - 1)..border + LEAST;
    let mut met = decoded.hidden.iter().filter(|at| near.contains(at));
    met.any(|at| decoded.leads_to(*at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_x86::{CpuModel, CpuidModel, TscFrequency};

    /// Code of a usual density, without any of them.
    const BEFORE: &[u8] = &[
        0x48, 0x89, 0xe5, // mov rbp, rsp
        0x48, 0x8b, 0x47, 0x10, // mov rax, [rdi + 16]
        0x83, 0xf8, 0x05, // cmp eax, 5
        0x0f, 0x84, 0x10, 0xc5, 0xf8, 0x57, // je, with VEX in its displacement
        0xe8, 0x12, 0xc4, 0xe2, 0x00, // call
        0x41, 0xc7, 0x44, 0x24, 0x08, 0x62, 0xf1, 0x7c,
        0x48, // mov dword [r12 + 8], 0x487cf162
    ];

    const HIDDEN: &[&[u8]] = &[
        &[0x66, 0x0f, 0x38, 0x00, 0xc1],             // pshufb xmm0, xmm1
        &[0xf3, 0x0f, 0xb8, 0xc1],                   // popcnt eax, ecx
        &[0xf3, 0x0f, 0xbd, 0xc1],                   // lzcnt eax, ecx
        &[0x48, 0x0f, 0xc7, 0x0e],                   // cmpxchg16b [rsi]
        &[0xc5, 0xfd, 0xfe, 0xc1],                   // vpaddd ymm0, ymm0, ymm1
        &[0xc4, 0xe2, 0xfb, 0xf5, 0xc1],             // pdep rax, rax, rcx
        &[0x62, 0xf1, 0xfd, 0x48, 0x58, 0xc1],       // vaddpd zmm0, zmm0, zmm1
        &[0x66, 0x0f, 0x38, 0xdc, 0x44, 0x24, 0x10], // aesenc xmm0, [rsp + 16]
        &[0x0f, 0xc7, 0xf0],                         // rdrand eax
    ];

    fn hidden() -> HiddenInstructions {
        let level = CpuidModel::of(CpuModel::V1, TscFrequency::of_host(), 1);
        level
            .expect("every host is a processor of the first level")
            .hidden()
    }

    fn page(code: &[u8], at: usize) -> Vec<u8> {
        let mut page: Vec<u8> = BEFORE.iter().copied().cycle().take(4096).collect();
        // In step with what comes before.
        let at = at / BEFORE.len() * BEFORE.len();
        page[at..].fill(0x90);
        page[at..at + code.len()].copy_from_slice(code);
        page
    }

    #[test]
    fn a_hidden_instruction_is_found_wherever_it_stands() {
        for code in HIDDEN {
            for at in [0, 40, 777, 2000, 4060] {
                let found = find(&page(code, at), hidden());
                assert_ne!(found, Where::Nowhere, "{code:x?} at {at}");
                assert!(at == 0 || found == Where::Inside, "{code:x?} at {at}");
            }
            assert_eq!(
                find(&page(code, 777), HiddenInstructions::NONE),
                Where::Nowhere
            );
        }
    }

    #[test]
    fn what_is_part_of_another_instruction_is_none() {
        for at in [40, 777, 4060] {
            let found = find(&page(&[0x90], at), hidden());
            assert_eq!(found, Where::Nowhere, "{at}");
        }
    }

    #[test]
    fn one_that_goes_on_in_the_next_page_is_found_too() {
        const BORDER: usize = 64;
        for code in HIDDEN {
            for cut in 0..code.len() {
                let before: Vec<u8> = BEFORE
                    .iter()
                    .copied()
                    .cycle()
                    .take(BEFORE.len() * 4)
                    .collect();
                let whole = [&before[before.len() - BORDER + cut..], code, &[0x90; 32]].concat();
                assert!(
                    is_across(&whole, BORDER, hidden()),
                    "{code:x?} cut at {cut}"
                );
            }
        }
        assert!(!is_across(&[0x90; 96], BORDER, hidden()));
    }
}
