//! Translated code: a kernel whose parts an input's words choose runs on the interpreter and on the translator, and must come out alike (`fuzz/src/kernel`).
//!
//! A word is what a part is drawn from, so what reached something new is kept part by part: the fuzzer changes, leaves out and joins steps of kernels.
//! Direct execution is left to the campaign of `cargo xtask fuzz kernels`, since nobody sees what its children reach.

use doppel_fuzz::kernel::campaign::{self, Rig, Verdict};
use doppel_fuzz::kernel::case::Case;

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "kernels",
    longest: WORD * (1 + MOST),
    words: &[],
    seeds,
    open,
};

const WORD: usize = size_of::<u64>();
/// Steps.
const MOST: usize = 10;

fn open() -> anyhow::Result<Take> {
    let mut rig = Rig::new()?;
    Ok(Box::new(move |bytes| take(&mut rig, bytes)))
}

fn take(rig: &mut Rig, bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    let kernel = choices.word();
    let mut steps = vec![choices.word()];
    while !choices.is_empty() && steps.len() < MOST {
        steps.push(choices.word());
    }
    let case = rig
        .case_of_words(kernel, &steps)
        .expect("code that encodes");
    let engine = campaign::translator_of(&case);
    let verdict = rig.check(&case, engine).expect("the translator runs");
    if let Verdict::Different(found) = verdict {
        panic!("{}", found.join("\n  ") + "\n" + &least(rig, &case, engine));
    }
}

/// The parts that it takes.
fn least(rig: &mut Rig, case: &Case, engine: &str) -> String {
    let differs = |verdict: &Verdict| matches!(verdict, Verdict::Different(_));
    let kept = campaign::least(rig, case, case.everything(), engine, differs);
    campaign::shown(rig, case, &kept, engine).unwrap_or_else(|e| e.to_string())
}

fn seeds() -> Vec<Vec<u8>> {
    let word = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let kernel = |n: u64| {
        (0..3 + n % 6)
            .flat_map(|part| word(16 * n + part))
            .collect()
    };
    (1..25).map(kernel).collect()
}
