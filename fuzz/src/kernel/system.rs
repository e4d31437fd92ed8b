//! Items for the kernel alone: page tables and what flushes them, control, debug and model-specific registers, descriptor tables.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, byte_ptr, fword_ptr, qword_ptr, word_ptr, xmmword_ptr};

use super::layout::*;
use super::supervisor;
use super::write::{Assembled, Levels, Writer};

/// A word in RAM that is nobody's else.
const OWN: u64 = KERNEL_DATA + 0x7800;

fn toggle_global_pages(a: &mut CodeAssembler) -> Assembled {
    a.mov(r8, cr4)?;
    a.xor(r8, 0x80)?;
    a.mov(cr4, r8)?;
    a.xor(r8, 0x80)?;
    a.mov(cr4, r8)
}

fn invalidate_all(a: &mut CodeAssembler) -> Assembled {
    a.mov(r8d, 2)?;
    a.mov(r9d, OWN as u32)?;
    a.mov(qword_ptr(r9), 0)?;
    a.mov(qword_ptr(r9 + 8), 0)?;
    a.invpcid(r8, xmmword_ptr(r9))
}

/// Drops what the processor may know of page `page` in each of its linear addresses; of everything where it is `None`.
fn flush(w: &mut Writer, a: &mut CodeAssembler, page: Option<u64>) -> Assembled {
    match (w.r.below(4), page) {
        (0, Some(page)) if !w.traits.pcids => {
            for alias in w.traits.aliases() {
                a.mov(r8, alias + page * 0x1000)?;
                a.invlpg(byte_ptr(r8))?;
            }
            Ok(())
        }
        (0 | 1, _) if !w.traits.pcids && !w.traits.globals => {
            a.mov(r8, cr3)?;
            a.mov(cr3, r8)
        }
        (2, _) => invalidate_all(a),
        _ => toggle_global_pages(a),
    }
}

/// A new entry of a page table, and the flush that it needs.
pub fn change_mapping(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let space = w.r.below(2) as usize;
    let [pdpt, pd, pt] = X_TABLES[space];
    let of_five = w.traits.levels != Levels::Four;
    let (at, entry, page) = match w.r.below(20) {
        0 => (
            pdpt + 8 * (1 + w.r.below(HUGE_PAGES)),
            w.large_entry(30),
            None,
        ),
        1 => (
            pd + 8 * (1 + w.r.below(LARGE_PAGES)),
            w.large_entry(21),
            None,
        ),
        2 => (pd, w.table_entry(pt), None),
        3 => (pdpt, w.table_entry(pd), None),
        4 | 5 if of_five => {
            let root = [PML4, PML4_B][space] + TO_PML5;
            let at = root + 8 * w.r.pick(&super::image::X_ENTRIES_5);
            (at, w.table_entry(X_PML4[space]), None)
        }
        _ => {
            let page = w.page();
            let entry = match w.r.percent(40) {
                true => w.good_entry(),
                false => w.entry(),
            };
            (pt + 8 * page, entry, Some(page))
        }
    };
    a.mov(rax, entry)?;
    a.mov(rcx, at)?;
    match (w.r.below(4), page) {
        (0, Some(_)) => {
            // One bit of what is there; of A and D a flag would tell.
            let bit = *w.r.pick(&[0u32, 1, 2, 63, 59, 61]);
            a.btc(qword_ptr(rcx), bit)?;
        }
        _ => a.mov(qword_ptr(rcx), rax)?,
    }
    flush(w, a, page)
}

/// The same with an access before and after.
pub fn remap_and_access(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let page = w.page();
    let alias = *w.r.pick(w.traits.aliases());
    let tables = X_TABLES[w.r.below(2) as usize];
    let entry = w.good_entry() & !(w.r.bits() & 4);
    a.mov(rbx, alias + page * 0x1000 + 8 * w.r.below(512))?;
    a.mov(rdx, qword_ptr(rbx))?;
    a.mov(rax, entry)?;
    a.mov(rcx, tables[2] + 8 * page)?;
    a.mov(qword_ptr(rcx), rax)?;
    flush(w, a, Some(page))?;
    a.mov(qword_ptr(rbx), rdx)?;
    a.mov(rdx, qword_ptr(rbx + 8))
}

