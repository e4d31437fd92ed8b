//! The listing: guest on the left, host and reasons on the right.

use std::fmt::Write;

use iced_x86::{
    Decoder, DecoderOptions, Instruction, IntelFormatter, OpKind, Register, SymbolResolver,
    SymbolResult,
};

use super::Symbols;
use super::dissect::{Dissected, Host, Origin, format};
use super::why::annotate;
use crate::blocks::Form;
use crate::engine::TranslateOptions;
use crate::frontend::{Class, GuestInstruction};
use crate::thunk::PRIVILEGE_NAMES;

/// Bytes of a guest instruction that stand on one line.
const BYTES: usize = 8;
const GUEST_WIDTH: usize = 34;
const HOST_WIDTH: usize = 42;

/// After a run: which exits, by their numbers, are linked.
pub(crate) type Links<'a> = Option<&'a [bool]>;

/// The listing of a block.
pub(crate) fn block(
    origin: &Origin<'_>,
    options: &TranslateOptions,
    symbols: &Symbols,
    heading: &str,
    links: Links<'_>,
) -> String {
    let Some(mut block) = Dissected::new(origin, options) else {
        return format!("block {:x}: not decodable\n", origin.linear);
    };
    let name = |address: u64| {
        let name = symbols.name(address);
        name.unwrap_or_else(|| format!("{address:x}"))
    };
    let link = |exit: usize| match links.and_then(|links| links.get(exit)) {
        None => "",
        Some(true) => ", linked",
        Some(false) => ", not linked",
    };
    annotate(&mut block, &link, &name);
    let mut listing = Listing {
        out: title(&block, origin, symbols, heading),
        address_width: format!("{:x}", block.linear).len(),
    };
    listing.body(&block, origin, symbols);
    listing.out
}

fn title(block: &Dissected, origin: &Origin<'_>, symbols: &Symbols, heading: &str) -> String {
    let mut title = format!("block {:x}", block.linear);
    if let Some(name) = symbols.name(block.linear) {
        let _ = write!(title, " {name}");
    }
    let form = match origin.form {
        Form::Normal => "",
        Form::Careful => ", a check for each access",
        Form::TwoPages => ", one instruction on two pages",
    };
    let who = PRIVILEGE_NAMES[usize::from(block.privilege)];
    let (guest, host) = (
        block.guest.bytes.len(),
        block.host.last().map_or(0, Host::end),
    );
    let _ = write!(title, " ({who}{form}): {guest} bytes became {host}");
    if !heading.is_empty() {
        let _ = write!(title, "\n  {heading}");
    }
    title.push('\n');
    title
}

struct Listing {
    out: String,
    address_width: usize,
}

impl Listing {
    fn body(&mut self, block: &Dissected, origin: &Origin<'_>, symbols: &Symbols) {
        let prologue = block.numbers(0..block.range(0).start);
        self.rows(Vec::new(), &host_lines(block, prologue));
        let texts = guest_texts(origin, symbols);
        for (n, (i, text)) in block.guest.instructions.iter().zip(texts).enumerate() {
            let from = usize::from(i.offset - block.guest.start);
            let bytes = &block.guest.bytes[from..from + i.decoded.len()];
            let left = self.guest_lines(block.address_of(i), bytes, &text);
            let mut right = host_lines(block, block.numbers(block.range(n)));
            if right.is_empty() {
                right.push((String::new(), nothing(i).to_owned()));
            }
            self.rows(left, &right);
        }
        let stubs = block.numbers(block.code.body..u32::MAX);
        self.rows(Vec::new(), &host_lines(block, stubs));
    }

    fn guest_lines(&self, address: u64, bytes: &[u8], text: &str) -> Vec<String> {
        let hex = |b: &[u8]| {
            let b: Vec<_> = b.iter().map(|b| format!("{b:02x}")).collect();
            b.join(" ")
        };
        let (address_width, bytes_width) = (self.address_width, 3 * BYTES);
        let mut lines = Vec::new();
        for (n, part) in bytes.chunks(BYTES).enumerate() {
            let part = hex(part);
            lines.push(match n {
                0 => format!("{address:address_width$x}  {part:bytes_width$} {text}"),
                _ => format!("{:address_width$}  {part}", ""),
            });
        }
        lines
    }

    fn rows(&mut self, left: Vec<String>, right: &[(String, String)]) {
        let width = self.address_width + 2 + 3 * BYTES + 1 + GUEST_WIDTH;
        for n in 0..left.len().max(right.len()) {
            let guest = left.get(n).map_or("", String::as_str);
            let (host, note) = right.get(n).map_or(("", ""), |(h, n)| (h, n));
            let line = match note {
                "" => format!("{guest:width$} | {host}"),
                note => format!("{guest:width$} | {host:HOST_WIDTH$} ; {note}"),
            };
            let _ = writeln!(self.out, "{}", line.trim_end());
        }
    }
}

fn nothing(i: &GuestInstruction) -> &'static str {
    match i.class {
        Class::Nothing => "nothing: no effect that the guest could see",
        _ => "nothing",
    }
}

/// Host instructions as text with their notes; labels have a line of their own.
fn host_lines(block: &Dissected, numbers: std::ops::Range<usize>) -> Vec<(String, String)> {
    let mut lines: Vec<(String, String)> = Vec::new();
    for h in &block.host[numbers] {
        if let Some(label) = block.labels.get(&h.at).filter(|_| is_target(block, h.at)) {
            lines.push((format!("{label}:"), String::new()));
        }
        lines.push((format!("  {}", block.host_text(h)), h.note.clone()));
    }
    lines
}

fn is_target(block: &Dissected, at: u32) -> bool {
    let slots = block.code.exits.iter().filter(|e| e.slot.is_some());
    let mut jumps = block.host.iter().filter_map(|h| block.names(h));
    jumps.any(|to| to == at) || slots.into_iter().any(|e| e.stub == at)
}

fn guest_texts(origin: &Origin<'_>, symbols: &Symbols) -> Vec<String> {
    let names = GuestNames(symbols.clone());
    let mut formatter = IntelFormatter::with_options(Some(Box::new(names)), None);
    let decoder = Decoder::with_ip(
        origin.mode.bits(),
        origin.bytes,
        origin.linear,
        DecoderOptions::NONE,
    );
    decoder
        .into_iter()
        .map(|i| format(&mut formatter, &i))
        .collect()
}

struct GuestNames(Symbols);

impl SymbolResolver for GuestNames {
    fn symbol(
        &mut self,
        i: &Instruction,
        operand: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let relative = i.op_kind(operand) == OpKind::Memory && i.memory_base() == Register::RIP;
        let branch = i.op_kind(operand) == OpKind::NearBranch64;
        let name = (relative || branch).then(|| self.0.name(address))??;
        Some(SymbolResult::with_string(address, name))
    }
}
