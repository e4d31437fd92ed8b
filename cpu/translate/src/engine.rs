//! The engine as the rest of Doppel sees it: its switches, and the [`Engine`] contract.

use std::sync::Arc;

use doppel_memory::probe;
use doppel_x86::{Bus, Cpu, Engine, EngineStats, Exit, Kick, UserCode};
use iced_x86::{Decoder, DecoderOptions, FlowControl, IntelFormatter};

use crate::enter_unsafe::{ThreadSetup, host_features};
use crate::explain::{self, Observers};
use crate::narrow::Mode;
use crate::shared::SharedCode;
use crate::translator::Translator;

/// Switches and bounds of the translator.
#[derive(Clone, Copy, Debug)]
pub struct TranslateOptions {
    /// Bytes of the code cache, of which the records of the translations take a third; when it is full, everything is translated anew.
    pub cache_size: usize,
    /// Translate only the first so many blocks and interpret the rest: finds a bad block by halving.
    pub translate_limit: Option<u64>,
    /// Link blocks to one another.
    pub link: bool,
    /// Do not save flags that are dead; see `flags`.
    pub flag_liveness: bool,
    /// Keep the flags at the entry of a block that overwrites them, for the frame of a fault before that (see `rewrite::lost`).
    pub entry_flags: bool,
    /// Emit CLI, STI, PUSHF, POPF, STAC, CLAC and SWAPGS as code instead of interpreting them.
    pub inline_system: bool,
    /// Emit REP MOVS and REP STOS as code where they stay within a page.
    pub inline_strings: bool,
    /// Emit XSAVE, XSAVEC and XRSTOR as code where their area lies in one page, or in two that are neighbours in the host.
    pub inline_xsave: bool,
    /// Let a CPU that executes PAUSE again and again give the host's processor to another thread.
    pub yield_spins: bool,
    /// Let blocks go on after a conditional branch that is not taken.
    pub extend: bool,
    /// Let accesses off one base share a TLB check.
    pub share_checks: bool,
    /// Let a block borrow a register for the base that it keeps coming back to.
    pub borrow_registers: bool,
    /// Let a block keep the bases in memory that it comes back to.
    pub hold: bool,
    /// Keep r10 and r11 in their registers while nothing else needs them.
    pub resident: bool,
    /// Let translated code write to pages with translated code, beside that.
    pub write_beside_code: bool,
    /// Shift addresses with BMI2's RORX where the processor has it.
    pub rorx: bool,
    /// Keep a comparison beside the branch on it, for the processor makes one operation of the two.
    pub fuse: bool,
    /// Look for what was driven out of a TLB slot in its victim.
    pub victims: bool,
    /// Keep the code cache in huge pages where the host has them.
    pub huge_code: bool,
    /// Load the vector state when a block uses it, and not whenever translated code is entered.
    pub lazy_vectors: bool,
    /// Look for the target of an indirect branch in the second level of the jump cache before the monitor is asked.
    pub second_jump_cache: bool,
    /// Look for the target of an indirect branch of user code in the code map before the monitor is asked.
    pub code_map: bool,
    /// Enter the pages around one of user code along with it.
    pub code_neighbours: bool,
    /// Let an access across two pages go on without the monitor where both are in the TLB.
    pub cross_pages: bool,
    /// Keep what is known of an address space while another is current, where the guest says so (CR4.PCIDE).
    pub keep_spaces: bool,
    /// Translate 32-bit code too.
    pub narrow_modes: bool,
    /// With that, access memory through a window where paging is off.
    pub window: bool,
    /// With that, translate 16-bit code, code on 16-bit stacks and in code segments that are not flat; and code of CPL 1 and 2.
    pub short_modes: bool,
    /// Share translations between the CPUs of a machine ([`Translate::sharing`]).
    pub shared_cache: bool,
    /// Count the blocks and instructions that run (costs six instructions a block) and the time spent in translated code.
    pub count: bool,
    /// Keep code where perf looks for names in a map; see [`crate::explain::PerfMap`].
    pub perf_map: bool,
}

