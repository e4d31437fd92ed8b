//! What each step of a translation is for.
//!
//! A step is a few host instructions, and its reason stands at the first. Most are known by what they do (they load the poll,
//! they store the flags), checks and exits by the translator's tables.

use std::ops::Range;

use iced_x86::{Mnemonic, OpKind, Register};

use super::dissect::{Dissected, Host};
use crate::blocks::Form;
use crate::context as ctx;
use crate::flags::FlagSet;
use crate::frontend::{Class, GuestInstruction};
use crate::rewrite::{AccessSite, hold};

/// What a run tells of an exit's link, by its number.
pub(crate) type Links<'a> = &'a dyn Fn(usize) -> &'static str;

/// Writes the reasons into a block.
pub(crate) fn annotate(block: &mut Dissected, links: Links<'_>, name: &dyn Fn(u64) -> String) {
    let mut notes: Vec<Vec<String>> = block.host.iter().map(|_| Vec::new()).collect();
    let view = View { block, links, name };
    let prologue = block.numbers(0..block.range(0).start);
    for n in prologue {
        notes[n].extend(view.entry(n));
    }
    for n in 0..block.guest.instructions.len() {
        for (host, note) in view.instruction(n) {
            notes[host].push(note);
        }
    }
    for n in block.numbers(block.code.body..u32::MAX) {
        notes[n].extend(view.stub(n));
    }
    for (h, notes) in block.host.iter_mut().zip(notes) {
        h.note = notes.join("; ");
    }
}

struct View<'a> {
    block: &'a Dissected,
    links: Links<'a>,
    name: &'a dyn Fn(u64) -> String,
}

