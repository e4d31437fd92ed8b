//! `doppel explain`: guest code beside its translation; and the names that perf is given for it.

use crate::args::{self, Explain, Run};
use crate::run;
use anyhow::{Context, Result, bail};
use doppel_machine::explain::{PerfMap, Profile, Sample, Selection, Symbols};
use doppel_machine::{EngineChoice, TranslateOptions};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Blocks that are shown unless a number is given.
const HOTTEST: usize = 10;

/// Shows what `args` ask for; the exit status is that of the run, if there is one.
pub fn explain(args: &Explain) -> Result<u8> {
    let symbols = symbols(&args.run)?;
    let output = Output::open(args.output.as_deref())?;
    if let Some(code) = &args.bytes {
        let sample = Sample {
            bytes: &code.0,
            address: args.address,
            user: args.cpl == 3,
            hidden: args.run.cpu.hidden(),
        };
        let listing = sample.explain(&TranslateOptions::default(), &symbols)?;
        output.write(&listing)?;
        return Ok(0);
    }
    explain_run(args, symbols, output)
}

fn explain_run(args: &Explain, mut symbols: Symbols, output: Output<'_>) -> Result<u8> {
    only_translated(
        &args.run,
        &[EngineChoice::Auto, EngineChoice::Translate],
        "explain",
    )?;
    let run = Run {
        engine: EngineChoice::Translate,
        ..args.run.clone()
    };
    if let Some(at) = &args.at {
        place(at, &symbols)?;
    }
    let profile = Arc::new(Profile::default());
    let status = run::run_observed(&run, Some(profile.clone()), args.seconds)?;
    symbols.set_slide(profile.slide(&symbols));
    let selection = match &args.at {
        Some(at) => Selection::At(place(at, &symbols)?),
        None => Selection::Hottest(args.hottest.unwrap_or(HOTTEST)),
    };
    let listing = profile.report(selection, &symbols);
    if listing.is_empty() {
        let what = args.at.as_deref().unwrap_or("any address");
        bail!("no translated code ran at {what}; --hottest N shows what did");
    }
    output.write(&listing)?;
    Ok(status)
}

/// A linear address from a symbol or a number.
fn place(text: &str, symbols: &Symbols) -> Result<u64> {
    let named = symbols.address(text).map(Ok);
    named
        .unwrap_or_else(|| args::address(text))
        .map_err(|why| anyhow::anyhow!("--at: {text} is no symbol of --symbols FILE; {why}"))
}

fn only_translated(args: &Run, engines: &[EngineChoice], what: &str) -> Result<()> {
    match engines.contains(&args.engine) {
        true => Ok(()),
        false => bail!("{what} is about translated code: take --engine translate"),
    }
}

fn symbols(args: &Run) -> Result<Symbols> {
    let Some(path) = &args.symbols else {
        return Ok(Symbols::default());
    };
    let map = fs::read_to_string(path)
        .with_context(|| format!("--symbols: {} cannot be read", path.display()))?;
    Ok(Symbols::parse(&map))
}

/// The file in which `perf report` looks for names of this process's code, if it is asked for.
pub fn perf_map(args: &Run) -> Result<Option<PerfMap>> {
    if !args.perf_map {
        return Ok(None);
    }
    let engines = [
        EngineChoice::Auto,
        EngineChoice::Translate,
        EngineChoice::Direct,
    ];
    only_translated(args, &engines, "--perf-map")?;
    let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
    let map = PerfMap::create(&path, symbols(args)?)
        .with_context(|| format!("--perf-map: {} cannot be written", path.display()))?;
    eprintln!("doppel: names for perf are in {}", path.display());
    Ok(Some(map))
}

/// Where the listing goes; a file is made at the start, so that a bad path shows then.
enum Output<'a> {
    Standard,
    File(&'a Path, File),
}

impl Output<'_> {
    fn open(path: Option<&Path>) -> Result<Output<'_>> {
        let Some(path) = path else {
            return Ok(Output::Standard);
        };
        let file = File::create(path)
            .with_context(|| format!("--output: {} cannot be written", path.display()))?;
        Ok(Output::File(path, file))
    }

    fn write(self, listing: &str) -> Result<()> {
        match self {
            Output::File(path, mut file) => file
                .write_all(listing.as_bytes())
                .with_context(|| format!("writing {}", path.display())),
            Output::Standard => match io::stdout().write_all(listing.as_bytes()) {
                // The reader has seen enough.
                Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
                result => result.context("writing the listing"),
            },
        }
    }
}
