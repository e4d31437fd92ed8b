//! The bus between the APICs: every local APIC with its lock, the I/O APIC, and the messages between them.
//!
//! A local APIC is used by its own vCPU all the time and by others now and then. What the vCPU asks most often (is there
//! anything for me?) is therefore an atomic beside the lock, kept up to date by whoever held the lock last.
//!
//! Locks: the I/O APIC's, then one local APIC's. What a register access means for others (an [`Effect`]) is carried out
//! after the lock of the local APIC is given back, so that two vCPUs that interrupt each other never wait in a circle.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use doppel_device::{Alarm, BusDevice, Clock, InterruptInput, MsiTarget, Nanos, OnAlarm, Timers};

use crate::{
    Acknowledged, DeliveryMode, Destination, Effect, InterruptMessage, IoApic, LocalApic,
    LocalApicConfig, Requests, Start,
};

/// Tells a vCPU's thread to look at [`CpuApic::requests`]: sets a flag, wakes it. Chips may be locked meanwhile, so it
/// calls none.
pub type Kick = Box<dyn Fn() + Send + Sync>;

/// No register page.
const NO_PAGE: u64 = u64::MAX;

/// A local APIC with its lock.
struct Slot {
    state: Mutex<State>,
    requests: AtomicU32,
    page: AtomicU64,
    /// The processor is to leave its halt.
    woken: AtomicBool,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
    kick: Kick,
}

struct State {
    apic: LocalApic,
    armed: Option<Nanos>,
}

impl Slot {
    fn new(apic: LocalApic, kick: Kick, timers: &Arc<Timers>) -> Arc<Self> {
        let slot = Arc::new_cyclic(|this: &Weak<Self>| Slot {
            state: Mutex::new(State { apic, armed: None }),
            requests: AtomicU32::new(0),
            page: AtomicU64::new(NO_PAGE),
            woken: AtomicBool::new(false),
            clock: timers.clock().clone(),
            alarm: timers.alarm(this.clone()),
            kick,
        });
        slot.with(|_, _| ());
        slot
    }

    /// Calls into the local APIC, then lets the alarm and the vCPU follow.
    fn with<R>(&self, f: impl FnOnce(&mut LocalApic, Nanos) -> R) -> R {
        let (result, new) = self.change(f);
        if new {
            (self.kick)();
        }
        result
    }

    /// The same but for the kick: whether the vCPU has something new to look at.
    fn change<R>(&self, f: impl FnOnce(&mut LocalApic, Nanos) -> R) -> (R, bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state.apic, self.clock.now());
        let deadline = state.apic.next_deadline();
        if state.armed != deadline {
            state.armed = deadline;
            self.alarm.set(deadline);
        }
        self.page
            .store(state.apic.page().unwrap_or(NO_PAGE), Ordering::Relaxed);
        let new = state.apic.requests().bits();
        let old = self.requests.swap(new, Ordering::SeqCst);
        (result, new & !old != 0)
    }
}

impl OnAlarm for Slot {
    fn on_alarm(&self) {
        self.with(|apic, now| apic.advance(now));
    }
}

impl Slot {
    /// Takes a message that may be for it; true where it is and was not refused.
    fn accept(&self, message: InterruptMessage) -> bool {
        self.with(|apic, _| {
            apic.matches(message.destination)
                && apic.accept(message.mode, message.vector, message.level_triggered)
        })
    }
}

/// LINT0 (input 0) and LINT1 (input 1).
impl InterruptInput for Slot {
    fn set_level(&self, input: u32, level: bool) {
        self.with(|apic, _| apic.set_lint(input, level));
    }
}

/// All APICs of a machine. As a [`BusDevice`] it is the I/O APIC's register window, as an [`InterruptInput`] the I/O
/// APIC's pins.
pub struct ApicBus {
    slots: Vec<Arc<Slot>>,
    io: Mutex<IoApic>,
    /// Some device was told once to send what ends a halt with interrupts off. Nobody looks whether it still is.
    device_ends_any_halt: AtomicBool,
}

