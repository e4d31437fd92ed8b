//! One vCPU: an engine, its bus and the thread that runs them.
//!
//! HLT blocks the thread until its doorbell rings (an interrupt, an IPI, the machine's end), so an idle machine costs
//! no host CPU; deadlines are the timer thread's business.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use doppel_x86::{Activity, Bus, Engine, Exit, Rflags, Start};

use crate::control::{Cause, Control};
use crate::doorbell::Doorbell;
use crate::run_delay::RunDelay;

/// What the vCPUs of a machine know of each other's sleep.
pub struct Sleepers {
    cpus: u32,
    /// HLTs executed by all of them.
    pub halts: Arc<AtomicU64>,
    // vCPUs that halted with interrupts off.
    for_good: AtomicU32,
}

impl Sleepers {
    /// For a machine of `cpus` vCPUs, all awake.
    pub fn new(cpus: u32) -> Arc<Self> {
        Arc::new(Sleepers {
            cpus,
            halts: Arc::default(),
            for_good: AtomicU32::new(0),
        })
    }
}

/// Where the wall-clock time of a vCPU went.
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuTime {
    /// In the engine, with the bus accesses that it made.
    pub running: Duration,
    /// Asleep in HLT.
    pub halted: Duration,
}

/// How often an engine came back, and why.
#[derive(Clone, Copy, Debug, Default)]
pub struct RunExits {
    /// Kicked.
    pub kicked: u64,
    /// HLT.
    pub halted: u64,
    /// Triple fault.
    pub shutdown: u64,
}

/// A vCPU before, while and after its thread runs.
pub struct Vcpu<B> {
    /// What executes it.
    pub engine: Box<dyn Engine>,
    /// What it sees of the machine.
    pub bus: B,
    /// What wakes it.
    pub doorbell: Arc<Doorbell>,
    /// The end of its machine.
    pub control: Arc<Control>,
    /// The other vCPUs.
    pub sleepers: Arc<Sleepers>,
    /// Where its time went.
    pub time: VcpuTime,
    /// Why its engine came back.
    pub exits: RunExits,
}

impl<B: Bus> Vcpu<B> {
    /// The body of the vCPU's thread: runs until the machine ends.
    pub fn run(&mut self) {
        self.doorbell.answer_here();
        let mut delay = RunDelay::of_this_thread();
        while !self.control.is_ending() {
            self.doorbell.answer();
            self.follow_starts();
            self.follow_wake();
            self.tell_steal_time(&mut delay);
            let start = Instant::now();
            let exit = self.engine.run(&mut self.bus);
            self.time.running += start.elapsed();
            match exit {
                Exit::Kicked => self.exits.kicked += 1,
                Exit::Halted => self.halt_unless_woken(),
                Exit::Shutdown => {
                    self.exits.shutdown += 1;
                    self.control.end(Cause::TripleFault);
                }
            }
        }
    }

    /// INIT and start-up IPIs, which reach a CPU whatever it does.
    fn follow_starts(&mut self) {
        while let Some(start) = self.bus.take_start() {
            let cpu = self.engine.cpu_mut();
            match start {
                Start::Init => cpu.init(),
                Start::StartUp(page) => cpu.start_up(page),
            }
        }
    }

    /// Ends a halt that another vCPU has asked to end.
    fn follow_wake(&mut self) {
        let halted = self.engine.cpu().activity == Activity::Halted;
        if halted && self.bus.take_wake() {
            self.engine.cpu_mut().activity = Activity::Active;
        }
    }

    fn tell_steal_time(&mut self, delay: &mut RunDelay) {
        let wanted = self.engine.cpu().msr.kvm_steal_time != 0;
        if wanted && let Some(nanoseconds) = delay.now_and_then() {
            let cpu = self.engine.cpu_mut();
            cpu.tell_steal_time(&mut self.bus, nanoseconds);
        }
    }

    /// Sleeps. A wake that came before the HLT, while the engine was left for another reason, is for this halt.
    fn halt_unless_woken(&mut self) {
        self.follow_wake();
        if self.engine.cpu().activity != Activity::Active {
            self.halt();
        }
    }

    fn halt(&mut self) {
        self.exits.halted += 1;
        self.sleepers.halts.fetch_add(1, Ordering::Relaxed);
        let start = Instant::now();
        self.engine.cpu_mut().mark_preempted(&mut self.bus);
        let cpu = self.engine.cpu();
        // A device may end an MWAIT, whatever is masked.
        let waits = matches!(cpu.activity, Activity::Waiting { .. });
        if waits || cpu.rflags.contains(Rflags::IF) {
            self.doorbell.sleep();
        } else {
            self.halt_for_good();
        }
        self.engine.cpu_mut().mark_running();
        self.bus.halt_ends();
        self.time.halted += start.elapsed();
    }

