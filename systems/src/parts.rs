//! What a system is booted from: files made of Debian packages, the checks that run in it included.

use crate::table::{System, What};
use anyhow::{Context, Result, ensure};
use doppel_cli::guest::cpio::Archive;
use doppel_cli::guest::package::{self, Kind};
use doppel_cli::guest::{self, Guest, KERNEL_PACKAGE, Parts};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const CHECK: &str = include_str!("check.sh");
/// What is looked at beyond that in the first domain of Xen, whose identity is all zeros, and where Doppel runs in Doppel.
const CHECK_XEN: &str = "#!/bin/sh\nset -e\n[ \"$(cat /sys/hypervisor/type)\" = xen ]\n\
    [ \"$(cat /sys/hypervisor/uuid)\" = 00000000-0000-0000-0000-000000000000 ]\n";
const CHECK_NESTED: &str = include_str!("nested.sh");

/// What a monitor needs to know.
#[derive(Debug)]
pub struct Machine {
    pub kernel: PathBuf,
    /// The initial RAM disk, or for a kernel that takes modules, files and their command lines.
    pub modules: Vec<(PathBuf, String)>,
    pub takes_modules: bool,
    pub cmdline: String,
    /// MiB.
    pub memory: u32,
    pub cpus: u32,
}

/// Where such files are made.
pub struct Workshop {
    pub directory: PathBuf,
    pub doppel: PathBuf,
}

impl Workshop {
    /// Makes what a system is booted from. An error means that its parts cannot be had.
    pub fn prepare(&self, system: &System, cpus: u32) -> Result<Machine> {
        let mut machine = Machine {
            kernel: PathBuf::new(),
            modules: Vec::new(),
            takes_modules: false,
            cmdline: system.cmdline.to_owned(),
            memory: system.memory,
            cpus,
        };
        match system.what {
            What::Linux {
                package,
                kernel,
                programs,
            } => {
                let parts = Parts {
                    package,
                    kernel,
                    programs,
                };
                let guest = guest::assembled(&parts, &progress)?;
                self.linux(&mut machine, &guest, Archive::new())?;
            }
            What::Nested => {
                let guest = guest::debian(KERNEL_PACKAGE, &progress)?;
                let more = self.nested(&guest)?;
                self.linux(&mut machine, &guest, more)?;
            }
            What::Xen { package } => self.xen(&mut machine, package)?,
            What::Files {
                package,
                kernel,
                initrd,
            } => {
                machine.kernel = self.unpack(package, kernel)?;
                let initrd = initrd.map(|path| self.unpack(package, path)).transpose()?;
                machine
                    .modules
                    .extend(initrd.map(|path| (path, String::new())));
            }
        }
        Ok(machine)
    }

    /// A Linux that runs the check.
    fn linux(&self, machine: &mut Machine, guest: &Guest, more: Archive) -> Result<()> {
        machine.kernel = guest.kernel.clone();
        machine.cmdline = words(&["console=ttyS0", &cpus(machine), &machine.cmdline]);
        let initrd = self.initrd(guest, more)?;
        machine.modules.push((initrd, String::new()));
        Ok(())
    }

    fn xen(&self, machine: &mut Machine, package: &str) -> Result<()> {
        let guest = guest::debian("linux-image-amd64", &progress)?;
        let mut more = Archive::new();
        more.file("doppel/more", 0o755, CHECK_XEN.as_bytes());
        let initrd = self.initrd(&guest, more)?;
        let packed = self.unpack(package, "amd64.gz")?;
        machine.kernel = gunzip(&packed)?;
        machine.takes_modules = true;
        let cmdline = words(&["console=hvc0", &cpus(machine)]);
        machine.modules.push((guest.kernel, cmdline));
        machine.modules.push((initrd, String::new()));
        Ok(())
    }

    /// The guest's initial RAM disk with the check and `more`.
    fn initrd(&self, guest: &Guest, mut more: Archive) -> Result<PathBuf> {
        more.file("doppel/script", 0o755, CHECK.as_bytes());
        let mut bytes = fs::read(&guest.initrd)?;
        bytes.extend(more.finish());
        let path = self.directory.join("initrd");
        fs::write(&path, bytes)?;
        Ok(path)
    }

    /// This Doppel with the libraries that it is linked with, and the files of a guest.
    fn nested(&self, guest: &Guest) -> Result<Archive> {
        let mut archive = Archive::new();
        archive.file("doppel/more", 0o755, CHECK_NESTED.as_bytes());
        let mut files = vec![
            ("nested/doppel".to_owned(), self.doppel.clone()),
            ("nested/vmlinuz".to_owned(), guest.kernel.clone()),
            ("nested/initrd".to_owned(), guest.initrd.clone()),
        ];
        let libraries = libraries(&self.doppel)?;
        files.extend(libraries.into_iter().map(|path| {
            let name = path.to_string_lossy().into_owned();
            (name, path)
        }));
        for (name, path) in files {
            archive.file(&name, 0o755, &fs::read(&path)?);
        }
        let mut script = Archive::new();
        script.file("doppel/script", 0o755, b"#!/bin/sh\necho nested: it runs\n");
        archive.file("nested/script", 0o644, &script.finish());
        Ok(archive)
    }

    /// The file of a package whose path ends so, in the workshop.
    fn unpack(&self, name: &str, ending: &str) -> Result<PathBuf> {
        let debs = guest::packages(name, &[name], &progress)?;
        let mut content = None;
        package::visit(&debs[0], |mut member| {
            if member.path.ends_with(ending) && matches!(member.kind, Kind::File(_)) {
                content = Some(member.read()?);
            }
            Ok(())
        })?;
        let content = content.with_context(|| format!("{name} has no {ending}"))?;
        let file = Path::new(ending).file_name().context("no file name")?;
        let path = self.directory.join(file);
        fs::write(&path, content)?;
        Ok(path)
    }
}

/// Says what is done, without what apt says of each file.
fn progress(line: &str) {
    if line.starts_with("assembling") {
        eprintln!("systems: {line}");
    }
}

fn cpus(machine: &Machine) -> String {
    format!("systems.cpus={}", machine.cpus)
}

fn words(words: &[&str]) -> String {
    let words: Vec<&str> = words.iter().copied().filter(|w| !w.is_empty()).collect();
    words.join(" ")
}

fn gunzip(packed: &Path) -> Result<PathBuf> {
    let path = packed.with_extension("");
    let status = Command::new("gzip")
        .arg("-dc")
        .arg(packed)
        .stdout(fs::File::create(&path)?)
        .status()
        .context("gzip cannot be run")?;
    ensure!(status.success(), "{} cannot be unpacked", packed.display());
    Ok(path)
}

/// The libraries that a program is linked with, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .stderr(Stdio::inherit())
        .output()
        .context("ldd cannot be run")?;
    ensure!(output.status.success(), "ldd {} failed", program.display());
    Ok(linked(&String::from_utf8_lossy(&output.stdout)))
}

/// The paths in what ldd says: `NAME => PATH (ADDRESS)`, or the path alone for the loader.
fn linked(text: &str) -> Vec<PathBuf> {
    let path = |line: &str| {
        let words = line.split_whitespace();
        words
            .into_iter()
            .find(|word| word.starts_with('/'))
            .map(PathBuf::from)
    };
    text.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_and_the_libraries_are_taken() {
        let text = "\tlinux-vdso.so.1 (0x7ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let paths = linked(text);
        let wanted = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(paths, wanted.map(PathBuf::from));
    }
}
