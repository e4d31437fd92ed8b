//! Debian packages through the host's apt, as an ordinary user.
//!
//! apt keeps its lists and its cache where only root may write. Both move to a directory of the caller's here, while
//! the host's sources, keys, proxies and pins stay in force: apt fetches from where the host's owner said and verifies
//! every package against the archive's signature as always. The lists are fetched afresh, because a host's own may
//! be stale (their packages gone from the mirror) or, in a container, missing altogether. They are those of one architecture,
//! whatever others the host's dpkg knows, and those of one suite where the caller names it.

use crate::image::sources;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Clears the hooks that a host may have for the time after an update: they are root's.
const CONFIGURATION: &str = "\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
";

const OPTIONS: &[&str] = &[
    "Acquire::Languages=none",
    "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
    "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
    "Acquire::IndexTargets::deb-src::Sources::DefaultEnabled=false",
    "Acquire::Retries=2",
    "Acquire::http::Timeout=30",
    "Acquire::https::Timeout=30",
    "APT::Sandbox::User=root", // no second user: the caller is one that can do no harm
];

/// Where packages come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source<'a> {
    /// The architecture, by Debian's name for it. The host need not know it.
    pub architecture: &'a str,
    /// One suite of Debian's archive, such as `bookworm-backports`, at the mirror that the host uses; else all sources of the host.
    pub suite: Option<&'a str>,
}

/// The host's sources.
pub const HOST: Source<'static> = Source {
    architecture: "amd64",
    suite: None,
};

/// apt with lists and cache of its own in a directory.
pub struct Apt<'a> {
    directory: PathBuf,
    options: Vec<String>,
    progress: &'a dyn Fn(&str),
}

