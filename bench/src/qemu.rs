//! QEMU: whether it is there, which one, and where a newer one comes from.

use crate::contestant::QEMU;
use anyhow::{Context, Result, bail, ensure};
use std::process::Command;

const PACKAGE: &str = "qemu-system-x86";
/// Those of a newer source forbid `PACKAGE`; apt would remove them.
const UTILITIES: &str = "qemu-utils";

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
    run(&mut newest.install()).or_else(|e| {
        eprintln!("bench: {e}; once more, with {UTILITIES} of the same source");
        run(&mut newest.install_all())
    })
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Offer<'a> {
    version: &'a str,
    suite: &'a str,
}

impl Offer<'_> {
    fn install(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.args(["install", "--yes", "--no-remove", "--no-install-recommends"]);
        command.args(["--target-release", self.suite, PACKAGE]);
        command
    }

    /// Together with the utilities, where those that are there are of a source that is not enabled any more.
    fn install_all(&self) -> Command {
        let mut command = self.install();
        command.arg("--allow-downgrades");
        command.arg(format!("{UTILITIES}/{}", self.suite));
        command
    }
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
        let words = |command: Command| {
            let words: Vec<_> = command.get_args().map(|a| a.to_owned()).collect();
            words.join(" ".as_ref()).into_string().unwrap()
        };
        let install = words(offer.install());
        assert!(
            install.ends_with("--target-release bookworm-backports qemu-system-x86"),
            "{install}"
        );
        assert_eq!(
            words(offer.install_all()),
            install + " --allow-downgrades qemu-utils/bookworm-backports"
        );
    }
}
