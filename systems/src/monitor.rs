//! The commands that boot a machine: Doppel's and QEMU's, with the same files, memory and number of CPUs.

use crate::parts::Machine;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;

pub const QEMU: &str = "qemu-system-x86_64";

/// Who boots.
pub enum Monitor {
    Doppel { program: PathBuf, engine: String },
    Qemu,
}

impl Monitor {
    pub fn name(&self) -> &'static str {
        match self {
            Monitor::Doppel { .. } => "doppel",
            Monitor::Qemu => "qemu",
        }
    }

    pub fn command(&self, machine: &Machine) -> Command {
        match self {
            Monitor::Doppel { program, engine } => doppel(machine, program.as_os_str(), engine),
            Monitor::Qemu => qemu(machine),
        }
    }
}

fn doppel(machine: &Machine, program: &OsStr, engine: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--debug-exit", "--no-reboot", "--engine", engine]);
    command.args(["--cpus", &machine.cpus.to_string()]);
    command.args(["--memory", &format!("{}M", machine.memory)]);
    // QEMU's machines have neither.
    command.args(["--net", "none", "--balloon", "off"]);
    command.arg("--kernel").arg(&machine.kernel);
    command.args(["--cmdline", &machine.cmdline]);
    if machine.takes_modules {
        for (file, words) in &machine.modules {
            let mut module = file.clone().into_os_string();
            module.push(" ");
            module.push(words);
            command.arg("--module").arg(module);
        }
    } else if let Some((initrd, _)) = machine.modules.first() {
        command.arg("--initrd").arg(initrd);
    }
    command
}

fn qemu(machine: &Machine) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args("-accel tcg -cpu max -nodefaults -display none -serial stdio -no-reboot".split(' '));
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.args(["-smp", &machine.cpus.to_string()]);
    command.args(["-m", &machine.memory.to_string()]);
    command.arg("-kernel").arg(&machine.kernel);
    command.args(["-append", &machine.cmdline]);
    let mut files = OsString::new();
    for (file, words) in &machine.modules {
        if !files.is_empty() {
            files.push(",");
        }
        files.push(file);
        if !words.is_empty() {
            // A comma would begin the next file.
            files.push(format!(" {}", words.replace(',', ",,")));
        }
    }
    if !files.is_empty() {
        command.arg("-initrd").arg(files);
    }
    command
}

/// What the installed QEMU calls itself.
pub fn qemu_version() -> Option<String> {
    let output = Command::new(QEMU).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_given_the_same() {
        let machine = Machine {
            kernel: "/xen".into(),
            modules: vec![
                ("/linux".into(), "console=hvc0,115200".into()),
                ("/initrd".into(), String::new()),
            ],
            takes_modules: true,
            cmdline: "console=com1".into(),
            memory: 768,
            cpus: 2,
        };
        let doppel = Monitor::Doppel {
            program: "doppel".into(),
            engine: "auto".into(),
        };
        let line = |monitor: &Monitor| format!("{:?}", monitor.command(&machine));
        let doppel = line(&doppel);
        assert!(
            doppel.contains(r#""--module" "/linux console=hvc0,115200" "--module" "/initrd ""#)
        );
        assert!(doppel.contains(r#""--memory" "768M""#) && doppel.contains(r#""--cpus" "2""#));
        let qemu = line(&Monitor::Qemu);
        assert!(
            qemu.contains(r#""-initrd" "/linux console=hvc0,,115200,/initrd""#),
            "{qemu}"
        );
        assert!(qemu.contains(r#""-m" "768""#) && qemu.contains(r#""-smp" "2""#));
    }
}
