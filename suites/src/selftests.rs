//! Linux's own tests, built from Debian's source of its kernel, in 64 and 32 bits, without anything installed but a compiler: headers and
//! libraries come from Debian packages too, as a system root for the compiler.

use crate::files::{self, progress};
use anyhow::{Context, Result, bail, ensure};
use doppel_cli::guest::{self, package};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SOURCE: &str = "linux-source-6.1";
/// Of the source, what the tests are built from.
const PARTS: &[&str] = &[
    "Makefile",
    "arch/x86/include",
    "include/uapi",
    "lib",
    "mm/gup_test.h",
    "scripts",
    "tools",
];
/// Where the tests are in it.
const TESTS: &str = "tools/testing/selftests";
/// What the tests are compiled and linked against. The first are what they need in the guest.
const SYSTEM: &[&str] = &[
    "libc6",
    "libc6-i386",
    "libcap2",
    "libgcc-s1",
    "lib32gcc-s1",
    "libnuma1",
    "gcc-multilib",
    "lib32gcc-12-dev",
    "libc6-dev",
    "libc6-dev-i386",
    "libcap-dev",
    "libcrypt-dev",
    "libgcc-12-dev",
    "libnuma-dev",
    "linux-libc-dev",
];
const LIBRARIES: usize = 6;

/// The folder with the tests of `folders`, each in a folder of its name, and the packages that the guest needs to run them.
pub fn build(workshop: &Path, folders: &[&str]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let source = guest::packages(SOURCE, &[SOURCE], &progress)?;
    let system = guest::packages("selftests-system", SYSTEM, &progress)?;
    let place = workshop.join("selftests");
    let recipe = files::recipe(&[&source, &system]);
    if !files::is_of(&place, &recipe) {
        files::remove(&place)?;
        unpack_source(&source[0], &place)?;
        files::unpack(&system, &place.join("system"))?;
        files::mark(&place, &recipe)?;
    }
    for folder in folders {
        let built = place.join("built").join(folder);
        if !built.exists() {
            make(&place, folder, &built)?;
        }
    }
    Ok((place.join("built"), system[..LIBRARIES].to_vec()))
}

/// The archive in the package is unpacked by tar, which reads its compression.
fn unpack_source(deb: &Path, place: &Path) -> Result<()> {
    eprintln!("suites: unpacking {SOURCE}");
    fs::create_dir_all(place)?;
    let name = format!("{SOURCE}.tar.xz");
    let packed = place.join(&name);
    package::visit(deb, |mut member| {
        if member.path.ends_with(&name) {
            fs::write(&packed, member.read()?)?;
        }
        Ok(())
    })?;
    let mut tar = Command::new("tar");
    tar.current_dir(place).arg("-xf").arg(&packed);
    tar.args(PARTS.iter().map(|part| format!("{SOURCE}/{part}")));
    let status = tar.status().context("tar cannot be run")?;
    ensure!(status.success(), "{name} cannot be unpacked");
    Ok(fs::remove_file(packed)?)
}

/// A test that cannot be built is missing in the guest, and fails there.
fn make(place: &Path, folder: &str, built: &Path) -> Result<()> {
    eprintln!("suites: building {folder}");
    let partial = place.join("built").join(format!("{folder}.partial"));
    files::remove(&partial)?;
    fs::create_dir_all(&partial)?;
    let log = fs::File::create(place.join(format!("{}.log", folder.replace('/', "-"))))?;
    let mut make = Command::new("make");
    make.arg("-k")
        .arg("-C")
        .arg(place.join(SOURCE).join(TESTS).join(folder))
        .arg(format!("OUTPUT={}", partial.display()))
        .arg(format!("CC={}", compiler(&place.join("system"))))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    make.status()
        .context("make cannot be run: the tests need make and gcc")?;
    let empty = fs::read_dir(&partial)?.next().is_none();
    if empty {
        bail!(
            "nothing of {folder} could be built: what make said is in {}",
            place.display()
        );
    }
    Ok(fs::rename(partial, built)?)
}

/// gcc that looks for everything in `system`.
fn compiler(system: &Path) -> String {
    let at = system.display();
    format!(
        "gcc --sysroot={at} -B{at}/usr/lib/gcc/x86_64-linux-gnu/12/ -isystem {at}/usr/include/x86_64-linux-gnu \
         -L{at}/usr/lib/gcc/x86_64-linux-gnu/12"
    )
}