impl View<'_> {
    fn host(&self, n: usize) -> &Host {
        &self.block.host[n]
    }

    // ---- before the first instruction ----

    fn entry(&self, n: usize) -> Vec<String> {
        let (b, h) = (self.block, self.host(n));
        let code = &b.code;
        let mut notes = Vec::new();
        if code.entry_registers != code.entry_saved {
            if h.at == code.entry_registers {
                notes.push("entry for callers whose flags are in the registers".to_owned());
            }
            if h.at == code.entry_saved {
                notes.push("entry for callers that saved their flags".to_owned());
            }
        }
        if h.slot() == Some(ctx::SIMD_LIVE) {
            notes.push("are the guest's vector registers loaded?".to_owned());
        }
        notes
    }

    // ---- one guest instruction ----

    /// Notes with the numbers of their host instructions.
    fn instruction(&self, n: usize) -> Vec<(usize, String)> {
        let i = &self.block.guest.instructions[n];
        let range = self.block.numbers(self.block.range(n));
        let mut notes = Vec::new();
        let steps = range.clone().filter_map(|h| self.step(n, i, h, &range));
        notes.extend(steps);
        let lead = self.first_own(&range);
        if let (Some(at), Some(text)) = (lead, self.lead(n, i)) {
            notes.insert(0, (at, text));
        }
        notes
    }

    /// The first instruction that is there neither to poll nor to save flags.
    fn first_own(&self, range: &Range<usize>) -> Option<usize> {
        let mut at = range.start;
        if at < range.end && self.loads(at, ctx::POLL) {
            at += 2;
        }
        let near = at..range.end.min(at + 4);
        let saved = near.into_iter().find(|h| self.stores(*h, ctx::FLAGS));
        let after = saved.map_or(at, |store| store + 2);
        (after < range.end).then_some(after)
    }

    fn stores(&self, n: usize, slot: i32) -> bool {
        let h = self.host(n);
        h.slot() == Some(slot) && h.decoded.op0_kind() == OpKind::Memory
    }

    fn loads(&self, n: usize, slot: i32) -> bool {
        self.host(n).slot() == Some(slot) && self.host(n).decoded.op1_kind() == OpKind::Memory
    }

    /// What the host instruction `h` begins, with the number of the first instruction of that step.
    fn step(
        &self,
        n: usize,
        i: &GuestInstruction,
        h: usize,
        range: &Range<usize>,
    ) -> Option<(usize, String)> {
        let host = self.host(h);
        let back = |by: usize| h.saturating_sub(by).max(range.start);
        if (ctx::HELD..ctx::HELD + 8 * hold::SLOTS as i32)
            .contains(&host.slot().unwrap_or_default())
        {
            return Some((h, held(host).to_owned()));
        }
        if host.slot() == Some(ctx::WINDOW) {
            let text = "through the window onto physical memory, without a check";
            return Some((h, text.to_owned()));
        }
        if let Some(site) = self.site_at(host.at) {
            return Some((h, self.check(n, site)));
        }
        if self.is_copy(i, host) {
            return Some((h, "as it is".to_owned()));
        }
        if host.decoded.mnemonic() == Mnemonic::Lahf {
            return Some((back(1), self.flags_saved(n)));
        }
        if host.decoded.mnemonic() == Mnemonic::Sahf {
            return Some((back(3), self.flags_restored(i)));
        }
        if self.loads(h, ctx::POLL) {
            return Some((h, poll(i).to_owned()));
        }
        if self.loads(h, ctx::PAGE_BASE) {
            return Some((h, self.page(h).to_owned()));
        }
        if host.slot().is_some() && host.decoded.mnemonic() == Mnemonic::Cmp {
            let cache =
                (0..ctx::JUMP_CACHES as u8).any(|p| host.slot() == Some(ctx::jump_cache(p)));
            if cache {
                let text = "is the target in the jump cache? (after a kick the mask is 0)";
                return Some((back(2), text.to_owned()));
            }
        }
        self.exit(i, host)
            .or_else(|| self.register_in_memory(i, h))
            .or_else(|| self.own(n, i, h))
            .map(|text| (h, text))
    }

    /// True for the guest's instruction, as it was.
    fn is_copy(&self, i: &GuestInstruction, h: &Host) -> bool {
        let from = usize::from(i.offset - self.block.guest.start);
        let guest = &self.block.guest.bytes[from..from + i.decoded.len()];
        matches!(i.class, Class::Copy | Class::Lea) && self.block.bytes_of(h) == guest
    }

    /// Why the page's linear address is loaded.
    fn page(&self, h: usize) -> &'static str {
        let next = h + 1..self.block.host.len().min(h + 4);
        if next.into_iter().any(|n| self.stores(n, ctx::PAGE_BASE)) {
            "the page that runs becomes that of the target"
        } else {
            "a guest address: user code is mapped where the context says"
        }
    }

    fn site_at(&self, at: u32) -> Option<&AccessSite> {
        self.block.code.accesses.iter().find(|s| s.retry == at)
    }

    fn check(&self, n: usize, site: &AccessSite) -> String {
        let kind = if site.write { "writing" } else { "reading" };
        let bytes = site.span;
        let plural = if bytes == 1 { "" } else { "s" };
        let text = format!("TLB check of {bytes} byte{plural} for {kind}");
        match self.sharers(n) {
            0 => text,
            1 => format!("{text}, shared by the next access"),
            more => format!("{text}, shared by the next {more} accesses"),
        }
    }

    /// How many accesses follow that have no check of their own.
    fn sharers(&self, n: usize) -> usize {
        let after = &self.block.guest.instructions[n + 1..];
        after
            .iter()
            .take_while(|i| !self.has_site(i))
            .filter(|i| accesses_memory(i))
            .count()
    }

    fn has_site(&self, i: &GuestInstruction) -> bool {
        let mut sites = self.block.code.accesses.iter();
        sites.any(|s| s.offset == i.offset)
    }

    /// The instruction whose check this one shares.
    fn shares_with(&self, n: usize) -> Option<u64> {
        let i = &self.block.guest.instructions[n];
        if self.has_site(i) || !accesses_memory(i) || self.block.form == Form::TwoPages {
            return None;
        }
        let mut before = self.block.guest.instructions[..n].iter().rev();
        let checked = before.find(|i| self.has_site(i))?;
        Some(self.block.address_of(checked))
    }

    fn flags_saved(&self, n: usize) -> String {
        let instructions = &self.block.guest.instructions;
        let mut live: FlagSet = instructions[n].live_before;
        for i in &instructions[n..] {
            if i.flags.reads & live != 0 {
                let reader = mnemonic(i);
                return format!(
                    "flags saved: {reader} at {:x} reads them",
                    self.block.address_of(i)
                );
            }
            live &= !i.flags.kills;
            if live == 0 {
                return "flags saved: a fault shows them".to_owned();
            }
            if matches!(i.class, Class::Conditional) {
                break;
            }
        }
        "flags saved: the next block may read them".to_owned()
    }

    fn flags_restored(&self, i: &GuestInstruction) -> String {
        if i.flags.reads != 0 {
            format!("flags restored: {} reads them", mnemonic(i))
        } else if i.flags.writes != 0 {
            format!("flags restored: {} leaves some as they are", mnemonic(i))
        } else {
            "flags restored".to_owned()
        }
    }

    fn exit(&self, i: &GuestInstruction, h: &Host) -> Option<String> {
        if let Some((n, e)) = self.block.exit_of(h) {
            if e.interpret {
                return Some(self.interpreted(i).to_owned());
            }
            let link = (self.links)(n);
            if e.slot.is_some() {
                return Some(self.slot(h, e.target, link));
            }
            let to = (self.name)(self.block.address(e.target));
            return Some(format!("to {to}{link}"));
        }
        let stub = self.block.position(h)?;
        let leaves = stub >= self.block.code.body && self.block.labels[&stub].starts_with("stub");
        let to = (self.name)(self.block.address(i.decoded.near_branch64() as i64));
        leaves.then(|| format!("to {to}, in another page"))
    }

    fn interpreted(&self, i: &GuestInstruction) -> &'static str {
        match i.class {
            Class::Interpret if self.block.is_hidden(i) => {
                "not as the guest's processor has it, if it has it at all: the monitor interprets it"
            }
            Class::Interpret if i.decoded.is_privileged() => {
                "privileged: the monitor interprets it"
            }
            Class::Interpret => "left to the monitor, which interprets it",
            _ => "the rare case: the monitor interprets it",
        }
    }

    /// A jump through a slot, whose target counts from the page that was turned to just before.
    fn slot(&self, h: &Host, target: i64, link: &str) -> String {
        let before = &self.block.host[..self.block.numbers(0..h.at).end];
        let turn = before.iter().rev().take_while(|h| {
            h.slot() == Some(ctx::PAGE_BASE) || h.decoded.mnemonic() == Mnemonic::Lea
        });
        let turned = before.last().and_then(Host::slot) == Some(ctx::PAGE_BASE);
        let by: i64 = turn
            .filter(|h| turned && h.slot().is_none())
            .map(|h| h.decoded.memory_displacement64() as i64)
            .sum();
        let to = (self.name)(self.block.address(by + target));
        format!("to {to}, through a slot, which is quick to set back{link}")
    }

    /// The guest's r10 and r11, where an instruction uses them.
    fn register_in_memory(&self, i: &GuestInstruction, h: usize) -> Option<String> {
        if matches!(i.class, Class::Syscall | Class::Sysret) {
            return None;
        }
        let slot = self.host(h).slot()?;
        let n = [10u8, 11].into_iter().find(|n| ctx::gpr(*n) == slot)?;
        Some(format!("the guest's r{n} lives in memory"))
    }

    /// The guest's instruction itself.
    fn own(&self, n: usize, i: &GuestInstruction, h: usize) -> Option<String> {
        let d = &self.host(h).decoded;
        let same = d.mnemonic() == i.decoded.mnemonic();
        match i.class {
            Class::Memory { .. } if same && on_host_address(self.host(h)) => {
                Some(match self.shares_with(n) {
                    Some(at) => format!("its operand: within the check at {at:x}"),
                    None => "its operand: the host address".to_owned(),
                })
            }
            Class::BitString | Class::ExtendedState { .. } if same => {
                Some("its operand: the host address".to_owned())
            }
            _ => None,
        }
    }

    /// What becomes of the instruction as a whole.
    fn lead(&self, n: usize, i: &GuestInstruction) -> Option<String> {
        let shared = self.shares_with(n);
        let stack = |what: &str| match shared {
            Some(at) => format!("{what}: within the check at {at:x}"),
            None => what.to_owned(),
        };
        let text = match i.class {
            Class::Copy | Class::Jump | Class::Conditional | Class::Nothing | Class::Interpret => {
                return None;
            }
            Class::Memory { .. } if shared.is_some() => return None,
            Class::Memory { .. } if self.block.form == Form::TwoPages => {
                "memory operand in two pages: at a copy of its bytes".to_owned()
            }
            Class::Memory { .. } => "memory operand: its linear address".to_owned(),
            Class::BitString => {
                "bit string: the address of the operand that holds the bit".to_owned()
            }
            Class::Lea if self.block.numbers(self.block.range(n)).len() == 1 => return None,
            Class::Lea => "an address that names RIP, r10 or r11".to_owned(),
            Class::Push | Class::Pop | Class::Leave => stack("stack access"),
            Class::Call => stack("pushes the return address"),
            Class::CallIndirect => "the target, then the return address".to_owned(),
            Class::Return => stack("the return address is a guest address"),
            Class::JumpIndirect => "the target is a guest address".to_owned(),
            Class::Counted => "reaches 127 bytes only: jumps over a jump".to_owned(),
            class => format!("sensitive: {}", virtual_state(class)),
        };
        Some(text)
    }

    // ---- stubs ----

    fn stub(&self, n: usize) -> Vec<String> {
        let (b, h) = (self.block, self.host(n));
        let mut notes = Vec::new();
        if let Some(site) = b.code.accesses.iter().find(|s| b.miss_of(s) == Some(h.at)) {
            let at = b.address(i64::from(site.offset));
            notes.push(format!("the check at {at:x} failed"));
        }
        let careful = |e: &u32| b.code.exits.get(*e as usize).map(|e| e.patch);
        let patched = b.code.accesses.iter().filter_map(|s| s.careful.as_ref());
        if patched.filter_map(careful).any(|p| p == Some(h.end() - 4)) {
            notes.push("leads to the careful form, once that is needed".to_owned());
        }
        let of = b.code.exits.iter().find(|e| e.stub == h.at);
        if of.is_some_and(|e| e.slot.is_some()) && h.slot().is_none() {
            notes.push("by the code map, or the monitor, which links one jump in eight".to_owned());
        }
        if h.slot() == Some(ctx::EXIT) {
            notes.extend(of.map(|e| match e.interpret {
                true => "tells the monitor what to interpret".to_owned(),
                false => "asks the monitor, which links the jump".to_owned(),
            }));
        }
        if h.decoded.mnemonic() == Mnemonic::Jmp
            && h.jumps_to().is_some()
            && b.position(h).is_none()
        {
            let to = b.host_text(h);
            if to.contains("slow") {
                notes.push(
                    "a neighbouring page, or the monitor fills the TLB, or interprets".to_owned(),
                );
            }
        }
        if self.loads(n, ctx::PAGE_BASE) {
            notes.push(self.page(n).to_owned());
        }
        if let Some((exit, _)) = b.exit_of(h).filter(|(_, e)| e.slot.is_some()) {
            notes.push(self.slot(h, b.code.exits[exit].target, (self.links)(exit)));
        }
        if h.decoded.mnemonic() == Mnemonic::Xrstor64 {
            notes.push("loads the guest's vector registers".to_owned());
        }
        notes
    }
}

