//! The local APIC against the manual.

use super::*;
use crate::torture::every_register_takes_everything;
use doppel_device::Chip;

const ENABLE: u32 = SVR_ENABLE | 0xff;

fn config(id: u32) -> LocalApicConfig {
    LocalApicConfig {
        id,
        bootstrap: id == 0,
        bus_hz: 1_000_000_000,
        tsc_hz: 1_000_000_000,
    }
}

fn set(apic: &mut LocalApic, register: u32, value: u32) -> Effect {
    LocalApic::write(apic, u64::from(register) << 4, 4, value.into(), 0)
}

fn get(apic: &mut LocalApic, register: u32) -> u32 {
    LocalApic::read(apic, u64::from(register) << 4, 4, 0) as u32
}

fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(config(3));
    set(&mut apic, SVR, ENABLE);
    apic
}

fn in_x2apic_mode(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(config(id));
    apic.write_msr(
        IA32_APIC_BASE,
        LOCAL_APIC_BASE | BASE_ENABLE | BASE_X2APIC,
        0,
        0,
    )
    .unwrap();
    apic.write_msr(X2APIC_FIRST + SVR, ENABLE.into(), 0, 0)
        .unwrap();
    apic
}

fn fixed(apic: &mut LocalApic, vector: u8) {
    apic.accept(DeliveryMode::Fixed, vector, false);
}

#[test]
fn after_reset_it_is_as_the_manual_says() {
    let mut apic = LocalApic::new(config(3));
    for (register, value) in [
        (ID, 3 << 24),
        (VERSION_REGISTER, 0x0005_0014),
        (TPR, 0),
        (LDR, 0),
        (DFR, u32::MAX),
        (SVR, 0xff),
        (LVT_TIMER, LVT_MASKED),
        (LVT_ERROR, LVT_MASKED),
        (INITIAL_COUNT, 0),
    ] {
        assert_eq!(get(&mut apic, register), value, "{register:#x}");
    }
    assert_eq!(apic.read_msr(IA32_APIC_BASE, 0), Some(0xfee0_0800));
    let mut first = LocalApic::new(config(0));
    assert_eq!(first.read_msr(IA32_APIC_BASE, 0), Some(0xfee0_0900));
    assert_eq!(get(&mut first, LVT_TIMER + LINT0 as u32), 0x700);
}

#[test]
fn interrupts_nest_by_class() {
    let mut apic = enabled();
    fixed(&mut apic, 0x51);
    fixed(&mut apic, 0x5f);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0x5f)));
    assert_eq!(get(&mut apic, PPR), 0x50);
    assert_eq!(apic.acknowledge(), None, "0x51 is of the same class");
    fixed(&mut apic, 0x60);
    assert_eq!(apic.requests(), Requests::INTERRUPT);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0x60)));
    set(&mut apic, EOI, 0);
    assert_eq!(apic.acknowledge(), None);
    set(&mut apic, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0x51)));
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let mut apic = enabled();
    fixed(&mut apic, 0x45);
    apic.set_cr8(4);
    assert_eq!((get(&mut apic, TPR), apic.cr8()), (0x40, 4));
    assert!(apic.requests().is_empty());
    set(&mut apic, TPR, 0x3f);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0x45)));
}

#[test]
fn the_end_of_a_level_interrupt_is_told_to_io_apics() {
    let mut apic = enabled();
    apic.accept(DeliveryMode::Fixed, 0x70, true);
    fixed(&mut apic, 0x80);
    apic.acknowledge();
    assert_eq!(set(&mut apic, EOI, 0), Effect::None);
    apic.acknowledge();
    assert_eq!(get(&mut apic, TMR + 3), 1 << 16);
    assert_eq!(set(&mut apic, EOI, 0), Effect::EndOfInterrupt(0x70));
    assert_eq!(set(&mut apic, EOI, 0), Effect::None, "nothing in service");
}

#[test]
fn software_disabled_it_takes_no_vectors_and_masks_its_own() {
    let mut apic = enabled();
    set(&mut apic, LVT_TIMER, 0x40);
    assert_eq!(get(&mut apic, LVT_TIMER), 0x40);
    set(&mut apic, SVR, 0xff);
    assert_eq!(get(&mut apic, LVT_TIMER), LVT_MASKED | 0x40);
    set(&mut apic, LVT_TIMER, 0x41);
    assert_eq!(get(&mut apic, LVT_TIMER), LVT_MASKED | 0x41);
    fixed(&mut apic, 0x50);
    assert!(apic.requests().is_empty());
    apic.accept(DeliveryMode::Nmi, 0, false);
    assert_eq!(apic.requests(), Requests::NMI);
    assert!(apic.take_nmi() && !apic.take_nmi());
}

