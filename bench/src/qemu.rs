//! QEMU: whether it is there, which one, and where a newer one comes from.

use crate::contestant::QEMU;
use anyhow::{Context, Result, bail, ensure};
use std::process::Command;

const PACKAGE: &str = "qemu-system-x86";

/// An error that says what to do, where there is no QEMU.
pub fn check() -> Result<()> {
    match version() {
        Ok(_) => Ok(()),
        Err(_) => bail!("there is no {QEMU}: --install-qemu installs it, --no-qemu goes without"),
    }
}

/// What the installed QEMU calls itself.
pub fn version() -> Result<String> {
    let output = output(Command::new(QEMU).arg("--version"))?;
    Ok(output.lines().next().unwrap_or_default().to_owned())
}

/// Installs the newest that any enabled source of apt offers, backports among them.
pub fn install() -> Result<()> {
    run(Command::new("apt-get").args(["update", "--quiet"]))?;
    let offers = output(Command::new("apt-cache").args(["madison", PACKAGE]))?;
    let newest = newest(&offers).with_context(|| format!("apt offers no {PACKAGE}"))?;
    eprintln!(
        "bench: installing {PACKAGE} {} of {}",
        newest.version, newest.suite
    );
    run(Command::new("apt-get")
        .args([
            "install",
            "--yes",
            "--no-install-recommends",
            "--target-release",
        ])
        .args([newest.suite, PACKAGE]))
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Offer<'a> {
    version: &'a str,
    suite: &'a str,
}

/// apt-cache madison: `package | version | URI suite/component architecture Packages`, by falling version.
fn newest(madison: &str) -> Option<Offer<'_>> {
    madison.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let version = columns.nth(1)?;
        let (suite, _) = columns.next()?.split_whitespace().nth(1)?.split_once('/')?;
        Some(Offer { version, suite })
    })
}

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status} (it needs root)");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_offer_and_its_suite_are_found() {
        let madison = "\
qemu-system-x86 | 1:10.0.2 | http://mirror.example/debian bookworm-backports/main amd64 Packages
qemu-system-x86 | 1:7.2 | http://mirror.example/debian bookworm/main amd64 Packages
";
        let offer = newest(madison).unwrap();
        assert_eq!(
            (offer.version, offer.suite),
            ("1:10.0.2", "bookworm-backports")
        );
        assert_eq!(newest(""), None);
    }
}
