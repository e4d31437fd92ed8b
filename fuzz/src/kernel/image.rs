//! RAM of a generated kernel before it runs: tables, supervisor, steps, routines, data.

use anyhow::Result;
use doppel_x86::CpuFeatures;

use super::layout::*;
use super::steps::Step;
use super::write::{Levels, Mode, Paging, Traits, Writer};
use super::{protected, supervisor, supervisor32};
use crate::random::Random;

/// RFLAGS.VM.
pub const V86: u64 = 1 << 17;

/// All bytes of RAM.
#[derive(Clone)]
pub struct Image(pub Vec<u8>);

impl Image {
    /// Stores a word.
    pub fn put(&mut self, at: u64, v: u64) {
        self.bytes(at, &v.to_le_bytes());
    }

    /// Stores bytes.
    pub fn bytes(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A word.
    pub fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(word)
    }
}

/// RAM that holds a supervisor, and INT3 where code might go astray, for each way of paging.
pub struct Supervisors(Vec<(Paging, Vec<u8>)>);

impl Supervisors {
    /// Assembles them.
    pub fn new() -> Result<Self> {
        let all = [Paging::Long, Paging::Off, Paging::Bits32, Paging::Pae];
        let each = all
            .into_iter()
            .map(|paging| Ok((paging, supervised(paging)?)));
        Ok(Supervisors(each.collect::<Result<_>>()?))
    }

    fn ram(&self, paging: Paging) -> Vec<u8> {
        let found = self.0.iter().find(|(p, _)| *p == paging);
        found.map(|(_, ram)| ram.clone()).unwrap_or_default()
    }
}

fn supervised(paging: Paging) -> Result<Vec<u8>> {
    let mut image = Image(vec![0; RAM as usize]);
    for (from, to) in [(0, PML4), (0x2_3000, LOG), (USER_CODE, RAM)] {
        image.0[from as usize..to as usize].fill(0xcc);
    }
    if paging == Paging::Off {
        image.0[TABLES.start as usize..TABLES.end as usize].fill(0xcc);
    }
    let pieces = match paging {
        Paging::Long => supervisor::pieces()?,
        paging => supervisor32::pieces(paging)?,
    };
    for (at, code) in pieces {
        image.bytes(at, &code);
    }
    Ok(image.0)
}

/// What a case starts from but its steps: everything random in it is drawn here, so that it stays when steps are left out.
pub fn base(supervisors: &Supervisors, r: &mut Random, traits: Traits) -> Image {
    let mut image = Image(supervisors.ram(traits.paging));
    image.bytes(KERNEL_PAD, &[0xcd, END_STEP]);
    image.bytes(USER_PAD, &[0xcd, END_STEP]);
    let mut w = Writer {
        r,
        traits,
        mode: match traits.paging {
            Paging::Long => Mode::Bits64,
            _ => Mode::Bits32,
        },
        cpl: 0,
        v86: false,
    };
    match traits.paging {
        Paging::Long => {
            identity(&mut image, &mut w);
            for n in 0..2 {
                experiments(&mut image, &mut w, n);
            }
            descriptors(&mut image, &mut w);
            gates(&mut image, &mut w);
            task_state(&mut image, w.r);
        }
        paging => protected::fill(&mut image, &mut w, paging),
    }
    data(&mut image, w.r);
    routines(&mut image, w.r);
    variables(&mut image, &mut w);
    image
}

fn identity(image: &mut Image, w: &mut Writer) {
    for root in [PML4, PML4_B] {
        image.put(root, PDPT | 7);
        for entry in [0, 511] {
            image.put(root + TO_PML5 + 8 * entry, root | 7);
        }
    }
    image.put(PDPT, PD | 7);
    // The experiments' alias below 4 GiB.
    image.put(PDPT + 8, X_TABLES[0][1] | 7);
    image.put(PD, PT | 7);
    for page in 0..RAM >> 12 {
        let entry = w.own_entry(page << 12);
        image.put(PT + 8 * page, entry);
    }
}

/// Where the experiments are in a root of five levels, and in the tables below it that only these have.
pub const X_ENTRIES_5: [u64; 3] = [1, 255, 256];
const X_ENTRIES_4: [u64; 3] = [0, 1, 511];

