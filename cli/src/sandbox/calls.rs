//! The system calls that each kind of thread makes: the table behind the filters.
//!
//! It is what threads were seen to do (strace over the tests' guests), and what the libraries below do in rarer cases: errors, other
//! versions of the kernel and of glibc. A call with a [`Test`] is permitted where that holds.

use crate::args::Run;
use crate::domain::Domain;
use crate::terminal;
use doppel_machine::net::Network;
use doppel_machine::{EngineChoice, NetConfig};
use doppel_seccomp::Kind;
use syscalls::Sysno;

/// What a machine has on top of what all have, from its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Every machine.
    Always,
    /// A user network: TCP and UDP.
    Inet(Place),
    /// Sockets with a path: `--net switch`, `--vsock`.
    Unix(Place),
    /// `--net tap`.
    Tap(Place),
    /// `--share`.
    Share,
    /// Programs are started: `direct`'s zygote, a back-end's process, the terminal's watchdog.
    Programs,
}

/// Where networks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the monitor.
    Monitor,
    /// In processes of their own (`--driver-domain net`).
    Apart,
}
use Place::{Apart, Monitor};

/// A test of a call's argument (numbered from 0), of its lower 32 bits.
#[derive(Clone, Copy, Debug)]
pub enum Test {
    /// It is this.
    Is(u8, u32),
    /// None of these bits.
    Without(u8, u32),
    /// All of these bits.
    With(u8, u32),
    /// It is the number of this process.
    OwnProcess(u8),
}
use Test::{Is, OwnProcess, With, Without};

/// Calls that go together.
pub struct Group {
    /// Where a machine has this.
    pub need: Need,
    /// Who makes them; the control thread makes all, since its filter holds for all whom it starts.
    pub kinds: &'static [Kind],
    /// Permitted whatever their arguments.
    pub calls: &'static [Sysno],
    /// Permitted where the test holds.
    pub tested: &'static [(Sysno, Test)],
}

/// Calls so frequent that the filter looks for them first. A child of `direct` makes them through the filters of its ancestors, too.
pub const FREQUENT: [Sysno; 6] = [
    Sysno::futex,
    Sysno::rt_sigreturn,
    Sysno::pread64,
    Sysno::mmap,
    Sysno::mprotect,
    Sysno::munmap,
];

/// Answered with an error by who may not make them at all: the C library has another way then. Instead of `clone3` it takes `clone`, whose
/// flags a filter can see; `openat` is how malloc, in any thread, asks for the number of processors; and `clone` comes with all signals blocked,
/// so that the kernel would kill without a message.
pub const DENIED: [(Sysno, i32); 3] = [
    (Sysno::clone3, libc::ENOSYS),
    (Sysno::openat, libc::EACCES),
    (Sysno::clone, libc::EPERM),
];

const EVERYBODY: &[Kind] = &Kind::ALL;
const EXECUTE: u32 = libc::PROT_EXEC as u32;

/// Linux 6.4: what the kernel told the process at its start.
const PR_GET_AUXV: u32 = 0x4155_5856;
const FIONBIO: u32 = libc::FIONBIO as u32;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNGETFEATURES: u32 = 0x8004_54cf;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;

/// What a machine of these options has.
#[must_use]
pub fn needs(args: &Run) -> Vec<Need> {
    let place = match args.driver_domain.contains(&Domain::Net) {
        true => Apart,
        false => Monitor,
    };
    let networks = args.devices.cards().map(|card| of_network(card, place));
    let domain = !args.driver_domain.is_empty();
    let direct = matches!(args.engine, EngineChoice::Auto | EngineChoice::Direct);
    let programs = direct || domain || terminal::size().is_some();
    let table = [
        (true, Need::Always),
        (args.devices.vsock().is_some(), Need::Unix(Monitor)),
        (args.devices.shares().next().is_some(), Need::Share),
        (programs, Need::Programs),
    ];
    let there = table.into_iter().filter(|(there, _)| *there);
    there.map(|(_, need)| need).chain(networks).collect()
}

/// What a card's network has, there where it is.
#[must_use]
pub fn of_network(card: &NetConfig, place: Place) -> Need {
    match card.network {
        Network::User(_) => Need::Inet(place),
        Network::Switch(_) => Need::Unix(place),
        Network::Tap(_) => Need::Tap(place),
    }
}