#[test]
fn software_disabled_it_delivers_what_it_had_accepted() {
    let mut apic = enabled();
    fixed(&mut apic, 0x50);
    set(&mut apic, SVR, 0xff);
    fixed(&mut apic, 0x60);
    assert_eq!(apic.requests(), Requests::INTERRUPT);
    assert!(apic.acknowledge().is_some());
    assert!(apic.requests().is_empty());
}

#[test]
fn one_nmi_runs_and_one_waits() {
    let mut apic = enabled();
    let send = |apic: &mut LocalApic, count| {
        for _ in 0..count {
            apic.accept(DeliveryMode::Nmi, 0, false);
        }
    };
    for (before, within, taken) in [(2, 0, 2), (10, 0, 2), (1, 10, 2), (2, 10, 2), (1, 0, 1)] {
        send(&mut apic, before);
        assert!(apic.take_nmi());
        send(&mut apic, within);
        let mut count = 1;
        loop {
            apic.nmi_ends();
            if !apic.take_nmi() {
                break;
            }
            count += 1;
        }
        assert_eq!(count, taken, "{before} before, {within} within");
    }
    send(&mut apic, 2);
    apic.accept(DeliveryMode::Init, 0, false);
    assert!(!apic.take_nmi());
}

#[test]
fn the_8259_comes_through_lint0() {
    let mut apic = LocalApic::new(config(0));
    apic.set_lint(0, true);
    assert_eq!(apic.requests(), Requests::EXTERNAL);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::External));
    apic.set_lint(0, false);
    assert!(apic.requests().is_empty());
    set(&mut apic, SVR, ENABLE);
    set(&mut apic, LVT_TIMER + LINT0 as u32, LVT_MASKED | 0x700);
    apic.set_lint(0, true);
    assert!(apic.requests().is_empty());
    apic.write_msr(IA32_APIC_BASE, LOCAL_APIC_BASE, 0, 0)
        .unwrap();
    assert_eq!(
        apic.requests(),
        Requests::EXTERNAL,
        "APIC off: LINT0 is INTR"
    );
}

#[test]
fn lint1_can_be_nmi() {
    let mut apic = enabled();
    set(&mut apic, LVT_TIMER + LINT0 as u32 + 1, 0x400);
    apic.set_lint(1, true);
    assert!(apic.take_nmi());
    apic.set_lint(1, true);
    assert!(!apic.take_nmi(), "no edge");
}

#[test]
fn the_timer_interrupts_unless_masked() {
    let mut apic = enabled();
    set(&mut apic, DIVIDE, 0xb);
    set(&mut apic, LVT_TIMER, 1 << 17 | 0xef);
    set(&mut apic, INITIAL_COUNT, 1_000_000);
    assert_eq!(apic.next_deadline(), Some(1_000_000));
    apic.advance(1_000_000);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0xef)));
    set(&mut apic, EOI, 0);
    LocalApic::write(&mut apic, 0x320, 4, 0x3_00ef, 1_500_000);
    assert_eq!(apic.next_deadline(), None);
    apic.advance(2_000_000);
    assert!(apic.requests().is_empty());
}

#[test]
fn a_tsc_deadline_is_an_msr() {
    let mut apic = enabled();
    set(&mut apic, LVT_TIMER, 2 << 17 | 0xec);
    apic.write_msr(IA32_TSC_DEADLINE, 10_500, 10_000, 70)
        .unwrap();
    assert_eq!(apic.next_deadline(), Some(570));
    assert_eq!(apic.read_msr(IA32_TSC_DEADLINE, 569), Some(10_500));
    assert_eq!(apic.read_msr(IA32_TSC_DEADLINE, 570), Some(0));
    assert_eq!(apic.requests(), Requests::INTERRUPT);
    apic.acknowledge();
    apic.write_msr(IA32_TSC_DEADLINE, 1, 20_000, 600).unwrap();
    set(&mut apic, EOI, 0);
    assert_eq!(apic.requests(), Requests::INTERRUPT, "past means now");
}