fn experiments(image: &mut Image, w: &mut Writer, n: usize) {
    let [pdpt, pd, pt] = X_TABLES[n];
    let root = [PML4, PML4_B][n];
    for entry in [1, 255, 256] {
        image.put(root + 8 * entry, pdpt | 7);
    }
    if w.traits.levels != Levels::Four {
        for entry in X_ENTRIES_5 {
            image.put(root + TO_PML5 + 8 * entry, w.table_entry(X_PML4[n]));
        }
        for entry in X_ENTRIES_4 {
            image.put(X_PML4[n] + 8 * entry, w.table_entry(pdpt));
        }
    }
    for last in [0, 511] {
        image.put(pdpt + 8 * last, w.table_entry(pd));
        image.put(pd + 8 * last, w.table_entry(pt));
    }
    for page in 1..=HUGE_PAGES {
        image.put(pdpt + 8 * page, w.large_entry(30));
    }
    for page in 1..=LARGE_PAGES {
        image.put(pd + 8 * page, w.large_entry(21));
    }
    for page in (0..32).chain(496..512) {
        let entry = match w.r.percent(35) {
            true => w.good_entry(),
            false => w.entry(),
        };
        image.put(pt + 8 * page, entry);
        let good = w.good_entry();
        image.put(GOOD_ENTRIES + 8 * page, good);
    }
}

/// A descriptor of any kind, most often present and flat.
pub fn random_descriptor(r: &mut Random) -> u64 {
    let limit = *r.pick(&[0xf_ffffu64, 0xf_ffff, 0x100, 0, 0xfff]);
    let base = match r.below(10) {
        0..6 => 0,
        6 => ALIASES[1],
        7 => USER_CODE,
        8 => USER_DATA,
        _ => r.bits() & 0xffff_ffff,
    };
    let kind = r.below(16);
    let s = u64::from(r.percent(88)) << 4;
    let dpl = *r.pick(&[0u64, 3, 3, 1, 2]) << 5;
    let present = u64::from(r.percent(92)) << 7;
    let high = *r.pick(&[0x8u64, 0xc, 0xc, 0xa, 0xa, 0x4, 0x0, 0xe]);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | (kind | s | dpl | present) << 40
        | (limit >> 16) << 48
        | high << 52
        | (base >> 24) << 56
}

fn call_gate(w: &mut Writer) -> (u64, u64) {
    let (high, beyond) = (w.wide(KERNEL_PAD), w.beyond());
    let r = &mut *w.r;
    let target = *r.pick(&[high, KERNEL_PAD, KERNEL_PAD, USER_PAD, beyond, KERNEL_CODE]);
    let selector = u64::from(*r.pick(&[K64, K64, K64, K64 | 3, U64, K32, KDS, 0, 0x90]));
    let kind = *r.pick(&[0xcu64, 0xc, 0xc, 0xc, 0xc, 0x4, 0xe]);
    let dpl = *r.pick(&[3u64, 3, 3, 0, 1]) << 5;
    let present = u64::from(r.percent(92)) << 7;
    let low = target & 0xffff
        | selector << 16
        | (kind | dpl | present) << 40
        | (target >> 16 & 0xffff) << 48;
    (low, target >> 32 | u64::from(r.percent(4)) << 40)
}

fn descriptors(image: &mut Image, w: &mut Writer) {
    let flat = |attributes: u64| 0x000f_0000_0000_ffff | attributes << 40;
    let system = |base: u64, limit: u64, kind: u64| {
        limit & 0xffff | base << 16 | kind << 40 | (limit >> 16) << 48
    };
    let of_code = USER_CODE << 16 | 0xffff;
    for (selector, descriptor) in [
        (K64, flat(0xa09b)),
        (KDS, flat(0xc093)),
        (U32, flat(0xc0fb)),
        (UDS, flat(0xc0f3)),
        (U64, flat(0xa0fb)),
        (U16, of_code | 0xfb << 40),
        (TR, system(TSS, TSS_LIMIT, 0x8b)),
        (LDTR, system(LDT, 0xff, 0x82)),
        (K32, flat(0xc09b)),
        // RSP0 and the first two stacks of the interrupt stack table.
        (SHORT_TR, system(TSS, 0x33, 0x89)),
    ] {
        image.put(GDT + u64::from(selector & !7), descriptor);
    }
    for (selector, descriptor) in SHORT_DESCRIPTORS {
        image.put(GDT + u64::from(selector & !7), descriptor);
    }
    for selector in RANDOM_DESCRIPTORS.step_by(8) {
        image.put(GDT + u64::from(selector), random_descriptor(w.r));
    }
    for selector in CALL_GATES.step_by(16) {
        let (low, high) = call_gate(w);
        image.put(GDT + u64::from(selector), low);
        image.put(GDT + u64::from(selector) + 8, high);
    }
    for entry in 0..32 {
        image.put(LDT + 8 * entry, random_descriptor(w.r));
    }
}

struct Gate {
    offset: u64,
    selector: u16,
    kind: u64,
    dpl: u64,
    ist: u64,
    present: bool,
}

fn put_gate(image: &mut Image, vector: u64, g: &Gate) {
    let attributes = g.kind | g.dpl << 5 | u64::from(g.present) << 7;
    let low = g.offset & 0xffff
        | u64::from(g.selector) << 16
        | g.ist << 32
        | attributes << 40
        | (g.offset >> 16 & 0xffff) << 48;
    image.put(IDT + 16 * vector, low);
    image.put(IDT + 16 * vector + 8, g.offset >> 32);
}

