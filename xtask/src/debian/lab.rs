//! Files of the trials: the image, disks copied from it, a key, a set of packages; and machines that start with them.

use crate::console::Console;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root file system in the image.
const OFFSET: &str = "?offset=1048576";
/// What the trials use in the guest.
const PACKAGES: &str = "fio,stress-ng";
/// Room for what is installed in the guest.
const SIZE: &str = "6G";

/// Where everything lies.
pub struct Lab {
    doppel: PathBuf,
    folder: PathBuf,
    release: String,
}

/// How a machine is to start.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// doppel, qemu, or doppel with another engine: `doppel/interpret`.
    pub monitor: &'a str,
    /// What it boots from.
    pub disk: &'a Path,
    /// A second disk, raw.
    pub second: Option<&'a Path>,
    pub cpus: u32,
    pub memory: &'a str,
    /// A port of the host that leads to the guest's port 22.
    pub ssh: Option<u16>,
    /// More for the kernel's command line.
    pub append: &'a str,
}

impl<'a> Start<'a> {
    /// One processor, 512 MiB, one disk.
    pub fn of(monitor: &'a str, disk: &'a Path) -> Start<'a> {
        Start {
            monitor,
            disk,
            second: None,
            cpus: 1,
            memory: "512M",
            ssh: None,
            append: "",
        }
    }
}

impl Lab {
    /// Builds the image, unless it is there.
    pub fn new(root: &Path, release: &str) -> Result<Lab> {
        let folder = root.join("target/debian");
        fs::create_dir_all(&folder)?;
        let lab = Lab {
            doppel: root.join("target/release/doppel"),
            folder,
            release: release.to_owned(),
        };
        lab.build()?;
        Ok(lab)
    }

    fn image(&self) -> PathBuf {
        self.file(&format!("{}-trial.qcow2", self.release))
    }

    /// A file of the trials.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The private key that opens the guest.
    pub fn key(&self) -> PathBuf {
        self.file("key")
    }

    fn build(&self) -> Result<()> {
        if !self.key().exists() {
            let mut keygen = Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
            succeed(keygen.arg(self.key()))?;
            // Another key makes another image.
            let _ = fs::remove_file(self.image());
        }
        if self.image().exists() {
            return Ok(());
        }
        let mut command = Command::new(&self.doppel);
        command.args(["image", "build", &format!("debian:{}", self.release)]);
        command.args(["--packages", PACKAGES, "--size", SIZE, "--ssh-key"]);
        command.arg(self.key().with_extension("pub"));
        succeed(command.arg(self.image()))
    }

