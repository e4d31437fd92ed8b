//! The sandbox of `doppel run`: what the monitor gives up before the guest's first instruction.
//!
//! A guest that found a hole in the monitor would have the rights of the user who runs it: all the user's files, programs and processes.
//! So the monitor keeps only what its command line names. It opens disks, then binds itself by Landlock (Linux, landlock(7)), which a
//! thread can neither lift nor widen; threads and processes started later inherit it, so it comes before the first of them.
//! Files that are open already stay usable. It costs nothing per instruction: only opening a file, starting a program and sending a signal
//! to another process are checked.

mod calls;
mod enter;
mod filter;
mod landlock;
mod plan;

pub use calls::{Need, Place, needs};
pub use enter::{begin, enter, enter_disk_process, enter_network_process, print};
pub use filter::{filters, permitted};
pub use landlock::{Enforced, confine, keep_apart};
pub use plan::{Grant, Plan, Right};

use rustix::process::{Resource, Rlimit, setrlimit};

/// Neither set-user-ID programs nor core files, which would hold the guest's memory. For this thread and those it starts.
pub fn give_up_privileges() {
    // Neither is refused by a kernel that Rust's standard library runs on; no later measure relies on them.
    let _ = rustix::thread::set_no_new_privs(true);
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
}

/// What is in force after [`confine`], for a reader.
#[must_use]
pub fn describe(plan: &Plan, enforced: Enforced) -> String {
    let mut text =
        format!("every thread and process: no new privileges, no core file; {enforced}\n");
    if enforced == Enforced::None {
        return text;
    }
    for grant in plan.grants() {
        text += &format!(
            "  {:<11} {}: {}\n",
            grant.right.name(),
            grant.path.display(),
            grant.reason
        );
    }
    let network = match plan.tcp() {
        true => "TCP: as the user network needs it",
        false => "TCP: none (Linux 6.7 or later)",
    };
    text + "  "
        + network
        + "\n  signals, abstract sockets: within the machine alone (Linux 6.12 or later)\n"
}
