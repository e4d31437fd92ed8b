//! Warnings of the machine's parts, on standard error.
//!
//! A part that cannot do what it is for, because the host does not let it, warns (`tracing`), and the machine goes on. A guest can cause some of these as
//! often as it likes, so a few of each kind are shown and no more.

use crate::host_error::with_advice;
use crate::terminal::say;
use std::collections::BTreeMap;
use std::fmt::{Debug, Write};
use std::sync::{Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Of each kind.
const MOST: u32 = 3;

/// Shows them from now on.
pub fn show() {
    // Refused where somebody shows them already.
    let _ = tracing::subscriber::set_global_default(Warnings::default());
}

/// How often each place in the source has warned.
#[derive(Default)]
struct Warnings(Mutex<BTreeMap<(&'static str, u32), u32>>);

impl Warnings {
    /// Counts; true where it is to be shown.
    fn counts(&self, place: (&'static str, u32)) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(place).or_default();
        *count = count.saturating_add(1);
        *count <= MOST
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let place = event.metadata();
        if self.counts((
            place.file().unwrap_or_default(),
            place.line().unwrap_or_default(),
        )) {
            let mut text = Text::default();
            event.record(&mut text);
            say(&format!("doppel: {}", with_advice(&text.0)));
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// The message of an event.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.0, "{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_of_each_kind_are_shown() {
        let warnings = Warnings::default();
        let shown = |line| (0..10).filter(|_| warnings.counts(("file", line))).count();
        assert_eq!((shown(1), shown(2), shown(1)), (3, 3, 0));
    }
}
