//! A Debian system as a tree: mmdebstrap fetches, verifies, unpacks and configures the packages, and what a machine needs beside them is
//! added here.

use super::args::Build;
use super::tree::{Kind, Node, Tree};
use super::work::Work;
use super::{epoch, sources};
use crate::unblocked_unsafe::unblocked;
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What every image has.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "systemd-sysv",
    "systemd-resolved",
    "libpam-systemd",
    "udev",
    "dbus",
    "zstd",
    "ca-certificates",
    "iproute2",
    "iputils-ping",
    "less",
    "nano",
    "netbase",
    "procps",
];

const MISSING: &str = "mmdebstrap is not installed; on Debian: apt-get install mmdebstrap uidmap";
const HINT: &str = "to become root within the image, an ordinary user needs user namespaces and lines in /etc/subuid and /etc/subgid \
     (apt-get install uidmap), or fakechroot (apt-get install fakechroot fakeroot)";

/// Lines of mmdebstrap's that an error shows.
const LAST_WORDS: usize = 12;

/// Assembles the system for `release` in `tree`; `progress` is told what happens.
pub fn assemble(
    args: &Build,
    release: &str,
    tree: &mut Tree,
    work: &Work,
    progress: &(dyn Fn(&str) + Sync),
) -> Result<()> {
    let sources = sources::choose(args.sources.as_deref(), release)?;
    let mut child = start(args, release, work)?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    // Where it ends before it has read them, it says why.
    let _ = stdin.write_all(sources.as_bytes());
    drop(stdin);
    let stdout = child.stdout.take().context("no stdout")?;
    let stderr = child.stderr.take().context("no stderr")?;
    let (mut read, mut said) = (Ok(()), VecDeque::new());
    let status = work.wait_for(&mut child, || {
        std::thread::scope(|scope| {
            let listener = scope.spawn(|| listen(stderr, progress));
            read = tree.read(BufReader::with_capacity(1 << 20, stdout));
            said = listener.join().unwrap_or_default();
        });
    })?;
    if !status.success() {
        let said = Vec::from(said).join("\n  ");
        bail!("mmdebstrap failed ({status}):\n  {said}\n({HINT})");
    }
    read.context("reading what mmdebstrap made")
}

fn start(args: &Build, release: &str, work: &Work) -> Result<Child> {
    let mut packages: Vec<&str> = PACKAGES.to_vec();
    packages.extend(args.ssh_key.iter().map(|_| "openssh-server"));
    packages.extend(args.packages.iter().map(String::as_str));
    let options = work.path().join("apt.conf");
    fs::write(&options, host_options())?;
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=minbase", "--format=tar", "--architectures=amd64"])
        .arg(format!("--mode={}", args.mode))
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--aptopt={}", options.display()))
        .env("SOURCE_DATE_EPOCH", epoch(release)?.to_string())
        .env("LC_ALL", "C");
    if let Some(file) = &args.password_file {
        password(&mut command, file, work.path())?;
    }
    command
        .args([release, "-", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    unblocked(work.prepare(&mut command))
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => anyhow::anyhow!(MISSING),
            _ => anyhow::Error::from(error).context("mmdebstrap"),
        })
}

/// Has root's password set within the image, so that its own tools make the hash.
fn password(command: &mut Command, file: &Path, work: &Path) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let password = text.lines().next().unwrap_or_default();
    if password.is_empty() {
        bail!("{}: its first line is empty", file.display());
    }
    let path = work.join("password");
    let mut options = fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut to = options.write(true).create_new(true).open(&path)?;
    writeln!(to, "root:{password}")?;
    command.arg(format!(
        "--customize-hook=upload \"{}\" /root/password",
        path.display()
    ));
    command.arg(
        "--customize-hook=chroot \"$1\" sh -c 'chpasswd < /root/password && rm /root/password'",
    );
    Ok(())
}

/// How the host's apt fetches: proxies, certificates, dates. They do not stay in the image.
fn host_options() -> String {
    let output = Command::new("apt-config")
        .args(["dump", "Acquire"])
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let text = text.unwrap_or_default();
    let names = ["Acquire::http", "Acquire::https", "Acquire::Check-"];
    let lines = text.lines().filter(|line| {
        let wanted = names.iter().any(|name| line.starts_with(name));
        wanted && !line.contains(" \"\";")
    });
    let mut options: Vec<&str> = lines.collect();
    options.push("Acquire::Languages \"none\";");
    options.push("Acquire::Retries \"3\";");
    options.join("\n") + "\n"
}

/// Tells what mmdebstrap says of its progress, and keeps its last words for an error.
fn listen(from: impl std::io::Read, progress: &dyn Fn(&str)) -> VecDeque<String> {
    let mut last = VecDeque::new();
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        match line.strip_prefix("I: ") {
            Some(what) => progress(what),
            None => last.push_back(line),
        }
        if last.len() > LAST_WORDS {
            last.pop_front();
        }
    }
    last
}

/// Folders that are mounted over, or hold what belongs to a run alone.
const EMPTIED: &[&str] = &[
    "dev/",
    "proc/",
    "sys/",
    "run/",
    "tmp/",
    "var/tmp/",
    "var/lib/apt/lists/",
];

/// What would tell one build from another, or one machine made from the image from the next.
const REMOVED: &[&str] = &[
    "etc/apt/apt.conf.d/99mmdebstrap",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dbus/machine-id",
    "var/lib/systemd/random-seed",
    "var/cache/apt/pkgcache.bin",
    "var/cache/apt/srcpkgcache.bin",
];