/// An accelerator by its name, and where it is turned off.
pub struct Switch {
    /// As the command line names it.
    pub name: &'static str,
    /// What the translator without it is called where several are compared.
    pub without: &'static str,
    field: fn(&mut TranslateOptions) -> &mut bool,
}

macro_rules! switches {
    ($($name:literal => $field:ident,)*) => { &[$(Switch {
        name: $name,
        without: concat!("translate-no-", $name),
        field: |o| &mut o.$field,
    }),*] };
}

impl TranslateOptions {
    /// Every accelerator that can be turned off.
    pub const SWITCHES: &'static [Switch] = switches! {
        "link" => link,
        "flag-liveness" => flag_liveness,
        "inline-system" => inline_system,
        "inline-strings" => inline_strings,
        "inline-xsave" => inline_xsave,
        "yield-spins" => yield_spins,
        "extend" => extend,
        "share-checks" => share_checks,
        "borrow-registers" => borrow_registers,
        "hold" => hold,
        "resident" => resident,
        "write-beside-code" => write_beside_code,
        "rorx" => rorx,
        "fuse" => fuse,
        "victims" => victims,
        "huge-code" => huge_code,
        "lazy-vectors" => lazy_vectors,
        "second-jump-cache" => second_jump_cache,
        "code-map" => code_map,
        "code-neighbours" => code_neighbours,
        "cross-pages" => cross_pages,
        "keep-spaces" => keep_spaces,
        "narrow-modes" => narrow_modes,
        "short-modes" => short_modes,
        "window" => window,
        "shared-cache" => shared_cache,
    };

    /// The same without an accelerator.
    pub fn without(mut self, switch: &Switch) -> Self {
        *(switch.field)(&mut self) = false;
        self
    }
}

impl Switch {
    /// The switch of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        TranslateOptions::SWITCHES.iter().find(|s| s.name == name)
    }
}

impl Default for TranslateOptions {
    fn default() -> Self {
        TranslateOptions {
            cache_size: 96 << 20,
            translate_limit: None,
            link: true,
            flag_liveness: true,
            entry_flags: false,
            inline_system: true,
            inline_strings: true,
            inline_xsave: true,
            yield_spins: true,
            share_checks: true,
            extend: true,
            borrow_registers: true,
            hold: true,
            resident: true,
            write_beside_code: true,
            rorx: std::is_x86_feature_detected!("bmi2"),
            fuse: true,
            victims: true,
            huge_code: true,
            lazy_vectors: true,
            second_jump_cache: true,
            code_map: true,
            code_neighbours: true,
            cross_pages: true,
            keep_spaces: true,
            narrow_modes: true,
            short_modes: true,
            window: true,
            shared_cache: true,
            count: false,
            perf_map: false,
        }
    }
}

/// Why the engine cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// The processor lacks something that the translator emits.
    #[error("the processor lacks {0}, which the translator needs")]
    Processor(&'static str),
    /// No memory for the code cache.
    #[error("the host gives no memory for {0} bytes of code cache: {1}")]
    Cache(usize, std::io::Error),
}

/// Whether the engine can run on this host.
pub fn supported() -> Result<(), TranslateError> {
    let (xsave, _) = host_features();
    if !xsave {
        return Err(TranslateError::Processor("XSAVE"));
    }
    if !std::is_x86_feature_detected!("cmpxchg16b") {
        return Err(TranslateError::Processor("CMPXCHG16B"));
    }
    Ok(())
}

/// The engine that translates guest code of every mode to host code; what it does not translate is interpreted.
pub struct Translate {
    t: Box<Translator>,
}

impl Translate {
    /// An engine that runs `cpu`.
    pub fn new(cpu: Box<Cpu>, options: TranslateOptions) -> Result<Self, TranslateError> {
        supported()?;
        Ok(Translate {
            t: Box::new(Translator::new(cpu, options, None)?),
        })
    }

