# stress-ng's stressors of the processor, memory, processes, signals and contexts, with their results verified; then what the kernel says of it.
export LD_LIBRARY_PATH=/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu
mkdir -p /dev/shm
mount -t tmpfs none /dev/shm
cd /tmp
run() {
    echo "step: $*"
    # Its buffer is as large as the last cache that it is told of, which may be larger than the guest.
    stress-ng "$@" --cache-level 2 --verify --timeout "$seconds" --metrics-brief 2>&1 || { echo "failed: $*"; exit 1; }
}
run --cpu 1 --vm 1 --vm-bytes 24M --fork 1 --signal 1 --context 1
run --sigsegv 1 --sigfpe 1 --sigtrap 1 --sigabrt 1 --sigchld 1 --sigsuspend 1 --signest 1
run --switch 1 --pthread 1 --mmap 1 --mmap-bytes 16M --vfork 1 --x86syscall 1
run --icache 1 --vecmath 1 --vecfp 1 --longjmp 1 --ptrace 1 --vdso 1 --mprotect 1 --itimer 1
run --opcode 2
dmesg | grep -E 'rcu.*stall|soft lockup|hard lockup|hung_task|blocked for more than|BUG|WARNING|Call Trace|Oops|unstable|nobody cared' && exit 1
echo 'step: done'