/// Takes out what is of no use in an image.
pub fn clean(tree: &mut Tree) {
    let emptied = |path: &str| EMPTIED.iter().any(|folder| path.starts_with(folder));
    let backup = |path: &str| {
        let old = path.ends_with("-old") || path.ends_with('-');
        old && ["etc/", "var/lib/dpkg/", "var/cache/debconf/"]
            .iter()
            .any(|f| path.starts_with(f))
    };
    let log = |path: &str, node: &Node| {
        path.starts_with("var/log/") && matches!(node.kind, Kind::File(_))
    };
    let host_key = |path: &str| path.starts_with("etc/ssh/ssh_host_");
    tree.remove(|path, node| {
        emptied(path)
            || backup(path)
            || log(path, node)
            || host_key(path)
            || REMOVED.contains(&path)
    });
}

const NETWORK: &str =
    "# Every Ethernet card gets its address by DHCP.\n[Match]\nType=ether\n\n[Network]\nDHCP=yes\n";

/// Root is let in at the serial console, which is the owner's, and has no password for anything else.
const AUTOLOGIN: &str = "[Service]\nExecStart=\n\
    ExecStart=-/sbin/agetty -o '-p -f -- \\\\u' --keep-baud 115200,57600,38400,9600 --noclear --autologin root - $TERM\n";

/// Each machine made from the image makes its own keys: no RSA key, for which nobody has asked since OpenSSH 6.5 (2014), and which takes a hundred times as
/// long as the others, at the first boot, before anybody can log in.
const HOST_KEYS: &str = "[Unit]\nDescription=OpenSSH host keys\nBefore=ssh.service\n\
    ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key\n\n[Service]\nType=oneshot\n\
    ExecStartPre=/bin/rm -f /etc/ssh/ssh_host_ecdsa_key\n\
    ExecStart=/usr/bin/ssh-keygen -q -N \"\" -t ecdsa -f /etc/ssh/ssh_host_ecdsa_key\n\
    ExecStart=/usr/bin/ssh-keygen -q -N \"\" -t ed25519 -f /etc/ssh/ssh_host_ed25519_key\n";

/// Units that are wanted: where, and the unit.
const UNITS: &[(&str, &str)] = &[
    ("multi-user.target.wants", "systemd-networkd.service"),
    ("sockets.target.wants", "systemd-networkd.socket"),
    (
        "network-online.target.wants",
        "systemd-networkd-wait-online.service",
    ),
    ("sysinit.target.wants", "systemd-resolved.service"),
];
const ALIASES: &[(&str, &str)] = &[
    (
        "dbus-org.freedesktop.network1.service",
        "systemd-networkd.service",
    ),
    (
        "dbus-org.freedesktop.resolve1.service",
        "systemd-resolved.service",
    ),
];

/// Adds what makes a machine of the packages: name, network, console, keys, and the root file system by its `uuid`.
pub fn furnish(tree: &mut Tree, args: &Build, uuid: &str) -> Result<()> {
    let name = &args.hostname;
    tree.file("etc/hostname", 0o644, format!("{name}\n").as_bytes())?;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
    );
    tree.file("etc/hosts", 0o644, hosts.as_bytes())?;
    let fstab = format!("UUID={uuid} / ext4 errors=remount-ro 0 1\n");
    tree.file("etc/fstab", 0o644, fstab.as_bytes())?;
    // Empty: the first boot makes one.
    tree.file("etc/machine-id", 0o444, b"")?;
    tree.file(
        "etc/systemd/network/20-ethernet.network",
        0o644,
        NETWORK.as_bytes(),
    )?;
    tree.symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf");
    let system = "etc/systemd/system";
    for (folder, unit) in UNITS {
        tree.symlink(
            &format!("{system}/{folder}/{unit}"),
            &format!("/lib/systemd/system/{unit}"),
        );
    }
    for (alias, unit) in ALIASES {
        tree.symlink(
            &format!("{system}/{alias}"),
            &format!("/lib/systemd/system/{unit}"),
        );
    }
    let getty = "serial-getty@ttyS0.service";
    let wanted = format!("{system}/getty.target.wants/{getty}");
    tree.symlink(&wanted, "/lib/systemd/system/serial-getty@.service");
    if args.password_file.is_none() {
        tree.file(
            &format!("{system}/{getty}.d/autologin.conf"),
            0o644,
            AUTOLOGIN.as_bytes(),
        )?;
    }
    if let Some(key) = &args.ssh_key {
        ssh(tree, key)?;
    }
    Ok(())
}

fn ssh(tree: &mut Tree, key: &Path) -> Result<()> {
    let key = fs::read_to_string(key).with_context(|| key.display().to_string())?;
    if key.contains("PRIVATE KEY") {
        bail!("--ssh-key: this is a private key; name the public one (.pub)");
    }
    tree.directory("root/.ssh");
    tree.set_mode("root/.ssh", 0o700);
    tree.file("root/.ssh/authorized_keys", 0o600, key.as_bytes())?;
    let unit = "ssh-host-keys.service";
    let path = format!("etc/systemd/system/{unit}");
    tree.file(&path, 0o644, HOST_KEYS.as_bytes())?;
    tree.symlink(
        &format!("etc/systemd/system/ssh.service.requires/{unit}"),
        &format!("/{path}"),
    );
    Ok(())
}
