//! Folders that are made of packages, and the archives that guests get of them.

use anyhow::{Context, Result};
use doppel_cli::guest::cpio::Archive;
use doppel_cli::guest::package::{self, Kind};
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Names what a folder was made of.
const MARK: &str = "recipe";

/// Says what is done, without what apt says of each file.
pub fn progress(line: &str) {
    if line.starts_with("assembling") {
        eprintln!("suites: {line}");
    }
}

/// What tells packages from others of the same names.
pub fn recipe(packages: &[&[PathBuf]]) -> String {
    let mut text = String::new();
    for deb in packages.iter().copied().flatten() {
        let look = fs::metadata(deb).map(|m| (m.len(), m.mtime()));
        let _ = writeln!(text, "{} {:?}", deb.display(), look.ok());
    }
    text
}

/// Whether a folder was made by a recipe, to its end.
pub fn is_of(folder: &Path, recipe: &str) -> bool {
    fs::read_to_string(folder.join(MARK)).is_ok_and(|mark| mark == recipe)
}

/// Says that it was.
pub fn mark(folder: &Path, recipe: &str) -> Result<()> {
    Ok(fs::write(folder.join(MARK), recipe)?)
}

/// Removes a folder if there is one.
pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Unpacks packages below `root`.
pub fn unpack(debs: &[PathBuf], root: &Path) -> Result<()> {
    for deb in debs {
        package::visit(deb, |mut member| {
            let path = root.join(&member.path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match member.kind.clone() {
                Kind::File(mode) => {
                    fs::write(&path, member.read()?)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
                }
                Kind::Symlink(target) => {
                    let _ = fs::remove_file(&path);
                    // One from the root would lead out of the system root.
                    let target = match target.strip_prefix('/') {
                        Some(below) => root.join(below),
                        None => target.into(),
                    };
                    symlink(target, &path)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Adds packages to an archive as they are, but for their documentation.
pub fn add_packages(archive: &mut Archive, debs: &[PathBuf]) -> Result<()> {
    for deb in debs {
        package::add(archive, deb, |path| !path.starts_with("usr/share/doc"))?;
    }
    Ok(())
}

/// Adds the files below a folder to an archive, as `name`.
pub fn add_folder(archive: &mut Archive, name: &str, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            add_folder(archive, &name, &entry.path())?;
        } else if kind.is_symlink() {
            let target = fs::read_link(entry.path())?;
            archive.symlink(&name, &target.to_string_lossy());
        } else {
            archive.file(
                &name,
                entry.metadata()?.mode() & 0o777,
                &fs::read(entry.path())?,
            );
        }
    }
    Ok(())
}