impl ApicBus {
    /// The APICs of processors `cpus`, each with what wakes it.
    pub fn new(cpus: Vec<(LocalApicConfig, Kick)>, io: IoApic, timers: &Arc<Timers>) -> Arc<Self> {
        let slots = cpus
            .into_iter()
            .map(|(config, kick)| Slot::new(LocalApic::new(config), kick, timers))
            .collect();
        Arc::new(ApicBus {
            slots,
            io: Mutex::new(io),
            device_ends_any_halt: AtomicBool::new(false),
        })
    }

    /// The local APIC of processor `index`, for its vCPU.
    pub fn cpu(self: &Arc<Self>, index: usize) -> Option<CpuApic> {
        Some(CpuApic {
            bus: self.clone(),
            slot: self.slots.get(index)?.clone(),
        })
    }

    /// Sends a message to all that it is for; true where one of them accepted it.
    pub fn deliver(&self, message: InterruptMessage) -> bool {
        if message.mode == DeliveryMode::LowestPriority {
            return self.deliver_to_lowest(message);
        }
        let candidates = self.candidates(message.destination).iter();
        candidates.fold(false, |accepted, slot| slot.accept(message) | accepted)
    }

    /// Those that may match: a physical ID is also the place in the list.
    fn candidates(&self, destination: Destination) -> &[Arc<Slot>] {
        match destination {
            Destination::Physical(id) => self.slot(id).map_or(&[], std::slice::from_ref),
            _ => &self.slots,
        }
    }

    fn slot(&self, id: u32) -> Option<&Arc<Slot>> {
        self.slots.get(id as usize)
    }

    fn deliver_to_lowest(&self, message: InterruptMessage) -> bool {
        let priority = |slot: &&Arc<Slot>| {
            let state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
            let matches = state.apic.matches(message.destination);
            state.apic.arbitration_priority().filter(|_| matches)
        };
        let candidates = self.slots.iter().filter_map(|s| Some((priority(&s)?, s)));
        let lowest = candidates.min_by_key(|(priority, _)| *priority);
        lowest.is_some_and(|(_, slot)| {
            slot.with(|apic, _| apic.accept(message.mode, message.vector, message.level_triggered))
        })
    }

    /// Calls into the I/O APIC, then sends what it has to send.
    pub fn with_io_apic<R>(&self, f: impl FnOnce(&mut IoApic) -> R) -> R {
        let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut io);
        io.send(|message| self.deliver(message));
        result
    }

    fn carry_out(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Send(message) => {
                self.deliver(message);
            }
            Effect::EndOfInterrupt(vector) => self.with_io_apic(|io| io.end_of_interrupt(vector)),
        }
    }
}

impl BusDevice for ApicBus {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        self.with_io_apic(|io| io.read(offset, size))
    }

    fn write(&self, offset: u64, _size: u8, value: u64) {
        self.with_io_apic(|io| io.write(offset, value as u32));
    }
}

impl InterruptInput for ApicBus {
    fn set_level(&self, input: u32, level: bool) {
        self.with_io_apic(|io| io.set_input(input, level));
    }
}

impl MsiTarget for ApicBus {
    fn send(&self, address: u64, data: u32) {
        if let Some(message) = InterruptMessage::from_msi(address, data) {
            self.deliver(message);
        }
    }

    fn set_up(&self, data: u32) {
        if DeliveryMode::from_register(data).is_some_and(DeliveryMode::ends_any_halt) {
            self.device_ends_any_halt.store(true, Ordering::SeqCst);
        }
    }
}

/// One processor's local APIC on the bus: what its vCPU calls.
#[derive(Clone)]
pub struct CpuApic {
    bus: Arc<ApicBus>,
    slot: Arc<Slot>,
}

impl CpuApic {
    /// What the local APIC wants of the processor now. Takes no lock.
    pub fn requests(&self) -> Requests {
        Requests::from_bits_truncate(self.slot.requests.load(Ordering::SeqCst))
    }

    /// The guest physical page of the registers, where they are in memory. Takes no lock.
    pub fn page(&self) -> Option<u64> {
        Some(self.slot.page.load(Ordering::Relaxed)).filter(|page| *page != NO_PAGE)
    }

