//! A disk as the user asks for it, and how it is opened.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::backend::{BlockBackend, SECTOR};
use crate::error::BlockError;
use crate::file::HostFile;
use crate::format::{Format, Look, look};
use crate::raw::Raw;
use crate::{overlay, qcow2};

/// `FILE[,format=raw|qcow2][,ro][,overlay=FILE][,at-once=on|off]`. A comma within a name is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Where the image is.
    pub path: PathBuf,
    /// Its format; guessed where it is not said.
    pub format: Option<Format>,
    /// The guest may only read.
    pub read_only: bool,
    /// Where what the guest writes goes instead, made when it is not there.
    pub overlay: Option<PathBuf>,
    /// Whoever asks for something that needs no waiting may be kept for it.
    pub at_once: bool,
}

impl DiskSpec {
    /// The image at `path` with nothing else said.
    pub fn new(path: impl Into<PathBuf>) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            format: None,
            read_only: false,
            overlay: None,
            at_once: true,
        }
    }

    /// Opens the image, locked against other virtual machines.
    pub fn open(&self) -> Result<Arc<dyn BlockBackend>, BlockError> {
        if let Some(overlay) = &self.overlay {
            let disk = overlay::open(overlay, &self.path, self.format)?;
            return Ok(Arc::new(disk));
        }
        let file = HostFile::open(&self.path, !self.read_only)?;
        let found = look(&file.head(SECTOR as usize)?);
        Ok(match (self.format, found) {
            (Some(Format::Raw), _) => Arc::new(Raw::new(file)),
            (None, Look::Raw) => Arc::new(Raw::new(file).guarded()),
            (Some(Format::Qcow2), _) | (None, Look::Qcow2) => Arc::new(qcow2::open(file)?),
            (None, Look::Other(name)) => {
                let path = self.path.clone();
                return Err(BlockError::Unsupported { path, name });
            }
        })
    }
}

/// As it is parsed.
impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doubled = |path: &Path| path.to_string_lossy().replace(',', ",,");
        f.write_str(&doubled(&self.path))?;
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        if self.read_only {
            f.write_str(",ro")?;
        }
        match &self.overlay {
            Some(overlay) => write!(f, ",overlay={}", doubled(overlay)),
            None => Ok(()),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = BlockError;

    fn from_str(text: &str) -> Result<Self, BlockError> {
        let mut parts = split(text).into_iter();
        let mut spec = DiskSpec::new(parts.next().unwrap_or_default());
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => spec.read_only = true,
                Some(("format", name)) => {
                    spec.format = Some(name.parse().map_err(BlockError::Usage)?);
                }
                Some(("at-once", "on")) => spec.at_once = true,
                Some(("at-once", "off")) => spec.at_once = false,
                Some(("overlay", path)) if !path.is_empty() => spec.overlay = Some(path.into()),
                _ => {
                    return Err(BlockError::Usage(format!(
                        "{part:?} is no option of a disk: format=raw|qcow2, ro, overlay=FILE, at-once=on|off (a comma in a name is written twice)"
                    )));
                }
            }
        }
        if spec.path.as_os_str().is_empty() {
            return Err(BlockError::Usage("a disk needs the name of a file".into()));
        }
        if spec.read_only && spec.overlay.is_some() {
            let what = "a disk is either read-only (ro) or has an overlay";
            return Err(BlockError::Usage(what.into()));
        }
        Ok(spec)
    }
}

/// The parts between single commas, with double commas made one.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let part = parts.last_mut();
        if c != ',' || characters.next_if_eq(&',').is_some() {
            part.into_iter().for_each(|part| part.push(c));
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_written_as_it_is_parsed() {
        for text in [
            "a",
            "a,,b/c,format=raw,ro",
            "x=y,format=qcow2,overlay=o,,p",
            "x,overlay=,,",
        ] {
            let spec: DiskSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
        }
    }
}
