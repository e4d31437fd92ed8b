//! Work that is the kernel's: system calls, page faults, processes, signals, files.

mod files;
mod memory;
mod process;
pub mod system_unsafe;

use crate::row::{Row, Work};

pub const ROWS: &[Row] = &[
    row("syscall", 200_000, Work::All(files::null)),
    row("pread", 100_000, Work::Own(files::pread)),
    row("pwrite", 100_000, Work::Own(files::pwrite)),
    row("select", 10_000, Work::Own(files::select)),
    row("create", 3000, Work::All(files::create)),
    row("fault", 16, Work::All(memory::fault)),
    row("mmap", 5000, Work::All(memory::map)),
    row("fork", 300, Work::All(process::fork_wait)),
    row("exec-static", 80, Work::All(process::exec_static)),
    row("exec-dynamic", 50, Work::All(process::exec_dynamic)),
    row("thread", 1500, Work::All(process::thread)),
    row("pipe", 10_000, Work::Own(process::pipe)),
    row("switch", 1000, Work::Own(process::switch)),
    row("signal", 50_000, Work::All(process::signal)),
];

const fn row(name: &'static str, count: u64, work: Work) -> Row {
    Row {
        group: "kernel",
        name,
        count,
        work,
        repeated: true,
    }
}