/// Calls a routine, maps another page in its place, and calls what is there then.
pub fn remap_and_call(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let page = w.page();
    let at = *w.r.pick(w.traits.aliases()) + page * 0x1000 + 0x40 * w.r.below(63);
    a.mov(rbx, at)?;
    for _ in 0..2 + w.r.below(3) {
        a.call(rbx)?;
        let user = 4 * u64::from(w.r.percent(20));
        let entry = (SPARE + w.r.below(ROUTINE_PAGES) * 0x1000) | 3 | user;
        a.mov(rax, entry)?;
        for tables in X_TABLES {
            a.mov(rcx, tables[2] + 8 * page)?;
            a.mov(qword_ptr(rcx), rax)?;
        }
        flush(w, a, Some(page))?;
    }
    a.call(rbx)
}

pub fn flushes(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    a.mov(rbx, at)?;
    match w.r.below(6) {
        0 => a.invlpg(byte_ptr(rbx)),
        1 => {
            // Any kind, any descriptor.
            let kind = match w.r.percent(85) {
                true => w.r.below(4),
                false => w.r.value(),
            };
            let (pcid, address) = match w.r.percent(70) {
                true => (w.r.below(8), w.pointer()),
                false => (w.r.value(), w.r.value()),
            };
            a.mov(rcx, kind)?;
            a.mov(rdx, OWN)?;
            a.mov(rax, pcid)?;
            a.mov(qword_ptr(rdx), rax)?;
            a.mov(rax, address)?;
            a.mov(qword_ptr(rdx + 8), rax)?;
            a.invpcid(rcx, xmmword_ptr(rdx))
        }
        2 => a.invpcid(rcx, xmmword_ptr(rbx)),
        3 => a.wbinvd(),
        4 => a.clflush(byte_ptr(rbx)),
        _ => toggle_global_pages(a),
    }
}

/// CR3 becomes RAX.
fn load_root(w: &Writer, a: &mut CodeAssembler) -> Assembled {
    match w.traits.levels {
        Levels::Four => a.mov(cr3, rax),
        _ => supervisor::load_root(a),
    }
}

fn root(w: &mut Writer) -> u64 {
    let root = w.root();
    match (w.traits.pcids, w.r.percent(92)) {
        (true, true) => root | w.r.below(4) | w.r.below(2) << 63,
        (false, true) => root | (w.r.bits() & 0x18),
        (_, false) => root | 1 << (40 + w.r.below(24)),
    }
}

pub fn switch_address_space(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (root, at, rbx_at) = (root(w), w.pointer(), w.register());
    a.mov(rax, root)?;
    load_root(w, a)?;
    a.mov(rbx_at, at)?;
    a.mov(rax, qword_ptr(rbx_at))?;
    a.mov(rcx, cr3)
}

pub fn control_registers(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    const CR0: [u32; 9] = [1, 2, 3, 4, 5, 16, 18, 29, 30];
    const CR4: [u32; 19] = [
        0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 16, 18, 20, 21, 22, 22, 17,
    ];
    match w.r.below(16) {
        0..4 => {
            let bit = 1i32 << *w.r.pick(&CR0);
            a.mov(rax, cr0)?;
            a.xor(eax, bit)?;
            a.mov(cr0, rax)
        }
        4..9 => {
            let bit = match w.r.percent(50) {
                true => *w.r.pick(&CR4),
                false => *w.r.pick(&[2, 11, 20, 21, 9]),
            };
            // Turning PCIDs on and off under way is the business of a case that has them.
            let bit = if bit == 17 && !w.traits.pcids {
                21
            } else {
                bit
            };
            a.mov(rax, cr4)?;
            a.xor(eax, 1i32 << bit)?;
            a.mov(cr4, rax)
        }
        9 => {
            a.mov(eax, w.r.bits() as u32 & 0xf)?;
            a.lmsw(ax)
        }
        10 => a.clts(),
        11 => {
            a.mov(eax, w.r.below(20) as u32)?;
            a.mov(cr8, rax)?;
            a.mov(rcx, cr8)
        }
        12 => {
            let v = w.pointer();
            a.mov(rax, v)?;
            a.mov(cr2, rax)?;
            a.mov(rcx, cr2)
        }
        13 => {
            let at = w.pointer();
            a.mov(rbx, at)?;
            a.lmsw(word_ptr(rbx))
        }
        14 => {
            // Bits that are reserved, in the upper half too; paging off in 64-bit mode.
            let bit = *w.r.pick(&[31u32, 0, 35, 63, 17, 28]);
            a.mov(rax, cr0)?;
            a.btc(rax, bit)?;
            a.mov(cr0, rax)
        }
        _ => {
            let bit = *w.r.pick(&[5u32, 13, 14, 23, 35, 63]);
            a.mov(rax, cr4)?;
            a.btc(rax, bit)?;
            a.mov(cr4, rax)
        }
    }
}

