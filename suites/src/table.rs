//! The suites, as data: what each is made of, what is run of it, and who knows the right outcome.

use doppel_cli::guest::STRESS_NG;

/// A suite.
#[derive(Debug)]
pub struct Suite {
    pub name: &'static str,
    pub what: What,
    /// With whose outcomes Doppel's are compared.
    pub reference: Reference,
    pub tests: &'static [Test],
}

/// Where its files come from.
#[derive(Debug)]
pub enum What {
    /// Debian's source of the kernel, of which these folders of tools/testing/selftests are built.
    SelfTests { folders: &'static [&'static str] },
    /// glibc's own tests: those of mathematical functions, which Debian's source has.
    Glibc,
    /// Debian packages as they are. `set` names them in the cache.
    Packages {
        set: &'static str,
        names: &'static [&'static str],
    },
}

/// Who knows the right outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// QEMU with the same kernel and files: what is tested is the kernel, and the host's is another.
    Qemu,
    /// The host itself.
    Host,
}

/// One of its tests.
#[derive(Debug)]
pub struct Test {
    /// The folder that it is run in, below the suite's own, and what is run there, for the shell.
    pub line: &'static str,
    /// How long it may take on a host of its own.
    pub seconds: u32,
}

impl Test {
    const fn new(line: &'static str) -> Test {
        Test::long(line, 30)
    }
    const fn long(line: &'static str, seconds: u32) -> Test {
        Test { line, seconds }
    }
}

/// Tests by their lines.
macro_rules! tests {
    ($($line:literal $(in $seconds:literal)?),* $(,)?) => {
        &[$(tests!(@ $line $($seconds)?)),*]
    };
    (@ $line:literal) => { Test::new($line) };
    (@ $line:literal $seconds:literal) => { Test::long($line, $seconds) };
}

/// Of Linux's own tests these are not run: what takes hours or changes the clock by years (leap-a-day, set-2038, skews); what measures delays
/// (nsleep-lat, set-timer-lat, rtcpie); what wants hardware that no monitor here has (gup_test, hmm-tests, va_128TBswitch); what writes to each
/// file of /proc, /proc/sysrq-trigger among them; and step_after_suspend_test, which wants a resume to take longer than what is missing to a
/// second of the real-time clock.
const X86: &[Test] = tests![
    "x86 ./amx_64",
    "x86 ./check_initial_reg_state_32",
    "x86 ./check_initial_reg_state_64",
    "x86 ./corrupt_xstate_header_64",
    "x86 ./entry_from_vm86_32",
    "x86 ./fsgsbase_64",
    "x86 ./fsgsbase_restore_32",
    "x86 ./fsgsbase_restore_64",
    "x86 ./ioperm_32",
    "x86 ./ioperm_64",
    "x86 ./iopl_32",
    "x86 ./iopl_64",
    "x86 ./ldt_gdt_32",
    "x86 ./ldt_gdt_64",
    "x86 ./mov_ss_trap_32",
    "x86 ./mov_ss_trap_64",
    "x86 ./ptrace_syscall_32",
    "x86 ./ptrace_syscall_64",
    "x86 ./sigaltstack_32",
    "x86 ./sigaltstack_64",
    "x86 ./sigreturn_32",
    "x86 ./sigreturn_64",
    "x86 ./sigtrap_loop_32",
    "x86 ./sigtrap_loop_64",
    "x86 ./single_step_syscall_32",
    "x86 ./single_step_syscall_64",
    "x86 ./syscall_arg_fault_32",
    "x86 ./syscall_arg_fault_64",
    "x86 ./syscall_nt_32",
    "x86 ./syscall_nt_64",
    "x86 ./syscall_numbering_64" in 60,
    "x86 ./sysret_rip_64",
    "x86 ./sysret_ss_attrs_32",
    "x86 ./sysret_ss_attrs_64",
    "x86 ./test_FCMOV_32",
    "x86 ./test_FCOMI_32",
    "x86 ./test_FISTTP_32",
    "x86 ./test_mremap_vdso_32",
    "x86 ./test_mremap_vdso_64",
    "x86 ./test_syscall_vdso_32",
    "x86 ./test_vsyscall_32",
    "x86 ./test_vsyscall_64",
    "x86 ./unwind_vdso_32",
    "x86 ./vdso_restorer_32",
];

