//! The monitor is killed while the guest writes; what the guest had synced is there at the next boot.

use super::lab::{Lab, Start};
use super::{BOOT, QUIET, STEP};
use anyhow::{Context, Result, ensure};
use std::process::Command;
use std::time::Duration;

/// The monitor is killed while the guest writes and syncs records, beside fio; at the next boot all that it said was synced is there.
pub fn kills(lab: &Lab, rounds: usize, killed: &str) -> Result<()> {
    let disk = lab.disk("kills.qcow2")?;
    let mut written = 0;
    for round in 1..=rounds {
        let mut console = lab.start(Start::of(killed, &disk))?;
        console.until("# ", BOOT)?;
        console.shell(&format!("{QUIET}; cd /root"), STEP)?;
        if written > 0 {
            console
                .shell(&format!("sh -c '{VERIFY}' - {written}"), STEP)
                .with_context(|| format!("round {round}: of {written} records some are lost"))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

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
