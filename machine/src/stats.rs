//! What a machine counted, for `--stats`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use doppel_footprint::Footprint;
use doppel_virtio::GuestMemoryStats;
use doppel_x86::EngineStats;
use serde::Serialize;

use crate::cpu_bus::BusExits;
use crate::vcpu::{RunExits, VcpuTime};
use crate::virtio::DeviceCounters;

/// Everything that was counted from the machine's start to its end, over all reboots.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// The engine, by name.
    pub engine: String,
    /// Why it was taken.
    pub engine_reason: String,
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of guest RAM.
    pub memory_bytes: u64,
    /// Bytes of it that the host was asked for before the guest touched them.
    pub memory_ahead_bytes: u64,
    /// What the monitor took of the host's memory at the end of the last boot; `None` where nobody looked.
    pub memory: Option<Footprint>,
    /// Times the machine started.
    pub boots: u64,
    /// Where the time went.
    pub seconds: Seconds,
    /// Exits from guest code to the monitor, by reason.
    pub exits: Exits,
    /// What the engine counted.
    pub counters: EngineStats,
    /// Of the interruptions that found user code, the share (0 to 1) that found it in the processor itself, not translated (docs/direct.md); `None`
    /// where nobody counted any.
    pub user_direct_share: Option<f64>,
    /// What each disk counted.
    pub disk: Vec<DiskStats>,
    /// What each network card counted.
    pub net: Vec<NetStats>,
    /// What each console counted.
    pub console: Vec<ConsoleStats>,
    /// What each memory balloon counted.
    pub balloon: Vec<BalloonStats>,
    /// What each socket device counted.
    pub vsock: Vec<VsockStats>,
}

/// Requests to a disk, by who served them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskStats {
    /// The vCPU that asked.
    pub at_once: u64,
    /// The thread of a queue.
    pub by_queue: u64,
    /// A thread of the pool.
    pub by_pool: u64,
    /// Processes that followed one that died (`--driver-domain disk`).
    pub restarts: u64,
}

/// What a network card counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetStats {
    /// Frames from the guest.
    pub sent: u64,
    /// Bytes in them.
    pub sent_bytes: u64,
    /// Frames to the guest.
    pub received: u64,
    /// Bytes in them.
    pub received_bytes: u64,
    /// Notifications that the vCPU dealt with itself.
    pub at_once: u64,
    /// Notifications that the card's thread dealt with.
    pub handed_over: u64,
    /// Processes that followed one that died (`--driver-domain net`).
    pub restarts: u64,
}

/// What a console counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConsoleStats {
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Notifications that the vCPU dealt with itself.
    pub at_once: u64,
    /// Notifications that the console's thread dealt with.
    pub handed_over: u64,
}

/// What a memory balloon counted, and what the guest last said of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// Bytes that the guest reported as free.
    pub reported_bytes: u64,
    /// Bytes that were put into the balloon.
    pub inflated_bytes: u64,
    /// Bytes that were taken out of it.
    pub deflated_bytes: u64,
    /// Bytes that went back to the host for either reason.
    pub discarded_bytes: u64,
    /// Of the last boot.
    pub guest: Option<GuestMemoryStats>,
}

/// What a socket device counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VsockStats {
    /// Connections, whoever asked for them.
    pub connections: u64,
    /// Packets of the guest that were answered with a reset.
    pub refused: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
}

/// Wall-clock time in seconds; all but `wall` are sums over the vCPUs.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Seconds {
    /// From the start to the end of the machine.
    pub wall: f64,
    /// In the engine.
    pub guest: f64,
    /// In devices, on behalf of the guest.
    pub devices: f64,
    /// Asleep in HLT.
    pub halted: f64,
}

/// Exits by reason.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Exits {
    pub port_read: u64,
    pub port_write: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub apic_msr: u64,
    pub interrupt: u64,
    pub nmi: u64,
    pub halt: u64,
    pub kick: u64,
    pub shutdown: u64,
}

impl Stats {
    /// Adds what one vCPU counted during one boot.
    pub fn add_vcpu(
        &mut self,
        counters: &EngineStats,
        bus: &BusExits,
        run: &RunExits,
        time: &VcpuTime,
    ) {
        for (name, n) in counters {
            *self.counters.entry(name).or_default() += n;
        }
        self.user_direct_share = direct_share(&self.counters);
        self.exits.add(bus, run);
        self.seconds.guest += seconds(time.running.saturating_sub(bus.time));
        self.seconds.devices += seconds(bus.time);
        self.seconds.halted += seconds(time.halted);
    }

