//! What the user of `doppel run` is promised: exit statuses and errors that say what to do.

mod support;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{Boot, CLOUD, DOPPEL, Finished, Running, Scratch, debian, run, wait};

const MINUTE: Duration = Duration::from_secs(60);

fn doppel(arguments: &[&str]) -> Finished {
    run(Command::new(DOPPEL).args(arguments), MINUTE)
}

#[test]
fn usage_errors_end_with_status_1_and_say_what_to_write() {
    doppel(&["run", "--memory", "lots"]).expect(1).says("512M");
    doppel(&["run", "--serial", "tcp"])
        .expect(1)
        .says("file=PATH");
    doppel(&["run", "--engine", "magic"])
        .expect(1)
        .says("translate");
    doppel(&["run", "--no-such-flag"]).expect(1).says("--help");
    doppel(&[]).expect(1).says("Usage");
    doppel(&["run", "--help"]).expect(0).says("--debug-exit");
}

#[test]
fn a_missing_file_is_named() {
    doppel(&["run", "--kernel", "/no/kernel"])
        .expect(1)
        .says("/no/kernel");
    let arguments = ["run", "--kernel", DOPPEL, "--initrd", "/no/initrd"];
    doppel(&arguments).expect(1).says("/no/initrd");
    doppel(&["run", "--kernel", "/"])
        .expect(1)
        .says("no regular file");
    let arguments = ["run", "--kernel", DOPPEL, "--stats", "/no/stats"];
    doppel(&arguments).expect(1).says("/no/stats");
    let arguments = ["run", "--kernel", DOPPEL, "--serial", "file=/no/serial"];
    doppel(&arguments).expect(1).says("/no/serial");
}

#[test]
fn an_engine_that_cannot_be_had_is_refused_with_a_reason() {
    let arguments = ["run", "--kernel", DOPPEL, "--engine", "kvm"];
    doppel(&arguments).expect(1).says("cannot be used: ");
    let arguments = "run --engine direct --memory-backing anonymous --kernel";
    let arguments: Vec<_> = arguments.split(' ').chain([DOPPEL]).collect();
    doppel(&arguments).expect(1).says("memfd");
}

#[test]
fn an_impossible_number_of_processors_is_refused() {
    for cpus in ["0", "65"] {
        doppel(&["run", "--kernel", DOPPEL, "--cpus", cpus])
            .expect(1)
            .says("give --cpus 1 to 64");
    }
}

#[test]
fn a_damaged_kernel_is_an_error_of_the_host() {
    let scratch = Scratch::new();
    let kernel = fs::read(debian(CLOUD).kernel).unwrap();
    let damaged = [
        &b"no kernel at all"[..],
        &[0; 4096],
        &kernel[..1000],
        &kernel[..kernel.len() / 2],
        &[],
    ];
    for (number, bytes) in damaged.iter().enumerate() {
        let path = scratch.path(&number.to_string());
        fs::write(&path, bytes).unwrap();
        let finished = doppel(&["run", "--kernel", path.to_str().unwrap()]).expect(1);
        assert!(!finished.stderr.contains("panicked"), "{finished:?}");
    }
}

#[test]
fn an_initrd_larger_than_memory_is_an_error_of_the_host() {
    let boot = Boot::script(CLOUD, "true").file("big", 0o644, &vec![0; 100 << 20]);
    boot.memory("64M").doppel("auto", MINUTE).expect(1);
}

#[test]
fn without_apt_the_default_guest_is_an_error_that_names_kernel() {
    let scratch = Scratch::new();
    let mut command = Command::new(DOPPEL);
    command
        .arg("run")
        .env("PATH", "/nonexistent")
        .env("XDG_CACHE_HOME", scratch.path("cache"));
    run(&mut command, MINUTE)
        .expect(1)
        .says("--kernel")
        .says("Debian");
}

#[test]
fn poweroff_ends_with_status_0() {
    Boot::script(CLOUD, "poweroff -f")
        .doppel("auto", MINUTE)
        .expect(0)
        .says("doppel: engine: ");
}

#[test]
fn reboot_ends_with_status_0_where_none_is_wanted() {
    let boot = Boot::script(CLOUD, "reboot -f").flag("--no-reboot");
    boot.doppel("auto", MINUTE).expect(0).says("reboot");
}

#[test]
fn a_reboot_starts_the_machine_again() {
    let (mut command, _scratch) = Boot::script(CLOUD, "reboot -f").command("auto");
    Running::start(&mut command).until("Linux version", 3);
}

#[test]
fn a_panic_ends_with_status_2_and_the_registers() {
    let boot = Boot::script(CLOUD, "echo c > /proc/sysrq-trigger");
    boot.doppel("auto", MINUTE)
        .expect(2)
        .says("kernel panic")
        .says("rip ");
}

#[test]
fn a_kernel_without_a_root_ends_with_status_2() {
    let kernel = debian(CLOUD).kernel;
    let arguments = ["run", "--kernel", kernel.to_str().unwrap()];
    doppel(&arguments).expect(2).says("Unable to mount root fs");
}

#[test]
fn a_triple_fault_ends_with_status_2_and_the_last_instructions() {
    let boot = Boot::script(CLOUD, "reboot -f").cmdline("reboot=t");
    boot.doppel("auto", MINUTE)
        .expect(2)
        .says("triple fault")
        .says("rip ")
        .says("last instructions:")
        // The kernel ends itself so: a breakpoint with an empty IDT.
        .says("int3");
}

#[test]
fn the_debug_exit_port_gives_its_value_and_is_not_there_unless_asked_for() {
    let boot = || Boot::script(CLOUD, "debug-exit 5; poweroff -f");
    boot().doppel("auto", MINUTE).expect(11);
    let (mut command, _scratch) = boot().command("auto");
    run(&mut command, MINUTE).expect(0);
}

