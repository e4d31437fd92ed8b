//! The system calls that a child may make: a seccomp filter.
//!
//! Problem: the guest's code and the stub's run in one process, the stub must change mappings, and the guest must not, nor may it reach the
//! host by any other call. Idea: the filter looks at *where* the call comes from. At each of the stub's five `syscall` instructions it lets
//! one kind of call pass; from anywhere else, every number by every entry becomes a signal, which is the guest's system call on its way
//! to the monitor. Since guest code can jump to the stub's instructions, too, a call that changes mappings must carry a *key* of 64
//! random bits in the upper halves of two arguments of which the kernel uses the lower. The guest does not know it: it comes with the
//! orders (see `arch_stub`), and the stub forgets it before it goes on.
//!
//! Before the filter comes *user dispatch* (prctl PR_SET_SYSCALL_USER_DISPATCH), which makes a signal of every call from outside the stub's page.
//! Newer kernels exempt two calls from filters (`uretprobe` and `uprobe`, 335 and 336) but not from it; the calls of the vsyscall page
//! are exempt from it but not from filters.
//!
//! Invariant: what guest code can reach by jumping into the stub is to sleep, to wake the monitor, to have the monitor's
//! orders executed, and to load registers from a signal frame.
//! Cost: the filter is some thirty instructions at each trap and each call, well below a tenth of a microsecond.

use crate::arch_stub::{EXCHANGE_SIZE, ORDERS, ORDERS_FD, ORDERS_SIZE, SLEEPS, STUB_SIZE, Stub};

/// The descriptor of guest RAM in every child.
pub(crate) const RAM_FD: u32 = 0;

/// One instruction of classic BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

impl Instruction {
    pub fn bytes(self) -> u64 {
        u64::from(self.code)
            | u64::from(self.jt) << 16
            | u64::from(self.jf) << 24
            | u64::from(self.k) << 32
    }
}

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_ANY: u16 = 0x45;
const RETURN: u16 = 0x06;

const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;

/// Offsets in `seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ADDRESS: u32 = 8;
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

const X86_64: u32 = 0xc000_003e;
const MMAP: u32 = 9;
const MPROTECT: u32 = 10;
const MUNMAP: u32 = 11;
const RT_SIGRETURN: u32 = 15;
const PREAD64: u32 = 17;
const FUTEX: u32 = 202;
const FUTEX_WAIT: u32 = 0;
const FUTEX_WAKE_OP: u32 = 5;
/// FUTEX_OP_SET with 0.
const SET_TO_0: u32 = 0;
const MAP_SHARED_FIXED: u32 = 0x11;
const MAP_POPULATE: u32 = 0x8000;
const PROTECTIONS: u32 = 7;

/// A test of 32 bits of the call's data.
enum Test {
    Is(u32, u32),
    /// No bit but these.
    Within(u32, u32),
}
use Test::{Is, Within};

/// `value` at both halves of a 64-bit field.
fn is64(field: u32, value: u64) -> [Test; 2] {
    [Is(field, value as u32), Is(field + 4, (value >> 32) as u32)]
}

/// One kind of call that passes: all tests hold.
fn rule(tests: impl IntoIterator<Item = Test>) -> Vec<Instruction> {
    let tests: Vec<Test> = tests.into_iter().collect();
    let mut program = Vec::new();
    let count = tests.len();
    for (n, test) in tests.into_iter().enumerate() {
        // To the next rule: past the rest of the tests and the return.
        let out = (2 * (count - n - 1) + 1) as u8;
        let (field, code, k, jt, jf) = match test {
            Is(field, value) => (field, JUMP_EQUAL, value, 0, out),
            Within(field, bits) => (field, JUMP_ANY, !bits, out, 0),
        };
        program.push(instruction(LOAD, field));
        program.push(Instruction { code, jt, jf, k });
    }
    program.push(instruction(RETURN, ALLOW));
    program
}

fn instruction(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// The filter of a child whose stub is at `stub_at` and whose orders are at `orders_at` of their file. `key` is in the upper halves.
pub(crate) fn program(
    stub: &Stub,
    stub_at: u64,
    orders_at: u64,
    key: [u64; 2],
) -> Vec<Instruction> {
    let word = stub_at + STUB_SIZE;
    debug_assert!(word + EXCHANGE_SIZE < 1 << 47);
    let from = |place: u64| {
        let [low, high] = is64(ADDRESS, stub_at + place);
        [Is(ARCHITECTURE, X86_64), low, high]
    };
    let keyed = |number: u32| {
        let [k0, k1] =
            [(3, key[0]), (4, key[1])].map(|(n, key)| Is(argument(n) + 4, (key >> 32) as u32));
        from(stub.called)
            .into_iter()
            .chain([Is(NUMBER, number), k0, k1])
    };
    let protections = || [Within(argument(2), PROTECTIONS), Is(argument(2) + 4, 0)];
    let sleep = from(stub.slept)
        .into_iter()
        .chain([Is(NUMBER, FUTEX), Is(argument(1), FUTEX_WAIT)])
        .chain(is64(argument(0), word))
        .chain([Is(argument(2), SLEEPS)])
        .chain(is64(argument(3), 0));
    let wake = from(stub.woke)
        .into_iter()
        .chain([Is(NUMBER, FUTEX), Is(argument(1), FUTEX_WAKE_OP)])
        .chain(is64(argument(0), word))
        .chain([Is(argument(2), 1), Is(argument(3), 0)])
        .chain(is64(argument(4), word))
        .chain([Is(argument(5), SET_TO_0)]);
    let order = from(stub.ordered)
        .into_iter()
        .chain([Is(NUMBER, PREAD64), Is(argument(0), ORDERS_FD)])
        .chain(is64(argument(1), word + ORDERS as u64))
        .chain([
            Within(argument(2), ORDERS_SIZE as u32 - 1),
            Is(argument(2) + 4, 0),
        ])
        .chain(is64(argument(3), orders_at));
    let back = from(stub.returned)
        .into_iter()
        .chain([Is(NUMBER, RT_SIGRETURN)]);
    let map = keyed(MMAP)
        .chain([Is(argument(4), RAM_FD)])
        .chain([Is(argument(3), MAP_SHARED_FIXED)])
        .chain(protections());
    let populate = keyed(MMAP)
        .chain([Is(argument(4), RAM_FD)])
        .chain([Is(argument(3), MAP_SHARED_FIXED | MAP_POPULATE)])
        .chain(protections());
    let mut program = Vec::new();
    program.extend(rule(back));
    program.extend(rule(wake));
    program.extend(rule(sleep));
    program.extend(rule(order));
    program.extend(rule(map));
    program.extend(rule(populate));
    program.extend(rule(keyed(MPROTECT).chain(protections())));
    program.extend(rule(keyed(MUNMAP)));
    program.push(instruction(RETURN, TRAP));
    program
}
