//! The PC as a wiring diagram: which chip answers where, and where its pins lead. docs/machine.md draws it.

use std::sync::{Arc, Weak};

use doppel_device::{
    Backed, Bus, BusDevice, BusError, Gate, HostClock, InterruptInput, Line, Pin, Region, Timers,
    Wired,
};
use doppel_memory::{GuestRam, HOLE_START};
use doppel_pc::{
    AcpiPm, AcpiPmConfig, ApicBus, CpuApic, DebugExit, Ecam, FwCfg, HPET_LEGACY, HPET_LEN,
    HPET_REPLACES, HPET_ROUTES, HostBridge, Hpet, I8042, I8254, I8259, IoApic, Kick,
    LocalApicConfig, Mc146818, NumericError, PciBus, PciConfigPorts, Port92, TEST_LINES,
    TEST_MEMORY_LEN, TestLines, TestMemory, TestPorts, Uart16550,
};
use doppel_x86::APIC_BUS_HZ;

use crate::clock_pages::ClockPages;
use crate::config::MachineConfig;
use crate::control::Control;
use crate::doorbell::Doorbell;
use crate::layout;
use crate::machine::MachineError;
use crate::panic_watch::PanicWatch;
use crate::serial::CharLink;
use crate::vcpu::Sleepers;
use crate::virtio::VirtioDevices;

const KEYBOARD_IRQ: u8 = 1;
const NUMERIC_ERROR_IRQ: u8 = 13;
const NUMERIC_ERROR: u16 = 0xf0;
const ISA_IRQS: u8 = 16;
const DEBUG_EXIT: u16 = 0xf4;
/// QEMU's: pc-testdev's ports, those that decode single bytes, interrupt lines and memory; fw_cfg.
const TEST_PORTS: u16 = 0xe0;
const TEST_BYTE_PORTS: u16 = 0xe8;
const TEST_IRQ_LINES: u16 = 0x2000;
const TEST_MEMORY: u64 = 0xff00_0000;
const FW_CFG: u16 = 0x510;

/// What the chips are wired to.
pub struct PcParts<'a> {
    /// The machine's configuration.
    pub config: &'a MachineConfig,
    /// Frequency of the guest's TSC.
    pub tsc_hz: u64,
    /// What wakes each vCPU.
    pub doorbells: &'a [Arc<Doorbell>],
    /// Where requests for power off and reset go.
    pub control: &'a Arc<Control>,
    /// The serial port's back-end calls this.
    pub serial: &'a CharLink,
    /// Counts HLTs.
    pub sleepers: &'a Sleepers,
    /// The guest's memory, for devices that reach it.
    pub ram: &'a Arc<GuestRam>,
}

/// The wired chips.
pub struct Pc {
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Device memory, but for the local APICs' pages.
    pub memory: Arc<Bus>,
    /// The 8259 pair.
    pub pic: Arc<Wired<I8259>>,
    /// Where processors tell of x87 errors, with CR0.NE clear.
    pub numeric_error: Arc<Wired<NumericError>>,
    /// Local APICs and I/O APIC.
    pub apics: Arc<ApicBus>,
    /// Alarms of all chips; somebody has to run them.
    pub timers: Arc<Timers>,
    /// Where the guest hears that the host had stopped it.
    pub clock_pages: Arc<ClockPages>,
    /// What reads along on the serial console.
    pub watch: Arc<PanicWatch>,
    /// Devices with threads of their own.
    pub virtio: VirtioDevices,
}

impl Pc {
    /// Makes the chips and wires them.
    pub fn new(parts: PcParts) -> Result<Self, MachineError> {
        let timers = Timers::new(Arc::new(HostClock::new()))
            .map_err(|e| MachineError::Host("a timer cannot be made", e))?;
        let apics = new_apics(&parts, &timers);
        let pic = new_pic(&apics, &timers);
        let numeric_error = new_numeric_error(&pic, &apics, &timers);
        let clock_pages = ClockPages::new(parts.ram.clone(), parts.config.cpus);
        let pages = clock_pages.clone();
        timers.when_late(move || pages.tell_of_stop());
        let mut pc = Pc {
            ports: Arc::new(Bus::new()),
            memory: Arc::new(Bus::new()),
            watch: PanicWatch::new(
                parts.config.serial.sink.clone(),
                parts.control.clone(),
                parts.sleepers.halts.clone(),
                &timers,
            ),
            pic,
            numeric_error,
            apics,
            timers,
            clock_pages,
            virtio: VirtioDevices::default(),
        };
        pc.attach_interrupt_controllers()?;
        let pm = pc.attach_power(&parts)?;
        pc.attach_timers(&parts, pm)?;
        pc.attach_serial(&parts)?;
        if parts.config.test_devices {
            pc.attach_test_devices(parts.config)?;
        }
        let pci = pc.attach_pci(&parts)?;
        pc.virtio = VirtioDevices::plug_in(&pc, &pci, parts.config, parts.ram)?;
        Ok(pc)
    }

