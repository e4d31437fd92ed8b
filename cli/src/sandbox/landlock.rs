//! Landlock: a thread's files, TCP ports and signals, bounded by itself for good.

use super::plan::{Plan, Right};
use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use std::fmt;

/// The newest version whose rights are known here: files, TCP, ioctls of devices, signals and abstract sockets (Linux 6.12).
const VERSION: ABI = ABI::V6;

/// How much of it the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforced {
    /// Every rule.
    Full,
    /// Those that an older kernel knows.
    Partial,
    /// None.
    None,
}

impl fmt::Display for Enforced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Enforced::Full => "Landlock: these files and no others",
            Enforced::Partial => "Landlock, as far as this kernel has it: these files and no others",
            Enforced::None => "no Landlock: this kernel has none, so that all of the user's files are within reach",
        })
    }
}

const REFUSED: &str = "the host's Landlock refuses the sandbox; --sandbox off does without";

/// Keeps signals and abstract sockets of this thread, and those that it starts from now on, among themselves. This comes before the first
/// process of the machine, which signals reach, and [`confine`] later.
///
/// # Errors
/// The kernel has Landlock but refuses the rules.
pub fn keep_apart() -> Result<Enforced> {
    let rules = || {
        let rules = Ruleset::default().scope(Scope::from_all(VERSION))?;
        rules.create()?.restrict_self()
    };
    Ok(rules().context(REFUSED)?.ruleset.into())
}

/// Binds this thread, and those that it starts from now on, to `plan`.
///
/// # Errors
/// The kernel has Landlock but refuses the rules.
pub fn confine(plan: &Plan) -> Result<Enforced> {
    let rules = || {
        let mut rules = Ruleset::default().handle_access(AccessFs::from_all(VERSION))?;
        if !plan.tcp() {
            rules = rules.handle_access(AccessNet::from_all(VERSION))?;
        }
        rules.create()
    };
    let mut rules = rules().context(REFUSED)?;
    for grant in plan.grants() {
        // What is not there cannot be opened either.
        if let Ok(file) = PathFd::new(&grant.path) {
            let rule = PathBeneath::new(file, rights(grant.right));
            // A pipe or socket by its name in /proc needs no rule, and the kernel takes none.
            let _ = (&mut rules).add_rule(rule);
        }
    }
    Ok(rules.restrict_self().context(REFUSED)?.ruleset.into())
}

impl From<RulesetStatus> for Enforced {
    fn from(status: RulesetStatus) -> Enforced {
        match status {
            RulesetStatus::FullyEnforced => Enforced::Full,
            RulesetStatus::PartiallyEnforced => Enforced::Partial,
            RulesetStatus::NotEnforced => Enforced::None,
        }
    }
}

fn rights(right: Right) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    match right {
        Right::Read => read,
        Right::Write => write,
        Right::Device => write | AccessFs::IoctlDev,
        Right::Execute => AccessFs::ReadFile | AccessFs::Execute,
        Right::All => AccessFs::from_all(VERSION) & !(AccessFs::Execute | AccessFs::IoctlDev),
    }
}
