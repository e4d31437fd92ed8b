//! Which code accesses memory through a window ([`doppel_memory::Window`]): 32-bit code of CPL 0 in flat segments, while paging is off.
//!
//! Such a block has no TLB check for ordinary operands and the stack: `base + linear` is the host address, in one instruction that waits for nothing but the
//! address, and destroys no flags. What the window turns away is a fault of the host at an instruction that has changed nothing so far; it is
//! interpreted, as any instruction that faults. If it wrote to a page that is only closed, the run around it is opened then.
//! Invariant: [`Mode::window`] is a part of the keys of blocks, so such code runs only while paging is off, no data breakpoint is set and
//! the CPU has its window, whose address stands in the context.
//! What comes to devices or to pages with code all the time is better off with checks: after too many faults there is no window any more.
//! Cost: see docs/translate.md.

use doppel_memory::Window;
use doppel_x86::Cr0;

use crate::narrow::{Mode, Width};
use crate::translator::Translator;

/// A guest that turns paging on and off all the time pays for so many.
const MOST_MADE: u64 = 64;
/// Some milliseconds' worth.
const MOST_FAULTS: u64 = 2000;

impl Translator {
    /// The mode with the window, where code of this mode may use one.
    pub fn with_window(&mut self, mode: Mode) -> Mode {
        let cpu = &mut self.context.cpu;
        if cpu.cr0.contains(Cr0::PG) {
            cpu.window = None;
            return mode;
        }
        let kind = mode.flat && mode.width == Width::Bits32 && cpu.cpl == 0;
        let may = kind && self.options.window && !cpu.has_data_breakpoints();
        let window = may && self.has_window();
        Mode { window, ..mode }
    }

    fn has_window(&mut self) -> bool {
        let cpu = &mut self.context.cpu;
        if self.counts.window_faults >= MOST_FAULTS {
            cpu.window = None;
        } else if cpu.window.is_none() && self.counts.windows < MOST_MADE {
            self.counts.windows += 1;
            // A host without room for it does without.
            cpu.window = Window::new(&cpu.ram).unwrap_or_default();
            let base = cpu.window.as_ref().map_or(0, Window::base);
            self.context.window = base;
        }
        self.context.cpu.window.is_some()
    }

    /// An instruction that faulted in a window has been interpreted.
    pub fn window_fault(&mut self) {
        let at = self.context.fault_address;
        let cpu = &mut self.context.cpu;
        let Some(window) = &mut cpu.window else {
            return;
        };
        let Some(gpa) = window.physical(at) else {
            return;
        };
        if window.open(gpa, cpu.ram.tracker(), &cpu.peer) {
            self.counts.window_opened += 1;
        } else {
            self.counts.window_faults += 1;
        }
    }
}
