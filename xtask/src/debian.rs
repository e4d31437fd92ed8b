//! `cargo xtask debian`: a Debian is built, booted from its disk, used, killed, upgraded and looked at from outside.

use crate::console::Console;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

#[derive(Args)]
pub struct Debian {
    /// Which release.
    #[arg(long, default_value = "bookworm")]
    release: String,
    /// Boots to the login prompt, in turn with QEMU's if that is wanted.
    #[arg(long, default_value_t = 3)]
    boots: usize,
    /// Compare with qemu-system-x86_64 -accel tcg -cpu max.
    #[arg(long)]
    qemu: bool,
    /// Rounds of SIGKILL while the guest writes and syncs.
    #[arg(long, default_value_t = 5)]
    kills: usize,
    /// What is killed: doppel or qemu.
    #[arg(long, default_value = "doppel")]
    killed: String,
}

/// A boot is slower than this only where something is wrong.
const BOOT: Duration = Duration::from_secs(180);
const STEP: Duration = Duration::from_secs(120);
/// Makes the shell at the console one that only answers.
const QUIET: &str = "stty -echo; PS1=; bind \"set enable-bracketed-paste off\"";
/// The root file system in the image.
const OFFSET: &str = "?offset=1048576";

/// Does so.
pub fn debian(root: &Path, args: &Debian) -> Result<()> {
    let lab = Lab::new(root, &args.release)?;
    lab.build(args)?;
    lab.boots(args)?;
    if args.killed == "doppel" {
        lab.upgrade()?;
    }
    lab.kills(args)
}

/// Files of the trial.
struct Lab {
    doppel: PathBuf,
    folder: PathBuf,
    release: String,
}

impl Lab {
    fn new(root: &Path, release: &str) -> Result<Lab> {
        let folder = root.join("target/debian");
        fs::create_dir_all(&folder)?;
        Ok(Lab {
            doppel: root.join("target/release/doppel"),
            folder,
            release: release.to_owned(),
        })
    }

    fn image(&self) -> PathBuf {
        self.folder.join(format!("{}.qcow2", self.release))
    }

    /// Builds the image, unless it is there.
    fn build(&self, args: &Debian) -> Result<()> {
        if !self.image().exists() {
            let mut command = Command::new(&self.doppel);
            command.args([
                "image",
                "build",
                &format!("debian:{}", args.release),
                "--packages",
                "fio",
            ]);
            ensure!(
                command.arg(self.image()).status()?.success(),
                "the image could not be built"
            );
        }
        Ok(())
    }

    /// A disk of its own for a trial.
    fn disk(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        fs::copy(self.image(), &path)?;
        Ok(path)
    }

    fn start(&self, monitor: &str, disk: &Path) -> Result<Console> {
        let mut command = Command::new(&self.doppel);
        command
            .args(["run", "--memory", "512M", "--disk"])
            .arg(disk);
        match monitor {
            "doppel" => Console::start(command),
            _ => Console::start(self.qemu(disk)?),
        }
    }

    /// QEMU does not find the kernel by itself.
    fn qemu(&self, disk: &Path) -> Result<Command> {
        let (kernel, initrd) = self.kernel()?;
        let mut command = Command::new("qemu-system-x86_64");
        command.args(
            "-accel tcg -cpu max -m 512 -nodefaults -display none -serial stdio -no-reboot"
                .split(' '),
        );
        command
            .args(["-append", "root=/dev/vda1 ro console=ttyS0", "-kernel"])
            .arg(kernel);
        command.arg("-initrd").arg(initrd).arg("-drive");
        command.arg(format!("if=virtio,format=qcow2,file={}", disk.display()));
        Ok(command)
    }

