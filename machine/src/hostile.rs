//! A hostile guest's register accesses, as a vCPU makes them: every chip and device of a whole machine, wired as it is for a guest, with its
//! timers running meanwhile.
//!
//! Single chips have tests of their own (`io/pc`), and so have rings (`io/virtio`). This one is about what lies between: the buses, PCI's configuration space and its windows, interrupts that go from one chip
//! to the next, a virtio transport's registers. Nothing may panic, hang, answer more than was asked for, or take a guest's word for an address.
//!
//! `DOPPEL_BUS_ACCESSES=30000000 DOPPEL_BUS_SEED=7 cargo test --release -p doppel-machine hostile` is a longer campaign.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use doppel_block::DiskSpec;
use doppel_memory::GuestRam;
use doppel_virtio::hostile::Random;
use doppel_virtio::{BalloonControl, ConsoleBackend};
use doppel_x86::{Bus, Kick};

use crate::config::MachineConfig;
use crate::control::Control;
use crate::cpu_bus::CpuBus;
use crate::doorbell::Doorbell;
use crate::layout;
use crate::pc::{Pc, PcParts};
use crate::serial::{CharLink, SerialBackend};
use crate::vcpu::Sleepers;
use crate::virtio::{DeviceConfig, VirtioTransport};

const RAM: u64 = 4 << 20;
const TSC_HZ: u64 = 2_000_000_000;

/// Ports that somebody answers at, and some beside them.
const PORTS: [Range<u16>; 17] = [
    0x20..0x22,
    0x40..0x48,
    0x60..0x65,
    0x70..0x72,
    0x92..0x93,
    0xa0..0xa2,
    0xb2..0xb4,
    0xe0..0xf8,
    0x3f8..0x400,
    0x4d0..0x4d2,
    0x510..0x51c,
    0x600..0x610,
    0xa79..0xa7a,
    0xcf8..0xd00,
    0x2000..0x2018,
    0xc000..0xc100,
    0..0xffff,
];

/// Memory likewise.
const MEMORY: [Range<u64>; 10] = [
    layout::HPET..layout::HPET + 0x180,
    layout::IO_APIC..layout::IO_APIC + 0x100,
    layout::LOCAL_APIC..layout::LOCAL_APIC + 0x400,
    layout::VIRTIO_MMIO.start..layout::VIRTIO_MMIO.start + 0x8000,
    layout::ECAM.start..layout::ECAM.start + 0x4_0000,
    layout::PCI_MMIO_LOW,
    layout::PCI_MMIO_LOW.start..layout::PCI_MMIO_LOW.start + 0x2_0000,
    layout::PCI_MMIO_HIGH,
    0xff00_0000..0xff01_0000,
    0..u64::MAX - 8,
];

struct Silent;

impl Kick for Silent {
    fn kick(&self) {}
}

fn value(random: &mut Random) -> u64 {
    let value = random.next();
    match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << (value % 64),
        3 | 4 => value & 0xff,
        // What looks like an address: of a window, or of RAM.
        5 => layout::PCI_MMIO_LOW.start + (value & 0xf_f000),
        6 => value & (RAM - 1) & !0xf,
        _ => value,
    }
}

fn devices(disk: &Path) -> Vec<DeviceConfig> {
    let spec: DiskSpec = format!("{},format=raw", disk.display()).parse().unwrap();
    let SerialBackend { sink, source } = SerialBackend::none();
    let backend = ConsoleBackend {
        sink,
        source,
        size: None,
    };
    vec![
        DeviceConfig::Rng,
        DeviceConfig::Disk {
            backend: spec.open().unwrap(),
            serial: "hostile".to_owned(),
            at_once: true,
        },
        DeviceConfig::Console {
            backend,
            link: Arc::default(),
            at_once: true,
        },
        DeviceConfig::Balloon {
            control: BalloonControl::new(0).unwrap(),
            period: None,
        },
    ]
}