    /// The local APIC of each vCPU.
    pub fn cpu_apics(&self) -> impl Iterator<Item = CpuApic> {
        (0..).map_while(|n| self.apics.cpu(n))
    }

    /// A pin on ISA interrupt `irq`: to the 8259s and to the I/O APIC, where interrupt 0 comes in at input 2.
    fn isa_pin(&self, irq: u8) -> Pin {
        Line::new(self.isa_inputs(irq)).pin()
    }

    fn isa_inputs(&self, irq: u8) -> Vec<(Arc<dyn InterruptInput>, u32)> {
        isa_inputs(&self.pic, &self.apics, irq)
    }

    /// Makes `device` answer at blocks of ports: first port, number of ports, what the device calls the first.
    fn at_ports(
        &self,
        blocks: &[(u16, u64, u64)],
        device: &Arc<impl BusDevice + 'static>,
    ) -> Result<(), BusError> {
        for &(port, len, offset) in blocks {
            let region = Region::new(port.into(), len).at_offset(offset);
            self.ports.attach(region, device.clone())?;
        }
        Ok(())
    }

    fn attach_interrupt_controllers(&self) -> Result<(), BusError> {
        self.at_ports(&[(0x20, 2, 0), (0xa0, 2, 2), (0x4d0, 2, 4)], &self.pic)?;
        self.at_ports(&[(NUMERIC_ERROR, 1, 0)], &self.numeric_error)?;
        let window = Region::new(layout::IO_APIC, 0x1000);
        self.memory.attach(window, self.apics.clone())
    }

    /// The clock's interrupt is an event to power management too. Its way to the processors, and the 8254's, is the event timer's to cut.
    fn attach_timers(&self, parts: &PcParts, pm: Arc<Wired<AcpiPm>>) -> Result<(), BusError> {
        let [pit_line, rtc_line] =
            [layout::PIT_IRQ, layout::RTC_IRQ].map(|irq| Line::new(self.isa_inputs(irq)));
        let gates = [&pit_line, &rtc_line].map(|line| Gate::new(line.pin()));
        let pin = Line::new(vec![(gates[0].clone(), Gate::INPUT)]).pin();
        let pit = Wired::new(I8254::new(), vec![pin], &self.timers);
        self.at_ports(&[(0x40, 4, 0), (0x61, 1, 4)], &pit)?;
        let low = parts.config.memory.min(HOLE_START);
        let rtc = Mc146818::new(self.timers.clock().wall(), low, parts.config.memory - low);
        let pin = Line::new(vec![(gates[1].clone(), Gate::INPUT), (pm, 0)]).pin();
        let rtc = Wired::new(rtc, vec![pin], &self.timers);
        self.at_ports(&[(layout::RTC, 2, 0)], &rtc)?;
        self.attach_event_timer([pit_line, rtc_line], gates)
    }

    fn attach_event_timer(
        &self,
        legacy: [Arc<Line>; 2],
        gates: [Arc<Gate>; 2],
    ) -> Result<(), BusError> {
        let cut = |gate: Arc<Gate>| (gate as Arc<dyn InterruptInput>, Gate::CUT);
        let cut = Line::new(gates.map(cut).to_vec());
        let routed = |input: u32| match HPET_ROUTES >> input & 1 {
            0 => Pin::unconnected(),
            _ => Line::new(vec![(self.apics.clone(), input)]).pin(),
        };
        let pin = |output: u32| match HPET_LEGACY.iter().position(|l| *l == output) {
            Some(n) => legacy[n].pin(),
            None if output == HPET_REPLACES => cut.pin(),
            None => routed(output),
        };
        let pins = (0..=HPET_REPLACES).map(pin).collect();
        let hpet = Wired::new(Hpet::new(), pins, &self.timers);
        let window = Region::new(layout::HPET, HPET_LEN);
        self.memory.attach(window, hpet)
    }

    fn attach_serial(&self, parts: &PcParts) -> Result<(), BusError> {
        let source = parts.config.serial.source.clone();
        let chip = Uart16550::new(self.watch.clone(), source);
        let pins = vec![self.isa_pin(layout::COM1_IRQ)];
        let uart = Wired::new(chip, pins, &self.timers);
        let weak: Weak<dyn Backed> = Arc::downgrade(&uart) as _;
        parts.serial.connect(weak);
        self.at_ports(&[(layout::COM1, 8, 0)], &uart)
    }