    /// A disk of its own for a trial.
    pub fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.file(&format!("{}-{name}", self.release));
        fs::copy(self.image(), &path)?;
        Ok(path)
    }

    /// Starts a machine with its console here.
    pub fn start(&self, start: Start<'_>) -> Result<Console> {
        match start.monitor.split_once('/') {
            _ if start.monitor == "qemu" => Console::start(self.qemu(start)?),
            Some((_, engine)) => Console::start(self.doppel(start, engine)),
            None => Console::start(self.doppel(start, "auto")),
        }
    }

    /// Why an engine cannot be had on this host, if it cannot.
    pub fn refusal(&self, engine: &str) -> Result<Option<String>> {
        // It is looked at before the kernel, which is none.
        let mut command = Command::new(&self.doppel);
        command.args(["run", "--engine", engine, "--kernel"]);
        let output = command.arg(&self.doppel).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let mut lines = said.lines().filter(|line| line.contains("cannot be used"));
        Ok(lines.next().map(str::to_owned))
    }

    fn doppel(&self, start: Start<'_>, engine: &str) -> Command {
        let mut command = Command::new(&self.doppel);
        command.args(["run", "--engine", engine, "--memory", start.memory]);
        command.arg("--stats").arg(self.stats());
        command.args(["--cpus", &start.cpus.to_string(), "--disk"]);
        command.arg(start.disk);
        command.args(["--append", start.append]);
        if let Some(second) = start.second {
            let mut spec = second.as_os_str().to_owned();
            spec.push(",format=raw");
            command.arg("--disk").arg(spec);
        }
        if let Some(port) = start.ssh {
            command.args(["--net", &format!("user,hostfwd=tcp::{port}-:22")]);
        }
        command
    }

    fn stats(&self) -> PathBuf {
        self.file(&format!("{}-stats.json", self.release))
    }

    /// MiB of a kind of memory, as the last machine that ended counted them.
    pub fn memory(&self, name: &str) -> Result<f64> {
        let stats = fs::read_to_string(self.stats())?;
        let stats: serde_json::Value = serde_json::from_str(&stats)?;
        let bytes = stats["memory"][name].as_u64();
        Ok(bytes.context("the machine's memory was not counted")? as f64 / f64::from(1 << 20))
    }

    /// QEMU does not find the kernel by itself.
    fn qemu(&self, start: Start<'_>) -> Result<Command> {
        let (kernel, initrd) = self.kernel()?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(
            "-accel tcg -cpu max -nodefaults -display none -serial stdio -no-reboot".split(' '),
        );
        command.args(["-m", start.memory, "-smp", &start.cpus.to_string()]);
        let append = format!("root=/dev/vda1 ro console=ttyS0 {}", start.append);
        command.args(["-append", &append, "-kernel"]).arg(kernel);
        command.arg("-initrd").arg(initrd);
        let drive = |format: &str, path: &Path| {
            format!("if=virtio,format={format},file={}", path.display())
        };
        command.args(["-drive", &drive("qcow2", start.disk)]);
        if let Some(second) = start.second {
            command.args(["-drive", &drive("raw", second)]);
        }
        let forward = start
            .ssh
            .map(|port| format!(",hostfwd=tcp:127.0.0.1:{port}-:22"));
        let network = format!("user,id=net{}", forward.unwrap_or_default());
        command.args(["-netdev", &network, "-device", "virtio-net-pci,netdev=net"]);
        Ok(command)
    }

    /// Kernel and initial RAM disk of the image, taken out once.
    fn kernel(&self) -> Result<(PathBuf, PathBuf)> {
        let file = |name: &str| self.file(&format!("{}-{name}", self.release));
        let (kernel, initrd) = (file("vmlinuz"), file("initrd"));
        if !initrd.exists() {
            let raw = self.raw(&self.image())?;
            let names = debugfs(&raw, "ls -p /boot")?;
            for (prefix, to) in [("vmlinuz-", &kernel), ("initrd.img-", &initrd)] {
                let name = names.split('/').find(|name| name.starts_with(prefix));
                let name = name.context("there is no kernel in the image")?;
                debugfs(&raw, &format!("dump /boot/{name} {}", to.display()))?;
            }
        }
        Ok((kernel, initrd))
    }

    fn raw(&self, image: &Path) -> Result<PathBuf> {
        let raw = self.file(&format!("{}-raw", self.release));
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).args([image, &raw]);
        succeed(&mut convert)?;
        Ok(raw)
    }

    /// What qemu-img and e2fsck say of an image after an orderly end.
    pub fn look(&self, image: &Path) -> Result<()> {
        succeed(Command::new("qemu-img").args(["check", "-q"]).arg(image))?;
        let mut raw = self.raw(image)?.into_os_string();
        raw.push(OFFSET);
        let fsck = Command::new("/sbin/e2fsck")
            .args(["-f", "-n"])
            .arg(raw)
            .output()?;
        let said = String::from_utf8_lossy(&fsck.stdout);
        ensure!(fsck.status.success(), "e2fsck: {said}");
        Ok(())
    }

    /// A raw disk with an ext4: in /packages all that the image lacks of `wanted` and what they depend on, fetched by the host's apt from the
    /// image's own sources, and what `more` adds. How many packages there are.
    pub fn packages(
        &self,
        wanted: &[&str],
        more: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<(PathBuf, usize)> {
        let name = format!("{}-{}", self.release, wanted.join("-"));
        let (disk, folder) = (self.file(&format!("{name}.raw")), self.file(&name));
        let (content, packages) = (folder.join("content"), folder.join("content/packages"));
        if !disk.exists() {
            self.fetch(wanted, &folder, &packages)?;
            fs::remove_dir(packages.join("partial"))?;
            more(&content)?;
            let mut make = Command::new("/sbin/mke2fs");
            make.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&content);
            succeed(make.arg(&disk).arg("1G"))?;
        }
        let count = fs::read_dir(&packages)?.count();
        ensure!(count > 0, "no package is missing in the image");
        Ok((disk, count))
    }

    fn fetch(&self, wanted: &[&str], folder: &Path, packages: &Path) -> Result<()> {
        let lists = folder.join("lists");
        for parent in [packages, &lists] {
            fs::create_dir_all(parent.join("partial"))?;
        }
        let (status, sources) = (folder.join("status"), folder.join("sources.list.d"));
        let _ = fs::remove_dir_all(&sources);
        let raw = self.raw(&self.image())?;
        for request in [
            format!("dump /var/lib/dpkg/status {}", status.display()),
            format!("rdump /etc/apt/sources.list.d {}", folder.display()),
        ] {
            debugfs(&raw, &request)?;
        }
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            let own = [
                ("Dir::State::status", status.as_path()),
                ("Dir::State::lists", lists.as_path()),
                ("Dir::Cache", folder),
                ("Dir::Cache::archives", packages),
                ("Dir::Etc::sourcelist", Path::new("/dev/null")),
                ("Dir::Etc::sourceparts", &sources),
            ];
            for (name, path) in own {
                apt.arg("-o").arg(format!("{name}={}", path.display()));
            }
            apt.args(
                "-q -o Debug::NoLocking=1 -o APT::Sandbox::User= -o APT::Install-Recommends=0"
                    .split(' '),
            );
            succeed(apt.args(arguments))
        };
        apt(&["update"])?;
        apt(&[&["-y", "--download-only", "install"], wanted].concat())
    }
}

/// Runs a command of the host; an error unless it succeeds.
pub fn succeed(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let status = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .status()
        .with_context(|| format!("{program:?}"))?;
    ensure!(status.success(), "{program:?}: {status}");
    Ok(())
}

fn debugfs(raw: &Path, request: &str) -> Result<String> {
    let mut image = raw.as_os_str().to_owned();
    image.push(OFFSET);
    let output = Command::new("/sbin/debugfs")
        .args(["-R", request])
        .arg(image)
        .output()?;
    if !output.status.success() {
        bail!("debugfs: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