const KERNEL: &[Test] = tests![
    "breakpoints ./breakpoint_test",
    "clone3 ./clone3",
    "clone3 ./clone3_clear_sighand",
    "clone3 ./clone3_set_tid",
    "core ./close_range_test",
    "exec ./null-argv",
    "exec ./recursion-depth",
    "fpu ./test_fpu",
    "futex/functional ./futex_requeue",
    "futex/functional ./futex_requeue_pi -b -l -t 100000",
    "futex/functional ./futex_requeue_pi_mismatched_ops",
    "futex/functional ./futex_requeue_pi_signal_restart",
    "futex/functional ./futex_wait",
    "futex/functional ./futex_wait_private_mapped_file",
    "futex/functional ./futex_wait_timeout",
    "futex/functional ./futex_wait_uninitialized_heap",
    "futex/functional ./futex_wait_wouldblock",
    "futex/functional ./futex_waitv",
    "ipc ./msgque",
    "kcmp ./kcmp_test",
    "membarrier ./membarrier_test_multi_thread",
    "membarrier ./membarrier_test_single_thread",
    "mincore ./mincore_selftest",
    "perf_events ./remove_on_exec",
    "perf_events ./sigtrap_threads",
    "pidfd ./pidfd_fdinfo_test",
    "pidfd ./pidfd_getfd_test",
    "pidfd ./pidfd_open_test",
    "pidfd ./pidfd_setns_test",
    "pidfd ./pidfd_wait",
    "proc ./fd-001-lookup",
    "proc ./proc-pid-vm",
    "proc ./proc-self-syscall",
    "proc ./proc-uptime-001",
    "proc ./proc-uptime-002",
    "proc ./setns-dcache",
    "ptrace ./get_syscall_info",
    "ptrace ./peeksiginfo",
    "rseq ./basic_test",
    "rseq ./basic_percpu_ops_test" in 60,
    "rseq ./param_test -T b -M -r 5000",
    "rseq ./param_test -T s -r 5000",
    "rseq ./param_test -T l -r 5000",
    "rseq ./param_test -T b -r 5000",
    "rseq ./param_test -T m -r 5000",
    "rseq ./param_test -T i -r 5000",
    "rseq ./param_test -T r -t 2 -r 5000",
    "rseq ./param_test_compare_twice -T s -r 5000 -k -y",
    "seccomp ./seccomp_bpf" in 60,
    "sigaltstack ./sas",
    "syscall_user_dispatch ./sud_test",
    "timens ./clock_nanosleep",
    "timens ./exec",
    "timens ./futex",
    "timens ./timens",
    "timens ./timer",
    "timens ./timerfd",
    "timers ./inconsistency-check -t 3" in 90,
    "timers ./mqueue-lat",
    "timers ./nanosleep",
    "timers ./posix_timers" in 60,
    "timers ./threadtest -t 5 -n 4",
    "timers ./valid-adjtimex",
    "vDSO ./vdso_standalone_test_x86",
    "vDSO ./vdso_test_abi",
    "vDSO ./vdso_test_clock_getres",
    "vDSO ./vdso_test_correctness",
    "vDSO ./vdso_test_getcpu",
    "vDSO ./vdso_test_gettimeofday",
    "vm ./compaction_test" in 120,
    "vm ./hugepage-mmap",
    "vm ./hugepage-mremap 64 huge/mremap",
    "vm ./hugetlb-madvise huge/madvise",
    "vm ./madv_populate",
    "vm ./map_fixed_noreplace",
    "vm ./map_hugetlb",
    "vm ./map_populate",
    "vm ./memfd_secret",
    "vm ./mlock-random-test",
    "vm ./mlock2-tests",
    "vm ./mrelease_test",
    "vm ./mremap_dontunmap",
    "vm ./mremap_test" in 60,
    "vm ./protection_keys_32" in 60,
    "vm ./protection_keys_64" in 60,
    "vm ./soft-dirty" in 60,
    "vm ./thuge-gen",
    "vm ./userfaultfd anon 20 4" in 60,
    "vm ./userfaultfd shmem 20 4" in 60,
    "vm ./userfaultfd hugetlb 64 4" in 60,
    "vm ./virtual_address_range" in 60,
];

/// One file of tests each.
macro_rules! python {
    ($($name:literal),* $(,)?) => {
        &[$(Test::long(concat!("tmp $ROOT/usr/bin/python3.11 -m test ", $name), 120)),*]
    };
}

