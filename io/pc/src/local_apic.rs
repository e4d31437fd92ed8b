//! The local APIC of one processor, as xAPIC (device memory) and x2APIC (MSRs).
//!
//! A state machine: registers go in, an [`Effect`] on others comes out (an IPI, the end of a level-triggered interrupt).
//! [`crate::ApicBus`] locks it, carries effects out and wakes the vCPU.
//!
//! Source: Intel SDM volume 3, chapter 11 (APIC).

use doppel_device::Nanos;

use crate::apic_timer::{ApicTimer, TimerMode};
use crate::vector_set::VectorSet;
use crate::{DeliveryMode, Destination, InterruptMessage};

/// Where the register page is after reset.
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;

/// MSR numbers.
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const X2APIC_FIRST: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;

/// Bits of IA32_APIC_BASE.
const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

/// Integrated APIC, six LVT entries.
const VERSION: u32 = 0x14 | 5 << 16;

/// Register numbers: the offset in the page over 16, the x2APIC MSR less 0x800.
const ID: u32 = 0x02;
const VERSION_REGISTER: u32 = 0x03;
const TPR: u32 = 0x08;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const ICR_LOW: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_ERROR: u32 = 0x37;
const INITIAL_COUNT: u32 = 0x38;
const CURRENT_COUNT: u32 = 0x39;
const DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

/// Indices of the LVT entries that have a meaning here, and what can be written to each (timer, thermal, performance,
/// LINT0, LINT1, error).
const TIMER: usize = 0;
const PERFORMANCE: usize = 2;
const LINT0: usize = 3;
const ERROR: usize = 5;
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
const LVT_MASKED: u32 = 1 << 16;

const SVR_ENABLE: u32 = 1 << 8;

/// Bits of the ESR.
const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ILLEGAL_REGISTER: u32 = 1 << 7;

bitflags::bitflags! {
    /// What a local APIC wants of its processor.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Requests: u32 {
        /// A vector above the processor priority.
        const INTERRUPT = 1 << 0;
        /// The 8259's, through LINT0.
        const EXTERNAL = 1 << 1;
        /// A non-maskable interrupt.
        const NMI = 1 << 2;
        /// INIT or start-up: see [`LocalApic::take_start`].
        const START = 1 << 3;
        /// Something waits, and nobody knows whether the interrupt in service is over: see [`LocalApic::lend_end`].
        const END = 1 << 4;
    }
}

/// What an INIT or start-up message asks of the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// INIT: the bootstrap processor starts at the reset vector, the others wait for a start-up message.
    Init,
    /// Start in real mode at this page (CS = page × 0x100, IP = 0).
    Startup(u8),
}

/// What the processor is interrupted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// This vector.
    Vector(u8),
    /// Whatever the 8259 says.
    External,
}

/// What an access to a register does beyond its local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// An IPI to send.
    Send(InterruptMessage),
    /// A level-triggered interrupt of this vector has ended: I/O APICs want to know.
    EndOfInterrupt(u8),
}

/// Constants of a local APIC.
#[derive(Clone, Copy, Debug)]
pub struct LocalApicConfig {
    /// The APIC ID.
    pub id: u32,
    /// This is the processor that boots.
    pub bootstrap: bool,
    /// Frequency of the timer's clock, as CPUID leaf 0x15 says (the core crystal clock).
    pub bus_hz: u64,
    /// Frequency of the guest's TSC.
    pub tsc_hz: u64,
}

/// A local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    config: LocalApicConfig,
    base: u64,
    tpr: u32,
    logical_destination: u32,
    destination_format: u32,
    svr: u32,
    isr: VectorSet,
    tmr: VectorSet,
    irr: VectorSet,
    esr: u32,
    /// Errors since the last write to the ESR.
    errors: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: ApicTimer,
    /// Levels of LINT0 and LINT1.
    lint: [bool; 2],
    /// An ExtINT message (not the LINT0 pin) that waits.
    external: bool,
    /// NMIs that wait, and whether the handler of one runs.
    nmis: u8,
    nmi_runs: bool,
    init: bool,
    startup: Option<u8>,
    waits_for_startup: bool,
    /// The guest ends the interrupt in service without telling.
    end_lent: bool,
}

