//! RAM of a kernel without long mode: 32-bit paging, PAE paging or none, task state segments, gates of 32 and 16 bits; and items of
//! that kernel.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, byte_ptr, dword_ptr, fword_ptr, word_ptr};

use super::image::{Image, random_descriptor};
use super::layout::*;
use super::write::{Assembled, Paging, Writer};
use crate::random::Random;

/// Selectors behind which tasks, gates to them and call gates are.
pub const TASK_SELECTORS: std::ops::Range<u16> = CALL_GATES;
const TASKS: u64 = 4;

/// Everything but the supervisor and the steps.
pub fn fill(image: &mut Image, w: &mut Writer, paging: Paging) {
    match paging {
        Paging::Off => {}
        Paging::Bits32 => tables32(image, w),
        _ => tables_pae(image, w),
    }
    descriptors(image, w.r);
    gates(image, w.r);
    tasks(image, w.r);
}

fn dword(image: &mut Image, at: u64, v: u64) {
    image.bytes(at, &(v as u32).to_le_bytes());
}

fn tables32(image: &mut Image, w: &mut Writer) {
    for page in 0..1024 {
        let own = w.own_entry(page << 12);
        dword(image, PT + 4 * page, own);
        let entry = w.entry() & 0xffff_ffff & !0x180;
        let good = w.good_entry();
        dword(image, GOOD_ENTRIES + 4 * page, good);
        for tables in X_TABLES {
            let entry = if w.r.percent(40) { good } else { entry };
            dword(image, tables[2] + 4 * page, entry);
        }
    }
    for (root, tables) in [PML4, PML4_B].into_iter().zip(X_TABLES) {
        dword(image, root, PT | 7);
        dword(image, root + 4 * (ALIASES[1] >> 22), tables[2] | 7);
        for n in 1..4 {
            let entry = w.large_entry(22) & 0xffff_ffff & !0x100;
            dword(image, root + 4 * ((ALIASES[1] >> 22) + n), entry);
        }
    }
}

fn tables_pae(image: &mut Image, w: &mut Writer) {
    for page in 0..512 {
        let own = w.own_entry(page << 12);
        image.put(PT + 8 * page, own);
        let good = w.good_entry();
        image.put(GOOD_ENTRIES + 8 * page, good);
        for tables in X_TABLES {
            let entry = match w.r.percent(40) {
                true => good,
                // The ignored bits of other formats are reserved here.
                false => w.entry() & !0x7ff0_0000_0000_0180,
            };
            image.put(tables[2] + 8 * page, entry);
        }
    }
    for (root, tables) in [PML4, PML4_B].into_iter().zip(X_TABLES) {
        image.put(root, PD | 1);
        image.put(root + 8, tables[1] | 1);
        image.put(PD, PT | 7);
        image.put(tables[1], tables[2] | 7);
        for n in 1..=LARGE_PAGES {
            let entry = w.large_entry(21) & !0x7ff0_0000_0000_0100;
            image.put(tables[1] + 8 * n, entry);
        }
    }
}

fn flat(attributes: u64) -> u64 {
    0x000f_0000_0000_ffff | attributes << 40
}

fn system(base: u64, limit: u64, kind: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | kind << 40
}

fn gate(selector: u64, offset: u64, attributes: u64, count: u64) -> u64 {
    offset & 0xffff
        | selector << 16
        | count << 32
        | attributes << 40
        | (offset >> 16 & 0xffff) << 48
}

fn descriptors(image: &mut Image, r: &mut Random) {
    for (selector, descriptor) in [
        (K64, flat(0xc09b)),
        (KDS, flat(0xc093)),
        (U32, flat(0xc0fb)),
        (UDS, flat(0xc0f3)),
        (U64, flat(0xc0fb)),
        (U16, USER_CODE << 16 | 0xffff | 0xfb << 40),
        (TR, system(TSS, TSS_LIMIT, 0x89)),
        (TR + 8, 0),
        (LDTR, system(LDT, 0xff, 0x82)),
        (DOUBLE_FAULT_TR, system(DOUBLE_FAULT_TSS, 0x67, 0x89)),
        (K32, flat(0xc09b)),
    ] {
        image.put(GDT + u64::from(selector & !7), descriptor);
    }
    for (selector, descriptor) in SHORT_DESCRIPTORS {
        image.put(GDT + u64::from(selector & !7), descriptor);
    }
    for selector in RANDOM_DESCRIPTORS.step_by(8) {
        image.put(GDT + u64::from(selector), random_descriptor(r));
    }
    for selector in TASK_SELECTORS.step_by(8) {
        image.put(GDT + u64::from(selector), task_or_gate(r));
    }
    for entry in 0..32 {
        let descriptor = match r.percent(80) {
            true => random_descriptor(r),
            false => task_or_gate(r),
        };
        image.put(LDT + 8 * entry, descriptor);
    }
}

