//! Names of what translated code reaches through the GS base.

use std::mem::offset_of;

use doppel_memory::Tlb;

use crate::context as ctx;
use crate::jump_cache::JumpEntry;
use crate::translator::PRIVILEGES;

const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Slots of 8 bytes, except `spill`, with their names.
const SLOTS: &[(i32, i32, &str)] = &[
    (ctx::RFLAGS, 8, "rflags"),
    (ctx::FLAGS, 8, "flags"),
    (ctx::SPILL, 40, "spill"),
    (ctx::PAGE_BASE, 8, "page_base"),
    (ctx::POLL, 8, "poll"),
    (ctx::JUMP_MASK, 4, "jump_mask"),
    (ctx::SIMD_LIVE, 4, "simd_live"),
    (ctx::EXIT, 4, "exit"),
    (ctx::BRANCH, 4, "branch"),
    (ctx::SLOW_LINEAR, 8, "slow_linear"),
    (ctx::SLOW_SITE, 4, "slow_site"),
    (ctx::COPY_TO, 16, "copy_to"),
    (ctx::PINNED, 8, "pinned"),
    (ctx::HELD, 64, "held"),
    (ctx::WINDOW, 8, "window"),
    (ctx::INTERRUPT_WAITS, 4, "interrupt_waits"),
    (ctx::PAUSES_LEFT, 4, "pauses_left"),
    (ctx::TSC_OFFSET, 8, "tsc_offset"),
    (ctx::TSC_AUX, 8, "tsc_aux"),
    (ctx::STAR, 8, "star"),
    (ctx::LSTAR, 8, "lstar"),
    (ctx::SFMASK, 8, "sfmask"),
    (ctx::CR2, 8, "cr2"),
    (ctx::CR3, 8, "cr3"),
    (ctx::CR4, 8, "cr4"),
    (ctx::EFER, 8, "efer"),
    (ctx::CPL, 1, "cpl"),
    (ctx::KERNEL_GS_BASE, 8, "kernel_gs_base"),
    (ctx::FPU, 64, "vector_state"),
    (ctx::USER_ENTRIES, 8, "user_entries"),
    (ctx::INTERRUPT_RETURNS, 16, "interrupt_returns"),
    (ctx::ASKS_RETURN, 4, "asks_return"),
    (ctx::return_code(false), 8, "user_return.code"),
    (ctx::return_stack(false), 8, "user_return.stack"),
    (ctx::return_cs(false), 8, "user_return.cs"),
    (ctx::return_gdt_base(false), 8, "user_return.gdt_base"),
    (ctx::return_gdt_limit(false), 8, "user_return.gdt_limit"),
    (ctx::return_code(true), 8, "kernel_return.code"),
    (ctx::return_stack(true), 8, "kernel_return.stack"),
    (ctx::return_cs(true), 8, "kernel_return.cs"),
    (ctx::return_gdt_base(true), 8, "kernel_return.gdt_base"),
    (ctx::return_gdt_limit(true), 8, "kernel_return.gdt_limit"),
    (ctx::GDTR_BASE, 8, "gdtr.base"),
    (ctx::GDTR_LIMIT, 2, "gdtr.limit"),
    (ctx::NMI_BLOCKED, 1, "nmi_blocked"),
    (ctx::VECTOR_LOADS, 8, "vector_loads"),
];

/// Name of the slot at a displacement, and the displacement that the name stands for.
pub(crate) fn name(displacement: i32) -> Option<(i32, String)> {
    general(displacement)
        .or_else(|| fixed(displacement))
        .or_else(|| segment(displacement))
        .or_else(|| table(displacement))
        .or_else(|| Some((displacement, format!("slot{}", exit_slot(displacement)?))))
}

/// Number of the slot at a displacement that code jumps through.
pub(crate) fn exit_slot(displacement: i32) -> Option<u32> {
    let behind = displacement.checked_sub(ctx::slot(0))?;
    u32::try_from(behind).ok().map(|at| at / 8)
}

fn general(at: i32) -> Option<(i32, String)> {
    let n = usize::try_from(at - ctx::gpr(0)).ok()? / 8;
    let name = GPR_NAMES.get(n)?;
    Some((ctx::gpr(n as u8), format!("guest.{name}")))
}

fn fixed(at: i32) -> Option<(i32, String)> {
    let found = SLOTS
        .iter()
        .find(|(from, len, _)| (*from..*from + len).contains(&at))?;
    Some((found.0, found.2.to_owned()))
}

fn segment(at: i32) -> Option<(i32, String)> {
    (0..SEGMENTS.len() as u8).find_map(|n| {
        let parts = [
            (ctx::segment_base(n), "base"),
            (ctx::segment_limit(n), "limit"),
            (ctx::segment_attributes(n), "attributes"),
            (ctx::segment_selector(n), "selector"),
        ];
        let (_, part) = parts.into_iter().find(|(from, _)| *from == at)?;
        Some((at, format!("{}.{part}", SEGMENTS[usize::from(n)])))
    })
}

/// The TLBs and jump caches, which are reached with an index.
fn table(at: i32) -> Option<(i32, String)> {
    (0..PRIVILEGES.len() as u8).find_map(|privilege| {
        let (tlb, jumps) = (ctx::tlb(privilege), ctx::jump_cache(privilege));
        let parts = [
            (tlb + Tlb::READ_TAG as i32, "TLB", "read_tag"),
            (tlb + Tlb::WRITE_TAG as i32, "TLB", "write_tag"),
            (tlb + Tlb::HOST as i32, "TLB", "host"),
            (
                jumps + offset_of!(JumpEntry, linear) as i32,
                "jump_cache",
                "linear",
            ),
            (
                jumps + offset_of!(JumpEntry, host) as i32,
                "jump_cache",
                "host",
            ),
        ];
        let (_, table, part) = parts.into_iter().find(|(from, ..)| *from == at)?;
        Some((at, format!("{table}.{part}")))
    })
}