const MSRS: [u32; 26] = [
    0xc000_0080,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x174,
    0x175,
    0x176,
    0x277,
    0x1a0,
    0x48,
    0x1d9,
    0x8b,
    0xfe,
    0x2ff,
    0x200,
    0x201,
    0x250,
    0x258,
    0x17a,
    0x9999,
];

fn msr_value(w: &mut Writer, msr: u32) -> u64 {
    if w.r.percent(12) {
        return w.r.value();
    }
    match msr {
        0xc000_0080 => 0x500 | w.r.below(2) | w.r.below(2) << 11,
        0xc000_0081 => *w.r.pick(&[
            0x0023_0010_0000_0000,
            0x0020_0010_0000_0000,
            0x0023_0060_0000_0000,
        ]),
        0xc000_0082 | 0xc000_0083 => w.wide(SYSCALL_ENTRY),
        0xc000_0084 => 0x4_0700 ^ (w.r.bits() & 0xffff_ffff),
        0x174 => *w.r.pick(&[0x10, 0x10, 0x13, 0, 0x60]),
        0x175 => w.wide(CALL_STACK),
        0x176 => w.wide(SYSENTER_ENTRY),
        0x277 => 0x0007_0406_0007_0406,
        _ => w.pointer(),
    }
}

pub fn model_specific_registers(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let msr = *w.r.pick(&MSRS);
    let v = msr_value(w, msr);
    a.mov(ecx, msr)?;
    if w.r.percent(70) {
        a.mov(eax, v as u32)?;
        a.mov(edx, (v >> 32) as u32)?;
        a.wrmsr()?;
    }
    a.rdmsr()
}

/// Long mode is left and entered again with another number of levels.
pub fn change_levels(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (before, after) = (w.pointer(), w.pointer());
    a.mov(rbx, before)?;
    a.mov(rax, qword_ptr(rbx))?;
    a.mov(eax, CHANGE_LEVELS as u32)?;
    a.call(rax)?;
    a.mov(rbx, after)?;
    a.mov(qword_ptr(rbx), rax)
}

pub fn bases(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    match w.r.below(5) {
        0 => {
            a.swapgs()?;
            a.mov(rax, qword_ptr(8).gs())
        }
        1 => {
            a.mov(rax, at)?;
            a.wrgsbase(rax)?;
            a.mov(rcx, qword_ptr(0).gs())?;
            a.swapgs()
        }
        2 => {
            a.stac()?;
            a.mov(rbx, at)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.clac()?;
            a.mov(rcx, qword_ptr(rbx))
        }
        3 => {
            let v = w.r.bits() & 0x2ff;
            a.mov(eax, v as u32)?;
            a.xor(edx, edx)?;
            a.xor(ecx, ecx)?;
            a.xsetbv()?;
            a.xgetbv()
        }
        _ => a.stac(),
    }
}

pub fn debug_registers(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(6) {
        0 => {
            a.mov(rax, dr7)?;
            a.mov(rcx, dr6)?;
            a.mov(rdx, dr4)
        }
        1 => {
            a.mov(eax, 0x2400)?;
            a.mov(dr7, rax)?;
            a.mov(rcx, dr0)
        }
        2 => {
            let v = w.r.value();
            a.mov(rax, v)?;
            match w.r.percent(50) {
                true => a.mov(dr6, rax),
                false => a.mov(dr7, rax),
            }
        }
        _ => {
            // A breakpoint in data, at a port, or in code, local or global.
            let kind = *w.r.pick(&[0u64, 1, 1, 2, 3, 3]);
            let at = match kind {
                0 => {
                    *w.r.pick(&[USER_PAD, KERNEL_PAD, USER_CODE + 0x40, KERNEL_CODE + 0x40])
                }
                2 => 0x40 + w.r.below(4),
                _ => w.pointer(),
            };
            let len = if kind == 0 { 0 } else { w.r.below(4) };
            a.mov(rax, at)?;
            a.mov(dr1, rax)?;
            let dr7_value = 0x400 | (1 + w.r.below(3)) << 2 | (kind | len << 2) << 20;
            a.mov(rax, dr7_value)?;
            a.mov(dr7, rax)?;
            a.mov(rbx, at)?;
            match w.r.below(3) {
                0 => a.mov(rcx, qword_ptr(rbx)),
                1 => a.mov(qword_ptr(rbx), rcx),
                _ => a.in_(al, 0x40u32),
            }
        }
    }
}

