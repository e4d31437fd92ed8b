//! The seam to who executes user code by other means: what the engine does when user code comes back.

use std::sync::Arc;

use doppel_memory::GuestRam;
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::{
    Cpu, Cr0, Cr4, Efer, EmptyBus, Engine, EngineStats, Exit, Flushed, Kick, Left, Seg, Segment,
    UserCode,
};
use iced_x86::BlockEncoderOptions;
use iced_x86::code_asm::*;

const CODE: u64 = 0x10000;

/// Takes user code once, where it comes to `from`, and gives it back at `to`.
struct Mover {
    from: u64,
    to: u64,
    done: bool,
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl UserCode for Mover {
    fn interrupted(&mut self, _cpu: &Cpu, _entries: u64) -> bool {
        false
    }
    fn takes(&mut self, cpu: &Cpu) -> bool {
        cpu.rip == self.from && !self.done
    }
    fn run(&mut self, cpu: &mut Cpu, _called: &dyn Fn() -> bool, _entries: u64) -> Left {
        self.done = true;
        cpu.rip = self.to;
        Left::Declined
    }
    fn flushed(&mut self, _cpu: &Cpu, _flushed: &Flushed) {}
    fn written(&mut self, _cpu: &Cpu, _page: u64) {}
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }
    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }
}

/// A CPU in 64-bit mode at CPL 3, the first 2 MiB mapped to themselves, for user code.
fn user_cpu(code: &[u8]) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(4 << 20).unwrap());
    for (gpa, entry) in [(0x1000u64, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x87)] {
        ram.store::<u64>(gpa, entry).unwrap();
    }
    ram.ptr(CODE).unwrap().write(code);
    let mut cpu = Cpu::new(0, ram);
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP;
    cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.cr3 = 0x1000;
    let segment = |attributes, selector| Segment {
        base: 0,
        limit: !0,
        attributes,
        selector,
    };
    cpu.seg[Seg::Cs as usize] = segment(0xa0fb, 0x33);
    cpu.seg[Seg::Ss as usize] = segment(0xc0f3, 0x2b);
    cpu.cpl = 3;
    cpu.rip = CODE;
    cpu
}

#[test]
fn an_exit_is_not_linked_to_where_others_have_taken_the_code() {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut begin, mut target, mut elsewhere) =
        (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut begin).unwrap();
    a.inc(eax).unwrap();
    a.jmp(target).unwrap();
    a.set_label(&mut target).unwrap();
    a.inc(ebx).unwrap();
    a.ud2().unwrap();
    a.set_label(&mut elsewhere).unwrap();
    a.inc(ecx).unwrap();
    a.cmp(eax, 3).unwrap();
    a.jb(begin).unwrap();
    a.ud2().unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(CODE, options).unwrap();
    let [from, to] = [&target, &elsewhere].map(|l| assembled.label_ip(l).unwrap());
    let mover = Mover {
        from,
        to,
        done: false,
    };
    let cpu = user_cpu(&assembled.inner.code_buffer);
    let mut engine = Translate::new(cpu, TranslateOptions::default())
        .unwrap()
        .leaving_user_code_to(Box::new(mover));
    assert_eq!(engine.run(&mut EmptyBus), Exit::Shutdown);
    let counts = [0, 3, 1].map(|n| engine.cpu().gpr[n]);
    assert_eq!(counts, [2, 1, 1], "begun, at the target, elsewhere");
}

/// Takes user code when it has come to so many blocks that have no translation, and gives it back at `to`.
struct Explorer {
    blocks: u32,
    to: u64,
    taken: bool,
}

impl UserCode for Explorer {
    fn interrupted(&mut self, _cpu: &Cpu, _entries: u64) -> bool {
        false
    }
    fn untranslated(&mut self, _cpu: &Cpu, page: u64, _entries: u64) -> bool {
        assert_eq!(page, CODE);
        self.blocks = self.blocks.saturating_sub(1);
        self.blocks == 0 && !self.taken
    }
    fn takes(&mut self, _cpu: &Cpu) -> bool {
        self.blocks == 0 && !self.taken
    }
    fn run(&mut self, cpu: &mut Cpu, _called: &dyn Fn() -> bool, _entries: u64) -> Left {
        self.taken = true;
        cpu.rip = self.to;
        Left::Declined
    }
    fn flushed(&mut self, _cpu: &Cpu, _flushed: &Flushed) {}
    fn written(&mut self, _cpu: &Cpu, _page: u64) {}
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }
    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }
}

#[test]
fn others_may_take_code_before_it_is_translated() {
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut second, mut elsewhere) = (a.create_label(), a.create_label());
    a.inc(eax).unwrap();
    a.jmp(second).unwrap();
    a.set_label(&mut second).unwrap();
    a.inc(ebx).unwrap();
    a.inc(edi).unwrap();
    a.ud2().unwrap();
    a.set_label(&mut elsewhere).unwrap();
    a.inc(ecx).unwrap();
    a.ud2().unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let assembled = a.assemble_options(CODE, options).unwrap();
    let explorer = Explorer {
        blocks: 2,
        to: assembled.label_ip(&elsewhere).unwrap(),
        taken: false,
    };
    let cpu = user_cpu(&assembled.inner.code_buffer);
    let mut engine = Translate::new(cpu, TranslateOptions::default())
        .unwrap()
        .leaving_user_code_to(Box::new(explorer));
    assert_eq!(engine.run(&mut EmptyBus), Exit::Shutdown);
    let counts = [0, 3, 7, 1].map(|n| engine.cpu().gpr[n]);
    assert_eq!(
        counts,
        [1, 1, 0, 1],
        "translated, one interpreted on the way, taken, given back"
    );
}
