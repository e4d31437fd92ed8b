//! Boots of a fresh disk to the login prompt, and one after a kernel upgrade.

use super::lab::{Lab, Start};
use super::{BOOT, QUIET, STEP};
use crate::console::Console;
use anyhow::{Result, ensure};

/// Boots in turn; seconds to the login prompt.
pub fn boots(lab: &Lab, rounds: usize, qemu: bool) -> Result<()> {
    let monitors: &[&str] = if qemu {
        &["qemu", "doppel"]
    } else {
        &["doppel"]
    };
    let mut best = vec![f64::INFINITY; monitors.len()];
    for number in 1..=rounds {
        for (which, monitor) in monitors.iter().enumerate() {
            let disk = lab.disk("boot.qcow2")?;
            let mut console = lab.start(Start::of(monitor, &disk))?;
            console.until("login:", BOOT)?;
            let took = console.age().as_secs_f64();
            best[which] = best[which].min(took);
            console.until("# ", BOOT)?;
            use_it(&mut console)?;
            lab.look(&disk)?;
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
fn use_it(console: &mut Console) -> Result<()> {
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
pub fn upgrade(lab: &Lab) -> Result<()> {
    let disk = lab.disk("upgrade.qcow2")?;
    let mut console = lab.start(Start::of("doppel", &disk))?;
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
    lab.look(&disk)?;
    println!("an upgrade of the kernel took effect at the reboot");
    Ok(())
}
