//! The stub: the only code in a child that is not the guest's.
//!
//! It is one page, position independent, followed by the exchange area. It knows nothing: the monitor writes a list of system calls, the
//! stub executes them, and this is how a process is set up and how its mappings change. As the handler of every signal the stub
//! tells the monitor of the stop and waits for its turn.
//!
//! Whose turn it is says one word ([`WORD`]), a futex of the exchange area: the child's thread number while the child may run, 0 while the
//! monitor may read and write the rest. Bit 31 says that the other side sleeps. The word is also on the child's list of robust
//! futexes, so that the kernel tells the monitor of the child's death.
//!
//! Invariant: **after each `syscall` instruction comes code of the stub that takes nothing from a register that it has not loaded itself, and that
//! leaves only by `rt_sigreturn`.** Guest code can jump to any byte of the page; if it reaches a system call that the filter lets pass, it stays
//! in the stub until the monitor's next command.
//!
//! Since the guest can write to the exchange area at any time, it can also claim to have stopped and run on: see [`crate::process`] for why that
//! does not help it.
//!
//! For the same reason lists are not in the exchange area. They are in the *orders*, a file that the monitor writes,
//! that no child can map, and from which a child can only read its own part into its own exchange area, at the one instruction after which
//! the stub executes it. A guest that jumps there has the stub do what the monitor ordered, and nothing else. With the list comes the
//! key (see `filter`).

use std::arch::global_asm;

/// Bytes of the stub's page.
pub(crate) const STUB_SIZE: u64 = 4096;
/// Bytes of an exchange area.
pub(crate) const EXCHANGE_SIZE: u64 = 64 << 10;

/// Whose turn it is; must be 0, since the stub uses the area's address for it.
pub(crate) const WORD: usize = 0;
/// Calls that wait in the orders; 0 where the stub need not look.
pub(crate) const ANNOUNCED: usize = 0x0c;
/// Without calls: not 0 to go to the guest.
pub(crate) const RESUME: usize = 0x10;
/// Calls that were executed without an error.
pub(crate) const DONE: usize = 0x14;
/// Where the child's orders are in their file.
pub(crate) const ORDERS_AT: usize = 0x18;
/// FS and GS base.
pub(crate) const BASES: [usize; 2] = [0x30, 0x38];
/// DS, ES, FS, GS.
pub(crate) const SELECTORS: [usize; 4] = [0x40, 0x44, 0x48, 0x4c];
/// RFLAGS for what `rt_sigreturn` leaves alone (ID and NT).
pub(crate) const FLAGS: usize = 0x50;
/// The process that must be the parent.
pub(crate) const PARENT: usize = 0x58;
/// The signal that the handler was called for, or 0 after calls.
pub(crate) const REASON: usize = 0x5c;
/// The signal frame: where the handler found it, then what `rt_sigreturn` takes.
pub(crate) const FRAME: usize = 0x60;
/// Not 0 once guest code was resumed.
pub(crate) const RESUMED: usize = 0x68;
/// Where a sleeping child is moved to, as a proof that it sleeps.
pub(crate) const BENCH: usize = 0x70;
/// The robust list's head, and its only entry.
pub(crate) const ROBUST_HEAD: usize = 0x80;
pub(crate) const ROBUST_ENTRY: usize = 0xa0;
/// A `sock_fprog` and the filter's program.
pub(crate) const PROGRAM: usize = 0xc0;
pub(crate) const INSTRUCTIONS: usize = 0x100;
/// The child's copy of its orders: a head of [`CALL_SIZE`] bytes, then calls: number, six arguments, result.
pub(crate) const ORDERS: usize = 0x1000;
/// Most bytes of orders.
pub(crate) const ORDERS_SIZE: u64 = 16 << 10;
pub(crate) const CALL_SIZE: usize = 64;
/// Most calls of a list: less than [`ORDERS_SIZE`], so that a length has no bit of it.
pub(crate) const MOST_CALLS: usize = ORDERS_SIZE as usize / CALL_SIZE - 2;
/// In the orders' head. The key, in the upper halves; the stub forgets it at once.
pub(crate) const ORDER_KEY: [usize; 2] = [0, 8];
/// Calls in the list.
pub(crate) const ORDER_COUNT: usize = 16;
/// Not 0 to go to the guest after them.
pub(crate) const ORDER_RESUME: usize = 20;
/// The descriptor of the orders' file in every process.
pub(crate) const ORDERS_FD: u32 = 2;
/// The alternate signal stack, to the end of the area.
pub(crate) const SIGNAL_STACK: usize = ORDERS + ORDERS_SIZE as usize;

