//! The systems, as data: what each is made of, how it is started, and what it must say.

use doppel_cli::guest::{HOST, Source};

/// A system that is booted.
#[derive(Debug)]
pub struct System {
    pub name: &'static str,
    pub what: What,
    /// It is booted once with each of these numbers of CPUs.
    pub cpus: &'static [u32],
    /// MiB of memory.
    pub memory: u32,
    /// More for the command line of its kernel.
    pub cmdline: &'static str,
    /// What it says on its way that is worth a time of its own.
    pub first: Option<&'static str>,
    /// What it says on the serial line when it has passed.
    pub passed: &'static str,
    /// What the monitor then ends with by itself; a system without such an end is ended.
    pub status: Option<i32>,
    /// Seconds after which a boot has failed.
    pub timeout: u64,
}

/// What it is made of.
#[derive(Clone, Copy, Debug)]
pub enum What {
    /// A Debian kernel and busybox, with a script that tests what it can.
    Linux {
        package: &'static str,
        kernel: Source<'static>,
        programs: Source<'static>,
    },
    /// The hypervisor of a Debian package, with Debian's kernel as its first domain.
    Xen { package: &'static str },
    /// One file of a Debian package as the kernel, and perhaps another as its initial RAM disk.
    Files {
        package: &'static str,
        kernel: &'static str,
        initrd: Option<&'static str>,
    },
    /// This Doppel in the default guest, which boots the default guest.
    Nested,
}

/// What Linux says just before its first process; from there on it is busybox's time.
const INIT: Option<&str> = Some("Run /init as init process");
/// What the scripts say at their end.
const PASSED: &str = "systems: passed";
/// A script that succeeded: `(16 << 1) | 1`.
const SUCCESS: Option<i32> = Some(33);

const GENERIC: &str = "linux-image-amd64";
const CLOUD: &str = "linux-image-cloud-amd64";
const RT: &str = "linux-image-rt-amd64";

const fn suite(suite: &'static str) -> Source<'static> {
    Source {
        architecture: "amd64",
        suite: Some(suite),
    }
}

const BACKPORTS: Source = suite("bookworm-backports");
const I386: Source = Source {
    architecture: "i386",
    suite: Some("bookworm"),
};

const fn linux(
    name: &'static str,
    package: &'static str,
    kernel: Source<'static>,
    programs: Source<'static>,
) -> System {
    System {
        name,
        what: What::Linux {
            package,
            kernel,
            programs,
        },
        cpus: &[1, 2, 4],
        memory: 512,
        cmdline: "",
        first: INIT,
        passed: PASSED,
        status: SUCCESS,
        timeout: 180,
    }
}

/// All of them.
pub const SYSTEMS: &[System] = &[
    linux("cloud-6.1", CLOUD, HOST, HOST),
    linux("generic-6.1", GENERIC, HOST, HOST),
    linux("rt-6.1", RT, HOST, HOST),
    linux("cloud-6.12", CLOUD, BACKPORTS, HOST),
    linux("generic-6.12", GENERIC, BACKPORTS, HOST),
    linux("rt-6.12", RT, BACKPORTS, HOST),
    linux("trixie", GENERIC, suite("trixie"), HOST),
    linux("sid", GENERIC, suite("sid"), HOST),
    linux("686", "linux-image-686", I386, I386),
    linux("686-pae", "linux-image-686-pae", I386, I386),
    linux("user-32", GENERIC, HOST, I386),
    System {
        cpus: &[1, 2],
        memory: 768,
        // TCG of QEMU 7.2 dies of SMAP here.
        cmdline: "console=com1 com1=115200,8n1 loglvl=all noreboot dom0_mem=512M smap=0 smep=0",
        ..linux_of(What::Xen {
            package: "xen-hypervisor-4.17-amd64",
        })
    },
    System {
        name: "memtest86+",
        what: What::Files {
            package: "memtest86+",
            kernel: "boot/memtest86+x64.bin",
            initrd: None,
        },
        cpus: &[1],
        memory: 64,
        cmdline: "console=ttyS0,115200",
        first: Some("Testing"),
        passed: "Pass:  1        Errors: 0",
        status: None,
        timeout: 900,
    },
    System {
        name: "installer",
        what: What::Files {
            package: "debian-installer-12-netboot-amd64",
            kernel: "text/debian-installer/amd64/linux",
            initrd: Some("text/debian-installer/amd64/initrd.gz"),
        },
        cpus: &[1],
        memory: 1024,
        cmdline: "console=ttyS0",
        first: INIT,
        passed: "Select a language",
        status: None,
        timeout: 180,
    },
    System {
        name: "nested",
        what: What::Nested,
        cpus: &[1],
        memory: 1024,
        first: Some("nested: Doppel starts"),
        timeout: 600,
        ..linux("nested", CLOUD, HOST, HOST)
    },
];

const fn linux_of(what: What) -> System {
    System {
        what,
        ..linux("xen-4.17", GENERIC, HOST, HOST)
    }
}

/// What a Linux must not have said.
pub const COMPLAINTS: &[&str] = &[
    "Kernel panic",
    "BUG:",
    "WARNING: CPU",
    "Oops:",
    "soft lockup",
    "rcu: INFO:",
    "general protection fault",
    "Unhandled: vec",
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn systems_have_names_of_their_own_and_are_bounded() {
        let names: BTreeSet<&str> = SYSTEMS.iter().map(|s| s.name).collect();
        assert_eq!(names.len(), SYSTEMS.len());
        for system in SYSTEMS {
            assert!(
                !system.cpus.is_empty() && system.timeout <= 900,
                "{system:?}"
            );
            assert!(!system.passed.is_empty(), "{system:?}");
        }
    }
}