/// The table.
pub const GROUPS: &[Group] = &[
    // Memory, locks, time, its own signals and its end: what no thread of Rust's standard library and glibc does without.
    Group {
        need: Need::Always,
        kinds: EVERYBODY,
        calls: &[
            Sysno::read,
            Sysno::write,
            Sysno::readv,
            Sysno::writev,
            Sysno::close,
            Sysno::poll,
            Sysno::ppoll,
            Sysno::lseek,
            Sysno::munmap,
            Sysno::mremap,
            Sysno::madvise,
            Sysno::brk,
            Sysno::futex,
            Sysno::futex_wait,
            Sysno::futex_wake,
            Sysno::futex_waitv,
            Sysno::rt_sigaction,
            Sysno::rt_sigprocmask,
            Sysno::rt_sigreturn,
            Sysno::rt_sigtimedwait,
            Sysno::sigaltstack,
            Sysno::set_robust_list,
            Sysno::rseq,
            Sysno::membarrier,
            Sysno::sched_yield,
            Sysno::sched_getaffinity,
            Sysno::getcpu,
            Sysno::gettid,
            Sysno::getpid,
            Sysno::clock_gettime,
            Sysno::clock_getres,
            Sysno::clock_nanosleep,
            Sysno::nanosleep,
            Sysno::gettimeofday,
            Sysno::time,
            Sysno::getrandom,
            Sysno::restart_syscall,
            Sysno::exit,
            Sysno::exit_group,
        ],
        tested: &[
            (Sysno::tgkill, OwnProcess(0)),
            (Sysno::mmap, Without(2, EXECUTE)),
            (Sysno::mprotect, Without(2, EXECUTE)),
            (Sysno::prctl, Is(0, libc::PR_SET_NAME as u32)),
            (Sysno::prctl, Is(0, libc::PR_SET_VMA as u32)),
            (Sysno::prctl, Is(0, PR_GET_AUXV)),
        ],
    },
    // Code of one's own making, or a program's.
    Group {
        need: Need::Always,
        kinds: &[Kind::Vcpu, Kind::Zygote, Kind::Supervisor],
        calls: &[Sysno::mmap, Sysno::mprotect],
        tested: &[],
    },
    // Threads, of this process.
    Group {
        need: Need::Always,
        kinds: &[Kind::Disk, Kind::Share, Kind::DiskServer],
        calls: &[],
        tested: &[(Sysno::clone, With(0, libc::CLONE_THREAD as u32))],
    },
    // Events and timers. A network's next process has the supervisor's filter besides its own, as a disk's has.
    Group {
        need: Need::Always,
        kinds: &[
            Kind::Vcpu,
            Kind::Device,
            Kind::Disk,
            Kind::Net,
            Kind::Share,
            Kind::Supervisor,
            Kind::NetServer,
        ],
        calls: &[
            Sysno::epoll_create1,
            Sysno::epoll_ctl,
            Sysno::epoll_wait,
            Sysno::epoll_pwait,
            Sysno::epoll_pwait2,
            Sysno::eventfd2,
            Sysno::timerfd_create,
            Sysno::timerfd_settime,
            Sysno::fcntl,
            // An interrupt for a vCPU whose user code is in a child.
            Sysno::pidfd_send_signal,
        ],
        tested: &[],
    },
    // Open files: disks, which a vCPU reads itself where that is faster.
    Group {
        need: Need::Always,
        kinds: &[
            Kind::Vcpu,
            Kind::Disk,
            Kind::Share,
            Kind::Supervisor,
            Kind::DiskServer,
        ],
        calls: &[
            Sysno::pread64,
            Sysno::preadv,
            Sysno::preadv2,
            Sysno::pwrite64,
            Sysno::pwritev,
            Sysno::pwritev2,
            Sysno::fsync,
            Sysno::fdatasync,
            Sysno::sync_file_range,
            Sysno::fallocate,
            Sysno::ftruncate,
            Sysno::fstat,
            Sysno::statx,
            Sysno::newfstatat,
            Sysno::fstatfs,
            Sysno::fcntl,
        ],
        tested: &[],
    },
    // Guest memory in a file, of which the balloon gives pieces back.
    Group {
        need: Need::Always,
        kinds: &[Kind::Device, Kind::Helper],
        calls: &[Sysno::fallocate],
        tested: &[],
    },
    // Files by their names, within Landlock's bounds: the host's limits and load, name servers, the members of a switch.
    Group {
        need: Need::Always,
        kinds: &[
            Kind::Vcpu,
            Kind::Helper,
            Kind::Net,
            Kind::Zygote,
            Kind::Supervisor,
            Kind::NetServer,
        ],
        calls: &[
            Sysno::openat,
            Sysno::statx,
            Sysno::newfstatat,
            Sysno::fstat,
            Sysno::getdents64,
        ],
        tested: &[],
    },
    // A vCPU: its GS base, its processor, its children.
    Group {
        need: Need::Always,
        kinds: &[Kind::Vcpu],
        calls: &[
            Sysno::arch_prctl,
            Sysno::sched_setaffinity,
            Sysno::sched_getattr,
            Sysno::sched_setattr,
            Sysno::pidfd_open,
        ],
        tested: &[],
    },
    // The directories and files of a share.
    Group {
        need: Need::Share,
        kinds: &[Kind::Share],
        calls: &[
            Sysno::openat,
            Sysno::openat2,
            Sysno::statx,
            Sysno::newfstatat,
            Sysno::statfs,
            Sysno::getdents64,
            Sysno::readlinkat,
            Sysno::mkdirat,
            Sysno::mknodat,
            Sysno::symlinkat,
            Sysno::linkat,
            Sysno::unlinkat,
            Sysno::renameat,
            Sysno::renameat2,
            Sysno::fchmod,
            Sysno::fchmodat,
            Sysno::fchmodat2,
            Sysno::fchown,
            Sysno::fchownat,
            Sysno::truncate,
            Sysno::utimensat,
            Sysno::copy_file_range,
            Sysno::syncfs,
            Sysno::flock,
            Sysno::dup,
        ],
        tested: &[],
    },
    // Sockets that are there already: a message to the process of a back-end, a frame.
    Group {
        need: Need::Always,
        kinds: &[
            Kind::Vcpu,
            Kind::Device,
            Kind::Disk,
            Kind::Net,
            Kind::Supervisor,
            Kind::DiskServer,
            Kind::NetServer,
        ],
        calls: &[
            Sysno::sendto,
            Sysno::sendmsg,
            Sysno::sendmmsg,
            Sysno::recvfrom,
            Sysno::recvmsg,
            Sysno::recvmmsg,
            Sysno::shutdown,
        ],
        tested: &[],
    },
    // Networks, where they are.
    Group {
        need: Need::Inet(Monitor),
        kinds: &[Kind::Vcpu, Kind::Net],
        calls: CONNECTIONS,
        tested: INTERNET,
    },
    Group {
        need: Need::Inet(Apart),
        kinds: &[Kind::Supervisor, Kind::NetServer],
        calls: CONNECTIONS,
        tested: INTERNET,
    },
    Group {
        need: Need::Unix(Monitor),
        kinds: &[Kind::Vcpu, Kind::Device, Kind::Net],
        calls: CONNECTIONS,
        tested: PATHS,
    },
    Group {
        need: Need::Unix(Apart),
        kinds: &[Kind::Supervisor, Kind::NetServer],
        calls: CONNECTIONS,
        tested: PATHS,
    },
    // The path of a socket that goes.
    Group {
        need: Need::Unix(Monitor),
        kinds: &[Kind::Vcpu, Kind::Device, Kind::Net],
        calls: &[Sysno::unlink, Sysno::flock],
        tested: &[],
    },
    Group {
        need: Need::Unix(Apart),
        kinds: &[Kind::Supervisor, Kind::NetServer],
        calls: &[Sysno::unlink],
        tested: &[],
    },
    // A place at a switch.
    Group {
        need: Need::Unix(Apart),
        kinds: &[Kind::Supervisor],
        calls: &[Sysno::mkdir, Sysno::flock, Sysno::open],
        tested: &[],
    },
    Group {
        need: Need::Tap(Monitor),
        kinds: &[Kind::Vcpu, Kind::Net],
        calls: &[],
        tested: TAP,
    },
    Group {
        need: Need::Tap(Apart),
        kinds: &[Kind::Supervisor, Kind::NetServer],
        calls: &[],
        tested: TAP,
    },
    Group {
        need: Need::Tap(Apart),
        kinds: &[Kind::Supervisor],
        calls: &[Sysno::open],
        tested: &[],
    },
    // What is typed interrupts a vCPU, and what ends the machine calls it, while its user code is in a child.
    Group {
        need: Need::Always,
        kinds: &[Kind::Console],
        calls: &[Sysno::pidfd_send_signal],
        tested: &[],
    },
    // A terminal's settings and size; not TIOCSTI, which types.
    Group {
        need: Need::Always,
        kinds: &[Kind::Console],
        calls: &[],
        tested: &[
            (Sysno::ioctl, Is(1, libc::TCGETS as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETS as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETSW as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETSF as u32)),
            (Sysno::ioctl, Is(1, libc::TCGETS2 as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETS2 as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETSW2 as u32)),
            (Sysno::ioctl, Is(1, libc::TCSETSF2 as u32)),
            (Sysno::ioctl, Is(1, libc::TIOCGWINSZ as u32)),
        ],
    },
    // Programs: to start one, what it does until its own filter, and to see to its end.
    Group {
        need: Need::Programs,
        kinds: &[Kind::Zygote, Kind::Supervisor],
        calls: &[
            Sysno::clone,
            Sysno::vfork,
            Sysno::execve,
            Sysno::execveat,
            Sysno::wait4,
            Sysno::waitid,
            Sysno::kill,
            Sysno::pidfd_open,
            Sysno::pidfd_send_signal,
            Sysno::dup,
            Sysno::dup2,
            Sysno::dup3,
            Sysno::pipe2,
            Sysno::fcntl,
            Sysno::close_range,
            Sysno::setsid,
            Sysno::setpgid,
            Sysno::getppid,
            Sysno::prlimit64,
            Sysno::prctl,
            Sysno::seccomp,
            Sysno::arch_prctl,
            Sysno::set_tid_address,
            Sysno::access,
            Sysno::faccessat,
            Sysno::faccessat2,
            Sysno::readlink,
            Sysno::readlinkat,
            Sysno::pread64,
            Sysno::uname,
            Sysno::getuid,
            Sysno::geteuid,
            Sysno::getgid,
            Sysno::getegid,
        ],
        tested: &[],
    },
    // The process of a back-end, before it has opened what it serves.
    Group {
        need: Need::Programs,
        kinds: &[Kind::Supervisor],
        calls: &[
            Sysno::landlock_create_ruleset,
            Sysno::landlock_add_rule,
            Sysno::landlock_restrict_self,
        ],
        tested: &[
            (Sysno::socketpair, Is(0, libc::AF_UNIX as u32)),
            (Sysno::setsockopt, Is(1, libc::SOL_SOCKET as u32)),
        ],
    },
    // What makes a machine.
    Group {
        need: Need::Always,
        kinds: &[],
        calls: &[
            Sysno::clone,
            Sysno::memfd_create,
            Sysno::open,
            Sysno::flock,
            Sysno::mkdir,
            Sysno::mkdirat,
            Sysno::unlinkat,
            Sysno::geteuid,
            Sysno::getegid,
            Sysno::dup,
            Sysno::prlimit64,
            Sysno::sysinfo,
            Sysno::uname,
            Sysno::readlink,
            Sysno::readlinkat,
            Sysno::access,
            // Narrower filters for who is started.
            Sysno::seccomp,
        ],
        tested: &[(Sysno::prctl, Is(0, libc::PR_SET_NO_NEW_PRIVS as u32))],
    },
];

/// What has to do with connections.
const CONNECTIONS: &[Sysno] = &[
    Sysno::connect,
    Sysno::bind,
    Sysno::listen,
    Sysno::accept,
    Sysno::accept4,
    Sysno::getsockopt,
    Sysno::setsockopt,
    Sysno::getsockname,
    Sysno::getpeername,
];

const INTERNET: &[(Sysno, Test)] = &[
    (Sysno::socket, Is(0, libc::AF_INET as u32)),
    (Sysno::socket, Is(0, libc::AF_INET6 as u32)),
    (Sysno::ioctl, Is(1, FIONBIO)),
];

const PATHS: &[(Sysno, Test)] = &[
    (Sysno::socket, Is(0, libc::AF_UNIX as u32)),
    (Sysno::ioctl, Is(1, FIONBIO)),
];

const TAP: &[(Sysno, Test)] = &[
    (Sysno::ioctl, Is(1, TUNSETOFFLOAD)),
    (Sysno::ioctl, Is(1, TUNSETIFF)),
    (Sysno::ioctl, Is(1, TUNGETFEATURES)),
    (Sysno::ioctl, Is(1, TUNSETVNETHDRSZ)),
];