global_asm!(
    ".pushsection .text.doppel_direct_stub, \"ax\", @progbits",
    ".balign 64",
    ".globl doppel_direct_stub, doppel_direct_stub_end, doppel_direct_handler",
    ".globl doppel_direct_slept, doppel_direct_woke, doppel_direct_ordered, doppel_direct_called, doppel_direct_returned",
    "doppel_direct_stub:",
    // The first process: it maps its exchange area from descriptor 1.
    "mov r8d, 1",
    "xor r9d, r9d",
    // A process that was just made: its exchange area is at offset R9 of descriptor R8.
    "20:",
    "lea rdi, [rip + doppel_direct_stub + {stub}]",
    "mov esi, {exchange}",
    "mov edx, {read_write}",
    "mov r10d, {shared_fixed}",
    "mov eax, {mmap}",
    "syscall",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "cmp rax, rbx",
    "jne 29f",
    // It dies with its parent, also with one that was dead before.
    "mov edi, {pdeathsig}",
    "mov esi, {sigkill}",
    "mov eax, {prctl}",
    "syscall",
    "mov eax, {getppid}",
    "syscall",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "cmp eax, [rbx + {parent}]",
    "jne 29f",
    "mov dword ptr [rbx + {reason}], 0",
    "jmp 30f",
    "29:",
    "mov edi, 1",
    "mov eax, {exit_group}",
    "syscall",
    "ud2",

    "doppel_direct_handler:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "mov [rbx + {frame}], rsp",
    "mov [rbx + {reason}], edi",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "rdgsbase rax",
    "mov [rbx + {gs_base}], rax",
    "mov eax, ds",
    "mov [rbx + {ds}], eax",
    "mov eax, es",
    "mov [rbx + {es}], eax",
    "mov eax, fs",
    "mov [rbx + {fs}], eax",
    "mov eax, gs",
    "mov [rbx + {gs}], eax",

    // The monitor's turn. A key that a signal kept from being used is forgotten.
    "30:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "xor eax, eax",
    "mov r13, rax",
    "mov r14, rax",
    "mov [rbx + {key0}], rax",
    "mov [rbx + {key1}], rax",
    "mov eax, [rbx]",
    "34:",
    "test eax, eax",
    "js 35f",
    "xor ecx, ecx",
    "lock cmpxchg [rbx], ecx",
    "jne 34b",
    "jmp 31f",
    // It sleeps: the kernel gives it the turn and wakes it, in one call.
    "35:",
    "mov rdi, rbx",
    "mov esi, {futex_wake_op}",
    "mov edx, 1",
    "xor r10d, r10d",
    "mov r8, rbx",
    "xor r9d, r9d",
    "mov eax, {futex}",
    "syscall",
    "doppel_direct_woke:",

    // Wait for ours.
    "31:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "xor eax, eax",
    "mov edx, {sleeps}",
    "lock cmpxchg [rbx], edx",
    "test eax, {owner}",
    "jnz 40f",
    "mov rdi, rbx",
    "xor esi, esi",
    "xor r10d, r10d",
    "mov eax, {futex}",
    "syscall",
    "doppel_direct_slept:",
    "jmp 31b",

    // Ours: the calls, if there are any. They are read from the orders, which the guest can neither read nor write.
    "40:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "xor ebp, ebp",
    "mov edx, [rbx + {announced}]",
    "test edx, edx",
    "jz 44f",
    "shl edx, 6",
    "add edx, {call_size}",
    "mov edi, {orders_fd}",
    "lea rsi, [rbx + {orders}]",
    "mov r10, [rbx + {orders_at}]",
    "mov eax, {pread}",
    "syscall",
    "doppel_direct_ordered:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "mov r13, [rbx + {key0}]",
    "mov r14, [rbx + {key1}]",
    "xor ecx, ecx",
    "mov [rbx + {key0}], rcx",
    "mov [rbx + {key1}], rcx",
    "mov [rbx + {done}], ecx",
    // All of the list, or what is there may be the guest's.
    "mov r15d, [rbx + {count}]",
    "mov ecx, r15d",
    "shl ecx, 6",
    "add ecx, {call_size}",
    "cmp rax, rcx",
    "jne 29b",
    "lea r12, [rbx + {calls}]",
    "xor ebp, ebp",
    "41:",
    "cmp ebp, r15d",
    "jae 45f",
    "mov rax, [r12]",
    "mov rbx, rax",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "or r10, r13",
    "mov r8, [r12 + 40]",
    "or r8, r14",
    "mov r9, [r12 + 48]",
    "syscall",
    "doppel_direct_called:",
    // A clone still has its parent's exchange area, and must not touch it.
    "cmp rbx, {clone}",
    "jne 42f",
    "test rax, rax",
    "jz 20b",
    "42:",
    "lea rbx, [rip + doppel_direct_stub + {stub}]",
    "mov [r12 + 56], rax",
    "cmp rax, -4095",
    "jae 46f",
    "inc ebp",
    "add r12, {call_size}",
    "jmp 41b",
    "45:",
    "mov [rbx + {done}], ebp",
    "cmp dword ptr [rbx + {then}], 0",
    "jne 50f",
    "46:",
    "mov [rbx + {done}], ebp",
    "mov dword ptr [rbx + {reason}], 0",
    "jmp 30b",
    "44:",
    "cmp dword ptr [rbx + {resume}], 0",
    "je 46b",

    // To the guest, with the state of the frame and of what is not in it.
    "50:",
    "mov eax, ds",
    "cmp eax, [rbx + {ds}]",
    "je 51f",
    "mov ds, [rbx + {ds}]",
    "51:",
    "mov eax, es",
    "cmp eax, [rbx + {es}]",
    "je 52f",
    "mov es, [rbx + {es}]",
    "52:",
    "mov eax, fs",
    "cmp eax, [rbx + {fs}]",
    "je 53f",
    "mov fs, [rbx + {fs}]",
    "53:",
    "mov eax, gs",
    "cmp eax, [rbx + {gs}]",
    "je 54f",
    "mov gs, [rbx + {gs}]",
    "54:",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {gs_base}]",
    "wrgsbase rax",
    "lea rsp, [rbx + {flags}]",
    "popfq",
    "mov dword ptr [rbx + {resumed}], 1",
    "mov rsp, [rbx + {frame}]",
    "mov eax, {rt_sigreturn}",
    "syscall",
    "doppel_direct_returned:",
    "jmp 30b",
    "doppel_direct_stub_end:",
    ".popsection",
    stub = const STUB_SIZE,
    exchange = const EXCHANGE_SIZE,
    read_write = const 3,
    shared_fixed = const 0x11,
    mmap = const 9,
    pdeathsig = const 1,
    sigkill = const 9,
    prctl = const 157,
    getppid = const 110,
    exit_group = const 231,
    futex = const 202,
    futex_wake_op = const 5,
    pread = const 17,
    orders_fd = const ORDERS_FD,
    orders = const ORDERS,
    orders_at = const ORDERS_AT,
    announced = const ANNOUNCED,
    resume = const RESUME,
    clone = const 56,
    rt_sigreturn = const 15,
    owner = const OWNER,
    sleeps = const SLEEPS,
    parent = const PARENT,
    reason = const REASON,
    frame = const FRAME,
    fs_base = const BASES[0],
    gs_base = const BASES[1],
    ds = const SELECTORS[0],
    es = const SELECTORS[1],
    fs = const SELECTORS[2],
    gs = const SELECTORS[3],
    key0 = const ORDERS + ORDER_KEY[0],
    key1 = const ORDERS + ORDER_KEY[1],
    count = const ORDERS + ORDER_COUNT,
    calls = const ORDERS + CALL_SIZE,
    call_size = const CALL_SIZE,
    then = const ORDERS + ORDER_RESUME,
    done = const DONE,
    flags = const FLAGS,
    resumed = const RESUMED,
);