fn dpl_and_present(r: &mut Random) -> u64 {
    *r.pick(&[3u64, 3, 3, 0, 1]) << 5 | u64::from(r.percent(93)) << 7
}

fn task_or_gate(r: &mut Random) -> u64 {
    let attributes = dpl_and_present(r);
    match r.below(4) {
        0 => {
            let limit = *r.pick(&[0x67u64, 0x67, 0x67, 0x2b, 0x66, 0xfff]);
            let kind = *r.pick(&[0x9u64, 0x9, 0x9, 0xb, 0x1, 0x3]);
            system(
                TASK_STATES + 0x80 * r.below(TASKS),
                limit,
                kind | attributes,
            )
        }
        1 => {
            let selector = TASK_SELECTORS.start as u64 + 8 * r.below(32);
            gate(selector, 0, 0x5 | attributes, 0)
        }
        _ => {
            let target = *r.pick(&[KERNEL_PAD, KERNEL_PAD, KERNEL_PAD, USER_PAD]);
            let selector = u64::from(*r.pick(&[K64, K64, K64, K64 | 3, U32, K32, KDS, 0, 0x90]));
            let kind = *r.pick(&[0xcu64, 0xc, 0xc, 0x4]);
            gate(selector, target, kind | attributes, r.below(6))
        }
    }
}

fn gates(image: &mut Image, r: &mut Random) {
    for vector in 0..256u64 {
        let software = matches!(vector, 3 | 4 | 0x80..0x90);
        let dpl = if software { 3 << 5 } else { 0 };
        let kind = 0xe | u64::from(r.percent(25));
        let mut at = gate(K64.into(), STUBS + 16 * vector, kind | dpl | 0x80, 0);
        if RANDOM_GATES.contains(&(vector as u8)) {
            let kind = *r.pick(&[0xeu64, 0xe, 0xf, 0xf, 0x5, 0x6, 0x7, 0xc]);
            let selector = match kind {
                5 => u64::from(TASK_SELECTORS.start) + 8 * r.below(32),
                _ => u64::from(*r.pick(&[K64, K64, K64 | 3, U32, K32, KDS, 0, 0x98, 0x4])),
            };
            at = gate(selector, STUBS + 16 * vector, kind | dpl_and_present(r), 0);
        }
        if vector == 8 {
            at = gate(DOUBLE_FAULT_TR.into(), 0, 0x85, 0);
        }
        image.put(IDT + 8 * vector, at);
    }
}

/// A 32-bit task state: offsets of its fields as in Intel SDM vol. 3A, figure 8-2.
fn task(image: &mut Image, at: u64, eip: u64, top: u64, segments: [u16; 6], flags: u64) {
    dword(image, at + 4, KERNEL_STACK - 0x1000);
    dword(image, at + 8, KDS.into());
    dword(image, at + 0x1c, PML4);
    dword(image, at + 0x20, eip);
    dword(image, at + 0x24, flags);
    for n in 0..8 {
        dword(
            image,
            at + 0x28 + 4 * n,
            if n == 4 { top } else { 0x1111 * n },
        );
    }
    for (n, selector) in segments.into_iter().enumerate() {
        dword(image, at + 0x48 + 4 * n as u64, selector.into());
    }
    dword(image, at + 0x60, LDTR.into());
    image.bytes(at + 0x66, &0x68u16.to_le_bytes());
}

