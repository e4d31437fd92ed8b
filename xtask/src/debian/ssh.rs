//! A guest that is reached as people reach their machines: by ssh, through a port of the host.

use super::lab::{Lab, Start};
use super::{BOOT, STEP};
use anyhow::{Context, Result, bail, ensure};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// `interpret` takes twenty times as long for everything.
const INTERPRETED: u32 = 20;
/// What systemd gives up after a while, by the clock, is not over where everything takes longer.
const PATIENT: &str = "systemd.default_timeout_start_sec=1h systemd.default_device_timeout_sec=1h systemd.service_watchdogs=no \
     udev.event_timeout=3600";
/// The same for sshd, which lets nobody in who takes longer than two minutes to log in.
const PATIENT_LOGIN: &str =
    "echo LoginGraceTime 0 > /etc/ssh/sshd_config.d/patient.conf && systemctl reload ssh";
/// A small package without dependencies, and a test that it is there and does its work.
const PACKAGE: &[&str] = &["bc"];
const USE: &str = "test \"$(echo '2^200 % 1000007' | bc)\" = 446616";

/// A way into a guest.
pub struct Ssh {
    key: PathBuf,
    /// The host's port.
    pub port: u16,
}

impl Ssh {
    /// Through a port that is free now.
    pub fn new(lab: &Lab) -> Result<Ssh> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        Ok(Ssh {
            key: lab.key(),
            port: listener.local_addr()?.port(),
        })
    }

    /// Runs a command in the guest; what it printed.
    pub fn run(&self, command: &str, limit: Duration) -> Result<String> {
        let output = self.attempt(command, limit)?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(printed),
            false => bail!(
                "{command:?} by ssh: {}\n{printed}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }

    /// Waits until the guest lets us in.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            match self.run("true", limit) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(300)),
            }
        }
    }

    fn attempt(&self, command: &str, limit: Duration) -> Result<Output> {
        let mut ssh = Command::new("timeout");
        ssh.arg(limit.as_secs().to_string()).arg("ssh");
        ssh.args("-F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR".split(' '));
        ssh.args(["-o", &format!("ConnectTimeout={}", limit.as_secs()), "-i"])
            .arg(&self.key);
        ssh.args(["-p", &self.port.to_string(), "root@127.0.0.1", command]);
        let output = ssh.stdin(Stdio::null()).output();
        output.context("ssh; on Debian: apt-get install openssh-client")
    }
}

/// The whole way on each engine.
pub fn engines(lab: &Lab, engines: &[String]) -> Result<()> {
    let (packages, count) = lab.packages(PACKAGE, |_| Ok(()))?;
    for engine in engines {
        if let Some(reason) = lab.refusal(engine)? {
            println!("SKIPPED: {reason}");
            continue;
        }
        let (patience, append) = match engine.as_str() {
            "interpret" => (INTERPRETED, PATIENT),
            _ => (1, ""),
        };
        let disk = lab.disk("ssh.qcow2")?;
        let ssh = Ssh::new(lab)?;
        let monitor = format!("doppel/{engine}");
        let mut console = lab.start(Start {
            second: Some(&packages),
            ssh: Some(ssh.port),
            append,
            ..Start::of(&monitor, &disk)
        })?;
        ssh.wait(BOOT * patience).with_context(|| console.said())?;
        let reached = console.age().as_secs_f64();
        if patience > 1 {
            ssh.run(PATIENT_LOGIN, STEP * patience)?;
            // It does not listen for a moment.
            ssh.wait(BOOT * patience)?;
        }
        for step in [
            "mount -o ro /dev/vdb /mnt".to_owned(),
            INSTALL.to_owned(),
            USE.to_owned(),
            "dd if=/dev/urandom of=/root/data bs=1M count=8 status=none && sha256sum /root/data > /root/sum && sync".to_owned(),
            "umount /mnt && sha256sum --quiet -c /root/sum".to_owned(),
        ] {
            ssh.run(&step, STEP * patience)?;
        }
        // The connection ends with the guest, in one way or another.
        ssh.attempt("systemctl poweroff", STEP)?;
        let status = console.end(STEP * patience)?;
        ensure!(status.success(), "the monitor ended with {status}");
        lab.look(&disk)?;
        let all = console.age().as_secs_f64();
        println!(
            "{engine}: reached by ssh after {reached:.1} s, {count} packages installed, off after {all:.1} s; its disk is clean"
        );
    }
    Ok(())
}

/// Installs all packages of the second disk.
pub const INSTALL: &str = "DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install /mnt/packages/*.deb";