    /// A load from the register page.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        self.slot.with(|apic, now| apic.read(offset, size, now))
    }

    /// A store to the register page.
    pub fn write(&self, offset: u64, size: u8, value: u64) {
        let effect = self
            .slot
            .with(|apic, now| apic.write(offset, size, value, now));
        self.bus.carry_out(effect);
    }

    /// RDMSR; `None` is #GP(0).
    pub fn read_msr(&self, msr: u32) -> Option<u64> {
        self.slot.with(|apic, now| apic.read_msr(msr, now))
    }

    /// WRMSR, when the guest's TSC is `tsc_now`; `None` is #GP(0).
    pub fn write_msr(&self, msr: u32, value: u64, tsc_now: u64) -> Option<()> {
        let effect = self
            .slot
            .with(|apic, now| apic.write_msr(msr, value, tsc_now, now))?;
        self.bus.carry_out(effect);
        Some(())
    }

    /// The guest has set its TSC, which is `tsc_now`.
    pub fn tsc_moved(&self, tsc_now: u64) {
        self.slot.with(|apic, now| apic.tsc_moved(tsc_now, now));
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        self.slot.with(|apic, _| apic.cr8())
    }

    /// A write to CR8.
    pub fn set_cr8(&self, value: u64) {
        self.slot.with(|apic, _| apic.set_cr8(value));
    }

    /// The processor takes an interrupt. On [`Acknowledged::External`] ask the 8259 next, and only then look
    /// at the requests again.
    pub fn acknowledge(&self) -> Option<Acknowledged> {
        self.slot.with(|apic, _| apic.acknowledge())
    }

    /// See [`LocalApic::lend_end`].
    pub fn lend_end(&self) -> bool {
        self.slot.with(|apic, _| apic.lend_end())
    }

    /// See [`LocalApic::return_end`]. The processor is kicked unless it `looks` at the requests next anyway.
    pub fn return_end(&self, over: bool, looks: bool) {
        let end = |apic: &mut LocalApic, _| apic.return_end(over);
        match looks {
            true => self.slot.change(end).0,
            false => self.slot.with(end),
        }
    }

    /// See [`LocalApic::overflow`].
    pub fn overflow(&self, masks: bool) {
        self.slot.with(|apic, _| apic.overflow(masks));
    }

    /// The processor takes a pending NMI.
    pub fn take_nmi(&self) -> bool {
        self.requests().contains(Requests::NMI) && self.slot.with(|apic, _| apic.take_nmi())
    }

    /// See [`LocalApic::nmi_ends`].
    pub fn nmi_ends(&self) {
        self.slot.with(|apic, _| apic.nmi_ends());
    }

    /// A device may yet end a halt of some processor whose interrupts are off: an input of the I/O APIC, LINT0 or a message sends NMI or INIT.
    pub fn device_ends_any_halt(&self) -> bool {
        let bus = &self.bus;
        let io = bus.io.lock().unwrap_or_else(PoisonError::into_inner);
        let lint0 = |slot: &Arc<Slot>| slot.with(|apic, _| apic.lint0_ends_any_halt());
        bus.device_ends_any_halt.load(Ordering::SeqCst)
            || io.ends_any_halt()
            || bus.slots.iter().any(lint0)
    }

    /// The processor takes a pending INIT or start-up.
    pub fn take_start(&self) -> Option<Start> {
        let waits = self.requests().contains(Requests::START);
        waits.then(|| self.slot.with(|apic, _| apic.take_start()))?
    }

    /// Makes the processor with this ID leave its present halt, or its next.
    pub fn wake(&self, id: u32) {
        if let Some(slot) = self.bus.slot(id) {
            slot.woken.store(true, Ordering::SeqCst);
            (slot.kick)();
        }
    }

    /// Takes a [`Self::wake`] of this processor.
    pub fn take_wake(&self) -> bool {
        self.slot.woken.load(Ordering::SeqCst) && self.slot.woken.swap(false, Ordering::SeqCst)
    }

    /// Sends an interrupt, as the low half of an ICR describes it, to the processors whose bit is set; the lowest bit is that of
    /// ID `first`. Returns how many took it.
    pub fn send_to(&self, ids: u128, first: u32, icr: u32) -> u64 {
        let Some(mode) = DeliveryMode::from_register(icr) else {
            return 0;
        };
        let wanted = (0..u128::BITS).filter(|n| ids >> n & 1 != 0);
        let mut taken = 0;
        for id in wanted.filter_map(|n| first.checked_add(n)) {
            let message = InterruptMessage {
                destination: Destination::Physical(id),
                mode,
                vector: icr as u8,
                level_triggered: false,
            };
            let slot = self.bus.slot(id);
            taken += u64::from(slot.is_some_and(|s| s.accept(message)));
        }
        taken
    }

    /// IA32_APIC_BASE bit 11, which CPUID.1:EDX bit 9 mirrors.
    pub fn is_enabled(&self) -> bool {
        self.slot.with(|apic, _| apic.is_enabled())
    }

    /// Sends an NMI, as the machine's operator does.
    pub fn inject_nmi(&self) {
        self.slot.with(|apic, _| {
            apic.accept(DeliveryMode::Nmi, 0, false);
        });
    }

    /// Its LINT0 (input 0) and LINT1 (input 1) pins. The first processor's LINT0 is where the 8259's INTR goes.
    pub fn pins(&self) -> Arc<dyn InterruptInput> {
        self.slot.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IO_APIC_BASE;
    use doppel_device::{Bus, FakeClock, Line, Region};
    use std::sync::atomic::AtomicUsize;

    struct Rig {
        clock: Arc<FakeClock>,
        timers: Arc<Timers>,
        bus: Arc<ApicBus>,
        cpus: Vec<CpuApic>,
        kicks: Arc<AtomicUsize>,
    }

    fn rig(cpus: u32) -> Rig {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let kicks = Arc::new(AtomicUsize::new(0));
        let with_kick = |id: u32| {
            let kicks = kicks.clone();
            let config = LocalApicConfig {
                id,
                bootstrap: id == 0,
                bus_hz: 1_000_000_000,
                tsc_hz: 1_000_000_000,
            };
            let kick = move || {
                kicks.fetch_add(1, Ordering::SeqCst);
            };
            (config, Box::new(kick) as Kick)
        };
        let bus = ApicBus::new((0..cpus).map(with_kick).collect(), IoApic::new(0), &timers);
        let cpus: Vec<_> = (0..cpus as usize).map(|n| bus.cpu(n).unwrap()).collect();
        for cpu in &cpus {
            cpu.write(0xf0, 4, 0x1ff);
        }
        Rig {
            clock,
            timers,
            bus,
            cpus,
            kicks,
        }
    }

    fn redirect(bus: &Bus, pin: u64, entry: u64) {
        for (register, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry)] {
            bus.write(IO_APIC_BASE, 4, register);
            bus.write(IO_APIC_BASE + 0x10, 4, value & 0xffff_ffff);
        }
    }

    #[test]
    fn a_level_interrupt_goes_from_the_pin_to_the_vcpu_and_back() {
        let rig = rig(2);
        let bus = Bus::new();
        bus.attach(Region::new(IO_APIC_BASE, 0x1000), rig.bus.clone())
            .unwrap();
        redirect(&bus, 10, 1 << 56 | 0x8061);
        let pin = Line::new(vec![(rig.bus.clone(), 10)]).pin();
        pin.set(true);
        let cpu = &rig.cpus[1];
        for _ in 0..2 {
            assert_eq!(cpu.requests(), Requests::INTERRUPT);
            assert!(rig.cpus[0].requests().is_empty());
            assert_eq!(cpu.acknowledge(), Some(Acknowledged::Vector(0x61)));
            assert!(cpu.requests().is_empty());
            cpu.write(0xb0, 4, 0);
        }
        assert_eq!(cpu.acknowledge(), Some(Acknowledged::Vector(0x61)));
        pin.set(false);
        cpu.write(0xb0, 4, 0);
        assert!(cpu.requests().is_empty());
    }

    #[test]
    fn a_level_that_nobody_accepted_is_sent_again_when_its_entry_is_written() {
        let rig = rig(2);
        let bus = Bus::new();
        bus.attach(Region::new(IO_APIC_BASE, 0x1000), rig.bus.clone())
            .unwrap();
        let pin = Line::new(vec![(rig.bus.clone(), 10)]).pin();
        // To nobody, then to one that software has off.
        redirect(&bus, 10, 7 << 56 | 0x8061);
        pin.set(true);
        redirect(&bus, 10, 1 << 56 | 0x8061);
        let cpu = &rig.cpus[1];
        assert_eq!(cpu.acknowledge(), Some(Acknowledged::Vector(0x61)));
        pin.set(false);
        cpu.write(0xb0, 4, 0);
        cpu.write(0xf0, 4, 0xff);
        pin.set(true);
        assert_eq!(bus.read(IO_APIC_BASE + 0x10, 4), 0x8061, "no remote IRR");
        assert!(cpu.requests().is_empty());
        cpu.write(0xf0, 4, 0x1ff);
        redirect(&bus, 10, 1 << 56 | 0x8061);
        assert_eq!(cpu.requests(), Requests::INTERRUPT);
        assert_eq!(bus.read(IO_APIC_BASE + 0x10, 4), 0xc061);
    }

    #[test]
    fn devices_that_send_nmi_or_init_may_end_any_halt() {
        let lint0 = |rig: &Rig, entry| rig.cpus[0].write(0x350, 4, entry);
        let input = |rig: &Rig, entry: u64| {
            rig.bus.with_io_apic(|io| {
                io.write(0, 0x10);
                io.write(0x10, entry as u32);
            });
        };
        let rig = rig(2);
        let may = || rig.cpus[1].device_ends_any_halt();
        for mode in [0x400, 0x500] {
            assert!(!may());
            lint0(&rig, mode);
            assert!(may());
            lint0(&rig, 0x1_0000 | mode);
            assert!(!may());
            lint0(&rig, 0x700);
            input(&rig, mode);
            assert!(may());
            input(&rig, 0x1_0000 | mode);
        }
        input(&rig, 0x51);
        rig.bus.set_up(0x4051);
        assert!(!may());
        rig.bus.set_up(0x400);
        assert!(may());
    }

    #[test]
    fn an_ipi_kicks_its_target_once() {
        let rig = rig(3);
        rig.cpus[0].write(0x310, 4, 2 << 24);
        rig.cpus[0].write(0x300, 4, 0x40fd);
        rig.cpus[0].write(0x300, 4, 0x40fc);
        assert_eq!(rig.kicks.load(Ordering::SeqCst), 1);
        assert_eq!(rig.cpus[2].acknowledge(), Some(Acknowledged::Vector(0xfd)));
        rig.cpus[0].write(0x300, 4, 0xc_4500);
        assert_eq!(rig.cpus[1].take_start(), Some(Start::Init));
        rig.cpus[0].write(0x300, 4, 0xc_4608);
        assert_eq!(rig.cpus[1].take_start(), Some(Start::Startup(8)));
        assert_eq!(rig.cpus[0].take_start(), None);
    }

    #[test]
    fn an_end_that_was_lent_is_asked_for_when_something_waits() {
        let rig = rig(2);
        let (a, b) = (&rig.cpus[0], &rig.cpus[1]);
        for over in [true, false] {
            b.send_to(1, 0, 0x51);
            assert_eq!(a.acknowledge(), Some(Acknowledged::Vector(0x51)));
            assert!(a.lend_end() && a.requests().is_empty());
            let kicks = rig.kicks.load(Ordering::SeqCst);
            b.send_to(1, 0, 0x41);
            assert_eq!(a.requests(), Requests::END);
            assert_eq!(rig.kicks.load(Ordering::SeqCst), kicks + 1);
            a.return_end(over, false);
            let let_through = usize::from(over);
            assert_eq!(rig.kicks.load(Ordering::SeqCst), kicks + 1 + let_through);
            if !over {
                assert!(
                    a.requests().is_empty(),
                    "a lower one waits for the register"
                );
                a.write(0xb0, 4, 0);
            }
            assert_eq!(a.acknowledge(), Some(Acknowledged::Vector(0x41)));
            a.write(0xb0, 4, 0);
        }
        assert!(!a.lend_end(), "nothing is in service");
    }

    #[test]
    fn who_looks_next_anyway_is_not_kicked_for_what_the_end_of_an_interrupt_lets_through() {
        let rig = rig(2);
        let (a, b) = (&rig.cpus[0], &rig.cpus[1]);
        b.send_to(1, 0, 0x51);
        assert_eq!(a.acknowledge(), Some(Acknowledged::Vector(0x51)));
        assert!(a.lend_end());
        b.send_to(1, 0, 0x41);
        let kicks = rig.kicks.load(Ordering::SeqCst);
        a.return_end(true, true);
        assert_eq!(rig.kicks.load(Ordering::SeqCst), kicks);
        assert_eq!(a.requests(), Requests::INTERRUPT);
    }

    #[test]
    fn one_call_interrupts_many_and_one_wakes() {
        let rig = rig(3);
        assert_eq!(rig.cpus[0].send_to(1 | 1 << 1 | 1 << 90, 1, 0xfd), 2);
        let takers: Vec<_> = rig.cpus.iter().map(|cpu| cpu.acknowledge()).collect();
        let taken = Some(Acknowledged::Vector(0xfd));
        assert_eq!(takers, [None, taken, taken]);
        assert_eq!(rig.cpus[0].send_to(u128::MAX, u32::MAX, 0xfd), 0);
        assert_eq!(rig.cpus[0].send_to(1, 0, 0x3fd), 0, "a reserved mode");
        let kicks = rig.kicks.load(Ordering::SeqCst);
        rig.cpus[0].wake(2);
        rig.cpus[0].wake(77);
        assert_eq!(rig.kicks.load(Ordering::SeqCst), kicks + 1);
        assert!(rig.cpus[2].take_wake() && !rig.cpus[2].take_wake());
    }

    #[test]
    fn lowest_priority_goes_to_one() {
        let rig = rig(3);
        rig.cpus[0].set_cr8(3);
        rig.cpus[1].set_cr8(2);
        rig.cpus[2].set_cr8(4);
        rig.bus.send(0xfeef_f00c, 0x4171);
        let takers: Vec<_> = rig.cpus.iter().map(|cpu| cpu.acknowledge()).collect();
        assert_eq!(takers, [None, Some(Acknowledged::Vector(0x71)), None]);
    }

    #[test]
    fn the_timer_thread_delivers_the_deadline() {
        let rig = rig(1);
        let cpu = &rig.cpus[0];
        cpu.write(0x320, 4, 2 << 17 | 0xec);
        cpu.write_msr(0x6e0, 1_000, 0).unwrap();
        assert_eq!(rig.timers.fire_due(), Some(1_000));
        rig.clock.advance(1_000);
        rig.timers.fire_due();
        assert_eq!(rig.kicks.load(Ordering::SeqCst), 1);
        assert_eq!(cpu.acknowledge(), Some(Acknowledged::Vector(0xec)));
        assert_eq!(cpu.read_msr(0x6e0), Some(0));
    }

    #[test]
    fn the_deadline_follows_the_guests_clock() {
        let rig = rig(1);
        let cpu = &rig.cpus[0];
        cpu.write(0x320, 4, 2 << 17 | 0xec);
        cpu.write_msr(0x6e0, 5_000, 0).unwrap();
        cpu.tsc_moved(4_900);
        assert_eq!(rig.timers.fire_due(), Some(100));
        cpu.tsc_moved(5_000);
        assert_eq!(rig.kicks.load(Ordering::SeqCst), 1);
        assert_eq!(cpu.acknowledge(), Some(Acknowledged::Vector(0xec)));
        assert_eq!(rig.timers.fire_due(), None);
    }

    #[test]
    fn vcpus_that_interrupt_each_other_do_not_deadlock() {
        let rig = rig(2);
        rig.bus.with_io_apic(|io| {
            io.write(0, 0x10);
            io.write(0x10, 0x8051);
        });
        std::thread::scope(|scope| {
            for (n, cpu) in rig.cpus.iter().enumerate() {
                let bus = &rig.bus;
                scope.spawn(move || {
                    for round in 0..20_000 {
                        cpu.write(0x300, 4, 0xc_4041);
                        bus.set_level(0, (round + n) % 2 == 0);
                        if cpu.acknowledge().is_some() {
                            cpu.write(0xb0, 4, 0);
                        }
                    }
                });
            }
        });
    }
}