    /// Kernel and initial RAM disk of the image, taken out once.
    fn kernel(&self) -> Result<(PathBuf, PathBuf)> {
        let file = |name: &str| self.folder.join(format!("{}-{name}", self.release));
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
        let raw = self.folder.join("raw");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "raw"]).args([image, &raw]);
        ensure!(convert.status()?.success(), "qemu-img convert failed");
        Ok(raw)
    }

    /// What qemu-img and e2fsck say of an image after an orderly end.
    fn look(&self, image: &Path) -> Result<()> {
        let check = Command::new("qemu-img")
            .args(["check", "-q"])
            .arg(image)
            .status()?;
        ensure!(check.success(), "qemu-img check: {check}");
        let mut raw = self.raw(image)?.into_os_string();
        raw.push(OFFSET);
        let fsck = Command::new("/sbin/e2fsck")
            .args(["-f", "-n"])
            .arg(raw)
            .output()?;
        ensure!(
            fsck.status.success(),
            "e2fsck: {}",
            String::from_utf8_lossy(&fsck.stdout)
        );
        Ok(())
    }

    /// Boots in turn; seconds to the login prompt.
    fn boots(&self, args: &Debian) -> Result<()> {
        let monitors: &[&str] = if args.qemu {
            &["qemu", "doppel"]
        } else {
            &["doppel"]
        };
        let mut best = vec![f64::INFINITY; monitors.len()];
        for number in 1..=args.boots {
            for (which, monitor) in monitors.iter().enumerate() {
                let disk = self.disk("boot.qcow2")?;
                let mut console = self.start(monitor, &disk)?;
                console.until("login:", BOOT)?;
                let took = console.age().as_secs_f64();
                best[which] = best[which].min(took);
                console.until("# ", BOOT)?;
                self.use_it(&mut console)?;
                self.look(&disk)?;
                println!(
                    "boot {number}, {monitor}: {took:.2} s to the login prompt; its disk is clean"
                );
            }
        }
        if let [qemu, doppel] = best[..] {
            println!(
                "least of each: QEMU {qemu:.2} s, Doppel {doppel:.2} s, TCG : Doppel {:.2}",
                qemu / doppel
            );
        }
        Ok(())
    }

    /// Looks around in a fresh guest and ends it.
    fn use_it(&self, console: &mut Console) -> Result<()> {
        console.shell(QUIET, STEP)?;
        console.shell("systemctl is-system-running --wait", STEP)?;
        let failed = "systemctl --failed --no-legend --plain | cat";
        console.shell(&format!("{failed}; test -z \"$({failed})\""), STEP)?;
        console.shell(
            "dd if=/dev/urandom of=/root/data bs=1M count=8 status=none; sync",
            STEP,
        )?;
        console.send("poweroff")?;
        let status = console.end(STEP)?;
        ensure!(status.success(), "the monitor ended with {status}");
        Ok(())
    }

    /// A kernel of a higher version appears in /boot; after a reboot it is the one that runs.
    fn upgrade(&self) -> Result<()> {
        let disk = self.disk("upgrade.qcow2")?;
        let mut console = self.start("doppel", &disk)?;
        console.until("# ", BOOT)?;
        let upgrade = "cd /boot; for f in vmlinuz initrd.img; do cp $f-$(uname -r) $f-99.0.0-new; done; \
                       echo 'quiet upgraded=yes' > /etc/kernel/cmdline; sync";
        console.shell(QUIET, STEP)?;
        console.shell(&format!("mkdir -p /etc/kernel; {upgrade}"), STEP)?;
        console.send("reboot")?;
        console.until("automatic login", BOOT)?;
        console.until("# ", BOOT)?;
        console.shell(QUIET, STEP)?;
        console.shell("grep upgraded=yes /proc/cmdline", STEP)?;
        console.send("poweroff")?;
        console.end(STEP)?;
        self.look(&disk)?;
        println!("an upgrade of the kernel took effect at the reboot");
        Ok(())
    }

    /// The monitor is killed while the guest writes and syncs records, beside fio; at the next boot all that it said was synced is there.
    fn kills(&self, args: &Debian) -> Result<()> {
        let disk = self.disk("kills.qcow2")?;
        let mut written = 0;
        for round in 1..=args.kills {
            let mut console = self.start(&args.killed, &disk)?;
            console.until("# ", BOOT)?;
            console.shell(&format!("{QUIET}; cd /root"), STEP)?;
            if written > 0 {
                console
                    .shell(&format!("sh -c '{VERIFY}' - {written}"), STEP)
                    .with_context(|| {
                        format!("round {round}: of {written} records some are lost")
                    })?;
            }
            console.send(&format!("{FIO}; sh -c '{WRITE}' - {round}"))?;
            console.until("synced ", STEP)?;
            std::thread::sleep(Duration::from_millis(1500 + (round as u64 * 677) % 3000));
            console.kill()?;
            written = last(&console.rest()).context("nothing was synced")?;
            let check = Command::new("qemu-img")
                .args(["check", "-q"])
                .arg(&disk)
                .status()?;
            ensure!(
                matches!(check.code(), Some(0 | 3)),
                "round {round}: qemu-img check: {check}"
            );
            println!(
                "kill {round}: {written} records synced, all before them found, the image is sound"
            );
        }
        Ok(())
    }
}

/// Writes records of 4 KiB that tell round and number, each synced, and says so.
const WRITE: &str = "rm -f f; i=0; while :; do i=$((i+1)); yes \"$1 $i\" | head -c 4096 > r; \
     dd if=r of=f bs=4k seek=$i conv=notrunc,fsync status=none; echo $1 > round; echo \"synced $i\"; done";
const VERIFY: &str = "n=$1; r=$(cat round); i=0; while [ $i -lt $n ]; do i=$((i+1)); \
     dd if=f bs=4k skip=$i count=1 status=none > g; yes \"$r $i\" | head -c 4096 | cmp - g || exit 1; done";
const FIO: &str = "(fio --name=load --filename=/root/load --size=64M --rw=randwrite --bs=4k --fsync=8 --ioengine=psync \
     --time_based --runtime=60 --output=/dev/null &)";

/// The number in the last whole line "synced N".
fn last(shown: &str) -> Option<u64> {
    let whole = &shown[..shown.rfind('\n')?];
    let mut lines = whole.lines().rev();
    lines.find_map(|line| {
        line.trim()
            .rsplit_once("synced ")
            .map_or(line.trim(), |(_, n)| n)
            .parse()
            .ok()
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_count() {
        assert_eq!(last("7\nsynced 8\r\nsynced 91"), Some(8));
        assert_eq!(last("12\r\nsync"), Some(12));
        assert_eq!(last(""), None);
    }

    /// The scripts that the guest runs, run here.
    #[test]
    fn records_are_found_again_and_missing_ones_missed() {
        let folder = std::env::temp_dir().join(format!("doppel-records-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let write = WRITE.replace("while :", "while [ $i -lt 20 ]");
        let run = |script: &str, argument: &str| {
            let mut command = Command::new("sh");
            let command = command
                .args(["-c", script, "-", argument])
                .current_dir(&folder);
            command.output().unwrap().status.success()
        };
        assert!(run(&write, "3"));
        assert!(run(VERIFY, "20"));
        assert!(!run(VERIFY, "21"), "a record too many");
        fs::write(folder.join("round"), "4").unwrap();
        assert!(!run(VERIFY, "20"), "records of another round");
        fs::remove_dir_all(folder).unwrap();
    }
}
