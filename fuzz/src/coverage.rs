//! Which instruction forms ran on which engine with the processor's outcome.

use std::collections::{BTreeMap, HashSet};

use iced_x86::Code;

use crate::catalogue::{Catalogue, why_not};

/// Forms by engine.
#[derive(Default)]
pub struct Coverage(BTreeMap<&'static str, HashSet<Code>>);

impl Coverage {
    /// A case ran on an engine and executed these forms.
    pub fn note(&mut self, engine: &'static str, codes: &[Code]) {
        self.0.entry(engine).or_default().extend(codes);
    }

    /// A count for each engine, the forms not reached, and those that are left out with the reason.
    pub fn report(&self, catalogue: &Catalogue) -> String {
        let mut text = String::new();
        for (engine, reached) in &self.0 {
            let missing: Vec<_> = catalogue
                .all
                .iter()
                .filter(|c| !reached.contains(c))
                .collect();
            let total = catalogue.all.len();
            text += &format!("{engine}: {} of {total} forms", total - missing.len());
            if !missing.is_empty() {
                text += &format!("; not reached: {missing:?}");
            }
            text += "\n";
        }
        text + &left_out()
    }
}

fn left_out() -> String {
    let mut reasons: BTreeMap<&str, Vec<Code>> = BTreeMap::new();
    let user = |c: &Code| c.op_code().mode64() && c.op_code().cpl3();
    for code in Code::values().filter(user) {
        if let Some(reason) = why_not(code) {
            reasons.entry(reason).or_default().push(code);
        }
    }
    let line = |(reason, codes): (&&str, &Vec<Code>)| format!("left out, {reason}: {codes:?}\n");
    reasons.iter().map(line).collect()
}