const PYTHON: &[Test] = python![
    "test_array",
    "test_ast",
    "test_audioop",
    "test_augassign",
    "test_base64",
    "test_bigmem",
    "test_binascii",
    "test_binop",
    "test_bisect",
    "test_bool",
    "test_buffer",
    "test_builtin",
    "test_bytes",
    "test_bz2",
    "test_cmath",
    "test_codecs",
    "test_collections",
    "test_complex",
    "test_contextlib",
    "test_copy",
    "test_coroutines",
    "test_csv",
    "-i *find_library_with* test_ctypes",
    "test_datetime",
    "test_decimal",
    "test_decorators",
    "test_deque",
    "test_dict",
    "test_difflib",
    "test_enum",
    "test_exceptions",
    "test_faulthandler",
    "test_float",
    "test_format",
    "test_fractions",
    "test_functools",
    "test_gc",
    "test_generators",
    "test_grammar",
    "test_hash",
    "test_hashlib",
    "test_heapq",
    "test_hmac",
    "test_int",
    "test_io",
    "test_itertools",
    "test_json",
    "test_list",
    "test_long",
    "test_lzma",
    "test_marshal",
    "test_math",
    "test_memoryview",
    "test_mmap",
    "test_numeric_tower",
    "test_opcodes",
    "test_ordered_dict",
    "test_peepholer",
    "test_pickle",
    "test_pow",
    "test_queue",
    "test_random",
    "test_range",
    "test_re",
    "test_sched",
    "test_set",
    "test_signal",
    "test_slice",
    "test_sort",
    "test_statistics",
    "test_strtod",
    "test_struct",
    "test_structseq",
    "test_subprocess",
    "test_thread",
    "test_threading",
    "test_threading_local",
    "test_time",
    "test_tuple",
    "test_unicode",
    "test_unicodedata",
    "test_unpack",
    "test_userdict",
    "test_weakref",
    "test_zipfile",
    "test_zlib",
];

/// The functions of libm whose tests are run, each for all types.
pub const MATH: &[&str] = &[
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "cbrt",
    "ccos",
    "cexp",
    "clog",
    "cos",
    "cosh",
    "cpow",
    "csqrt",
    "erf",
    "exp",
    "exp10",
    "exp2",
    "expm1",
    "fma",
    "fmod",
    "frexp",
    "hypot",
    "j0",
    "jn",
    "lgamma",
    "llrint",
    "log",
    "log10",
    "log1p",
    "log2",
    "lrint",
    "modf",
    "nearbyint",
    "nextafter",
    "pow",
    "remainder",
    "remquo",
    "rint",
    "round",
    "scalbn",
    "sin",
    "sincos",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "tgamma",
    "trunc",
    "y0",
    "yn",
];

const GLIBC: &[Test] = tests![
    "math ./run acos" in 60,
    "math ./run acosh" in 60,
    "math ./run asin" in 60,
    "math ./run asinh" in 60,
    "math ./run atan" in 60,
    "math ./run atan2" in 60,
    "math ./run atanh" in 60,
    "math ./run cbrt" in 60,
    "math ./run ccos" in 60,
    "math ./run cexp" in 60,
    "math ./run clog" in 60,
    "math ./run cos" in 60,
    "math ./run cosh" in 60,
    "math ./run cpow" in 60,
    "math ./run csqrt" in 60,
    "math ./run erf" in 60,
    "math ./run exp" in 60,
    "math ./run exp10" in 60,
    "math ./run exp2" in 60,
    "math ./run expm1" in 60,
    "math ./run fma" in 60,
    "math ./run fmod" in 60,
    "math ./run frexp" in 60,
    "math ./run hypot" in 60,
    "math ./run j0" in 60,
    "math ./run jn" in 60,
    "math ./run lgamma" in 60,
    "math ./run llrint" in 60,
    "math ./run log" in 60,
    "math ./run log10" in 60,
    "math ./run log1p" in 60,
    "math ./run log2" in 60,
    "math ./run lrint" in 60,
    "math ./run modf" in 60,
    "math ./run nearbyint" in 60,
    "math ./run nextafter" in 60,
    "math ./run pow" in 60,
    "math ./run remainder" in 60,
    "math ./run remquo" in 60,
    "math ./run rint" in 60,
    "math ./run round" in 60,
    "math ./run scalbn" in 60,
    "math ./run sin" in 60,
    "math ./run sincos" in 60,
    "math ./run sinh" in 60,
    "math ./run sqrt" in 60,
    "math ./run tan" in 60,
    "math ./run tanh" in 60,
    "math ./run tgamma" in 60,
    "math ./run trunc" in 60,
    "math ./run y0" in 60,
    "math ./run yn" in 60,
];