fn tasks(image: &mut Image, r: &mut Random) {
    let kernel = [KDS, K64, KDS, KDS, KDS, KDS];
    task(image, TSS, 0, 0, kernel, 2);
    dword(image, TSS + 4, KERNEL_STACK);
    for n in 1..3 {
        dword(image, TSS + 4 + 8 * n, STEP_STACK);
        dword(
            image,
            TSS + 8 + 8 * n,
            u64::from(*r.pick(&[KDS, UDS, 0x90])),
        );
    }
    for port in 0..0x2000 {
        let closed = match port {
            8 => r.bits() as u8,
            _ if r.percent(50) => 0xff,
            _ => 0,
        };
        image.bytes(TSS + 0x68 + port, &[closed]);
    }
    image.bytes(TSS + TSS_LIMIT, &[0xff]);
    let stack = IST1;
    task(
        image,
        DOUBLE_FAULT_TSS,
        DOUBLE_FAULT_TASK_CODE,
        stack,
        kernel,
        2,
    );
    for n in 0..TASKS {
        let of_user = r.percent(50);
        let (mut segments, eip, top) = match of_user {
            true => ([UDS, U32, UDS, UDS, UDS, UDS], USER_PAD, USER_STACK - 0x800),
            false => (kernel, KERNEL_PAD, IST1 + 0x1000),
        };
        let returns = r.percent(35);
        if r.percent(25) {
            let any = *r.pick(&[0u16, KDS, UDS, 0x98, 0xa3, 0x4, U16]);
            segments[r.below(6) as usize] = any;
        }
        let flags = 2 | (r.bits() & 0x3200);
        let eip = if returns { eip + RETURNING_PAD } else { eip };
        task(image, TASK_STATES + 0x80 * n, eip, top, segments, flags);
    }
    for pad in [KERNEL_PAD, USER_PAD] {
        image.bytes(pad + RETURNING_PAD, &[0xcf, 0xcd, END_STEP]);
    }
}

/// An entry of a page table, or of a large page, and a flush.
pub fn change_mapping(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let tables = X_TABLES[w.r.below(2) as usize];
    let page = w.page() & 1023;
    let entry = match w.r.percent(50) {
        true => w.good_entry(),
        false => w.entry() & !0x7ff0_0000_0000_0180,
    };
    let linear = ALIASES[1] + page * 0x1000;
    let at = match w.traits.paging {
        Paging::Pae => tables[2] + 8 * page,
        _ => tables[2] + 4 * page,
    };
    a.mov(ecx, at as u32)?;
    a.mov(dword_ptr(ecx), entry as u32 as i32)?;
    if w.traits.paging == Paging::Pae {
        a.mov(dword_ptr(ecx + 4), (entry >> 32) as u32 as i32)?;
    }
    match w.r.percent(50) {
        true => {
            a.mov(eax, linear as u32)?;
            a.invlpg(byte_ptr(eax))
        }
        false => {
            a.mov(eax, cr3)?;
            a.mov(cr3, eax)
        }
    }?;
    a.mov(ebx, linear as u32)?;
    match w.r.percent(50) {
        true => a.mov(eax, dword_ptr(ebx)),
        false => a.add(dword_ptr(ebx), 1),
    }
}

/// Another task, by a far branch or an interrupt, or back by IRET.
pub fn switch_task(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = TASK_SELECTORS.start + 8 * w.r.below(32) as u16 + u16::from(w.cpl);
    let at = match w.cpl {
        3 => USER_DATA + 0x7200,
        _ => KERNEL_DATA + 0x7200,
    };
    a.mov(edi, at as u32)?;
    a.mov(dword_ptr(edi), USER_PAD as i32)?;
    a.mov(word_ptr(edi + 4), i32::from(selector as i16))?;
    match w.r.below(6) {
        0 => a.jmp(fword_ptr(edi)),
        1 | 2 => a.call(fword_ptr(edi)),
        3 => a.int(u32::from(RANDOM_GATES.start) + w.r.below(16) as u32),
        4 => {
            a.pushfd()?;
            a.or(dword_ptr(esp), 0x4000)?;
            a.popfd()?;
            a.iretd()
        }
        _ => {
            let [low, high] = selector.to_le_bytes();
            let code = [0x9a, 0, 0, 0, 0, low, high];
            match w.mode {
                super::write::Mode::Bits32 => a.db(&code),
                _ => a.db(&[&[0x66], &code[..]].concat()),
            }
        }
    }
}

/// Task states and descriptors change: tasks become free again.
pub fn change_task(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = u64::from(TASK_SELECTORS.start) + 8 * w.r.below(32);
    let state = TASK_STATES + 0x80 * w.r.below(TASKS);
    a.mov(ebx, (GDT + selector) as u32)?;
    match w.r.below(4) {
        0 => a.and(byte_ptr(ebx + 5), !2),
        1 => {
            let v = task_or_gate(w.r);
            a.mov(dword_ptr(ebx), v as u32 as i32)?;
            a.mov(dword_ptr(ebx + 4), (v >> 32) as u32 as i32)
        }
        2 => {
            let field = 4 * w.r.below(26) as u32;
            let selector = w.selector();
            a.mov(ebx, state as u32)?;
            a.mov(dword_ptr(ebx + field), i32::from(selector))
        }
        _ => {
            let link = selector;
            a.mov(dword_ptr(TSS), link as i32)
        }
    }
}