#[test]
fn an_ipi_goes_where_the_icr_says() {
    let mut apic = enabled();
    set(&mut apic, ICR_HIGH, 5 << 24);
    let Effect::Send(message) = set(&mut apic, ICR_LOW, 0x4041) else {
        panic!("nothing sent");
    };
    assert_eq!(message.destination, Destination::Physical(5));
    assert_eq!((message.mode, message.vector), (DeliveryMode::Fixed, 0x41));
    assert_eq!(get(&mut apic, ICR_LOW), 0x4041);
    for (low, destination) in [
        (0x0_0841, Destination::Logical(5)),
        (0x4_0041, Destination::Physical(3)),
        (0x8_0041, Destination::All),
        (0xc_0041, Destination::AllBut(3)),
    ] {
        let effect = set(&mut apic, ICR_LOW, low);
        assert!(
            matches!(effect, Effect::Send(m) if m.destination == destination),
            "{low:#x}"
        );
    }
    assert_eq!(
        set(&mut apic, ICR_LOW, 0x8500),
        Effect::None,
        "INIT de-assert"
    );
}

#[test]
fn init_and_startup_start_a_processor_once() {
    let mut apic = LocalApic::new(config(3));
    apic.accept(DeliveryMode::Init, 0, false);
    assert_eq!(apic.requests(), Requests::START);
    apic.accept(DeliveryMode::Startup, 0x9a, false);
    apic.accept(DeliveryMode::Startup, 0x9b, false);
    assert_eq!(apic.take_start(), Some(Start::Init));
    assert_eq!(apic.take_start(), Some(Start::Startup(0x9a)));
    assert_eq!(apic.take_start(), None);
    let mut first = LocalApic::new(config(0));
    first.accept(DeliveryMode::Startup, 1, false);
    assert_eq!(first.take_start(), None, "it runs");
}

#[test]
fn logical_destinations_match_flat_cluster_and_x2apic() {
    let mut apic = enabled();
    set(&mut apic, LDR, 0x0400_0000);
    assert!(apic.matches(Destination::Logical(0x06)));
    assert!(!apic.matches(Destination::Logical(0x02)));
    set(&mut apic, LDR, 0x2100_0000);
    set(&mut apic, DFR, 0x0fff_ffff);
    assert!(apic.matches(Destination::Logical(0x23)));
    assert!(!apic.matches(Destination::Logical(0x13)));
    assert!(!apic.matches(Destination::Logical(0x22)));

    let mut apic = in_x2apic_mode(0x25);
    assert_eq!(apic.read_msr(X2APIC_FIRST + LDR, 0), Some(0x0002_0020));
    assert!(apic.matches(Destination::Logical(0x0002_0030)));
    assert!(!apic.matches(Destination::Logical(0x0003_0020)));
    assert!(apic.matches(Destination::Physical(0x25)));
    assert!(!apic.matches(Destination::AllBut(0x25)));
}

#[test]
fn errors_show_after_a_write_to_the_esr() {
    let mut apic = enabled();
    set(&mut apic, LVT_ERROR, 0xfe);
    fixed(&mut apic, 0x0f);
    assert_eq!(set(&mut apic, ICR_LOW, 0x4001), Effect::None);
    get(&mut apic, 0x01);
    assert_eq!(get(&mut apic, ESR), 0);
    set(&mut apic, ESR, 0);
    assert_eq!(get(&mut apic, ESR), 0xe0);
    set(&mut apic, ESR, 0);
    assert_eq!(get(&mut apic, ESR), 0);
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0xfe)));
}

#[test]
fn only_the_legal_mode_changes_are_possible() {
    const OFF: u64 = LOCAL_APIC_BASE;
    const XAPIC: u64 = OFF | BASE_ENABLE;
    const X2APIC: u64 = XAPIC | BASE_X2APIC;
    for (path, last, legal) in [
        (&[][..], X2APIC, true),
        (&[], OFF, true),
        (&[], OFF | BASE_X2APIC, false),
        (&[], XAPIC | 1, false),
        (&[], XAPIC | 1 << 60, false),
        (&[], 0xd000_0000 | BASE_ENABLE, true),
        (&[X2APIC], XAPIC, false),
        (&[X2APIC], OFF, true),
        (&[X2APIC], X2APIC, true),
        (&[OFF], X2APIC, false),
        (&[OFF], XAPIC, true),
        (&[X2APIC, OFF, XAPIC], X2APIC, true),
    ] {
        let mut apic = LocalApic::new(config(1));
        for step in path {
            apic.write_msr(IA32_APIC_BASE, *step, 0, 0).unwrap();
        }
        let done = apic.write_msr(IA32_APIC_BASE, last, 0, 0).is_some();
        assert_eq!(done, legal, "{path:x?} then {last:#x}");
    }
}