fn gates(image: &mut Image, w: &mut Writer) {
    for vector in 0..256u64 {
        let software = matches!(vector, 3 | 4 | 0x80..0x90);
        let wild = RANDOM_GATES.contains(&(vector as u8));
        let (stub, beyond) = (w.wide(STUBS + 16 * vector), w.beyond());
        let r = &mut *w.r;
        let mut gate = Gate {
            offset: STUBS + 16 * vector,
            selector: K64,
            kind: 0xe | u64::from(r.percent(25)),
            dpl: if software { 3 } else { 0 },
            ist: match vector {
                8 => 1,
                _ if r.percent(15) => 1 + r.below(7),
                _ => 0,
            },
            present: true,
        };
        if wild {
            gate.kind = *r.pick(&[0xe, 0xe, 0xf, 0xf, 0xc, 0x5, 0x6]);
            gate.dpl = *r.pick(&[3, 3, 0, 1]);
            gate.present = r.percent(85);
            gate.selector = *r.pick(&[K64, K64, K64 | 3, U64, K32, KDS, 0, 0x98, 0x4]);
            // Of other vectors, four levels must suffice to get to the next step.
            gate.offset = if r.percent(8) { beyond } else { stub };
        }
        put_gate(image, vector, &gate);
    }
}

fn task_state(image: &mut Image, r: &mut Random) {
    image.put(TSS + 4, KERNEL_STACK);
    for n in 0..2 {
        image.put(TSS + 12 + 8 * n, STEP_STACK);
    }
    for n in 0..7 {
        image.put(TSS + 0x24 + 8 * n, IST1 + 0x1000 * n);
    }
    image.bytes(TSS + 0x66, &0x68u16.to_le_bytes());
    for port in 0..0x2000 {
        let closed = match port {
            8 => r.bits() as u8,
            _ if r.percent(50) => 0xff,
            _ => 0,
        };
        image.bytes(TSS + 0x68 + port, &[closed]);
    }
    image.bytes(TSS + TSS_LIMIT, &[0xff]);
}

fn data(image: &mut Image, r: &mut Random) {
    let areas = [
        (KERNEL_DATA, 0x7000),
        (USER_DATA, 0x7000),
        (
            SPARE + ROUTINE_PAGES * 0x1000,
            (SPARE_PAGES - ROUTINE_PAGES) * 0x1000,
        ),
    ];
    for (from, len) in areas {
        for at in (from..from + len).step_by(64) {
            // INT3 comes first, where this is executed.
            image.put(at + 0x20, r.value());
        }
    }
}

/// Sixty-four to a page; the last goes on in the next.
fn routines(image: &mut Image, r: &mut Random) {
    for page in 0..ROUTINE_PAGES {
        for slot in 0..64 {
            let at = SPARE + page * 0x1000 + slot * 0x40;
            let mut code = vec![0x83, 0xc0, r.bits() as u8];
            for _ in 0..r.below(5) {
                let n = r.bits() as u8;
                code.extend(*r.pick(&[
                    &[0xffu8, 0xc3] as &[u8],
                    &[0x01, 0xc8],
                    &[0x29, 0xd3],
                    &[0x83, 0xd1, n],
                    &[0x81, 0xc6, n, 1, 2, 3],
                    &[0x0f, 0x92, 0xc2],
                    &[0x90],
                ]));
            }
            if slot == 63 {
                code.resize(0x3d, 0x90);
                // An instruction of two pages.
                code.extend([0x81, 0xc7, 0x05]);
            } else {
                code.push(0xc3);
            }
            image.bytes(at, &code);
        }
    }
}