fn held(h: &Host) -> &'static str {
    match h.decoded.op0_kind() {
        OpKind::Memory => "kept: code comes back to this base",
        _ => "comes back to a base that was checked before",
    }
}

fn mnemonic(i: &GuestInstruction) -> String {
    format!("{:?}", i.decoded.mnemonic()).to_lowercase()
}

/// True for an instruction whose translation goes through a TLB check, its own or another's.
fn accesses_memory(i: &GuestInstruction) -> bool {
    match i.class {
        Class::Memory { .. } | Class::BitString | Class::Push | Class::Pop | Class::Leave => true,
        Class::ExtendedState { .. } => true,
        Class::Call | Class::CallIndirect | Class::Return => true,
        Class::JumpIndirect => i.decoded.op0_kind() == OpKind::Memory,
        _ => false,
    }
}

fn on_host_address(h: &Host) -> bool {
    let d = &h.decoded;
    let memory = (0..d.op_count()).any(|op| d.op_kind(op) == OpKind::Memory);
    memory && h.slot().is_none() && matches!(d.memory_base(), Register::R10 | Register::RBP)
}

fn poll(i: &GuestInstruction) -> &'static str {
    match i.class {
        Class::Jump | Class::Conditional | Class::Counted | Class::Call => {
            "poll, since it goes backwards: faults after a kick"
        }
        Class::Repeat { .. } => "poll, once a page: faults after a kick",
        _ => "poll, since it may go backwards: faults after a kick",
    }
}

