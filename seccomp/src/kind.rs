//! The kinds of threads.

/// What a thread is there for, which decides what it may ask of the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The one that makes machines and starts all others; its filter holds for all of them.
    Control,
    /// Executes the guest, and carries out what needs no waiting of its devices.
    Vcpu,
    /// Timers, and devices that have no kind of their own.
    Device,
    /// Disks.
    Disk,
    /// Network cards.
    Net,
    /// Shared directories.
    Share,
    /// The host's memory, ahead of time.
    Helper,
    /// Terminal, serial port, signals.
    Console,
    /// The parent of the processes that execute user code.
    Zygote,
    /// Starts the process of a disk or network, and starts it anew.
    Supervisor,
    /// Every thread of the process of a disk.
    DiskServer,
    /// The thread of the process of a network.
    NetServer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 12] = [
        Kind::Control,
        Kind::Vcpu,
        Kind::Device,
        Kind::Disk,
        Kind::Net,
        Kind::Share,
        Kind::Helper,
        Kind::Console,
        Kind::Zygote,
        Kind::Supervisor,
        Kind::DiskServer,
        Kind::NetServer,
    ];

    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Control => "control",
            Kind::Vcpu => "vCPU",
            Kind::Device => "device",
            Kind::Disk => "disk",
            Kind::Net => "network",
            Kind::Share => "share",
            Kind::Helper => "helper",
            Kind::Console => "console",
            Kind::Zygote => "zygote",
            Kind::Supervisor => "supervisor",
            Kind::DiskServer => "disk process",
            Kind::NetServer => "network process",
        }
    }
}
