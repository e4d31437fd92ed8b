//! The files of a Debian package, as a stream: dpkg-deb unpacks the outer archive and its compression, and the tar
//! within is read here, so that nothing unneeded touches the disk.

use super::cpio::Archive;
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

/// What a member of a package is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with these permission bits.
    File(u32),
    /// A symbolic link to this target.
    Symlink(String),
}

/// One file or link of a package; its content is read on demand.
pub struct Member<'a> {
    /// The path from the root, without a leading slash.
    pub path: String,
    /// File or link.
    pub kind: Kind,
    content: &'a mut dyn Read,
}

impl Member<'_> {
    /// The file's bytes.
    pub fn read(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.content.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// Calls `visit` for each regular file and symbolic link of the package `deb`, in the package's order.
pub fn visit(deb: &Path, mut visit: impl FnMut(Member) -> Result<()>) -> Result<()> {
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb cannot be run: is this host a Debian?")?;
    let stdout = child.stdout.take().context("no stdout")?;
    let mut archive = tar::Archive::new(stdout);
    for entry in archive.entries()? {
        let mut entry = entry.with_context(|| format!("reading {}", deb.display()))?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let path = path.trim_start_matches("./").to_owned();
        let Some(kind) = kind(&entry)? else { continue };
        let content = &mut entry;
        visit(Member {
            path,
            kind,
            content,
        })?;
    }
    let mut stdout = archive.into_inner();
    std::io::copy(&mut stdout, &mut std::io::sink())?; // the padding, lest dpkg-deb dies of a closed pipe
    if !child.wait()?.success() {
        bail!("dpkg-deb could not read {}", deb.display());
    }
    Ok(())
}

/// Adds to an archive those files and links of the package `deb` that `wanted` accepts, by their path from the root.
pub fn add(archive: &mut Archive, deb: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
    visit(deb, |mut member| {
        if wanted(&member.path) {
            match member.kind.clone() {
                Kind::File(mode) => {
                    let content = member.read()?;
                    archive.file(&member.path, mode, &content);
                }
                Kind::Symlink(target) => archive.symlink(&member.path, &target),
            }
        }
        Ok(())
    })
}

fn kind<R: Read>(entry: &tar::Entry<R>) -> Result<Option<Kind>> {
    let kind = entry.header().entry_type();
    if kind.is_file() {
        return Ok(Some(Kind::File(entry.header().mode()? & 0o7777)));
    }
    match entry.link_name()? {
        Some(target) if kind.is_symlink() => {
            Ok(Some(Kind::Symlink(target.to_string_lossy().into_owned())))
        }
        _ => Ok(None),
    }
}
