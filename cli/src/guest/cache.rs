//! A folder of the user's cache that is either whole or not there.
//!
//! A set of files is assembled beside its place and renamed into it, with a manifest of sizes and check sums; whoever
//! wants it checks the manifest first and assembles anew what is missing, damaged or of another recipe. A lock file
//! makes the second of two first runs wait for the first.
//!
//! Check sums of tens of megabytes would hold up every start, so the manifest also notes how a file looked (length, inode, time of
//! change) when its check sum was last found right, and a file that still looks so is not read. Whatever writes to a file changes
//! its time of change; a file that changed just now is not noted, since it could change again within the clock's tick.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const MANIFEST: &str = "manifest.json";

/// What a folder holds: written last, read first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    /// Which recipe made it: another one's result is not taken.
    recipe: u32,
    /// File name to CRC-32 of its content.
    files: BTreeMap<String, u32>,
    /// How files looked that had their check sums.
    #[serde(default)]
    looks: BTreeMap<String, Look>,
}

/// What changes whenever a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Look {
    len: u64,
    inode: u64,
    changed_seconds: i64,
    changed_nanoseconds: i64,
}

impl Look {
    fn of(path: &Path) -> Option<Look> {
        let meta = fs::metadata(path).ok()?;
        Some(Look {
            len: meta.len(),
            inode: meta.ino(),
            changed_seconds: meta.ctime(),
            changed_nanoseconds: meta.ctime_nsec(),
        })
    }

    /// The last change was long enough ago that another would show.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.is_ok_and(|now| now.as_secs() as i64 - self.changed_seconds >= SETTLED_SECONDS)
    }
}

/// Coarser than the time stamps of any file system.
const SETTLED_SECONDS: i64 = 3;

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
    let looks = BTreeMap::new();
    write(
        folder,
        &Manifest {
            recipe,
            files,
            looks,
        },
    )
}

fn write(folder: &Path, manifest: &Manifest) -> Result<()> {
    let partial = folder.join(format!("{MANIFEST}.partial"));
    fs::write(&partial, serde_json::to_vec_pretty(manifest)?)?;
    Ok(fs::rename(partial, folder.join(MANIFEST))?)
}

fn is_whole(folder: &Path, recipe: u32) -> bool {
    let Ok(text) = fs::read(folder.join(MANIFEST)) else {
        return false;
    };
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else {
        return false;
    };
    let mut looks = BTreeMap::new();
    for (name, sum) in &manifest.files {
        let path = folder.join(name);
        let Some(look) = Look::of(&path) else {
            return false;
        };
        if manifest.looks.get(name) != Some(&look) && checksum(&path).ok() != Some(*sum) {
            return false;
        }
        if look.is_settled() {
            looks.insert(name.clone(), look);
        }
    }
    note(folder, &manifest, looks);
    manifest.recipe == recipe
}

/// Notes what needs no check sum the next time. Where that fails, the next time is slower.
fn note(folder: &Path, manifest: &Manifest, looks: BTreeMap<String, Look>) {
    if manifest.looks != looks {
        let noted = Manifest {
            looks,
            ..manifest.clone()
        };
        let _ = write(folder, &noted);
    }
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
    fn a_file_that_looks_as_noted_is_not_read_and_one_that_changed_is() {
        let (scratch, made) = (Scratch::new("looks"), Cell::new(0));
        let place = take(&scratch.0, 1, &made);
        let data = place.join("data");
        let manifest = |looks: &[Look], sum| Manifest {
            recipe: 1,
            files: BTreeMap::from([("data".to_owned(), sum)]),
            looks: looks.iter().map(|l| ("data".to_owned(), *l)).collect(),
        };
        let look = Look::of(&data).unwrap();
        write(&place, &manifest(&[look], 0)).unwrap();
        assert!(is_whole(&place, 1), "the wrong sum is not worked out");
        let sum = checksum(&data).unwrap();
        let before = Look {
            changed_seconds: look.changed_seconds - 9,
            ..look
        };
        write(&place, &manifest(&[before], sum)).unwrap();
        assert!(is_whole(&place, 1), "the sum is right");
        write(&place, &manifest(&[before], 0)).unwrap();
        assert!(!is_whole(&place, 1));
    }

    #[test]
    fn only_settled_files_are_noted() {
        let (scratch, made) = (Scratch::new("settled"), Cell::new(0));
        let place = take(&scratch.0, 1, &made);
        let look = Look::of(&place.join("data")).unwrap();
        assert!(!look.is_settled());
        let long_ago = Look {
            changed_seconds: look.changed_seconds - SETTLED_SECONDS,
            ..look
        };
        assert!(long_ago.is_settled());
        take(&scratch.0, 1, &made);
        let text = fs::read(place.join(MANIFEST)).unwrap();
        let manifest: Manifest = serde_json::from_slice(&text).unwrap();
        assert_eq!(manifest.looks.len(), 0);
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