/// The base of a table: where the levels may change, one that they all reach.
fn table(w: &mut Writer, at: u64) -> u64 {
    match w.traits.levels {
        Levels::Five => w.wide(at),
        _ => at,
    }
}

pub fn descriptor_tables(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    a.mov(ebx, OWN as u32)?;
    match w.r.below(10) {
        0 | 1 => {
            let limit = *w.r.pick(&[0xfffu32, 0xfff, 0x7f, 0x107, 0xffff, 0x6b]);
            let at = table(w, GDT);
            a.mov(rax, at)?;
            a.mov(word_ptr(rbx), i32::from(limit as i16))?;
            a.mov(qword_ptr(rbx + 2), rax)?;
            a.lgdt(fword_ptr(rbx))
        }
        2 | 3 => {
            let limit = *w.r.pick(&[0xfffu32, 0xfff, 0x91f, 0x8ff]);
            let at = table(w, IDT);
            a.mov(rax, at)?;
            a.mov(word_ptr(rbx), i32::from(limit as i16))?;
            a.mov(qword_ptr(rbx + 2), rax)?;
            a.lidt(fword_ptr(rbx))
        }
        4 => {
            let (at, beyond) = (w.pointer(), w.beyond());
            a.mov(rax, beyond)?;
            a.mov(qword_ptr(rbx + 2), rax)?;
            match w.r.percent(50) {
                true => a.lgdt(fword_ptr(rbx)),
                false => {
                    a.mov(rbx, at)?;
                    a.sidt(fword_ptr(rbx))
                }
            }
        }
        5 | 6 => {
            let selector = match w.r.percent(60) {
                true => LDTR,
                false => w.selector(),
            };
            a.mov(eax, u32::from(selector))?;
            a.lldt(ax)
        }
        7 => {
            // Not busy, so that it can be loaded.
            a.and(byte_ptr(GDT + u64::from(TR) + 5), !2)?;
            a.mov(eax, u32::from(TR))?;
            a.ltr(ax)
        }
        8 => {
            let selector = w.selector();
            a.mov(eax, u32::from(selector))?;
            a.ltr(ax)
        }
        _ => {
            // A random descriptor changes.
            let at = GDT + u64::from(RANDOM_DESCRIPTORS.start) + 8 * w.r.below(48);
            let v = super::image::random_descriptor(w.r);
            a.mov(rax, v)?;
            a.mov(rcx, at)?;
            a.mov(qword_ptr(rcx), rax)
        }
    }
}

/// A stack in the task state segment that is not there, or is again.
pub fn task_stacks(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (at, good) = match w.r.percent(50) {
        true => (TSS + 4, KERNEL_STACK),
        false => {
            let n = 1 + w.r.below(6);
            (TSS + 0x24 + 8 * n, IST1 + 0x1000 * n)
        }
    };
    let v = match w.r.percent(60) {
        true => w.wide(good),
        false => w.pointer(),
    };
    a.mov(rax, v)?;
    a.mov(rcx, at)?;
    a.mov(qword_ptr(rcx), rax)
}

/// The task register of a short task state segment: some stacks lie beyond its limit, and there is no I/O permission map. Or the
/// ordinary one again.
pub fn another_task(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = *w.r.pick(&[TR, SHORT_TR, SHORT_TR]);
    a.and(byte_ptr(GDT + u64::from(selector) + 5), !2)?;
    a.mov(eax, u32::from(selector))?;
    a.ltr(ax)?;
    match w.r.percent(60) {
        true => a.int(u32::from(RANDOM_GATES.start) + w.r.below(16) as u32),
        false => a.ud2(),
    }
}

/// Another action for a vector.
pub fn actions(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (vector, action) = match w.r.below(5) {
        0 => (14, *w.r.pick(&[action::NEXT, action::FIX])),
        1 => (
            1,
            *w.r.pick(&[action::RESUME, action::STOP_STEPPING, action::NEXT]),
        ),
        2 | 3 => (
            0x100,
            *w.r.pick(&[
                action::NEXT,
                action::SYSRET,
                action::SYSRET,
                action::SYSRET32,
            ]),
        ),
        _ => (0x101, *w.r.pick(&[action::NEXT, action::SYSEXIT])),
    };
    a.mov(rcx, ACTIONS + 8 * vector)?;
    a.mov(qword_ptr(rcx), action as i32)
}
