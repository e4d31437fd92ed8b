//! Direct branches to addresses that are not canonical.
//!
//! Such a branch faults itself, before RIP or the stack change (SDM Vol. 2, JMP, CALL, Jcc: #GP(0)). Translated code, which does not know at which linear
//! address it runs, takes it all the same and comes to the monitor, since nothing is translated there. So it is taken back: RIP is the branch's again, and
//! the interpreter raises what the branch raises. (What a CALL pushed stays in memory, below RSP.)

use doppel_memory::PAGE_MASK;
use doppel_x86::Gpr;
use iced_x86::{Decoder, DecoderOptions};

use crate::frontend::MOST_BYTES;
use crate::narrow::Mode;
use crate::translator::Translator;

/// RIP of the branch, and whether it is a CALL.
struct Branch {
    rip: u64,
    calls: bool,
}

impl Translator {
    /// Takes back the branch by which user or kernel code has just come to where it cannot be.
    pub fn take_back_branch(&mut self) {
        let there = self.context.cpu.rip;
        if self.context.cpu.canonical(there) || self.mode != Mode::LONG {
            return;
        }
        let Some(exit) = self.link_from else {
            return;
        };
        if let Some(branch) = self.branch_of(exit, there) {
            let cpu = &mut self.context.cpu;
            cpu.rip = branch.rip;
            if branch.calls {
                let rsp = &mut cpu.gpr[Gpr::Rsp as usize];
                *rsp = rsp.wrapping_add(8);
            }
        }
    }

    /// The branch of an exit's block that leads there from where it stands.
    fn branch_of(&mut self, exit: u32, there: u64) -> Option<Branch> {
        let block = self.code.blocks.exit(exit).block;
        let key = self.code.blocks.get(block).key;
        let code = self.context.cpu.ram.ptr(key.gpa)?;
        let mut bytes = [0; MOST_BYTES];
        let len = code.room().min(MOST_BYTES);
        code.read(&mut bytes[..len]);
        let decoder = Decoder::with_ip(64, &bytes[..len], key.gpa, DecoderOptions::NONE);
        let instructions = decoder.into_iter().take_while(|i| !i.is_invalid());
        let mut branches = instructions.filter(|i| i.near_branch64() != 0);
        branches.find_map(|i| {
            let rip = there.wrapping_sub(i.near_branch64().wrapping_sub(i.ip()));
            let gpa = self.code_page(rip)? | rip & PAGE_MASK;
            let calls = i.is_call_near();
            (gpa == i.ip()).then_some(Branch { rip, calls })
        })
    }
}