/// One group of stressors each, which look at their own results. The stressor of swap is not among them: it wants a disk for its file, and the
/// guests have none.
macro_rules! stress {
    ($($stressors:literal),* $(,)?) => {
        &[$(Test::long(concat!("tmp $ROOT/usr/bin/stress-ng --verify --temp-path . -t 4 ", $stressors), 90)),*]
    };
}

const STRESS: &[Test] = stress![
    "--cpu 2 --cpu-method all",
    "--matrix 2 --matrix-method all",
    "--matrix-3d 1",
    "--vecmath 1",
    "--vecwide 1",
    "--vecfp 1",
    "--fp 1",
    "--crypt 1",
    "--hash 1",
    "--bitonicsort 1",
    "--heapsort 1",
    "--mergesort 1",
    "--qsort 1",
    "--radixsort 1",
    "--bsearch 1",
    "--hsearch 1",
    "--tree 1",
    "--skiplist 1",
    "--str 1 --str-method all",
    "--wcs 1 --wcs-method all",
    "--strlen 1",
    "--memcpy 1",
    "--memthrash 1",
    "--vm 1 --vm-bytes 64M --vm-method all",
    "--prime 1",
    "--primes 1",
    "--nsqrt 1",
    "--goto 1",
    "--branch 1",
    "--funccall 1",
    "--funcret 1",
    "--longjmp 1",
    "--atomic 2",
    "--mutex 1",
    "--sem 1",
    "--futex 1",
    "--zlib 1",
    "--jpeg 1",
    "--mcontend 1",
    "--lockbus 1",
    "--x86syscall 1",
    "--regs 1",
    "--ring-pipe 1",
    "--sigsegv 1",
    "--sigfpe 1",
    "--sigtrap 1",
    "--sigill 0 --vforkmany 1",
    "--exec 1",
    "--clone 1",
    "--mremap 1",
    "--mprotect 1",
    "--userfaultfd 1",
    "--icache 1",
    "--far-branch 1",
    "--rseq 1",
    "--nop 1",
];

/// All of them.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "x86",
        what: What::SelfTests { folders: &["x86"] },
        reference: Reference::Qemu,
        tests: X86,
    },
    Suite {
        name: "kernel",
        what: What::SelfTests {
            folders: &[
                "breakpoints",
                "clone3",
                "core",
                "exec",
                "fpu",
                "futex/functional",
                "ipc",
                "kcmp",
                "membarrier",
                "mincore",
                "perf_events",
                "pidfd",
                "proc",
                "ptrace",
                "rseq",
                "seccomp",
                "sigaltstack",
                "syscall_user_dispatch",
                "timens",
                "timers",
                "vDSO",
                "vm",
            ],
        },
        reference: Reference::Qemu,
        tests: KERNEL,
    },
    Suite {
        name: "python",
        what: What::Packages {
            set: "python-tests",
            names: &[
                "libc6",
                "python3.11",
                "python3.11-minimal",
                "libpython3.11-minimal",
                "libpython3.11-stdlib",
                "libpython3.11-testsuite",
                "libbz2-1.0",
                "libcrypt1",
                "libdb5.3",
                "libexpat1",
                "libffi8",
                "libgcc-s1",
                "liblzma5",
                "libncursesw6",
                "libnsl2",
                "libreadline8",
                "libsqlite3-0",
                "libssl3",
                "libtinfo6",
                "libtirpc3",
                "libuuid1",
                "media-types",
                "zlib1g",
            ],
        },
        reference: Reference::Host,
        tests: PYTHON,
    },
    Suite {
        name: "glibc",
        what: What::Glibc,
        reference: Reference::Host,
        tests: GLIBC,
    },
    Suite {
        name: "stress",
        what: What::Packages {
            set: "stress-ng",
            names: STRESS_NG,
        },
        reference: Reference::Host,
        tests: STRESS,
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn tests_have_lines_of_their_own_and_folders_that_are_built() {
        let mut seen = BTreeSet::new();
        for suite in SUITES {
            for test in suite.tests {
                assert!(seen.insert((suite.name, test.line)), "{}", test.line);
                let (folder, command) = test.line.split_once(' ').unwrap();
                assert!(
                    !command.is_empty() && !test.line.contains('|'),
                    "{}",
                    test.line
                );
                let name = command.split([' ', '-']).nth(1).unwrap_or_default();
                match suite.what {
                    What::SelfTests { folders } => assert!(folders.contains(&folder)),
                    What::Glibc => assert!(MATH.contains(&name)),
                    What::Packages { .. } => {}
                }
                assert!((1..=300).contains(&test.seconds), "{}", test.line);
            }
        }
    }
}
