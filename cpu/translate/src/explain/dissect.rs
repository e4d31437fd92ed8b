//! One block translated once more and taken apart: which host instruction belongs to which guest instruction, and where
//! its jumps lead.

use std::collections::BTreeMap;

use doppel_memory::PAGE_MASK;
use doppel_x86::HiddenInstructions;
use iced_x86::{
    Code, Decoder, DecoderOptions, Formatter, Instruction, InstructionInfoFactory, IntelFormatter,
    Mnemonic, OpKind, Register, SymbolResolver, SymbolResult,
};

use super::slots;
use crate::asm::Asm;
use crate::blocks::Form;
use crate::engine::TranslateOptions;
use crate::frontend::{Decoding, GuestBlock, GuestInstruction, Processor, Simd, decode};
use crate::narrow::Mode;
use crate::rewrite::{AccessSite, Base, ExitSite, FirstSites, Rewriter, Setting, Translated};
use crate::thunk::{self, How};

/// Where the code is translated for: any place will do that leaves the thunks within reach.
const HOST: u64 = 0x1000_0000;
/// Where the thunks are then.
const THUNKS: u64 = HOST - 0x1_0000;

/// All that a block's translation depends on, apart from the options.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    /// Where it runs: RIP.
    pub linear: u64,
    pub bytes: &'a [u8],
    pub privilege: u8,
    pub simd: Simd,
    pub mode: Mode,
    pub base: Base,
    pub form: Form,
    pub straddler_follows: bool,
    pub processor: Processor,
}

impl<'a> Origin<'a> {
    pub fn decode(&self, options: &TranslateOptions) -> Option<GuestBlock> {
        let (simd, mode) = (self.simd, self.mode);
        let how = Decoding::new(self.processor, simd, mode, self.privilege, options);
        let how = how.placed(self.base);
        let start = (self.mode.linear(self.linear) & PAGE_MASK) as u16;
        let mut block = decode(&mut InstructionInfoFactory::new(), self.bytes, start, how)?;
        block.straddler_follows |= self.straddler_follows;
        Some(block)
    }

    /// The bytes of the first instruction of `rest`, as far as they are there.
    pub fn first_of(&self, rest: &'a [u8]) -> &'a [u8] {
        let bits = self.mode.bits();
        let first = Decoder::with_ip(bits, rest, self.linear, DecoderOptions::NONE).decode();
        &rest[..first.len().min(rest.len())]
    }
}

/// A host instruction.
pub(crate) struct Host {
    /// Position in the block.
    pub at: u32,
    pub decoded: Instruction,
    /// What it is there for, at the first of a step.
    pub note: String,
}

impl Host {
    /// Position where it jumps to in the block, if it does.
    pub fn jumps_to(&self) -> Option<u64> {
        (self.decoded.op0_kind() == OpKind::NearBranch64).then(|| self.decoded.near_branch64())
    }

    pub fn end(&self) -> u32 {
        self.at + self.decoded.len() as u32
    }

    /// The displacement that it reaches behind the GS base.
    pub fn slot(&self) -> Option<i32> {
        let d = &self.decoded;
        let memory = (0..d.op_count()).any(|op| d.op_kind(op) == OpKind::Memory);
        (memory && d.memory_segment() == Register::GS).then(|| d.memory_displacement64() as i32)
    }
}

/// A block's translation in its parts.
pub(crate) struct Dissected {
    pub guest: GuestBlock,
    pub code: Box<Translated>,
    pub host: Vec<Host>,
    bytes: Vec<u8>,
    pub linear: u64,
    pub form: Form,
    pub privilege: u8,
    hidden: HiddenInstructions,
    /// Names of positions that jumps lead to.
    pub labels: BTreeMap<u32, String>,
    thunks: BTreeMap<u64, String>,
}

impl Dissected {
    /// `None` where the bytes hold no whole instruction.
    pub fn new(origin: &Origin<'_>, options: &TranslateOptions) -> Option<Self> {
        let guest = origin.decode(options)?;
        let thunks = thunk::assemble(&mut Asm::default(), THUNKS, How::new(options, false));
        let setting = Setting {
            base: origin.base,
            form: origin.form,
            privilege: origin.privilege,
            options: TranslateOptions {
                count: false,
                ..*options
            },
            counters: None,
            slots: 0,
            shared: false,
            thunks,
            simd: origin.simd,
            mode: origin.mode,
        };
        let mut rewriter = Rewriter::new();
        let first = FirstSites {
            exit: 0,
            access: 0,
            branch: 0,
        };
        let code = rewriter.translate(&guest, setting, HOST, first);
        let mut dissected = Dissected {
            host: disassemble(&rewriter.asm.bytes),
            bytes: rewriter.asm.bytes,
            guest,
            code,
            linear: origin.linear,
            form: origin.form,
            privilege: origin.privilege,
            hidden: origin.processor.hidden,
            labels: BTreeMap::new(),
            thunks: thunks.names(),
        };
        dissected.name_labels();
        Some(dissected)
    }