impl LocalApic {
    /// A local APIC after power-on; the bootstrap processor's LINT0 is wired through to the 8259 as a PC's
    /// firmware leaves it.
    pub fn new(config: LocalApicConfig) -> Self {
        let bsp = if config.bootstrap { BASE_BSP } else { 0 };
        let mut apic = LocalApic {
            config,
            base: LOCAL_APIC_BASE | BASE_ENABLE | bsp,
            tpr: 0,
            logical_destination: 0,
            destination_format: 0,
            svr: 0,
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            irr: VectorSet::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; 6],
            timer: ApicTimer::new(config.bus_hz, config.tsc_hz),
            lint: [false; 2],
            external: false,
            nmis: 0,
            nmi_runs: false,
            init: false,
            startup: None,
            waits_for_startup: !config.bootstrap,
            end_lent: false,
        };
        apic.reset_registers();
        apic
    }

    fn reset_registers(&mut self) {
        self.tpr = 0;
        self.logical_destination = 0;
        self.destination_format = u32::MAX;
        self.svr = 0xff;
        (self.isr, self.tmr, self.irr) = Default::default();
        (self.esr, self.errors, self.icr) = (0, 0, 0);
        self.lvt = [LVT_MASKED; 6];
        if self.config.bootstrap {
            self.lvt[LINT0] = 0x700;
        }
        self.timer.reset();
        self.external = false;
        self.end_lent = false;
    }

    /// The APIC ID.
    pub fn id(&self) -> u32 {
        self.config.id
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn software_enabled(&self) -> bool {
        self.enabled() && self.svr & SVR_ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    /// IA32_APIC_BASE bit 11, which CPUID.1:EDX bit 9 mirrors.
    pub fn is_enabled(&self) -> bool {
        self.enabled()
    }

    /// The guest physical page of the registers, where they are in memory.
    pub fn page(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.base & !0xfff)
    }

    // What the processor sees.

    fn processor_priority(&self) -> u32 {
        let in_service = self.isr.highest().map_or(0, |v| u32::from(v) & 0xf0);
        if self.tpr & 0xf0 >= in_service {
            self.tpr
        } else {
            in_service
        }
    }

    fn deliverable(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        let above = u32::from(vector) & 0xf0 > self.processor_priority() & 0xf0;
        // What it has accepted it delivers, even if software has disabled it since (SDM vol. 3A, 11.4.7.2).
        (self.enabled() && above).then_some(vector)
    }

    fn external_request(&self) -> bool {
        let lint0 = self.lvt[LINT0];
        let wired = lint0 & LVT_MASKED == 0
            && DeliveryMode::from_register(lint0) == Some(DeliveryMode::ExtInt);
        self.external || self.lint[0] && (wired || !self.enabled())
    }

    /// What it wants of the processor now.
    pub fn requests(&self) -> Requests {
        let mut requests = Requests::empty();
        requests.set(Requests::INTERRUPT, self.deliverable().is_some());
        requests.set(Requests::EXTERNAL, self.external_request());
        requests.set(Requests::NMI, self.nmis != 0);
        requests.set(Requests::START, self.init || self.startup.is_some());
        let waits = self.irr.highest().is_some();
        requests.set(Requests::END, self.end_lent && waits);
        requests
    }

    /// The processor takes an interrupt.
    pub fn acknowledge(&mut self) -> Option<Acknowledged> {
        if self.external_request() {
            self.external = false;
            return Some(Acknowledged::External);
        }
        let vector = self.deliverable()?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        Some(Acknowledged::Vector(vector))
    }

    /// Lets the guest end the interrupt in service without telling (KVM's paravirtual EOI): true where nobody else has to know of it
    /// and nothing waits for it. [`Self::return_end`] must follow before the end matters: on [`Requests::END`], and before any access to
    /// a register.
    pub fn lend_end(&mut self) -> bool {
        let alone = self.irr.highest().is_none();
        let edge = self.isr.highest().is_some_and(|v| !self.tmr.contains(v));
        self.end_lent = alone && edge;
        self.end_lent
    }

    /// The interrupt in service is over, or will be ended by the register.
    pub fn return_end(&mut self, over: bool) {
        if std::mem::take(&mut self.end_lent) && over {
            // Edge triggered: its end has no effect on others.
            self.end_of_interrupt();
        }
    }

    /// The processor takes a pending NMI. [`Self::nmi_ends`] follows.
    pub fn take_nmi(&mut self) -> bool {
        if self.nmis == 0 {
            return false;
        }
        self.nmis -= 1;
        self.nmi_runs = true;
        true
    }

    /// The handler of an NMI has executed IRET.
    pub fn nmi_ends(&mut self) {
        self.nmi_runs = false;
    }

    /// One NMI is held back while the handler of another runs (SDM volume 3, 6.7.1). Two that come at once are therefore both delivered, and
    /// two is what there is room for, the one that runs among them.
    fn accept_nmi(&mut self) {
        let room = 2 - u8::from(self.nmi_runs);
        self.nmis = (self.nmis + 1).min(room);
    }

    /// The processor takes a pending INIT or start-up, in this order.
    pub fn take_start(&mut self) -> Option<Start> {
        if std::mem::take(&mut self.init) {
            return Some(Start::Init);
        }
        self.startup.take().map(Start::Startup)
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// A write to CR8.
    pub fn set_cr8(&mut self, value: u64) {
        self.tpr = (value as u32 & 0xf) << 4;
    }

    // What comes in from the bus and the pins.

    /// True where a message for `destination` means this local APIC.
    pub fn matches(&self, destination: Destination) -> bool {
        self.enabled()
            && match destination {
                Destination::All => true,
                Destination::AllBut(id) => id != self.config.id,
                Destination::Physical(id) => id == self.config.id,
                Destination::Logical(mask) => self.matches_logical(mask),
            }
    }

    fn matches_logical(&self, mask: u32) -> bool {
        if self.x2apic() {
            let own = self.logical_id();
            return own >> 16 == mask >> 16 && own & mask & 0xffff != 0;
        }
        let own = self.logical_destination >> 24;
        if self.destination_format >> 28 == 0xf {
            own & mask & 0xff != 0
        } else {
            own >> 4 == mask >> 4 & 0xf && own & mask & 0xf != 0
        }
    }

    /// The logical ID in x2APIC mode: cluster and bit, both from the ID.
    fn logical_id(&self) -> u32 {
        let id = self.config.id;
        (id >> 4) << 16 | 1 << (id & 0xf)
    }

    /// The priority that lowest-priority delivery goes by; `None` takes no interrupts.
    pub fn arbitration_priority(&self) -> Option<u32> {
        self.software_enabled().then(|| self.processor_priority())
    }

    /// A message that [`LocalApic::matches`]. False where it is refused: while software keeps the local APIC off it takes no
    /// vectors (SDM volume 3, 11.4.7.2).
    pub fn accept(&mut self, mode: DeliveryMode, vector: u8, level_triggered: bool) -> bool {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.accept_vector(vector, level_triggered);
                return self.software_enabled();
            }
            DeliveryMode::Nmi => self.accept_nmi(),
            DeliveryMode::ExtInt => self.external = true,
            DeliveryMode::Init => self.accept_init(),
            DeliveryMode::Startup if self.waits_for_startup => {
                self.waits_for_startup = false;
                self.startup = Some(vector);
            }
            DeliveryMode::Startup | DeliveryMode::Smi => {}
        }
        true
    }

    fn accept_vector(&mut self, vector: u8, level_triggered: bool) {
        if !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.error(RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.irr.insert(vector);
        self.tmr.set(vector, level_triggered);
    }

    fn accept_init(&mut self) {
        self.reset_registers();
        (self.nmis, self.nmi_runs) = (0, false);
        self.init = true;
        self.startup = None;
        self.waits_for_startup = !self.config.bootstrap;
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        let entry = self.lvt[ERROR];
        // An illegal vector here would be an error about an error.
        if entry & LVT_MASKED == 0 && entry & 0xff >= 16 {
            self.accept_vector(entry as u8, false);
        }
    }

    /// LINT0 (0) or LINT1 (1) changes.
    pub fn set_lint(&mut self, pin: u32, level: bool) {
        let Some(line) = self.lint.get_mut(pin as usize) else {
            return;
        };
        let rises = !std::mem::replace(line, level) && level;
        let entry = self.lvt[LINT0 + pin as usize];
        if !rises || entry & LVT_MASKED != 0 || !self.enabled() {
            return;
        }
        match DeliveryMode::from_register(entry) {
            // Looked at as a level, in `external_request`.
            Some(DeliveryMode::ExtInt) | None => {}
            Some(mode) => {
                self.accept(mode, entry as u8, false);
            }
        }
    }

    /// LINT0 may yet send what ends a halt with interrupts off.
    pub fn lint0_ends_any_halt(&self) -> bool {
        let entry = self.lvt[LINT0];
        let mode = DeliveryMode::from_register(entry).filter(|_| entry & LVT_MASKED == 0);
        self.enabled() && mode.is_some_and(DeliveryMode::ends_any_halt)
    }

    /// A performance counter has overflowed. On Intel's processors that masks the entry, which `masks` says.
    pub fn overflow(&mut self, masks: bool) {
        let entry = self.lvt[PERFORMANCE];
        if entry & LVT_MASKED != 0 || !self.enabled() {
            return;
        }
        if masks {
            self.lvt[PERFORMANCE] |= LVT_MASKED;
        }
        if let Some(mode) = DeliveryMode::from_register(entry) {
            self.accept(mode, entry as u8, false);
        }
    }

    // Time.

    /// When the timer goes off next, if that interrupts.
    pub fn next_deadline(&self) -> Option<Nanos> {
        let masked = self.lvt[TIMER] & LVT_MASKED != 0;
        self.timer.next_deadline().filter(|_| !masked)
    }

    /// Brings the timer to `now`.
    pub fn advance(&mut self, now: Nanos) {
        let entry = self.lvt[TIMER];
        if self.timer.advance(now) && entry & LVT_MASKED == 0 {
            self.accept_vector(entry as u8, false);
        }
    }

    // Registers.

    fn register(&self, register: u32, now: Nanos) -> Option<u32> {
        Some(match register {
            ID if self.x2apic() => self.config.id,
            ID => self.config.id << 24,
            VERSION_REGISTER => VERSION,
            TPR => self.tpr,
            PPR => self.processor_priority(),
            LDR if self.x2apic() => self.logical_id(),
            LDR => self.logical_destination,
            DFR if !self.x2apic() => self.destination_format,
            SVR => self.svr,
            ISR..TMR => self.isr.word(register - ISR),
            TMR..IRR => self.tmr.word(register - TMR),
            IRR..ESR => self.irr.word(register - IRR),
            ESR => self.esr,
            ICR_LOW => self.icr as u32,
            ICR_HIGH if !self.x2apic() => (self.icr >> 32) as u32,
            LVT_TIMER..=LVT_ERROR => self.lvt[(register - LVT_TIMER) as usize],
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => self.timer.current_count(now),
            DIVIDE => self.timer.divide_configuration(),
            _ => return None,
        })
    }

    /// `None` where the register does not exist or cannot be written.
    fn set_register(&mut self, register: u32, value: u32, now: Nanos) -> Option<Effect> {
        match register {
            TPR => self.tpr = value & 0xff,
            EOI => return Some(self.end_of_interrupt()),
            LDR if !self.x2apic() => self.logical_destination = value & 0xff00_0000,
            DFR if !self.x2apic() => self.destination_format = value | 0x0fff_ffff,
            SVR => self.set_svr(value),
            ESR => self.esr = std::mem::take(&mut self.errors),
            ICR_LOW => return Some(self.send(self.icr & !0xffff_ffff | u64::from(value))),
            ICR_HIGH if !self.x2apic() => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
            }
            LVT_TIMER..=LVT_ERROR => self.set_lvt((register - LVT_TIMER) as usize, value),
            INITIAL_COUNT => self.timer.set_initial_count(value, now),
            DIVIDE => self.timer.set_divide_configuration(value, now),
            _ => return None,
        }
        Some(Effect::None)
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else {
            return Effect::None;
        };
        self.isr.remove(vector);
        if self.tmr.contains(vector) {
            Effect::EndOfInterrupt(vector)
        } else {
            Effect::None
        }
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & 0x3ff;
        if self.svr & SVR_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32) {
        let mut entry = value & LVT_WRITABLE[index];
        if !self.software_enabled() {
            entry |= LVT_MASKED;
        }
        self.lvt[index] = entry;
        if index == TIMER {
            self.timer.set_mode(TimerMode::from_lvt(entry));
        }
    }

    fn send(&mut self, icr: u64) -> Effect {
        const LEVEL: u32 = 1 << 15;
        const ASSERT: u32 = 1 << 14;
        self.icr = if self.x2apic() {
            icr & 0xffff_ffff_000c_cfff
        } else {
            icr & 0xff00_0000_000c_cfff
        };
        let low = icr as u32;
        let Some(mode) = DeliveryMode::from_register(low) else {
            return Effect::None;
        };
        if mode == DeliveryMode::Init && low & LEVEL != 0 && low & ASSERT == 0 {
            // INIT de-assert means nothing since the P6.
            return Effect::None;
        }
        let vector = low as u8;
        if vector < 16 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.error(SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        Effect::Send(InterruptMessage {
            destination: self.ipi_destination(icr),
            mode,
            vector,
            level_triggered: false,
        })
    }

    fn ipi_destination(&self, icr: u64) -> Destination {
        let logical = icr & 1 << 11 != 0;
        match icr >> 18 & 3 {
            0 if self.x2apic() => Destination::from_32_bits((icr >> 32) as u32, logical),
            0 => Destination::from_8_bits((icr >> 56) as u8, logical),
            1 => Destination::Physical(self.config.id),
            2 => Destination::All,
            _ => Destination::AllBut(self.config.id),
        }
    }

    // xAPIC: the register page.

    /// A load from the register page. Registers are 32 bits at multiples of 16; what else there is reads as 0.
    pub fn read(&mut self, offset: u64, size: u8, now: Nanos) -> u64 {
        self.advance(now);
        let value = match self.register((offset >> 4) as u32 & 0xff, now) {
            Some(value) => u64::from(value),
            // These can only be written.
            None if matches!(offset >> 4 & 0xff, 0x09 | 0x0b | 0x0c) => 0,
            None => {
                self.error(ILLEGAL_REGISTER);
                0
            }
        };
        let within = offset & 0xf;
        if within >= 4 {
            return 0;
        }
        value >> (8 * within) & doppel_device::all_ones(size)
    }

    /// A store to the register page: 32 bits, aligned.
    pub fn write(&mut self, offset: u64, size: u8, value: u64, now: Nanos) -> Effect {
        if size < 4 || offset & 0xf != 0 {
            return Effect::None;
        }
        self.advance(now);
        let register = (offset >> 4) as u32 & 0xff;
        let effect = self.set_register(register, value as u32, now);
        if effect.is_none() && self.register(register, now).is_none() {
            self.error(ILLEGAL_REGISTER);
        }
        self.advance(now);
        effect.unwrap_or(Effect::None)
    }

    // MSRs.

    /// RDMSR; `None` is #GP(0).
    pub fn read_msr(&mut self, msr: u32, now: Nanos) -> Option<u64> {
        self.advance(now);
        match msr {
            IA32_APIC_BASE => Some(self.base),
            IA32_TSC_DEADLINE => Some(self.timer.tsc_deadline()),
            X2APIC_FIRST..=X2APIC_LAST if self.x2apic() => match msr - X2APIC_FIRST {
                ICR_LOW => Some(self.icr),
                register => self.register(register, now).map(u64::from),
            },
            _ => None,
        }
    }

    /// WRMSR, when the guest's TSC is `tsc_now`; `None` is #GP(0).
    pub fn write_msr(&mut self, msr: u32, value: u64, tsc_now: u64, now: Nanos) -> Option<Effect> {
        self.advance(now);
        let effect = match msr {
            IA32_APIC_BASE => self.set_base(value)?,
            IA32_TSC_DEADLINE => {
                self.timer.set_tsc_deadline(value, tsc_now, now);
                Effect::None
            }
            X2APIC_FIRST..=X2APIC_LAST if self.x2apic() => {
                self.write_x2apic(msr - X2APIC_FIRST, value, now)?
            }
            _ => return None,
        };
        self.advance(now);
        Some(effect)
    }

    /// The guest has set its TSC, which is `tsc_now`.
    pub fn tsc_moved(&mut self, tsc_now: u64, now: Nanos) {
        self.advance(now);
        self.timer.follow_tsc(tsc_now, now);
        self.advance(now);
    }

    fn write_x2apic(&mut self, register: u32, value: u64, now: Nanos) -> Option<Effect> {
        if register == ICR_LOW {
            return (value & 0xfff3_2000 == 0).then(|| self.send(value));
        }
        let value = u32::try_from(value).ok()?;
        let reserved = match register {
            TPR | SELF_IPI => !0xff,
            EOI | ESR => u32::MAX,
            SVR => !0x3ff,
            LVT_TIMER..=LVT_ERROR => {
                !LVT_WRITABLE[(register - LVT_TIMER) as usize] & !(1 << 12 | 1 << 14)
            }
            DIVIDE => !0xb,
            _ => 0,
        };
        if value & reserved != 0 {
            return None;
        }
        if register == SELF_IPI {
            return Some(self.send_to_self(value as u8));
        }
        self.set_register(register, value, now)
    }

    fn send_to_self(&mut self, vector: u8) -> Effect {
        if vector < 16 {
            self.error(SEND_ILLEGAL_VECTOR);
        } else {
            self.accept_vector(vector, false);
        }
        Effect::None
    }

    /// The legal transitions are off → xAPIC → x2APIC → off and xAPIC → off.
    fn set_base(&mut self, value: u64) -> Option<Effect> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        let reserved = !(MODE | BASE_BSP | 0xf_ffff_ffff_f000);
        let (from, to) = (self.base & MODE, value & MODE);
        let legal = match (from, to) {
            (_, BASE_X2APIC) | (0, MODE) | (MODE, BASE_ENABLE) => false,
            _ => value & reserved == 0,
        };
        if !legal {
            return None;
        }
        self.base = value;
        if to == 0 && from != 0 {
            self.reset_registers();
        } else if to == MODE && from != MODE {
            self.icr &= 0xffff_ffff;
        }
        Some(Effect::None)
    }
}

#[cfg(test)]
mod tests;
