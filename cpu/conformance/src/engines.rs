//! The engines that the suite runs on: a new engine or switch is a row.

use std::sync::Arc;

use doppel_direct::{Direct, DirectHost, DirectOptions};
use doppel_translate::explain::Observers;
use doppel_translate::{SharedCode, Translate, TranslateOptions};
use doppel_x86::interpret::Interpret;
use doppel_x86::{Cpu, Engine};

/// An engine in one configuration.
pub struct Row {
    /// What a failing test shows.
    pub name: &'static str,
    /// Makes the engine for a CPU; those of one RAM have the same [`SharedCode`].
    pub make: fn(Box<Cpu>, &SharedCode) -> Box<dyn Engine>,
}

fn interpret(cpu: Box<Cpu>, _: &SharedCode) -> Box<dyn Engine> {
    Box::new(Interpret::new(cpu))
}

fn translate(cpu: Box<Cpu>, options: TranslateOptions) -> Box<dyn Engine> {
    match Translate::new(cpu, options) {
        Ok(engine) => Box::new(engine),
        Err(e) => panic!("the translator does not run on this host: {e}"),
    }
}

fn translate_shared(
    cpu: Box<Cpu>,
    code: &SharedCode,
    options: TranslateOptions,
) -> Box<dyn Engine> {
    match Translate::sharing(cpu, options, code, Observers::default()) {
        Ok(engine) => Box::new(engine),
        Err(e) => panic!("the translator does not run on this host: {e}"),
    }
}

fn translate_observed(cpu: Box<Cpu>, _: &SharedCode) -> Box<dyn Engine> {
    let observers = Observers {
        profile: Some(Arc::default()),
        perf_map: None,
    };
    let options = TranslateOptions {
        cache_size: 0,
        ..TranslateOptions::default()
    };
    match Translate::new(cpu, options) {
        Ok(engine) => Box::new(engine.observed(observers)),
        Err(e) => panic!("the translator does not run on this host: {e}"),
    }
}

/// User code on the processor from its first instruction on; translated, and said aloud, where the host does not let it.
fn direct(mut cpu: Box<Cpu>, code: &SharedCode) -> Box<dyn Engine> {
    let host = match DirectHost::new(&cpu.ram) {
        Ok(host) => Arc::new(host),
        Err(e) => {
            eprintln!("SKIPPED: this host has no direct execution: {e}");
            return translate(cpu, TranslateOptions::default());
        }
    };
    cpu.tsc_offset = 0;
    let direct = Direct::new(host, &cpu, DirectOptions::always());
    let options = TranslateOptions::default();
    match Translate::sharing(cpu, options, code, Observers::default()) {
        Ok(engine) => Box::new(engine.leaving_user_code_to(Box::new(direct))),
        Err(e) => panic!("the translator does not run on this host: {e}"),
    }
}

macro_rules! translate_with {
    ($name:literal $(, $field:ident: $value:expr)*) => {
        Row {
            name: $name,
            make: |cpu, _| {
                #[allow(unused_mut)]
                let mut options = TranslateOptions::default();
                $(options.$field = $value;)*
                translate(cpu, options)
            },
        }
    };
}

macro_rules! shared_with {
    ($name:literal $(, $field:ident: $value:expr)*) => {
        Row {
            name: $name,
            make: |cpu, code| {
                #[allow(unused_mut)]
                let mut options = TranslateOptions::default();
                $(options.$field = $value;)*
                translate_shared(cpu, code, options)
            },
        }
    };
}

/// Every engine, and the translator with each of its accelerators turned off.
pub const ENGINES: &[Row] = &[
    Row {
        name: "interpret",
        make: interpret,
    },
    Row {
        name: "direct",
        make: direct,
    },
    translate_with!("translate"),
    shared_with!("translate, shared cache"),
    shared_with!("translate, smallest shared cache, counting", cache_size: 0, count: true),
    shared_with!("translate, shared cache, link off", link: false),
    translate_with!("translate, link off", link: false),
    translate_with!("translate, flag_liveness off", flag_liveness: false),
    translate_with!("translate, inline_system off", inline_system: false),
    translate_with!("translate, inline_strings off", inline_strings: false),
    translate_with!("translate, extend off", extend: false),
    translate_with!("translate, share_checks off", share_checks: false),
    translate_with!("translate, borrow_registers and resident off", borrow_registers: false, resident: false),
    translate_with!("translate, smallest cache, counting", cache_size: 0, count: true),
    Row {
        name: "translate, smallest cache, profiled",
        make: translate_observed,
    },
    translate_with!("translate, first three blocks", translate_limit: Some(3)),
];