/// Any access; what it answers fits into what was asked for.
fn access(bus: &mut CpuBus, random: &mut Random) {
    let size = 1 << random.below(4);
    let value = value(random);
    let port = PORTS[random.below(PORTS.len() as u64) as usize].clone();
    let port = port.start + random.below(port.len() as u64) as u16;
    let memory = MEMORY[random.below(MEMORY.len() as u64) as usize].clone();
    let gpa = memory.start + random.below(memory.end - memory.start);
    let within = gpa & !(size - 1);
    let narrow = size.min(4) as u8;
    match random.below(16) {
        0..3 => {
            let answer = u64::from(bus.port_read(port, narrow));
            assert!(answer <= u64::MAX >> (64 - 8 * narrow), "{port:#x}");
        }
        3..7 => bus.port_write(port, narrow, value as u32),
        7..9 => {
            let answer = bus.mmio_read(within, size as u8);
            assert!(answer <= u64::MAX >> (64 - 8 * size), "{within:#x}");
        }
        9..13 => bus.mmio_write(within, size as u8, value),
        13 => {
            let msr = [0x1b, 0x6e0, 0x800 + random.below(0x40) as u32];
            let msr = msr[random.below(3) as usize];
            match random.below(2) {
                0 => drop(bus.apic_msr_read(msr)),
                _ => drop(bus.apic_msr_write(msr, value, random.next())),
            }
        }
        14 => {
            bus.set_cr8(value & 15);
            bus.set_pv_eoi((value & 1 == 0).then_some(value & !3));
            bus.send_ipis(random.next().into(), value as u32, random.next() as u32);
            bus.wake(value as u32);
        }
        _ => {
            bus.interrupt_pending();
            bus.interrupt_acknowledge();
            bus.take_nmi();
            bus.take_start();
        }
    }
}

/// Accesses that an input's bytes decide, by one CPU.
///
/// # Panics
/// Where a chip or a bus does not stand them.
pub fn run_bytes(bytes: &[u8], disk: &Path) {
    let mut random = Random::of_bytes(bytes);
    let transport = random.one(&[VirtioTransport::Pci, VirtioTransport::Mmio]);
    machine(transport, 1, disk, |_, bus| {
        let mut random = Random::of_bytes(bytes);
        while !random.is_used_up() {
            access(bus, &mut random);
        }
    });
}

/// One machine, on each CPU's bus of which something is done, its timers running.
fn machine(
    transport: VirtioTransport,
    cpus: usize,
    disk: &Path,
    done: impl Fn(usize, &mut CpuBus) + Sync,
) {
    let config = MachineConfig {
        memory: RAM,
        cpus: cpus as u32,
        test_devices: true,
        devices: devices(disk),
        virtio: transport,
        ..MachineConfig::new(PathBuf::new())
    };
    let ram = Arc::new(GuestRam::new(RAM).expect("memory"));
    let doorbells: Vec<_> = (0..cpus).map(|_| Doorbell::new(Arc::new(Silent))).collect();
    let control = Arc::new(Control::default());
    let (serial, sleepers) = (CharLink::default(), Sleepers::new(cpus as u32));
    let pc = Pc::new(PcParts {
        config: &config,
        tsc_hz: TSC_HZ,
        doorbells: &doorbells,
        control: &control,
        serial: &serial,
        sleepers: &sleepers,
        ram: &ram,
    });
    let pc = pc.expect("a machine");
    thread::scope(|scope| {
        scope.spawn(|| pc.timers.run());
        let run = |(n, apic)| {
            let mut bus = CpuBus::new(&pc, n as u32, apic, ram.clone(), false);
            let done = &done;
            scope.spawn(move || done(n, &mut bus))
        };
        let started: Vec<_> = pc.cpu_apics().enumerate().map(run).collect();
        let ends: Vec<_> = started.into_iter().map(|cpu| cpu.join()).collect();
        pc.virtio.stop();
        pc.timers.stop();
        assert!(ends.iter().all(Result::is_ok), "a vCPU panicked");
    });
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    const CPUS: usize = 2;
    const LIMIT: Duration = Duration::from_secs(240);

    #[test]
    fn hostile_register_accesses_of_a_whole_machine_end_in_values() {
        let number = |name: &str, usual| {
            let given = std::env::var(name).ok();
            given.map_or(usual, |text| text.parse().expect("a number"))
        };
        let (accesses, seed) = (
            number("DOPPEL_BUS_ACCESSES", 150_000),
            number("DOPPEL_BUS_SEED", 1),
        );
        let disk = std::env::temp_dir().join(format!("doppel-hostile-{}", std::process::id()));
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        let (done, ended) = channel();
        let path = disk.clone();
        let run = thread::spawn(move || {
            for transport in [VirtioTransport::Pci, VirtioTransport::Mmio] {
                machine(transport, CPUS, &path, |n, bus| {
                    let mut random = Random::seeded(seed * 64 + n as u64);
                    (0..accesses).for_each(|_| access(bus, &mut random));
                });
            }
            let _ = done.send(());
        });
        // A longer campaign has the time that it takes.
        let limit = LIMIT * (1 + accesses / 1_000_000) as u32;
        let over = ended.recv_timeout(limit).is_ok();
        let _ = std::fs::remove_file(&disk);
        assert!(over, "it hangs or panicked");
        run.join().unwrap();
    }
}
