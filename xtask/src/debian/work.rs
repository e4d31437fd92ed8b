//! What people do with a computer: install a compiler with all that it needs, then build with it.
//!
//! The packages lie on a second disk, so that no network is measured. The project is C of our own making, the same at
//! each run: files of functions that use the C library's headers, and one that calls them all and checks the sum.

use super::lab::{Lab, Start};
use super::ssh::{INSTALL, Ssh};
use super::{BOOT, STEP, least};
use anyhow::{Context, Result, ensure};
use doppel_footprint::family::time_of_all;
use std::fs;
use std::path::Path;
use std::time::Duration;

const PACKAGES: &[&str] = &["build-essential"];
/// Files of the project, and functions in each.
const FILES: usize = 16;
const FUNCTIONS: usize = 60;
/// TCG takes minutes for the packages.
const LONG: Duration = Duration::from_secs(1500);

/// Both, in turns.
pub fn work(lab: &Lab, rounds: usize, monitors: &[&str]) -> Result<()> {
    let (packages, count) = lab.packages(PACKAGES, project)?;
    let mut times: Vec<(Vec<Took>, Vec<Took>)> = vec![Default::default(); monitors.len()];
    for round in 1..=rounds {
        for (which, monitor) in monitors.iter().enumerate() {
            let disk = lab.disk("work.qcow2")?;
            let ssh = Ssh::new(lab)?;
            let start = Start {
                second: Some(&packages),
                ssh: Some(ssh.port),
                cpus: 2,
                memory: "1G",
                ..Start::of(monitor, &disk)
            };
            let mut console = lab.start(start)?;
            ssh.wait(BOOT)?;
            ssh.run(
                "systemctl is-system-running --wait; mount -o ro /dev/vdb /mnt",
                STEP,
            )?;
            let pid = console.pid();
            let apt = timed(&ssh, pid, &format!("{INSTALL} && sync"))?;
            ssh.run("cp -r /mnt/project .", STEP)?;
            let make = timed(&ssh, pid, "make -s -C project -j2")?;
            let said = ssh.run("project/all", STEP)?;
            ensure!(
                said.trim() == sum().to_string(),
                "the program said {said:?}"
            );
            ssh.run("umount /mnt; sync", STEP)?;
            console.send("poweroff")?;
            console.end(STEP)?;
            lab.look(&disk)?;
            println!(
                "round {round}, {monitor}: apt-get install of {count} packages {apt}, make -j2 {make}"
            );
            times[which].0.push(apt);
            times[which].1.push(make);
        }
    }
    if let [qemu, doppel] = &times[..] {
        for (what, tcg, ours) in [
            ("apt-get", &qemu.0, &doppel.0),
            ("make", &qemu.1, &doppel.1),
        ] {
            let (tcg, ours) = (Took::least(tcg), Took::least(ours));
            println!(
                "{what}, least of each: TCG {tcg}, Doppel {ours}, TCG : Doppel {:.2}, by processor time {:.2}",
                tcg.wall / ours.wall,
                tcg.processor / ours.processor
            );
        }
    }
    Ok(())
}

/// Seconds that something took.
#[derive(Clone, Copy)]
pub struct Took {
    /// By the guest's clock.
    pub wall: f64,
    /// Of the monitor's processor time, which is what counts on a host with other work.
    pub processor: f64,
}

impl Took {
    fn least(of: &[Took]) -> Took {
        let all = |what: fn(&Took) -> f64| least(&of.iter().map(what).collect::<Vec<_>>());
        Took {
            wall: all(|took| took.wall),
            processor: all(|took| took.processor),
        }
    }
}

impl std::fmt::Display for Took {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} s (processor {:.1} s)", self.wall, self.processor)
    }
}

/// What a command takes.
pub fn timed(ssh: &Ssh, pid: u32, command: &str) -> Result<Took> {
    let script = format!(
        "s=$(date +%s.%N); ({command}) > log 2>&1 || {{ tail log; exit 1; }}; e=$(date +%s.%N); echo $s $e"
    );
    let before = time_of_all(pid)?;
    let printed = ssh.run(&script, LONG)?;
    let processor = time_of_all(pid)?.saturating_sub(before).as_secs_f64();
    let mut numbers = printed.split_whitespace().map(str::parse::<f64>);
    let mut next = || {
        let number = numbers.next().and_then(Result::ok);
        number.with_context(|| printed.clone())
    };
    let start = next()?;
    Ok(Took {
        wall: next()? - start,
        processor,
    })
}

/// Writes the project's files to a folder.
fn project(folder: &Path) -> Result<()> {
    let folder = folder.join("project");
    fs::create_dir_all(&folder)?;
    let mut main = String::from("#include <stdio.h>\n");
    let mut calls = String::new();
    for n in 1..=FILES {
        fs::write(folder.join(format!("part{n}.c")), part(n))?;
        main += &format!("long part{n}(long);\n");
        calls += &format!("\tx = part{n}(x);\n");
    }
    main += &format!("int main(void)\n{{\n\tlong x = 1;\n{calls}\tprintf(\"%ld\\n\", x);\n}}\n");
    fs::write(folder.join("main.c"), main)?;
    Ok(fs::write(folder.join("Makefile"), MAKEFILE)?)
}

const MAKEFILE: &str =
    "CFLAGS = -O2 -Wall\nall: $(patsubst %.c,%.o,$(wildcard *.c))\n\t$(CC) -o $@ $^ -lm\n";
const HEADERS: &str = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <math.h>\n#include <time.h>\n#include <unistd.h>\n";

fn part(n: usize) -> String {
    let mut text = HEADERS.to_owned();
    let mut calls = String::new();
    for k in 0..FUNCTIONS {
        text += &FUNCTION
            .replace("NAME", &format!("f{k}"))
            .replace("ADDED", &(k * 5 + n).to_string())
            .replace("FACTOR", &(k + 3).to_string());
        calls += &format!("\tx = f{k}(x);\n");
    }
    text + &format!("long part{n}(long x)\n{{\n{calls}\treturn x;\n}}\n")
}

const FUNCTION: &str = r#"static long NAME(long x)
{
	char text[64];
	snprintf(text, sizeof text, "%ld", x + ADDED);
	double root = sqrt((double)(strlen(text) * strlen(text)));
	for (long i = 0; i < 9; i++) {
		switch ((x + i) % 4) {
		case 0: x *= 31; break;
		case 1: x ^= i * FACTOR; break;
		case 2: x += (long)root - (long)strlen(text); break;
		default: x = x * 7 + ADDED;
		}
		x %= 65521;
	}
	return x;
}
"#;

/// What the program has to say.
fn sum() -> i64 {
    let mut x = 1;
    for n in 1..=FILES as i64 {
        for k in 0..FUNCTIONS as i64 {
            for i in 0..9 {
                match (x + i) % 4 {
                    0 => x *= 31,
                    1 => x ^= i * (k + 3),
                    2 => {}
                    _ => x = x * 7 + k * 5 + n,
                }
                x %= 65521;
            }
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The project is built here as it is in a guest.
    #[test]
    fn the_project_builds_and_says_what_is_expected() {
        let has = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
        if !["gcc", "make"].into_iter().all(has) {
            eprintln!("SKIPPED: gcc or make is not installed");
            return;
        }
        let folder = std::env::temp_dir().join(format!("doppel-project-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        project(&folder).unwrap();
        let all = "cd project && make -s -j2 && ./all";
        let output = Command::new("sh")
            .args(["-c", all])
            .current_dir(&folder)
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            sum().to_string(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        std::fs::remove_dir_all(folder).unwrap();
    }
}
