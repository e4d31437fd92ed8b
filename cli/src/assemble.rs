//! `doppel guest`: the default guest's files, for use elsewhere.

use crate::args::Guest;
use crate::guest::{self, cpio::Archive};
use anyhow::{Context, Result};
use std::fs;

/// Assembles the guest and prints the paths of its kernel and its initial RAM disk; with a script, writes a RAM disk that
/// runs it.
pub fn assemble(args: &Guest) -> Result<()> {
    let guest = guest::debian(&args.package, &|line| eprintln!("doppel: {line}"))?;
    let mut initrd = guest.initrd;
    if let (Some(script), Some(output)) = (&args.script, &args.output) {
        let mut bytes = fs::read(&initrd)?;
        let script = fs::read(script).with_context(|| format!("reading {}", script.display()))?;
        let mut archive = Archive::new();
        archive.file("doppel/script", 0o755, &script);
        bytes.extend(archive.finish());
        fs::write(output, bytes).with_context(|| format!("writing {}", output.display()))?;
        initrd = output.clone();
    }
    println!("{}\n{}", guest.kernel.display(), initrd.display());
    Ok(())
}