impl<'a> Apt<'a> {
    /// Sets up a private apt in `directory` and fetches the package lists of `source`; `progress` is given a line at a time.
    pub fn update(directory: &Path, source: Source, progress: &'a dyn Fn(&str)) -> Result<Apt<'a>> {
        for folder in ["state/lists/partial", "cache/archives/partial", "packages"] {
            std::fs::create_dir_all(directory.join(folder))?;
        }
        std::fs::write(directory.join("apt.conf"), CONFIGURATION)?;
        let apt = Apt {
            directory: directory.to_owned(),
            options: options(directory, source)?,
            progress,
        };
        apt.run(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    /// The first package that `package` depends on and whose name starts with `prefix`: what a meta package stands for
    /// today. `package` itself where there is none.
    pub fn resolve(&self, package: &str, prefix: &str) -> Result<String> {
        let found = self.depends(package, &[prefix])?.into_iter().next();
        Ok(found.unwrap_or_else(|| package.to_owned()))
    }

    /// The packages that `package` depends on and whose names start with one of `prefixes`.
    pub fn depends(&self, package: &str, prefixes: &[&str]) -> Result<Vec<String>> {
        let output = self
            .command("apt-cache")
            .args(["show", "--no-all-versions", package])
            .stderr(Stdio::null())
            .output()
            .context("running apt-cache")?;
        if !output.status.success() {
            bail!(
                "apt knows no package {package}: either its lists could not be fetched (no network?) or the host's \
                   sources are not Debian's"
            );
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let wanted = |name: &&str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        Ok(dependencies(&text)
            .filter(wanted)
            .map(str::to_owned)
            .collect())
    }

    /// Downloads packages, verified by apt; the `.deb` files in the order of `names`.
    pub fn download(&self, names: &[impl AsRef<str>]) -> Result<Vec<PathBuf>> {
        let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
        let folder = self.directory.join("packages");
        let mut command = self.command("apt-get");
        self.run(command.arg("download").args(&names).current_dir(&folder))?;
        names.iter().map(|name| find(&folder, name)).collect()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C")
            .arg("-c")
            .arg(self.directory.join("apt.conf"));
        let own = self.options.iter().map(String::as_str);
        for option in OPTIONS.iter().copied().chain(own) {
            command.args(["-o", option]);
        }
        command
    }

    /// Runs a command, each line of its output given to `progress`; what it complained of is part of the error.
    fn run(&self, command: &mut Command) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{program} cannot be run: is this host a Debian?"))?;
        let stderr = child.stderr.take().context("no stderr")?;
        let complaints = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = BufReader::new(stderr).read_to_string(&mut text);
            text
        });
        let stdout = child.stdout.take().context("no stdout")?;
        for line in BufReader::new(stdout).lines() {
            (self.progress)(line?.trim_end());
        }
        let status = child.wait()?;
        conclude(&program, status, &complaints.join().unwrap_or_default())
    }
}

/// What differs from caller to caller. A suite needs a list of sources of its own.
fn options(directory: &Path, source: Source) -> Result<Vec<String>> {
    let within = |name: &str| directory.join(name).display().to_string();
    let mut options = vec![
        format!("Dir::State={}", within("state")),
        format!("Dir::Cache={}", within("cache")),
        format!("APT::Architecture={}", source.architecture),
        format!("APT::Architectures::={}", source.architecture),
    ];
    if let Some(suite) = source.suite {
        let list = directory.join("suite.sources");
        std::fs::write(&list, sources::of_suite(suite)?)?;
        options.push(format!("Dir::Etc::sourcelist={}", list.display()));
        options.push("Dir::Etc::sourceparts=/dev/null".to_owned());
    }
    Ok(options)
}

fn conclude(program: &str, status: ExitStatus, complaints: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let errors: Vec<&str> = complaints.lines().filter(|l| l.starts_with("E:")).collect();
    bail!("{program} failed ({status}): {}", errors.join(" "))
}

/// The names in the `Depends:` field of a package's record, versions and alternatives left off.
fn dependencies(record: &str) -> impl Iterator<Item = &str> {
    let fields = record
        .lines()
        .filter_map(|line| line.strip_prefix("Depends:"));
    fields
        .flat_map(|field| field.split(','))
        .filter_map(|item| item.split_whitespace().next())
}

/// The `.deb` of `name` in `folder`; apt names it `NAME_VERSION_ARCHITECTURE.deb`.
fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let prefix = format!("{name}_");
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name();
        let file = file.to_string_lossy();
        if file.starts_with(&prefix) && file.ends_with(".deb") {
            return Ok(entry.path());
        }
    }
    bail!("apt downloaded no package {name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_meta_package_names_what_it_stands_for() {
        let record = "Package: linux-image-cloud-amd64\nVersion: 6.1\n\
                      Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), other | more\nSize: 1\n";
        let names: Vec<&str> = dependencies(record).collect();
        assert_eq!(names, ["linux-image-6.1.0-56-cloud-amd64", "other"]);
        assert_eq!(dependencies("Package: a\n").count(), 0);
    }

    #[test]
    fn foreign_architectures_of_the_host_are_not_asked_for() {
        let directory = std::env::temp_dir().join(format!("doppel-apt-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("apt.conf"), CONFIGURATION).unwrap();
        let source = Source {
            architecture: "i386",
            suite: None,
        };
        let apt = Apt {
            directory: directory.clone(),
            options: options(&directory, source).unwrap(),
            progress: &|_| {},
        };
        let mut command = apt.command("apt-config");
        let dpkg = directory.join("dpkg");
        std::fs::write(&dpkg, "#!/bin/sh\necho armhf\n").unwrap();
        std::fs::set_permissions(&dpkg, std::fs::Permissions::from_mode(0o755)).unwrap();
        let dpkg = format!("Dir::Bin::dpkg={}", dpkg.display());
        let command = command.args(["-o", &dpkg, "dump"]);
        let output = command.output().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        let dump = String::from_utf8(output.stdout).unwrap();
        let lines = dump.lines().filter(|l| l.starts_with("APT::Architecture"));
        let lines: Vec<&str> = lines.collect();
        assert!(lines.contains(&"APT::Architecture \"i386\";"), "{dump}");
        assert!(lines.contains(&"APT::Architectures:: \"i386\";"), "{dump}");
        let others = |line: &&str| line.contains("amd64") || line.contains("armhf");
        assert!(!lines.iter().any(others), "{lines:?}");
    }

    #[test]
    fn a_failure_says_what_apt_complained_of() {
        let status = Command::new("false").status().unwrap();
        let error = conclude("apt-get", status, "W: odd\nE: no such thing\n").unwrap_err();
        assert!(error.to_string().contains("E: no such thing"));
        assert!(!error.to_string().contains("odd"));
    }
}
