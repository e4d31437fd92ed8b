//! A suite on the host itself, from packages that are unpacked below a folder.

use crate::outcome::{Outcome, outcome};
use crate::table::Test;
use anyhow::{Context, Result};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// The host is no guest's: it may be busy.
const PATIENCE: u32 = 2;

/// Where tests find what they need.
pub struct Place {
    /// What the packages have is below.
    pub root: PathBuf,
    /// The folders of the tests are below.
    pub base: PathBuf,
    /// Where they may write.
    pub scratch: PathBuf,
}

/// Runs tests; what those said that failed goes to `log`.
pub fn run(place: &Place, tests: &[&Test], log: &Path) -> Result<Vec<Outcome>> {
    let mut log = fs::File::create(log)?;
    tests
        .iter()
        .map(|test| one(place, test, &mut log))
        .collect()
}

fn one(place: &Place, test: &Test, log: &mut fs::File) -> Result<Outcome> {
    let (folder, line) = test.line.split_once(' ').unwrap_or(("", test.line));
    let (root, scratch) = (&place.root, &place.scratch);
    let limit = test.seconds * PATIENCE;
    let libraries = ["lib", "usr/lib"].map(|lib| root.join(lib).join("x86_64-linux-gnu"));
    let libraries = libraries.map(|path| path.display().to_string()).join(":");
    let start = Instant::now();
    let output = Command::new("timeout")
        .args(["-k", "5", &limit.to_string(), "sh", "-c", line])
        .current_dir(place.base.join(folder))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", scratch)
        .env("TMPDIR", scratch)
        .env("LANG", "C.UTF-8")
        .env("ROOT", root)
        .env("LD_LIBRARY_PATH", libraries)
        .stdin(Stdio::null())
        .output()
        .context("timeout cannot be run")?;
    let outcome = outcome(
        output.status.code().unwrap_or(-1),
        start.elapsed().as_secs_f64(),
        limit.into(),
    );
    writeln!(log, "{line}: {outcome:?}")?;
    if !output.status.success() {
        log.write_all(&output.stdout)?;
        log.write_all(&output.stderr)?;
    }
    Ok(outcome)
}
