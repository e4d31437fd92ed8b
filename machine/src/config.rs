//! What a machine is made of.

use std::path::PathBuf;

use doppel_direct::DirectOptions;
use doppel_memory::Backing;
use doppel_translate::TranslateOptions;
use doppel_translate::explain::Observers;
use doppel_x86::CpuChoice;

use crate::boot::KernelSource;
use crate::engine::EngineChoice;
use crate::serial::SerialBackend;
use crate::virtio::{DeviceConfig, VirtioTransport};

/// Everything that a machine is made of. [`MachineConfig::new`] has the defaults.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Which engine to run the guest with.
    pub engine: EngineChoice,
    /// vCPUs.
    pub cpus: u32,
    /// Which processor the guest sees.
    pub cpu: CpuChoice,
    /// Bytes of guest RAM, whole pages.
    pub memory: u64,
    /// What it is made of on the host; by default what serves the engine best.
    pub memory_backing: Option<Backing>,
    /// Have a thread ask the host for memory that the guest is likely to touch next.
    pub memory_ahead: bool,
    /// The kernel, or the disk that has one.
    pub kernel: KernelSource,
    /// Initial RAM disk; takes the place of the one on a boot disk.
    pub initrd: Option<PathBuf>,
    /// Modules with their command lines, for kernels that take them (PVH, Multiboot).
    pub modules: Vec<(PathBuf, String)>,
    /// Kernel command line; with a boot disk, what is added to the one that it has.
    pub cmdline: String,
    /// The other end of COM1.
    pub serial: SerialBackend,
    /// Virtio devices, in the order of their PCI slots from 1 on; 31 at most.
    pub devices: Vec<DeviceConfig>,
    /// How the guest reaches them.
    pub virtio: VirtioTransport,
    /// End instead of starting again when the guest resets the machine.
    pub no_reboot: bool,
    /// Offer the debug-exit port 0xf4.
    pub debug_exit: bool,
    /// Offer QEMU's devices for test programs: the debug-exit port, pc-testdev, fw_cfg.
    pub test_devices: bool,
    /// How to translate; `count` and `perf_map` follow from what else is asked for.
    pub translate: TranslateOptions,
    /// How to execute directly.
    pub direct: DirectOptions,
    /// Count what the engine runs and measure the time in devices, which costs a little.
    pub count: bool,
    /// What it takes of the host's memory is looked at when it ends.
    pub weigh: bool,
    /// Who is told of the blocks that are translated.
    pub observers: Observers,
}

impl MachineConfig {
    /// Bytes of memory that a machine has unless told otherwise, on the command line too. With 512 MiB Linux would leave transparent huge pages off.
    pub const MEMORY: u64 = 1 << 30;

    /// A machine of one vCPU and [`MachineConfig::MEMORY`] that boots `kernel`, with nobody at its serial port.
    pub fn new(kernel: impl Into<KernelSource>) -> Self {
        MachineConfig {
            engine: EngineChoice::Auto,
            cpus: 1,
            cpu: CpuChoice::default(),
            memory: Self::MEMORY,
            memory_backing: None,
            memory_ahead: true,
            kernel: kernel.into(),
            initrd: None,
            modules: Vec::new(),
            cmdline: String::new(),
            serial: SerialBackend::none(),
            devices: Vec::new(),
            virtio: VirtioTransport::default(),
            no_reboot: false,
            debug_exit: false,
            test_devices: false,
            translate: TranslateOptions::default(),
            direct: DirectOptions::default(),
            count: false,
            weigh: false,
            observers: Observers::default(),
        }
    }
}
