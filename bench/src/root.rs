//! The root directory of the native run: the guest's files in the host's tmpfs, as they are in the guest's.

use crate::guest::Guest;
use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};

const PLACE: &str = "/dev/shm";
const NAME: &str = "doppel-bench-";

/// It is gone at the end.
pub struct Root(PathBuf);

impl Root {
    pub fn unpack(guest: &Guest) -> Result<Root> {
        remove_abandoned(Path::new(PLACE))?;
        let root = Root(Path::new(PLACE).join(format!("{NAME}{}", std::process::id())));
        guest.unpack(&root.0)?;
        Ok(root)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Removes what a benchmark left that was killed: the directory is named for its process.
fn remove_abandoned(place: &Path) -> Result<()> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(process) = name.strip_prefix(NAME) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}