    /// HLT with interrupts off, or waiting for a start-up IPI. Only another vCPU can end it, one that is awake or that was called and has
    /// not noticed yet, unless the guest has told a device to send NMIs.
    fn halt_for_good(&mut self) {
        let sleepers = &self.sleepers;
        let last = sleepers.for_good.fetch_add(1, Ordering::SeqCst) + 1 == sleepers.cpus;
        if last && self.control.nobody_is_called() && !self.bus.device_ends_any_halt() {
            self.control.end(Cause::Halted);
        }
        self.doorbell.sleep();
        sleepers.for_good.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_memory::GuestRam;
    use doppel_x86::{Cpu, EmptyBus, EngineStats, Kick};
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::{Sender, channel};

    #[derive(Default)]
    struct Kicked(AtomicBool);
    impl Kick for Kicked {
        fn kick(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// Comes back with what the script says, then as kicked.
    struct Scripted {
        cpu: Box<Cpu>,
        script: Vec<Exit>,
        ran: Sender<Exit>,
        kicked: Arc<Kicked>,
    }
    impl Engine for Scripted {
        fn run(&mut self, _: &mut dyn Bus) -> Exit {
            let exit = self.script.pop().unwrap_or(Exit::Kicked);
            if exit == Exit::Halted && self.cpu.activity == Activity::Active {
                self.cpu.activity = Activity::Halted;
            }
            let _ = self.ran.send(exit);
            exit
        }
        fn cpu(&self) -> &Cpu {
            &self.cpu
        }
        fn cpu_mut(&mut self) -> &mut Cpu {
            &mut self.cpu
        }
        fn kicker(&self) -> Arc<dyn Kick> {
            self.kicked.clone()
        }
        fn stats(&self) -> EngineStats {
            EngineStats::new()
        }
    }

    fn vcpu(
        script: Vec<Exit>,
        flags: Rflags,
        cpus: u32,
    ) -> (Vcpu<EmptyBus>, std::sync::mpsc::Receiver<Exit>) {
        vcpu_on(EmptyBus, script, flags, cpus)
    }

    fn vcpu_on<B: Bus>(
        bus: B,
        script: Vec<Exit>,
        flags: Rflags,
        cpus: u32,
    ) -> (Vcpu<B>, std::sync::mpsc::Receiver<Exit>) {
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        let (ran, seen) = channel();
        let mut cpu = Cpu::new(0, ram);
        cpu.rflags = Rflags::ONE | flags;
        let engine = Box::new(Scripted {
            cpu,
            script,
            ran,
            kicked: Arc::default(),
        });
        let vcpu = Vcpu {
            doorbell: Doorbell::new(engine.kicker()),
            engine,
            bus,
            control: Arc::default(),
            sleepers: Sleepers::new(cpus),
            time: VcpuTime::default(),
            exits: RunExits::default(),
        };
        vcpu.control.set_doorbells(vec![vcpu.doorbell.clone()]);
        (vcpu, seen)
    }

    const SOON: Duration = Duration::from_secs(20);
    const A_WHILE: Duration = Duration::from_millis(50);

    #[test]
    fn a_halted_vcpu_sleeps_until_its_doorbell_rings() {
        let (mut vcpu, seen) = vcpu(vec![Exit::Halted], Rflags::IF, 1);
        let (doorbell, control) = (vcpu.doorbell.clone(), vcpu.control.clone());
        let thread = std::thread::spawn(move || {
            vcpu.run();
            vcpu
        });
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Halted));
        assert!(seen.recv_timeout(A_WHILE).is_err(), "asleep");
        doorbell.ring();
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Kicked));
        control.end(Cause::Stop);
        let vcpu = thread.join().unwrap();
        assert_eq!(vcpu.exits.halted, 1);
        assert!(vcpu.time.halted >= A_WHILE / 2);
    }

    #[test]
    fn one_in_mwait_sleeps_until_somebody_stores_to_its_line() {
        const LINE: u64 = 0x2040;
        let (mut vcpu, seen) = vcpu(vec![Exit::Halted], Rflags::empty(), 1);
        let cpu = vcpu.engine.cpu_mut();
        let (ram, doorbell) = (cpu.ram.clone(), vcpu.doorbell.clone());
        cpu.activity = Activity::Waiting { masked: false };
        cpu.peer.set_alarm(move || doorbell.ring());
        ram.tracker().watch(LINE, &cpu.peer);
        cpu.peer.arm();
        let control = vcpu.control.clone();
        let thread = std::thread::spawn(move || vcpu.run());
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Halted));
        ram.write_from_device(LINE + 64, &[1]);
        assert!(seen.recv_timeout(A_WHILE).is_err(), "asleep");
        assert!(!control.is_ending(), "a device may wake it");
        ram.write_from_device(LINE, &[0]);
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Kicked));
        control.end(Cause::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn a_wake_that_is_noticed_before_the_halt_ends_it() {
        let script = vec![Exit::Halted, Exit::Kicked];
        let bus = WakingBus {
            wake: true,
            ..WakingBus::default()
        };
        let (mut vcpu, seen) = vcpu_on(bus, script, Rflags::IF, 2);
        let control = vcpu.control.clone();
        let thread = std::thread::spawn(move || {
            vcpu.run();
            vcpu
        });
        for exit in [Exit::Kicked, Exit::Halted, Exit::Kicked] {
            assert_eq!(seen.recv_timeout(SOON), Ok(exit));
        }
        control.end(Cause::Stop);
        assert_eq!(thread.join().unwrap().exits.halted, 0);
    }

    #[test]
    fn a_stop_wakes_a_halted_vcpu() {
        let (mut vcpu, seen) = vcpu(vec![Exit::Halted], Rflags::IF, 1);
        let control = vcpu.control.clone();
        let thread = std::thread::spawn(move || vcpu.run());
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Halted));
        control.end(Cause::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn a_triple_fault_ends_the_machine() {
        let (mut vcpu, _seen) = vcpu(vec![Exit::Shutdown], Rflags::IF, 1);
        vcpu.run();
        assert_eq!(vcpu.control.wait(), Cause::TripleFault);
    }

    #[test]
    fn the_last_halt_with_interrupts_off_ends_the_machine() {
        let (mut vcpu, _seen) = vcpu(vec![Exit::Halted], Rflags::empty(), 1);
        vcpu.run();
        assert_eq!(vcpu.control.wait(), Cause::Halted);
    }

    /// Nothing but a device that may send an NMI, or another CPU that has asked once for the end of a halt.
    #[derive(Default)]
    struct WakingBus {
        nmi: bool,
        wake: bool,
    }
    #[rustfmt::skip]
    impl Bus for WakingBus {
        fn port_read(&mut self, _: u16, _: u8) -> u32 { 0 }
        fn port_write(&mut self, _: u16, _: u8, _: u32) {}
        fn mmio_read(&mut self, _: u64, _: u8) -> u64 { 0 }
        fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
        fn apic_msr_read(&mut self, _: u32) -> Option<u64> { None }
        fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> { None }
        fn cr8(&mut self) -> u64 { 0 }
        fn set_cr8(&mut self, _: u64) {}
        fn interrupt_pending(&mut self) -> bool { false }
        fn interrupt_acknowledge(&mut self) -> Option<u8> { None }
        fn take_nmi(&mut self) -> bool { false }
        fn device_ends_any_halt(&mut self) -> bool { self.nmi }
        fn take_wake(&mut self) -> bool { std::mem::take(&mut self.wake) }
    }

    #[test]
    fn an_nmi_of_a_device_may_still_wake_one_that_halted_with_interrupts_off() {
        let bus = WakingBus {
            nmi: true,
            ..WakingBus::default()
        };
        let (mut vcpu, seen) = vcpu_on(bus, vec![Exit::Halted], Rflags::empty(), 1);
        let (doorbell, control) = (vcpu.doorbell.clone(), vcpu.control.clone());
        let thread = std::thread::spawn(move || vcpu.run());
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Halted));
        assert!(seen.recv_timeout(A_WHILE).is_err(), "asleep");
        assert!(!control.is_ending());
        doorbell.ring();
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Kicked));
        control.end(Cause::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn another_vcpu_may_still_wake_one_that_halted_with_interrupts_off() {
        let (mut vcpu, seen) = vcpu(vec![Exit::Halted], Rflags::empty(), 2);
        let control = vcpu.control.clone();
        let thread = std::thread::spawn(move || vcpu.run());
        assert_eq!(seen.recv_timeout(SOON), Ok(Exit::Halted));
        assert!(seen.recv_timeout(A_WHILE).is_err(), "asleep");
        assert!(!control.is_ending());
        control.end(Cause::Stop);
        thread.join().unwrap();
    }
}