    /// Everything that switches the machine off or resets it.
    fn attach_power(&self, parts: &PcParts) -> Result<Arc<Wired<AcpiPm>>, MachineError> {
        let control = parts.control;
        let pm = AcpiPmConfig {
            sleep_type_s5: layout::SLEEP_TYPE_S5,
            acpi_enable: layout::SMI_ACPI_ENABLE,
            acpi_disable: layout::SMI_ACPI_DISABLE,
        };
        let pm = AcpiPm::new(pm, control.clone());
        let pm = Wired::new(pm, vec![self.isa_pin(layout::SCI)], &self.timers);
        let blocks = [
            (layout::PM_BASE, layout::PM_LEN.into(), 0),
            (layout::SMI_COMMAND, 2, 16),
            (layout::PM2_CONTROL, 1, 18),
        ];
        self.at_ports(&blocks, &pm)?;
        let i8042 = I8042::new(control.clone());
        let i8042 = Wired::new(i8042, vec![self.isa_pin(KEYBOARD_IRQ)], &self.timers);
        self.at_ports(&[(0x60, 1, 0), (0x64, 1, 1)], &i8042)?;
        let port92 = Wired::new(Port92::new(control.clone()), vec![], &self.timers);
        self.at_ports(&[(0x92, 1, 0)], &port92)?;
        if parts.config.debug_exit || parts.config.test_devices {
            let exit = Wired::new(DebugExit::new(control.clone()), vec![], &self.timers);
            self.at_ports(&[(DEBUG_EXIT, 4, 0)], &exit)?;
        }
        Ok(pm)
    }

    /// What test programs that were written for QEMU expect.
    fn attach_test_devices(&self, config: &MachineConfig) -> Result<(), MachineError> {
        let ports = Wired::new(TestPorts::default(), vec![], &self.timers);
        self.at_ports(&[(TEST_PORTS, 4, 0), (TEST_BYTE_PORTS, 4, 0)], &ports)?;
        let pins = (0..TEST_LINES).map(|n| self.test_pin(n)).collect();
        let lines = Wired::new(TestLines::default(), pins, &self.timers);
        self.at_ports(&[(TEST_IRQ_LINES, TEST_LINES.into(), 0)], &lines)?;
        let fw_cfg = FwCfg::new(config.cpus as u16, config.memory);
        let fw_cfg = Wired::new(fw_cfg, vec![], &self.timers);
        self.at_ports(&[(FW_CFG, 2, 0)], &fw_cfg)?;
        let memory = Wired::new(TestMemory::default(), vec![], &self.timers);
        let window = Region::new(TEST_MEMORY, TEST_MEMORY_LEN);
        Ok(self.memory.attach(window, memory)?)
    }

    /// A pin on an interrupt line of the test device: the ISA interrupts, and the other inputs of the I/O APIC.
    fn test_pin(&self, line: u32) -> Pin {
        match u8::try_from(line) {
            Ok(irq) if irq < ISA_IRQS => self.isa_pin(irq),
            _ => Line::new(vec![(self.apics.clone(), line)]).pin(),
        }
    }

    fn attach_pci(&self, parts: &PcParts) -> Result<Arc<PciBus>, MachineError> {
        let bus = PciBus::new();
        bus.insert(0, 0, HostBridge::new())?;
        let ports = PciConfigPorts::new(bus.clone(), parts.control.clone());
        self.at_ports(&[(0xcf8, 8, 0)], &ports)?;
        let ecam = layout::ECAM;
        let window = Region::new(ecam.start, ecam.end - ecam.start);
        self.memory.attach(window, Ecam::new(bus.clone()))?;
        Ok(bus)
    }
}

fn new_apics(parts: &PcParts, timers: &Arc<Timers>) -> Arc<ApicBus> {
    let cpu = |(id, doorbell): (usize, &Arc<Doorbell>)| {
        let config = LocalApicConfig {
            id: id as u32,
            bootstrap: id == 0,
            bus_hz: APIC_BUS_HZ,
            tsc_hz: parts.tsc_hz,
        };
        let doorbell = doorbell.clone();
        (config, Box::new(move || doorbell.ring()) as Kick)
    };
    let cpus = parts.doorbells.iter().enumerate().map(cpu).collect();
    ApicBus::new(cpus, IoApic::new(layout::IO_APIC_ID), timers)
}

fn new_numeric_error(
    pic: &Arc<Wired<I8259>>,
    apics: &Arc<ApicBus>,
    timers: &Arc<Timers>,
) -> Arc<Wired<NumericError>> {
    let pin = Line::new(isa_inputs(pic, apics, NUMERIC_ERROR_IRQ)).pin();
    Wired::new(NumericError::default(), vec![pin], timers)
}

fn isa_inputs(
    pic: &Arc<Wired<I8259>>,
    apics: &Arc<ApicBus>,
    irq: u8,
) -> Vec<(Arc<dyn InterruptInput>, u32)> {
    let irq = u32::from(irq);
    let gsi = if irq == 0 { layout::PIT_GSI } else { irq };
    vec![(pic.clone(), irq), (apics.clone(), gsi)]
}

/// The 8259s' INTR leads to LINT0 of every processor, as the I/O APIC's ExtINT does not.
fn new_pic(apics: &Arc<ApicBus>, timers: &Arc<Timers>) -> Arc<Wired<I8259>> {
    let lint0: Vec<(Arc<dyn InterruptInput>, u32)> = apics
        .cpu(0)
        .map(|cpu| (cpu.pins(), 0))
        .into_iter()
        .collect();
    Wired::new(I8259::new(), vec![Line::new(lint0).pin()], timers)
}