/// What stands in for an instruction that names the machine's state.
fn virtual_state(class: Class) -> &'static str {
    match class {
        Class::Swapgs => "the virtual GS base and KERNEL_GS_BASE change places",
        Class::Rdtsc => "the host's counter plus the guest's offset",
        Class::Rdpid => "the guest's TSC_AUX",
        Class::ReadSelector => "the virtual selector, not the host's",
        Class::SegmentBase { .. } => "the virtual base, where CR4.FSGSBASE is set",
        Class::Syscall => "into the virtual kernel at LSTAR",
        Class::Sysret => "back to virtual CPL 3",
        Class::Iret => {
            "back to user code or the kernel, where frame, flags and descriptors are as usual"
        }
        Class::Pause => "the monitor is told of one in many, to give the host's processor away",
        Class::Serialize => "a fence will do: code is followed by other means",
        Class::DirectionFlag => "DF of the virtual RFLAGS",
        Class::ReadControl => "the virtual control register",
        Class::Cli => "IF of the virtual RFLAGS",
        Class::Sti => "IF of the virtual RFLAGS, unless an interrupt waits for it",
        Class::AlignmentFlag => {
            "AC of the virtual RFLAGS, which chooses the TLB: on in another block"
        }
        Class::Pushf => "the virtual RFLAGS and the saved arithmetic flags",
        Class::Popf => "the virtual RFLAGS, where only IF and arithmetic flags change",
        Class::Repeat { .. } => "page by page on host addresses",
        Class::Element { .. } => "a move or a comparison on host addresses, upwards",
        Class::ExtendedState { .. } => "of the guest's components alone, at a host address",
        _ => "on the virtual state",
    }
}
