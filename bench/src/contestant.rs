//! Who does the work: the host itself, QEMU, or a Doppel.

use crate::guest::Guest;
use crate::session::CpuTime;
use anyhow::Result;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const QEMU: &str = "qemu-system-x86_64";
/// Mebibytes of memory of every guest: what `doppel run` gives one by default, and enough for Linux to use huge pages.
pub const MEMORY: u64 = 1024;

/// One column of the table.
#[derive(Clone, Debug)]
pub struct Contestant {
    pub name: String,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub enum Kind {
    Native,
    Qemu,
    Doppel {
        program: PathBuf,
        flags: Vec<String>,
    },
}

/// What is asked of the program in the guest.
pub struct Order<'a> {
    /// Rows and groups by name.
    pub rows: &'a [String],
    pub passes: usize,
}

impl Contestant {
    pub fn is_doppel(&self) -> bool {
        matches!(self.kind, Kind::Doppel { .. })
    }

    pub fn boots(&self) -> bool {
        !matches!(self.kind, Kind::Native)
    }

    pub fn cpu_time(&self) -> CpuTime {
        match self.kind {
            Kind::Native => CpuTime::AsTold,
            _ => CpuTime::OfProcess,
        }
    }

    /// The command that does the order; `root` is where the guest's files are unpacked.
    pub fn command(&self, guest: &Guest, root: &Path, order: &Order) -> Result<Command> {
        match &self.kind {
            Kind::Native => native(root, order),
            _ => Ok(self.boot(&guest.kernel, &guest.initrd, &cmdline(order))),
        }
    }

    /// The command that boots only.
    pub fn boot(&self, kernel: &Path, initrd: &Path, cmdline: &str) -> Command {
        let mut command = match &self.kind {
            Kind::Doppel { program, flags } => doppel(program, flags),
            _ => qemu(),
        };
        let (kernel_flag, initrd_flag, cmdline_flag) = match self.is_doppel() {
            true => ("--kernel", "--initrd", "--cmdline"),
            false => ("-kernel", "-initrd", "-append"),
        };
        command.arg(kernel_flag).arg(kernel);
        command.arg(initrd_flag).arg(initrd);
        command.arg(cmdline_flag).arg(cmdline);
        command
    }
}

/// Whether a build of Doppel gives its guests a network card where nobody says otherwise. QEMU's guests here have none.
pub fn knows_networks(program: &Path) -> Result<bool> {
    let help = Command::new(program).args(["run", "--help"]).output()?;
    Ok(String::from_utf8_lossy(&help.stdout).contains("--net "))
}

/// The kernel's command line; it hands words that it does not know to init, as environment.
pub fn cmdline(order: &Order) -> String {
    let rows = order.rows.join(",");
    format!(
        "console=ttyS0 bench_rows={rows} bench_passes={}",
        order.passes
    )
}

fn doppel(program: &Path, flags: &[String]) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--debug-exit", "--no-reboot", "--memory"]);
    command.arg(format!("{MEMORY}M")).args(flags);
    command
}

fn qemu() -> Command {
    let mut command = Command::new(QEMU);
    command.args(
        "-accel tcg -cpu max -smp 1 -nodefaults -display none -serial stdio -no-reboot".split(' '),
    );
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
    command.args(["-m", &MEMORY.to_string()]);
    command
}

/// The program with the guest's files as its root: root may chroot, others make themselves root of a user namespace.
fn native(root: &Path, order: &Order) -> Result<Command> {
    let is_root = fs::metadata("/proc/self")?.uid() == 0;
    let mut command = Command::new(if is_root { "chroot" } else { "unshare" });
    if !is_root {
        command.args(["--map-root-user", "--root"]);
    }
    command.arg(root).args(["/bench/guest", "--passes"]);
    command.arg(order.passes.to_string()).args(order.rows);
    Ok(command)
}
