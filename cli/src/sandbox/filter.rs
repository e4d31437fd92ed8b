//! From the table of system calls to a filter for each kind of thread.

use super::calls::{DENIED, FREQUENT, GROUPS, Group, Need, Test};
use anyhow::{Context, Result};
use doppel_seccomp::{Filters, Kind, Program};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use syscalls::Sysno;

/// The tests of each call's arguments, one of which has to hold; none where there is nothing to test.
pub type Permitted = BTreeMap<Sysno, Vec<Test>>;

/// What a thread of `kind` may call in a machine with these needs.
#[must_use]
pub fn permitted(kind: Kind, needs: &[Need]) -> Permitted {
    let all = kind == Kind::Control;
    let applies =
        |group: &&Group| needs.contains(&group.need) && (all || group.kinds.contains(&kind));
    let groups = || GROUPS.iter().filter(applies);
    let mut permitted = Permitted::new();
    for (call, test) in groups().flat_map(|group| group.tested) {
        permitted.entry(*call).or_default().push(*test);
    }
    for call in groups().flat_map(|group| group.calls) {
        permitted.insert(*call, Vec::new());
    }
    permitted
}

/// The filters of a machine with these needs.
///
/// # Errors
/// The table makes no sense as a filter.
pub fn filters(needs: &[Need]) -> Result<Filters> {
    let program = |kind: &Kind| Ok((*kind, program(&permitted(*kind, needs))?));
    Ok(Filters::new(
        Kind::ALL.iter().map(program).collect::<Result<_>>()?,
    ))
}

/// A refused call raises SIGSYS. It must not kill by itself: a child of `direct` is under this filter and one of its own, of whose answers the
/// stricter counts, and its own makes a signal of each system call of the guest's.
fn program(permitted: &Permitted) -> Result<Program> {
    let rules = permitted
        .iter()
        .map(|(call, tests)| Ok((i64::from(call.id()), rules(tests)?)));
    let filter = SeccompFilter::new(
        rules.collect::<Result<_>>()?,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .context("a filter of system calls")?;
    let rest: Program = filter.try_into().context("a filter of system calls")?;
    let mut program = head(permitted);
    program.extend(rest);
    Ok(program)
}

fn rules(tests: &[Test]) -> Result<Vec<SeccompRule>> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let rule = |test: &Test| {
        let (argument, operator, value) = match *test {
            Test::Is(argument, value) => (argument, Eq, value),
            Test::Without(argument, bits) => (argument, MaskedEq(bits.into()), 0),
            Test::With(argument, bits) => (argument, MaskedEq(bits.into()), bits),
            Test::OwnProcess(argument) => (argument, Eq, std::process::id()),
        };
        let width = SeccompCmpArgLen::Dword;
        let condition = SeccompCondition::new(argument, width, operator, value.into())?;
        SeccompRule::new(vec![condition])
    };
    let rules: Result<_, seccompiler::BackendError> = tests.iter().map(rule).collect();
    rules.context("a filter of system calls")
}

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// Offsets in `seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// What comes before what seccompiler makes: that goes through all numbers in turn, kills by itself who comes by another entry
/// (`int 0x80`), and knows two answers.
fn head(permitted: &Permitted) -> Program {
    let load = |k| sock_filter {
        code: LOAD,
        jt: 0,
        jf: 0,
        k,
    };
    let skip_unless = |k| sock_filter {
        code: JUMP_EQUAL,
        jt: 0,
        jf: 1,
        k,
    };
    let answer = |action: SeccompAction| sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: action.into(),
    };
    let mut program = vec![
        load(ARCHITECTURE),
        sock_filter {
            jt: 1,
            jf: 0,
            ..skip_unless(AUDIT_ARCH_X86_64)
        },
        answer(SeccompAction::Trap),
        load(NUMBER),
    ];
    let always = |call: &&Sysno| permitted.get(call).is_some_and(Vec::is_empty);
    for call in FREQUENT.iter().filter(always) {
        program.push(skip_unless(call.id() as u32));
        program.push(answer(SeccompAction::Allow));
    }
    for (call, error) in DENIED {
        if !permitted.contains_key(&call) {
            program.push(skip_unless(call.id() as u32));
            program.push(answer(SeccompAction::Errno(error as u32)));
        }
    }
    program
}
