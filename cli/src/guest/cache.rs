//! A folder of the user's cache that is either whole or not there.
//!
//! A set of files is assembled beside its place and renamed into it, with a manifest of sizes and check sums; whoever
//! wants it checks the manifest first and assembles anew what is missing, damaged or of another recipe. A lock file
//! makes the second of two first runs wait for the first.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const MANIFEST: &str = "manifest.json";

/// What a folder holds: written last, read first.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    /// Which recipe made it: another one's result is not taken.
    recipe: u32,
    /// File name to CRC-32 of its content.
    files: BTreeMap<String, u32>,
}

/// Doppel's folder in the user's cache: `$XDG_CACHE_HOME/doppel`, else `$HOME/.cache/doppel`.
pub fn root() -> Result<PathBuf> {
    let absolute = |name: &str| {
        let value = std::env::var_os(name).map(PathBuf::from);
        value.filter(|path| path.is_absolute())
    };
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let base = base.context("neither XDG_CACHE_HOME nor HOME names a directory for the cache")?;
    Ok(base.join("doppel"))
}

/// The folder `name` below `root`, made by `assemble` if it is not there whole. `assemble` is given an empty folder to
/// fill with plain files; `recipe` is a number that changes with what `assemble` does.
pub fn folder(
    root: &Path,
    name: &str,
    recipe: u32,
    assemble: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    fs::create_dir_all(root)
        .with_context(|| format!("the cache {} cannot be created", root.display()))?;
    let lock = File::create(root.join(format!("{name}.lock")))?;
    lock.lock().context("locking the cache")?;
    let place = root.join(name);
    if is_whole(&place, recipe) {
        return Ok(place);
    }
    let work = root.join(format!("{name}.partial"));
    remove(&work)?;
    fs::create_dir_all(&work)?;
    let result = assemble(&work).and_then(|()| seal(&work, recipe));
    if let Err(error) = result {
        let _ = remove(&work);
        return Err(error);
    }
    remove(&place)?;
    fs::rename(&work, &place)?;
    Ok(place)
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

fn seal(folder: &Path, recipe: u32) -> Result<()> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.insert(name, checksum(&entry.path())?);
    }
    let manifest = serde_json::to_vec_pretty(&Manifest { recipe, files })?;
    Ok(fs::write(folder.join(MANIFEST), manifest)?)
}

fn is_whole(folder: &Path, recipe: u32) -> bool {
    let Ok(text) = fs::read(folder.join(MANIFEST)) else {
        return false;
    };
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else {
        return false;
    };
    let intact =
        |(name, sum): (&String, &u32)| checksum(&folder.join(name)).is_ok_and(|s| s == *sum);
    manifest.recipe == recipe && manifest.files.iter().all(intact)
}

fn checksum(path: &Path) -> Result<u32> {
    Ok(crc32fast::hash(&fs::read(path)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path =
                std::env::temp_dir().join(format!("doppel-cache-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn take(root: &Path, recipe: u32, made: &Cell<u32>) -> PathBuf {
        let assemble = |work: &Path| {
            made.set(made.get() + 1);
            Ok(fs::write(work.join("data"), b"content")?)
        };
        folder(root, "thing", recipe, assemble).unwrap()
    }

    #[test]
    fn it_is_assembled_once() {
        let (scratch, made) = (Scratch::new("once"), Cell::new(0));
        let place = take(&scratch.0, 1, &made);
        assert_eq!(take(&scratch.0, 1, &made), place);
        assert_eq!(fs::read(place.join("data")).unwrap(), b"content");
        assert_eq!(made.get(), 1);
    }

    #[test]
    fn a_damaged_or_missing_file_or_another_recipe_is_assembled_anew() {
        let (scratch, made) = (Scratch::new("damage"), Cell::new(0));
        let place = take(&scratch.0, 1, &made);
        fs::write(place.join("data"), b"c0ntent").unwrap();
        take(&scratch.0, 1, &made);
        assert_eq!(fs::read(place.join("data")).unwrap(), b"content");
        fs::remove_file(place.join("data")).unwrap();
        take(&scratch.0, 1, &made);
        assert_eq!(made.get(), 3);
        take(&scratch.0, 2, &made);
        assert_eq!(made.get(), 4);
    }

    #[test]
    fn a_failure_leaves_nothing_behind_that_would_be_taken() {
        let (scratch, made) = (Scratch::new("failure"), Cell::new(0));
        let half = |work: &Path| {
            fs::write(work.join("data"), b"half")?;
            anyhow::bail!("no network")
        };
        assert!(folder(&scratch.0, "thing", 1, half).is_err());
        assert!(!scratch.0.join("thing").exists() && !scratch.0.join("thing.partial").exists());
        take(&scratch.0, 1, &made);
        assert_eq!(made.get(), 1);
    }
}
