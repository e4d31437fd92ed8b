//! Chips wired together as a machine wires them: from a device's pin to the vector that the processor takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use doppel_device::{
    Bus, CharSink, Disconnected, FakeClock, InputQueue, Line, OutputQueue, Pin, Region, Timers,
    Wired,
};
use doppel_pc::{
    Acknowledged, ApicBus, CpuApic, I8254, I8259, IO_APIC_BASE, IoApic, LocalApicConfig, Requests,
    Uart16550,
};

/// A little more than a period of [`Machine::start_100_hz`].
const PERIOD: u64 = 10_000_200;

struct Machine {
    clock: Arc<FakeClock>,
    timers: Arc<Timers>,
    ports: Bus,
    memory: Bus,
    pic: Arc<Wired<I8259>>,
    cpu: CpuApic,
    kicks: Arc<AtomicU32>,
    apics: Arc<ApicBus>,
}

impl Machine {
    fn new() -> Self {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let kicks = Arc::new(AtomicU32::new(0));
        let kick = kicks.clone();
        let config = LocalApicConfig {
            id: 0,
            bootstrap: true,
            bus_hz: 1_000_000_000,
            tsc_hz: 1_000_000_000,
        };
        let wake = Box::new(move || {
            kick.fetch_add(1, Ordering::SeqCst);
        });
        let apics = ApicBus::new(vec![(config, wake)], IoApic::new(0), &timers);
        let cpu = apics.cpu(0).unwrap();
        let intr = Line::new(vec![(cpu.pins(), 0)]).pin();
        let pic = Wired::new(I8259::new(), vec![intr], &timers);
        let (ports, memory) = (Bus::new(), Bus::new());
        for (start, offset) in [(0x20, 0), (0xa0, 2), (0x4d0, 4)] {
            let region = Region::new(start, 2).at_offset(offset);
            ports.attach(region, pic.clone()).unwrap();
        }
        memory
            .attach(Region::new(IO_APIC_BASE, 0x1000), apics.clone())
            .unwrap();
        Machine {
            clock,
            timers,
            ports,
            memory,
            pic,
            cpu,
            kicks,
            apics,
        }
    }

    /// ISA interrupt `irq`, at the 8259s and at input `gsi` of the I/O APIC.
    fn isa_pin(&self, irq: u32, gsi: u32) -> Pin {
        Line::new(vec![(self.pic.clone(), irq), (self.apics.clone(), gsi)]).pin()
    }

    fn add_timer(&self) {
        let chip = Wired::new(I8254::new(), vec![self.isa_pin(0, 2)], &self.timers);
        self.ports
            .attach(Region::new(0x40, 4), chip.clone())
            .unwrap();
        let port_61 = Region::new(0x61, 1).at_offset(4);
        self.ports.attach(port_61, chip).unwrap();
    }

    fn set_up_8259(&self) {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 2),
            (0xa1, 1),
        ] {
            self.ports.write(port, 1, value);
        }
    }

    fn redirect(&self, gsi: u64, vector: u64) {
        self.memory.write(IO_APIC_BASE, 4, 0x10 + 2 * gsi);
        self.memory.write(IO_APIC_BASE + 0x10, 4, vector);
    }

    fn start_100_hz(&self) {
        for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
            self.ports.write(port, 1, value);
        }
    }

    fn pass(&self, nanos: u64) {
        self.clock.advance(nanos);
        self.timers.fire_due();
    }

    /// What the vCPU does between instructions.
    fn interrupt(&self) -> Option<u8> {
        match self.cpu.acknowledge()? {
            Acknowledged::Vector(vector) => Some(vector),
            Acknowledged::External => Some(self.pic.with(|pic, _| pic.acknowledge())),
        }
    }
}

#[test]
fn the_timer_interrupts_through_the_8259() {
    let machine = Machine::new();
    machine.add_timer();
    machine.set_up_8259();
    machine.ports.write(0x21, 1, 0xfe);
    machine.start_100_hz();
    machine.interrupt();
    machine.ports.write(0x20, 1, 0x20);
    for tick in 0..3 {
        assert_eq!(machine.interrupt(), None, "tick {tick}");
        machine.pass(PERIOD);
        assert_eq!(machine.cpu.requests(), Requests::EXTERNAL);
        assert_eq!(machine.interrupt(), Some(0x30));
        assert!(machine.cpu.requests().is_empty());
        machine.ports.write(0x20, 1, 0x20);
    }
    assert!(machine.kicks.load(Ordering::SeqCst) >= 3);
}

#[test]
fn the_timer_interrupts_through_the_io_apic() {
    let machine = Machine::new();
    machine.add_timer();
    machine.set_up_8259();
    machine.ports.write(0x21, 1, 0xff);
    machine.cpu.write(0xf0, 4, 0x1ff);
    machine.cpu.write(0x350, 4, 0x1_0700);
    machine.start_100_hz();
    machine.redirect(2, 0x40);
    for _ in 0..3 {
        machine.pass(PERIOD);
        assert_eq!(machine.interrupt(), Some(0x40));
        assert_eq!(machine.interrupt(), None);
        machine.cpu.write(0xb0, 4, 0);
    }
}

#[test]
fn typing_interrupts_through_the_io_apic() {
    let machine = Machine::new();
    let (input, output) = (InputQueue::new(64), OutputQueue::new(64));
    let uart = Uart16550::new(output.clone(), input.clone());
    let uart = Wired::new(uart, vec![machine.isa_pin(4, 4)], &machine.timers);
    let backed: Arc<dyn doppel_device::Backed> = uart.clone();
    input.connect(Arc::downgrade(&backed));
    output.connect(Arc::downgrade(&backed));
    machine.ports.attach(Region::new(0x3f8, 8), uart).unwrap();
    machine.set_up_8259();
    machine.ports.write(0x21, 1, 0xff);
    machine.cpu.write(0xf0, 4, 0x1ff);
    machine.redirect(4, 0x44);
    machine.ports.write(0x3f9, 1, 1);
    assert_eq!(machine.interrupt(), None);
    assert!(input.push(b"k"));
    assert_eq!(machine.interrupt(), Some(0x44));
    assert_eq!(machine.ports.read(0x3f8, 1), u64::from(b'k'));
    machine.ports.write(0x3f8, 1, b'!'.into());
    output.close();
    let mut shown = Vec::new();
    output.run(&mut shown).unwrap();
    assert_eq!(shown, b"!");
}

#[test]
fn a_disconnected_back_end_swallows() {
    assert_eq!(Disconnected.write(b"abc"), 3);
}

/// Every lock order that the machine has, at once: the vCPU's accesses, the timer thread, a back-end's thread.
#[test]
fn devices_timers_and_the_vcpu_do_not_deadlock() {
    let machine = Machine::new();
    machine.add_timer();
    machine.set_up_8259();
    machine.cpu.write(0xf0, 4, 0x1ff);
    machine.redirect(4, 0x8044);
    machine.redirect(2, 0x42);
    let pin = machine.isa_pin(4, 4);
    machine.start_100_hz();
    std::thread::scope(|scope| {
        scope.spawn(|| (0..5_000).for_each(|_| machine.pass(1_000_000)));
        scope.spawn(|| (0..20_000).for_each(|n| pin.set(n % 2 == 0)));
        scope.spawn(|| {
            for n in 0..20_000 {
                if let Some(vector) = machine.interrupt()
                    && vector >= 0x40
                {
                    machine.cpu.write(0xb0, 4, 0);
                }
                machine.ports.write(0x20, 1, 0x20);
                machine.ports.write(0x21, 1, n & 0x11);
                machine.ports.read(0x61, 1);
            }
        });
    });
}