/// MiB that the monitor may take besides guest and translations.
const MOST_OWN_MEMORY: u64 = 10;

#[test]
fn statistics_are_written() {
    let scratch = Scratch::new();
    let path = scratch.path("stats.json");
    let boot =
        Boot::script(CLOUD, "true").flag(&format!("--count-code --stats {}", path.display()));
    boot.doppel("auto", MINUTE).expect(support::PASSED);
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(
        stats["exits"]["port_write"].as_u64().unwrap() > 1000,
        "{stats}"
    );
    let counter = |name: &str| stats["counters"][name].as_u64().unwrap();
    let (hits, misses) = (counter("tlb_hits"), counter("tlb_misses"));
    assert!(misses > 1000 && hits > 100 * misses, "{stats}");
    assert!(stats["seconds"]["guest"].as_f64().unwrap() > 0.0, "{stats}");
    let memory = |name: &str| stats["memory"][name].as_u64().unwrap() >> 20;
    assert!(
        memory("guest_bytes") > 10 && memory("code_bytes") > 1,
        "{stats}"
    );
    assert!(
        (2..MOST_OWN_MEMORY).contains(&memory("monitor_bytes")),
        "{stats}"
    );
    assert!(
        !stats["counters"].as_object().unwrap().is_empty(),
        "{stats}"
    );
}

#[test]
fn a_long_computation_is_executed_directly_and_statistics_say_so() {
    let scratch = Scratch::new();
    let program = support::program("computation", &[]);
    let share = |engine: &str| {
        let path = scratch.path(engine);
        let boot = Boot::script(CLOUD, "/doppel/computation")
            .file("doppel/computation", 0o755, &program)
            .flag(&format!("--stats {}", path.display()));
        boot.doppel(engine, MINUTE).expect(support::PASSED);
        let stats: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        stats["user_direct_share"].as_f64()
    };
    let direct = share("direct").expect("user code was interrupted");
    assert!((0.8..=1.0).contains(&direct), "{direct}");
    assert_eq!(share("translate"), None, "nobody counts");
}

#[test]
fn the_serial_port_can_lead_to_a_file() {
    let scratch = Scratch::new();
    let path = scratch.path("console");
    let kernel = debian(CLOUD).kernel;
    let serial = format!("file={}", path.display());
    let arguments = [
        "run",
        "--serial",
        &serial,
        "--kernel",
        kernel.to_str().unwrap(),
    ];
    let finished = doppel(&arguments).expect(2);
    assert!(finished.console.is_empty());
    assert!(fs::read_to_string(path).unwrap().contains("Linux version"));
}

#[test]
fn a_signal_that_comes_twice_at_once_ends_in_order() {
    let scratch = Scratch::new();
    let kernel = debian(CLOUD).kernel;
    for attempt in 0..5 {
        let path = scratch.path(&format!("stats{attempt}"));
        let mut command = Command::new(DOPPEL);
        command.args(["run", "--cmdline", "console=ttyS0 panic=0"]);
        command.arg("--kernel").arg(&kernel);
        command.arg("--stats").arg(&path);
        let mut doppel = Running::start(&mut command);
        doppel.until("Linux version", 1);
        let process = Pid::from_raw(doppel.child.id() as i32);
        kill(process, Signal::SIGTERM).unwrap();
        std::thread::sleep(Duration::from_micros(300));
        // By now it may have ended.
        let _ = kill(process, Signal::SIGTERM);
        assert!(wait(&mut doppel.child, MINUTE));
        assert_eq!(doppel.child.wait().unwrap().code(), Some(1));
        assert!(fs::read_to_string(path).unwrap().contains("counters"));
    }
}

/// Whatever keeps it before the guest begins: here that nobody reads what it says.
#[test]
fn a_signal_ends_it_before_the_guest_begins() {
    let (unread, full) = nix::unistd::pipe().unwrap();
    fcntl(&full, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&full, &[0; 4096]).is_ok() {}
    fcntl(&full, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let mut command = Command::new(DOPPEL);
    command.arg("run").arg("--kernel").arg(debian(CLOUD).kernel);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    let waits = || {
        let text = fs::read_to_string(format!("/proc/{}/syscall", child.id()));
        // write(2, ...)
        text.is_ok_and(|text| text.starts_with("1 0x2 "))
    };
    let began = Instant::now();
    while !waits() {
        assert!(began.elapsed() < MINUTE, "it says which engine it takes");
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(wait(&mut child, MINUTE));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    drop(unread);
}

#[test]
fn a_fifo_is_no_kernel_and_nobody_waits_for_a_writer() {
    let scratch = Scratch::new();
    let path = scratch.path("fifo");
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    doppel(&["run", "--kernel", path.to_str().unwrap()])
        .expect(1)
        .says("no regular file");
}

#[test]
fn memory_that_the_kernel_does_not_fit_into_is_an_error_that_says_how_much_it_needs() {
    let kernel = debian(CLOUD).kernel;
    for size in ["16M", "48M", "64M"] {
        let arguments = ["run", "--memory", size, "--kernel"];
        let mut command = Command::new(DOPPEL);
        command.args(arguments).arg(&kernel);
        run(&mut command, MINUTE)
            .expect(1)
            .says("MiB, give the guest more");
    }
}

#[test]
fn the_cloud_kernel_boots_with_little_memory_and_with_much() {
    for size in ["96M", "20G"] {
        let boot = Boot::script(CLOUD, "grep MemTotal /proc/meminfo").memory(size);
        boot.doppel("auto", MINUTE)
            .expect(support::PASSED)
            .says("MemTotal");
    }
}
