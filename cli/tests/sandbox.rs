//! The sandbox of `doppel run`: what was not given is refused, and every thread of a machine is inside.

mod support;

use clap::Parser;
use doppel_cli::args::{Cli, Command as Doppel};
use doppel_cli::sandbox::{self, Enforced, Plan};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, Running, Scratch, run};

const MINUTE: Duration = Duration::from_secs(60);

/// Runs `attempt` in a thread that is confined as a machine of these options would be; false where the kernel cannot.
fn confined(options: &str, attempt: impl FnOnce() + Send + 'static) -> bool {
    let words = ["doppel", "run"].into_iter();
    let cli = Cli::parse_from(words.chain(options.split_whitespace()));
    let Doppel::Run(args) = cli.command else {
        panic!("no run")
    };
    let inside = move || {
        sandbox::give_up_privileges();
        let apart = sandbox::keep_apart().unwrap();
        let enforced = sandbox::confine(&Plan::new(&args, &[], &[])).unwrap();
        let full = [apart, enforced] == [Enforced::Full; 2];
        match full {
            true => attempt(),
            false => eprintln!("SKIPPED: this host's kernel has not all of Landlock"),
        }
        full
    };
    thread::spawn(inside).join().unwrap()
}

#[track_caller]
fn refused<T>(result: io::Result<T>) {
    let kind = result.err().map(|error| error.kind());
    assert_eq!(kind, Some(ErrorKind::PermissionDenied));
}

#[test]
fn what_was_not_given_is_refused_inside_the_sandbox() {
    let scratch = Scratch::new();
    let (given, other) = (scratch.path("given"), scratch.path("other"));
    for directory in [&given, &other] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join("file"), "text").unwrap();
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut bystander = Bystander(Command::new("sleep").arg("60").spawn().unwrap());
    let pid = Pid::from_raw(bystander.0.id() as i32);
    assert_eq!(kill(pid, None), Ok(()));
    let options = format!("--net none --share tag={}", given.display());
    confined(&options, move || {
        assert_eq!(fs::read(given.join("file")).unwrap(), b"text");
        fs::write(given.join("new"), "text").unwrap();
        refused(File::open(other.join("file")));
        refused(File::create(other.join("new")));
        refused(fs::remove_file(other.join("file")));
        refused(fs::rename(given.join("file"), other.join("moved")));
        refused(File::open("/etc/passwd"));
        refused(File::open(DOPPEL));
        refused(Command::new("/bin/true").spawn());
        refused(TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
        refused(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
        assert_eq!(kill(pid, None), Err(Errno::EPERM));
        refused(fs::read("/proc/1/environ"));
    });
    assert_eq!(bystander.0.try_wait().unwrap(), None);
}

/// A process that is none of the machine's.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_share_to_read_cannot_be_written_inside_the_sandbox() {
    let scratch = Scratch::new();
    let file = scratch.path("file");
    fs::write(&file, "text").unwrap();
    let directory = file.parent().unwrap().display().to_string();
    confined(&format!("--share tag={directory},ro"), move || {
        assert_eq!(fs::read(&file).unwrap(), b"text");
        refused(fs::write(&file, "other"));
        refused(fs::remove_file(&file));
    });
}

#[test]
fn every_thread_of_a_machine_is_inside_the_sandbox() {
    for engine in ["translate", "direct"] {
        let scratch = Scratch::new();
        let disk = scratch.path("disk");
        File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let boot = Boot::script(CLOUD, "echo script runs\nsleep 60").flag(&format!(
            "--rng --console none --driver-domain disk,net --disk {},format=raw",
            disk.display()
        ));
        let (mut command, _scratch) = boot.command(engine);
        let mut running = Running::start(&mut command);
        running.until("script runs", 1);
        let monitor = running.child.id();
        let processes = [monitor, process(monitor, "disk"), process(monitor, "net")];
        let tasks = processes.map(|pid| fs::read_dir(format!("/proc/{pid}/task")).unwrap());
        let mut threads = 0;
        for task in tasks.into_iter().flatten() {
            let path = task.unwrap().path();
            let status = fs::read_to_string(path.join("status")).unwrap();
            assert!(status.contains("NoNewPrivs:\t1"), "{engine}: {status}");
            assert!(status.contains("Seccomp:\t2"), "{engine}: {status}");
            // First threads, who starts others, and the threads of the disk's process have one filter, all others their own besides; so has the
            // network's process, which is started when the machine is made.
            let first = processes[..2].iter();
            let first = first.copied().any(|pid| path.ends_with(pid.to_string()));
            let name = fs::read_to_string(path.join("comm")).unwrap();
            let filters = match first || ["starter", "disk"].contains(&name.trim()) {
                true => 1,
                false => 2,
            };
            let count = format!("Seccomp_filters:\t{filters}\n");
            assert!(status.contains(&count), "{engine}: {status}");
            let limits = fs::read_to_string(path.join("limits")).unwrap();
            let core = limits.lines().find(|line| line.contains("core file"));
            let core: Vec<_> = core.unwrap().split_whitespace().collect();
            assert_eq!(core[4], "0", "{engine}: {limits}");
            threads += 1;
        }
        assert!(threads > 20, "{engine}: {threads}");
    }
}

/// The process that `monitor` started for its disk or network.
fn process(monitor: u32, class: &str) -> u32 {
    let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap();
    let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    let serves = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let mut words = line.split(|b| *b == 0);
        words.any(|word| word == b"backend") && words.any(|word| word == class.as_bytes())
    };
    children.find(serves).expect("a process for it")
}

#[test]
fn the_sandbox_says_what_is_in_force() {
    let doppel = |flags: &[&str]| {
        let mut command = Command::new(DOPPEL);
        run(
            command.arg("run").arg("--print-sandbox").args(flags),
            MINUTE,
        )
        .expect(0)
    };
    doppel(&["--sandbox", "off"]).says("no sandbox");
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("shared")).unwrap();
    let share = format!("tag={}", scratch.path("shared").display());
    let told = doppel(&["--net", "none", "--share", &share]);
    match told.console.contains("no Landlock") {
        true => eprintln!("SKIPPED: this host's kernel has no Landlock"),
        false => drop(told.says(&share[4..]).says("TCP: none")),
    }
}
