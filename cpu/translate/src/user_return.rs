//! Where the descriptors of the user's code and stack segments lie, for IRET in translated code (`rewrite::iret`).
//!
//! Invariant: what is noted is what the CPU's TLB could hold: it is forgotten with a flush that reaches the page of the descriptors.

use doppel_memory::{AccessKind, PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::{Dtr, Flushed, Seg};

use crate::context::{Context, ReturnSegments};
use crate::translator::Translator;

/// The page that the noted descriptors lie in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DescriptorPage {
    linear: u64,
    global: bool,
}

impl Translator {
    /// The interpreter has gone from the kernel to user code.
    pub fn note_user_return(&mut self) {
        let ctx = &mut *self.context;
        let (cs, ss) = (selector(ctx, Seg::Cs), selector(ctx, Seg::Ss));
        let known = &ctx.returns;
        let gdtr = ctx.cpu.gdtr;
        let same = known.cs == cs && (known.gdt_base, known.gdt_limit) == of(gdtr);
        if (same && known.code != 0) || cs & 4 != 0 || ss + 8 != cs {
            return;
        }
        if let Some((returns, page)) = find(ctx, cs, gdtr) {
            self.context.returns = returns;
            self.descriptor_page = page;
        }
    }

    /// Follows a flush.
    pub fn forget_user_return(&mut self, flushed: &Flushed) {
        let DescriptorPage { linear, global } = self.descriptor_page;
        let others = (flushed.non_global || flushed.switched) && !global;
        if flushed.global || others || flushed.pages.contains(&linear) {
            self.context.returns.code = 0;
        }
    }
}

fn selector(ctx: &Context, seg: Seg) -> u64 {
    ctx.cpu.segment(seg).selector.into()
}

fn of(gdtr: Dtr) -> (u64, u64) {
    (gdtr.base, gdtr.limit.into())
}

/// The descriptors of a code segment and of the segment before it, both in one page.
fn find(ctx: &mut Context, cs: u64, gdtr: Dtr) -> Option<(ReturnSegments, DescriptorPage)> {
    let offset = (cs & !7).checked_sub(8)?;
    let linear = gdtr.base.wrapping_add(offset);
    let fits = offset + 15 <= gdtr.limit.into() && linear & PAGE_MASK <= PAGE_SIZE - 16;
    if !fits || cs & 3 != 3 {
        return None;
    }
    let cpu = &mut ctx.cpu;
    let t = cpu
        .translate(linear, AccessKind::Read, Privilege::Supervisor)
        .ok()?;
    let stack = cpu.ram.ptr((t.gpa & !PAGE_MASK) | (linear & PAGE_MASK))?;
    let (gdt_base, gdt_limit) = of(gdtr);
    let returns = ReturnSegments {
        code: stack.addr() + 8,
        stack: stack.addr(),
        cs,
        gdt_base,
        gdt_limit,
    };
    let page = DescriptorPage {
        linear: linear & !PAGE_MASK,
        global: t.global,
    };
    Some((returns, page))
}
