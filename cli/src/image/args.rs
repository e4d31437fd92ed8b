//! The command line of `doppel image`.

use crate::size;
use clap::{Args, Subcommand};
use doppel_machine::block::Format;
use std::path::PathBuf;
use std::str::FromStr;

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Build an image that boots, from a distribution's own packages.
    Build(Build),
    /// Make an image for an empty disk.
    Create(Create),
    /// Show what an image is.
    Info(Info),
    /// Copy a disk into a new image, without what is zeros.
    Convert(Convert),
}

#[derive(Debug, Args)]
pub struct Build {
    /// What to build: debian, debian:bookworm or debian:trixie; without a release, the one of this host.
    #[arg(value_name = "debian[:RELEASE]")]
    pub system: System,
    /// Where to write it; .raw or .img makes a raw image, anything else qcow2.
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Size of the disk, with suffix M or G; the image takes what is used of it.
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = size::parse)]
    pub size: u64,
    /// Further packages.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub packages: Vec<String>,
    /// A public key that root may log in with over ssh; brings openssh-server.
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// Name of the machine.
    #[arg(long, value_name = "NAME", default_value = "debian", value_parser = hostname)]
    pub hostname: String,
    /// A file with root's password in its first line. Without one, the serial console logs root in by itself, and nothing else does.
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// A sources.list or .sources file to take packages from and to leave in the image, in place of this host's.
    #[arg(long, value_name = "FILE")]
    pub sources: Option<PathBuf>,
    /// How mmdebstrap becomes root within the image: auto, root, unshare or fakechroot.
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = ["auto", "root", "unshare", "fakechroot"])]
    pub mode: String,
}

/// A distribution and its release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct System {
    /// The release's code name; this host's where it is none.
    pub release: Option<String>,
}

impl FromStr for System {
    type Err = String;

    fn from_str(text: &str) -> Result<System, String> {
        let (name, release) = match text.split_once(':') {
            Some((name, release)) => (name, Some(release)),
            None => (text, None),
        };
        let plain = |r: &str| !r.is_empty() && r.bytes().all(|b| b.is_ascii_lowercase());
        if name != "debian" || release.is_some_and(|release| !plain(release)) {
            return Err("write debian, debian:bookworm or debian:trixie".to_owned());
        }
        let release = release.map(str::to_owned);
        Ok(System { release })
    }
}

fn hostname(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = (1..=63).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('-');
    match good {
        true => Ok(text.to_owned()),
        false => Err("a name has up to 63 small letters, digits and hyphens".to_owned()),
    }
}

#[derive(Debug, Args)]
pub struct Create {
    /// Where to make it.
    #[arg(value_name = "FILE")]
    pub path: PathBuf,
    /// Size of the disk, with suffix K, M, G or T.
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub size: u64,
    /// raw or qcow2.
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    pub format: Format,
}

#[derive(Debug, Args)]
pub struct Info {
    /// The image.
    #[arg(value_name = "FILE")]
    pub path: PathBuf,
    /// raw or qcow2; guessed where it is not said.
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<Format>,
}

#[derive(Debug, Args)]
pub struct Convert {
    /// The image to copy.
    #[arg(value_name = "FROM")]
    pub from: PathBuf,
    /// Where to make the copy.
    #[arg(value_name = "TO")]
    pub to: PathBuf,
    /// Format of the original; guessed where it is not said.
    #[arg(long, value_name = "FORMAT")]
    pub from_format: Option<Format>,
    /// Format of the copy: raw or qcow2.
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    pub format: Format,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_and_names_are_checked() {
        let release = |text: &str| text.parse::<System>().map(|s| s.release);
        assert_eq!(release("debian"), Ok(None));
        assert_eq!(release("debian:trixie"), Ok(Some("trixie".into())));
        for bad in ["fedora", "debian:", "debian:12;x", "Debian"] {
            assert!(release(bad).is_err(), "{bad}");
        }
        assert!(hostname("web-1").is_ok());
        assert!(hostname("").is_err() && hostname("a b").is_err() && hostname("-a").is_err());
    }
}
