//! Where the descriptors of code and stack segments lie that IRET in translated code (`rewrite::iret`) goes back to: user code's, and the kernel's.
//!
//! Invariant: what is noted is what the CPU's TLB could hold: it is forgotten with a flush that reaches the page of the descriptors.

use doppel_memory::{AccessKind, PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::{CpuMode, Dtr, Flushed, Seg};

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
        if ss + 8 == cs {
            self.note_return(cs, false);
        }
    }

    /// The interpreter has executed an IRET from the kernel to the kernel.
    pub fn note_kernel_return(&mut self) {
        if self.context.cpu.mode() == CpuMode::Bits64 {
            let cs = selector(&self.context, Seg::Cs);
            self.note_return(cs, true);
        }
    }

    fn note_return(&mut self, cs: u64, kernel: bool) {
        let ctx = &mut *self.context;
        let which = usize::from(kernel);
        let known = &ctx.returns[which];
        let gdtr = ctx.cpu.gdtr;
        let same = known.cs == cs && (known.gdt_base, known.gdt_limit) == of(gdtr);
        if (same && known.code != 0) || cs & 4 != 0 {
            return;
        }
        if let Some((returns, page)) = find(ctx, cs, kernel) {
            self.context.returns[which] = returns;
            self.descriptor_pages[which] = page;
        }
    }

    /// Follows a flush.
    pub fn forget_returns(&mut self, flushed: &Flushed) {
        let known = self.context.returns.iter_mut();
        for (returns, page) in known.zip(&self.descriptor_pages) {
            let others = (flushed.non_global || flushed.switched) && !page.global;
            if flushed.global || others || flushed.pages.contains(&page.linear) {
                returns.code = 0;
            }
        }
    }
}

fn selector(ctx: &Context, seg: Seg) -> u64 {
    ctx.cpu.segment(seg).selector.into()
}

fn of(gdtr: Dtr) -> (u64, u64) {
    (gdtr.base, gdtr.limit.into())
}

/// The descriptors of a code segment and of the stack's, before it of user code and behind it of the kernel, both in one page.
fn find(ctx: &mut Context, cs: u64, kernel: bool) -> Option<(ReturnSegments, DescriptorPage)> {
    let gdtr = ctx.cpu.gdtr;
    let rpl = if kernel { 0 } else { 3 };
    let offset = match kernel {
        true => cs & !7,
        false => (cs & !7).checked_sub(8)?,
    };
    let linear = gdtr.base.wrapping_add(offset);
    let fits = offset + 15 <= gdtr.limit.into() && linear & PAGE_MASK <= PAGE_SIZE - 16;
    if !fits || cs & 3 != rpl {
        return None;
    }
    let cpu = &mut ctx.cpu;
    let t = cpu
        .translate(linear, AccessKind::Read, Privilege::Supervisor)
        .ok()?;
    let first = cpu.ram.ptr((t.gpa & !PAGE_MASK) | (linear & PAGE_MASK))?;
    let first = first.addr();
    let (code, stack) = if kernel {
        (first, first + 8)
    } else {
        (first + 8, first)
    };
    let (gdt_base, gdt_limit) = of(gdtr);
    let returns = ReturnSegments {
        code,
        stack,
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