    /// Adds what the devices counted during one boot.
    pub fn add_devices(&mut self, of: &DeviceCounters) {
        add_all(&mut self.disk, &of.disks, |sum, disk| {
            total([
                (&mut sum.at_once, &disk.at_once),
                (&mut sum.by_queue, &disk.by_queue),
                (&mut sum.by_pool, &disk.by_pool),
            ]);
            // The back-end outlives the boot and counts on.
            sum.restarts += disk.restarts.swap(0, Ordering::Relaxed);
        });
        add_all(&mut self.net, &of.cards, |sum, card| {
            total([
                (&mut sum.sent, &card.sent),
                (&mut sum.sent_bytes, &card.sent_bytes),
                (&mut sum.received, &card.received),
                (&mut sum.received_bytes, &card.received_bytes),
                (&mut sum.at_once, &card.at_once),
                (&mut sum.handed_over, &card.handed_over),
                (&mut sum.restarts, &card.restarts),
            ]);
        });
        add_all(&mut self.console, &of.consoles, |sum, console| {
            total([
                (&mut sum.sent_bytes, &console.sent_bytes),
                (&mut sum.received_bytes, &console.received_bytes),
                (&mut sum.at_once, &console.at_once),
                (&mut sum.handed_over, &console.handed_over),
            ]);
        });
        add_all(&mut self.balloon, &of.balloons, |sum, balloon| {
            let (control, counters) = balloon;
            total([
                (&mut sum.reported_bytes, &counters.reported_bytes),
                (&mut sum.inflated_bytes, &counters.inflated_bytes),
                (&mut sum.deflated_bytes, &counters.deflated_bytes),
                (&mut sum.discarded_bytes, &counters.discarded_bytes),
            ]);
            sum.guest = control.statistics();
        });
        add_all(&mut self.vsock, &of.vsocks, |sum, vsock| {
            total([
                (&mut sum.connections, &vsock.connections),
                (&mut sum.refused, &vsock.refused),
                (&mut sum.sent_bytes, &vsock.sent_bytes),
                (&mut sum.received_bytes, &vsock.received_bytes),
            ]);
        });
    }
}

/// Adds the counters of each device of a class to its sums.
fn add_all<S: Clone + Default, C>(sums: &mut Vec<S>, of: &[Arc<C>], add: impl Fn(&mut S, &C)) {
    sums.resize(of.len(), S::default());
    sums.iter_mut().zip(of).for_each(|(sum, c)| add(sum, c));
}

fn total<const N: usize>(pairs: [(&mut u64, &AtomicU64); N]) {
    for (sum, n) in pairs {
        *sum += n.load(Ordering::Relaxed);
    }
}

impl Exits {
    fn add(&mut self, bus: &BusExits, run: &RunExits) {
        for (sum, n) in [
            (&mut self.port_read, bus.port_read),
            (&mut self.port_write, bus.port_write),
            (&mut self.mmio_read, bus.mmio_read),
            (&mut self.mmio_write, bus.mmio_write),
            (&mut self.apic_msr, bus.apic_msr),
            (&mut self.interrupt, bus.interrupt),
            (&mut self.nmi, bus.nmi),
            (&mut self.halt, run.halted),
            (&mut self.kick, run.kicked),
            (&mut self.shutdown, run.shutdown),
        ] {
            *sum += n;
        }
    }
}

/// Interruptions are samples of where user code spends its time.
fn direct_share(counters: &EngineStats) -> Option<f64> {
    let direct = *counters.get("user_interruptions_direct")?;
    let all = direct + counters.get("user_interruptions_translated")?;
    (all > 0).then(|| direct as f64 / all as f64)
}

/// For people and scripts: microseconds are enough.
pub fn seconds(d: Duration) -> f64 {
    d.as_micros() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_add_up() {
        let mut stats = Stats::default();
        let counters = EngineStats::from([("blocks", 7)]);
        let bus = BusExits {
            port_read: 2,
            time: Duration::from_millis(250),
            ..BusExits::default()
        };
        let time = VcpuTime {
            running: Duration::from_secs(1),
            halted: Duration::from_secs(3),
        };
        for _ in 0..2 {
            stats.add_vcpu(&counters, &bus, &RunExits::default(), &time);
        }
        assert_eq!(stats.counters["blocks"], 14);
        assert_eq!(stats.exits.port_read, 4);
        let s = stats.seconds;
        assert_eq!((s.guest, s.devices, s.halted), (1.5, 0.5, 6.0));
    }

    #[test]
    fn the_share_of_direct_execution_is_that_of_all_vcpus() {
        let mut stats = Stats::default();
        let mut add = |direct, translated| {
            let counters = EngineStats::from([
                ("user_interruptions_direct", direct),
                ("user_interruptions_translated", translated),
            ]);
            let (bus, run) = (BusExits::default(), RunExits::default());
            stats.add_vcpu(&counters, &bus, &run, &VcpuTime::default());
            stats.user_direct_share
        };
        assert_eq!(add(0, 0), None, "nothing was found");
        assert_eq!(add(3, 1), Some(0.75));
        assert_eq!(add(9, 3), Some(0.75));
        assert_eq!(add(0, 16), Some(0.375));
        assert_eq!(Stats::default().user_direct_share, None);
    }
}