    /// True for an instruction that the guest's processor does not have.
    pub fn is_hidden(&self, i: &GuestInstruction) -> bool {
        self.hidden.has(&i.decoded)
    }

    /// Linear address of an offset from the block's page.
    pub fn address(&self, offset: i64) -> u64 {
        (self.linear & !PAGE_MASK).wrapping_add(offset as u64)
    }

    pub fn address_of(&self, i: &GuestInstruction) -> u64 {
        self.address(i64::from(i.offset))
    }

    /// Positions of the code of a guest instruction.
    pub fn range(&self, n: usize) -> std::ops::Range<u32> {
        self.begin(n)..self.begin(n + 1)
    }

    fn begin(&self, n: usize) -> u32 {
        let first = |i: &GuestInstruction| {
            let found = self.code.boundaries.iter().find(|b| b.guest == i.offset);
            found.map(|b| b.host)
        };
        let instruction = self.guest.instructions.get(n);
        instruction.and_then(first).unwrap_or(self.code.body)
    }

    /// Numbers of the host instructions in a range of positions.
    pub fn numbers(&self, range: std::ops::Range<u32>) -> std::ops::Range<usize> {
        let from = self.host.partition_point(|h| h.at < range.start);
        let to = self.host.partition_point(|h| h.at < range.end);
        from..to
    }

    /// The check of a site jumps away from between its first and its last instruction.
    pub fn miss_of(&self, site: &AccessSite) -> Option<u32> {
        let check = &self.host[self.numbers(site.retry..site.done)];
        check.iter().find_map(|h| self.position(h))
    }

    /// The position in this block that an instruction jumps to.
    pub fn position(&self, h: &Host) -> Option<u32> {
        self.inside(h.jumps_to()?)
    }

    /// The position in this block that an instruction names, by a jump or as an address.
    pub fn names(&self, h: &Host) -> Option<u32> {
        let d = &h.decoded;
        let lea = d.mnemonic() == Mnemonic::Lea && d.is_ip_rel_memory_operand();
        let address = lea.then(|| d.ip_rel_memory_address());
        self.inside(address.or_else(|| h.jumps_to())?)
    }

    fn inside(&self, host: u64) -> Option<u32> {
        let offset = host.checked_sub(HOST)?;
        let end = self.host.last()?.end();
        u32::try_from(offset).ok().filter(|to| *to < end)
    }

    /// The exit that an instruction takes, with its number: by its slot, its displacement where that can be linked, else by the stub.
    pub fn exit_of(&self, h: &Host) -> Option<(usize, &ExitSite)> {
        let d = &h.decoded;
        let jumps = d.code() == Code::Jmp_rm64;
        let slot = h.slot().filter(|_| jumps).and_then(slots::exit_slot);
        let to = self.position(h);
        let displacement = h.end().checked_sub(4);
        let patched = |e: &ExitSite| e.patch.is_some() && e.patch == displacement && to.is_some();
        let mine = |e: &ExitSite| match slot {
            Some(slot) => e.slot == Some(slot),
            None => Some(e.stub) == to || patched(e),
        };
        self.code.exits.iter().enumerate().find(|(_, e)| mine(e))
    }