    /// An engine that shares its translations with the others made with the same `code`, which run CPUs of the same RAM with the same options; one
    /// with translations of its own where these are not to be shared, or where blocks are counted or named one by one ([`Self::observed`]).
    pub fn sharing(
        cpu: Box<Cpu>,
        options: TranslateOptions,
        code: &SharedCode,
        observers: Observers,
    ) -> Result<Self, TranslateError> {
        supported()?;
        let alone = observers.profile.is_some() || observers.perf_map.is_some();
        let with = (options.shared_cache && !alone).then_some(code);
        let t = Box::new(Translator::new(cpu, options, with)?);
        Ok(Translate { t }.observed(observers))
    }

    /// Leaves user code to somebody else as they say.
    pub fn leaving_user_code_to(mut self, user_code: Box<dyn UserCode>) -> Self {
        self.t.context.call_also(user_code.kicker());
        self.t.context.cpu.given_up.wanted = true;
        self.t.user_code = Some(user_code);
        self
    }

    /// Translates the code at RIP, unless it is translated, and runs none of it; false where the instruction there is left to the
    /// interpreter.
    pub fn translates(&mut self) -> bool {
        let found = self.t.find_translation();
        self.t.code.put_back();
        found.is_some()
    }

    /// Tells `observers` of the blocks from now on.
    pub fn observed(mut self, observers: Observers) -> Self {
        self.t.begin_observing(observers);
        self
    }
}

impl Drop for Translate {
    fn drop(&mut self) {
        self.t.end_observing();
    }
}

impl Engine for Translate {
    fn run(&mut self, bus: &mut dyn Bus) -> Exit {
        let t = &mut *self.t;
        let _setup = ThreadSetup::new(&t.context, t.range.clone(), t.thunks.exit);
        t.run(bus)
    }

    fn cpu(&self) -> &Cpu {
        &self.t.context.cpu
    }

    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.t.context.cpu
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.t.context.kicker()
    }

    fn stats(&self) -> EngineStats {
        let mut stats = self.t.stats();
        if let Some(user_code) = &self.t.user_code {
            stats.extend(user_code.stats());
        }
        stats
    }

    fn trace(&self) -> Vec<String> {
        self.t
            .recent()
            .map(|rip| format!("block at {rip:#x}: {}", beginning(self.cpu(), rip)))
            .collect()
    }
}

/// What stands at `rip` now: some instructions, up to a branch or the end of the page, as text on a line.
fn beginning(cpu: &Cpu, rip: u64) -> String {
    const INSTRUCTIONS: usize = 6;
    let mode = Mode::of(cpu).unwrap_or_default();
    let found = probe(&cpu.ram, &cpu.paging(), mode.linear(rip));
    let Some(code) = found.and_then(|t| cpu.ram.ptr(t.gpa)) else {
        return "not mapped any more".to_owned();
    };
    let mut bytes = [0; 15 * INSTRUCTIONS];
    let len = bytes.len().min(code.room());
    code.read(&mut bytes[..len]);
    let decoder = Decoder::with_ip(mode.bits(), &bytes[..len], rip, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    let mut texts = Vec::new();
    for i in decoder.into_iter().take(INSTRUCTIONS) {
        if i.is_invalid() {
            break;
        }
        texts.push(explain::format(&mut formatter, &i));
        if i.flow_control() != FlowControl::Next {
            break;
        }
    }
    texts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_memory::GuestRam;
    use doppel_x86::{Cr0, Efer, Seg};

    #[test]
    fn a_block_shows_its_first_instructions() {
        let mut cpu = Cpu::new(0, Arc::new(GuestRam::new(1 << 20).unwrap()));
        cpu.cr0 |= Cr0::PE;
        cpu.efer |= Efer::LMA;
        cpu.seg[Seg::Cs as usize].attributes = 0xa09b;
        let code = [0x48, 0x89, 0xd8, 0xff, 0xc1, 0xeb, 0xfe, 0x90];
        cpu.ram.ptr(0x1000).unwrap().write(&code);
        assert_eq!(beginning(&cpu, 0x1000), "mov rax, rbx; inc ecx; jmp 0x1005");
        cpu.ram.ptr(0x1ffe).unwrap().write(&code[..2]);
        assert_eq!(beginning(&cpu, 0x1ffe), "", "an instruction across pages");
        assert_eq!(beginning(&cpu, 1 << 30), "not mapped any more");
    }
}