#[test]
fn the_register_page_is_there_in_xapic_mode_only() {
    let mut apic = LocalApic::new(config(1));
    assert_eq!(apic.page(), Some(LOCAL_APIC_BASE));
    assert_eq!(apic.read_msr(X2APIC_FIRST + ID, 0), None);
    apic.write_msr(IA32_APIC_BASE, 0xd000_0000 | BASE_ENABLE, 0, 0)
        .unwrap();
    assert_eq!(apic.page(), Some(0xd000_0000));
    apic.write_msr(IA32_APIC_BASE, LOCAL_APIC_BASE, 0, 0)
        .unwrap();
    assert_eq!(apic.page(), None);
    assert!(!apic.matches(Destination::All));
    assert_eq!(in_x2apic_mode(1).page(), None);
}

#[test]
fn x2apic_registers_fault_where_the_manual_says() {
    let mut apic = in_x2apic_mode(0x12345);
    let mut write = |register: u32, value: u64| {
        apic.write_msr(X2APIC_FIRST + register, value, 0, 0)
            .is_some()
    };
    for (register, value, ok) in [
        (TPR, 0x20, true),
        (TPR, 0x100, false),
        (TPR, 1 << 32, false),
        (ID, 0, false),
        (LDR, 0, false),
        (DFR, 0, false),
        (PPR, 0, false),
        (EOI, 0, true),
        (EOI, 1, false),
        (ESR, 0, true),
        (ESR, 1, false),
        (ICR_HIGH, 0, false),
        (CURRENT_COUNT, 0, false),
        (LVT_TIMER, 0x2_00ef, true),
        (LVT_TIMER, 0x8_00ef, false),
        (SVR, 0x1ff, true),
        (0x3d, 0, false),
        (0xff, 0, false),
    ] {
        assert_eq!(write(register, value), ok, "{register:#x} {value:#x}");
    }
    let mut read = |register: u32| apic.read_msr(X2APIC_FIRST + register, 0);
    assert_eq!(read(ID), Some(0x12345));
    for register in [EOI, DFR, ICR_HIGH, SELF_IPI, 0x01, 0x40] {
        assert_eq!(read(register), None, "{register:#x}");
    }
}

#[test]
fn an_x2apic_ipi_is_one_write() {
    let mut apic = in_x2apic_mode(7);
    let effect = apic.write_msr(X2APIC_FIRST + ICR_LOW, 0x1_0203 << 32 | 0x45, 0, 0);
    assert!(
        matches!(effect, Some(Effect::Send(m)) if m.destination == Destination::Physical(0x1_0203))
    );
    assert_eq!(
        apic.read_msr(X2APIC_FIRST + ICR_LOW, 0),
        Some(0x1_0203 << 32 | 0x45)
    );
    apic.write_msr(X2APIC_FIRST + SELF_IPI, 0x66, 0, 0).unwrap();
    assert_eq!(apic.acknowledge(), Some(Acknowledged::Vector(0x66)));
}

struct AsChip(LocalApic);
impl Chip for AsChip {
    const WIDTH: u8 = 8;
    fn read(&mut self, offset: u64, size: u8, now: Nanos) -> u64 {
        if offset & 1 != 0 {
            let msr = X2APIC_FIRST + (offset >> 4) as u32;
            return self.0.read_msr(msr, now).unwrap_or(0) & doppel_device::all_ones(size);
        }
        self.0.read(offset, size, now)
    }
    fn write(&mut self, offset: u64, size: u8, value: u64, now: Nanos) {
        match offset & 0xf {
            1 => drop(
                self.0
                    .write_msr(X2APIC_FIRST + (offset >> 4) as u32, value, now, now),
            ),
            3 => drop(self.0.write_msr(IA32_TSC_DEADLINE, value, now, now)),
            5 => drop(
                self.0
                    .write_msr(IA32_APIC_BASE, value & 0xfff | LOCAL_APIC_BASE, 0, now),
            ),
            _ => drop(self.0.write(offset & !0xf, size, value, now)),
        }
    }
    fn next_deadline(&self) -> Option<Nanos> {
        self.0.next_deadline()
    }
    fn advance(&mut self, now: Nanos) {
        self.0.advance(now);
    }
}

#[test]
fn nothing_written_breaks_it() {
    every_register_takes_everything(
        &mut AsChip(LocalApic::new(config(9))),
        0x1000,
        |chip, random| {
            let mode = DeliveryMode::from_register(random as u32).unwrap_or(DeliveryMode::Fixed);
            chip.0.accept(mode, (random >> 16) as u8, random & 1 != 0);
            chip.0
                .set_lint(random as u32 >> 20 & 3, random >> 30 & 1 != 0);
            chip.0.set_cr8(random >> 40 & 0xf);
            chip.0.matches(Destination::Logical((random >> 32) as u32));
            chip.0.acknowledge();
            chip.0.take_start();
        },
    );
}