    fn name_labels(&mut self) {
        let mut labels = BTreeMap::new();
        for (n, e) in self.code.exits.iter().enumerate() {
            let slow = self
                .code
                .accesses
                .iter()
                .any(|s| s.careful == Some(n as u32));
            labels.insert(e.stub, format!("{}{n}", if slow { "slow" } else { "exit" }));
        }
        if self.code.simd {
            labels.insert(self.code.entry_simd, "loaded".to_owned());
            let entry = &self.host[self.numbers(0..self.code.entry_simd)];
            let missing = entry.iter().find_map(|h| self.position(h));
            labels.extend(missing.map(|at| (at, "load_vectors".to_owned())));
        }
        for (n, branch) in self.code.branches.iter().enumerate() {
            labels.insert(branch.stub, format!("lookup{n}"));
        }
        for (n, site) in self.code.accesses.iter().enumerate() {
            if let Some(at) = self.miss_of(site) {
                labels.insert(at, format!("miss{n}"));
            }
            labels.insert(site.done, format!("checked{n}"));
        }
        let targets = self.host.iter().filter_map(|h| self.position(h));
        let unnamed: std::collections::BTreeSet<_> =
            targets.filter(|at| !labels.contains_key(at)).collect();
        let mut counts = [0; 2];
        for at in unnamed {
            let stub = usize::from(at >= self.code.body);
            labels.insert(at, format!("{}{}", ["step", "stub"][stub], counts[stub]));
            counts[stub] += 1;
        }
        self.labels = labels;
    }

    /// The bytes of a host instruction.
    pub fn bytes_of(&self, h: &Host) -> &[u8] {
        &self.bytes[h.at as usize..h.end() as usize]
    }

    /// A host instruction as text, with names for what it names.
    pub fn host_text(&self, h: &Host) -> String {
        let names = HostNames {
            labels: self.labels.clone(),
            thunks: self.thunks.clone(),
        };
        let mut formatter = IntelFormatter::with_options(Some(Box::new(names)), None);
        format(&mut formatter, &h.decoded)
    }
}

fn disassemble(code: &[u8]) -> Vec<Host> {
    let decoder = Decoder::with_ip(64, code, HOST, DecoderOptions::NONE);
    let host = |decoded: Instruction| Host {
        at: (decoded.ip() - HOST) as u32,
        decoded,
        note: String::new(),
    };
    decoder.into_iter().map(host).collect()
}

/// The text of an instruction in Intel syntax.
pub(crate) fn format(formatter: &mut IntelFormatter, i: &Instruction) -> String {
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_small_hex_numbers_in_decimal(true);
    options.set_show_branch_size(false);
    options.set_space_after_operand_separator(true);
    options.set_branch_leading_zeros(false);
    options.set_displacement_leading_zeros(false);
    options.set_leading_zeros(false);
    options.set_rip_relative_addresses(false);
    let mut text = String::new();
    formatter.format(i, &mut text);
    text
}

struct HostNames {
    labels: BTreeMap<u32, String>,
    thunks: BTreeMap<u64, String>,
}

impl SymbolResolver for HostNames {
    fn symbol(
        &mut self,
        i: &Instruction,
        operand: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        match i.op_kind(operand) {
            OpKind::NearBranch64 => {
                let name = self.place(address)?;
                Some(SymbolResult::with_string(address, name))
            }
            OpKind::Memory if i.is_ip_rel_memory_operand() => {
                let name = self.place(address)?;
                Some(SymbolResult::with_string(address, name))
            }
            OpKind::Memory if i.memory_segment() == Register::GS => {
                let (at, name) = slots::name(address as i32)?;
                Some(SymbolResult::with_string(at as u64, name))
            }
            _ => None,
        }
    }
}

impl HostNames {
    fn place(&self, address: u64) -> Option<String> {
        let label = address
            .checked_sub(HOST)
            .and_then(|at| self.labels.get(&(at as u32)));
        label.or_else(|| self.thunks.get(&address)).cloned()
    }
}