/// Bits of [`WORD`] that name the child; not 0 in the child's turn.
pub(crate) const OWNER: u32 = 0x3fff_ffff;
/// Bit of [`WORD`]: the other side sleeps.
pub(crate) const SLEEPS: u32 = 1 << 31;
/// Bit of [`WORD`]: the child died in its turn.
pub(crate) const OWNER_DIED: u32 = 1 << 30;

unsafe extern "C" {
    static doppel_direct_stub: u8;
    static doppel_direct_handler: u8;
    static doppel_direct_slept: u8;
    static doppel_direct_woke: u8;
    static doppel_direct_ordered: u8;
    static doppel_direct_called: u8;
    static doppel_direct_returned: u8;
    static doppel_direct_stub_end: u8;
}

/// The stub's code and the places in it, counted from its beginning.
pub(crate) struct Stub {
    pub code: &'static [u8],
    pub handler: u64,
    /// What follows the `syscall` of each purpose, by which the filter knows them.
    pub slept: u64,
    pub woke: u64,
    pub ordered: u64,
    pub called: u64,
    pub returned: u64,
}

/// The stub.
pub(crate) fn stub() -> Stub {
    let start = &raw const doppel_direct_stub;
    let offset = |p: *const u8| p as u64 - start as u64;
    let len = offset(&raw const doppel_direct_stub_end);
    assert!(len <= STUB_SIZE);
    // SAFETY: the labels delimit bytes of this program's text, which live as long as it and do not change.
    let code = unsafe { std::slice::from_raw_parts(start, len as usize) };
    Stub {
        code,
        handler: offset(&raw const doppel_direct_handler),
        slept: offset(&raw const doppel_direct_slept),
        woke: offset(&raw const doppel_direct_woke),
        ordered: offset(&raw const doppel_direct_ordered),
        called: offset(&raw const doppel_direct_called),
        returned: offset(&raw const doppel_direct_returned),
    }
}