fn variables(image: &mut Image, w: &mut Writer) {
    let (traits, rights) = (w.traits, w.rights());
    let r = &mut *w.r;
    image.put(LOG_NEXT, LOG);
    image.put(FIXES_LEFT, r.below(12));
    image.put(FLAG_MASK, !0);
    let wp = u64::from(r.percent(70)) << 16;
    let am = u64::from(r.percent(40)) << 18;
    let paged = u64::from(traits.paging != Paging::Off) << 31;
    image.put(BASE_CR0, 0x33 | paged | wp | am);
    let mut cr4 = 0x6a0 | 0x1_0000;
    for (bit, percent) in [
        (2, 10),
        (3, 50),
        (8, 50),
        (11, 30),
        (18, 80),
        (20, 40),
        (21, 40),
    ] {
        cr4 |= u64::from(r.percent(percent)) << bit;
    }
    cr4 |= u64::from(traits.pcids) << 17;
    match traits.paging {
        Paging::Long | Paging::Pae => {}
        // Large pages, where there are any, and no PAE.
        _ => cr4 = cr4 & !0x20 | u64::from(r.percent(80)) << 4,
    }
    cr4 |= u64::from(traits.has_keys() && r.percent(90)) << 22;
    let five = match (traits.levels, traits.paging) {
        (Levels::Four, Paging::Long) => false,
        (Levels::Five, _) => true,
        // Without long mode it means nothing.
        _ => traits.features.contains(CpuFeatures::LA57) && r.percent(50),
    };
    cr4 |= u64::from(five) << 12;
    image.put(BASE_CR4, cr4);
    if traits.has_keys() {
        image.put(BASE_PKRU, rights.into());
    }
    let long = if traits.paging == Paging::Long {
        0x500
    } else {
        0
    };
    image.put(BASE_EFER, 1 | long | u64::from(r.percent(85)) << 11);
    for vector in 0..0x102 {
        let action = match vector {
            1 => *r.pick(&[action::RESUME, action::RESUME, action::STOP_STEPPING]),
            2 | 4 => action::RETURN,
            14 => *r.pick(&[action::NEXT, action::FIX, action::FIX]),
            0x100 => *r.pick(&[
                action::SYSRET,
                action::SYSRET,
                action::SYSRET32,
                action::NEXT,
            ]),
            0x101 => *r.pick(&[action::SYSEXIT, action::NEXT]),
            0x81 => action::NEXT,
            0x20.. => action::RETURN,
            _ => action::NEXT,
        };
        image.put(ACTIONS + 8 * vector, action);
    }
}

/// Puts steps and their order in, with the flags that notes are to have.
pub fn complete(base: &Image, steps: &[Step], schedule: &[u16], flag_mask: u64) -> Option<Image> {
    let mut image = base.clone();
    for (n, (step, at)) in steps.iter().zip(places(steps)).enumerate() {
        put_step(&mut image, n as u64, step, at)?;
    }
    for (n, step) in schedule.iter().enumerate() {
        image.bytes(SCHEDULE + 2 * n as u64, &step.to_le_bytes());
    }
    image.put(CURSOR, SCHEDULE);
    image.put(SCHEDULE_END, SCHEDULE + 2 * schedule.len() as u64);
    image.put(FLAG_MASK, flag_mask);
    Some(image)
}

/// Where each step's code begins.
pub fn places(steps: &[Step]) -> Vec<u64> {
    let (mut kernel, mut user) = (KERNEL_CODE, USER_CODE);
    let mut place = |step: &Step| {
        let next = if step.context.cpl == 3 {
            &mut user
        } else {
            &mut kernel
        };
        let at = *next + step.gap;
        *next = at + length(step);
        at
    };
    steps.iter().map(&mut place).collect()
}

fn length(step: &Step) -> u64 {
    step.items.iter().map(|i| i.bytes.len() as u64).sum::<u64>() + 2
}

fn put_step(image: &mut Image, n: u64, step: &Step, at: u64) -> Option<()> {
    let end = match step.context.cpl {
        3 => USER_DATA,
        _ => KERNEL_DATA,
    };
    if at + length(step) > end || n >= MOST_STEPS {
        return None;
    }
    let mut code: Vec<u8> = step.items.iter().flat_map(|i| &i.bytes).copied().collect();
    code.extend([0xcd, END_STEP]);
    image.bytes(at, &code);
    let c = &step.context;
    let d = STEPS + n * STEP_SIZE;
    let base = match c.cs {
        0xffff => 0xffff0,
        U16 => USER_CODE,
        K16 | C1 => KERNEL_CODE,
        _ => 0,
    };
    image.put(d + step::RIP, at - base);
    image.put(d + step::CS, c.cs.into());
    image.put(d + step::FLAGS, c.flags);
    image.put(d + step::RSP, c.rsp);
    image.put(d + step::SS, c.ss.into());
    image.put(d + step::DATA, c.data.into());
    for (n, v) in c.registers.iter().enumerate() {
        image.put(d + step::REGISTERS + 8 * n as u64, *v);
    }
    image.put(d + step::CR3, c.cr3);
    image.put(d + step::RESTORES, c.restores);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_supervisors_pieces_do_not_overlap() {
        let long = supervisor::pieces().unwrap();
        let narrow = [Paging::Off, Paging::Bits32, Paging::Pae].map(supervisor32::pieces);
        let all = narrow.into_iter().map(Result::unwrap).chain([long]);
        for mut pieces in all {
            pieces.sort_by_key(|(at, _)| *at);
            for pair in pieces.windows(2) {
                let end = pair[0].0 + pair[0].1.len() as u64;
                assert!(end <= pair[1].0, "{:x} ends at {end:x}", pair[0].0);
            }
        }
    }
}
