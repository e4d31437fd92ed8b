//! From a program that fails to one in which no instruction can be left out.

use crate::program::Program;

/// Leaves out instructions as long as `fails` says that what is left still does.
pub fn minimize(program: &Program, mut fails: impl FnMut(&Program) -> bool) -> Program {
    let mut best = program.clone();
    loop {
        let before = best.items.len();
        for n in (0..before).rev() {
            let candidate = best.without(n);
            if fails(&candidate) {
                best = candidate;
            }
        }
        for n in 0..best.items.len() {
            let mut candidate = best.clone();
            candidate.items[n].prefix.clear();
            if !best.items[n].prefix.is_empty() && fails(&candidate) {
                best = candidate;
            }
        }
        if best.items.len() == before {
            return best;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Item;
    use iced_x86::{Code, Instruction};

    #[test]
    fn what_does_not_matter_goes_and_labels_follow() {
        let plain = |code| Item::plain(Instruction::with(code));
        let mut jump = Item::plain(Instruction::with_branch(Code::Jmp_rel8_64, 0).unwrap());
        jump.label = Some(0);
        let program = Program {
            items: vec![
                plain(Code::Nopd),
                jump,
                plain(Code::Clc),
                plain(Code::Nopd),
                plain(Code::Stc),
            ],
            labels: vec![4],
        };
        let has = |p: &Program, code| p.items.iter().any(|i| i.instruction.code() == code);
        let least = minimize(&program, |p| has(p, Code::Jmp_rel8_64) && has(p, Code::Stc));
        assert_eq!(least.items.len(), 2);
        assert_eq!(least.labels, [1]);
        assert_eq!(least.assemble(0x1000).unwrap(), [0xeb, 0, 0xf9, 0x0f, 0x0b]);
    }
}
