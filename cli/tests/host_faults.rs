//! Faults of the host: what it does not give, takes back, stops or kills. The machine goes on, or ends with a sentence that says what to do, and
//! what the guest has flushed is there.

mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::{Boot, CLOUD, DOPPEL, Finished, PASSED, Running, Scratch, run, wait};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// Sums, a shell at work, and nothing that the kernel complains of.
const WORK: &str = "
    set -e
    head -c 1000000 /dev/urandom >/tmp/file
    sum=$(sha256sum </tmp/file)
    n=0
    while [ $n -lt 20 ]; do
        test \"$(sha256sum </tmp/file)\" = \"$sum\"
        n=$((n + 1))
    done
    ! dmesg | grep -E 'BUG:|lockup|self-detected stall|I/O error'
    echo it works
";

/// The command under limits that the shell sets.
fn limited(limits: &str, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    let script = format!("{limits} && exec \"$0\" \"$@\"");
    shell.arg("-c").arg(script).arg(command.get_program());
    shell.args(command.get_args()).env_remove("RUST_BACKTRACE");
    shell
}

/// Ends the test unless the machine works, or ends with status 1 and a sentence that has one of these words; true where it works. A guest may wait for a
/// device that the host refuses when it asks for it; then the sentence has to be there, too.
#[track_caller]
fn works_or_says(command: &mut Command, limit: &str, advice: &[&str]) -> bool {
    let said = |text: &str| {
        let mut lines = text.lines().filter(|l| l.starts_with("doppel: "));
        lines.any(|line| advice.iter().any(|words| line.contains(words)))
    };
    // A busy host gets its time only where nothing was said.
    let mut finished = run(command, Duration::from_secs(6));
    if finished.timed_out && !said(&finished.stderr) {
        finished = run(command, LIMIT);
    }
    let works = finished.status == Some(PASSED) && finished.console.contains("it works");
    let ended = finished.timed_out || finished.status == Some(1);
    assert!(
        works || ended && said(&finished.stderr),
        "{limit}: {finished:?}"
    );
    works
}

/// A machine with many devices and little memory.
fn machine(scratch: &Scratch, engine: &str, script: &str) -> (Command, Scratch) {
    let disk = scratch.path("small disk");
    File::create(&disk).unwrap().set_len(MIB).unwrap();
    let more = format!(
        "--debug-exit --code-cache 32M --rng --share t={}",
        env!("CARGO_MANIFEST_DIR")
    );
    let boot = Boot::script(CLOUD, script).memory("128M").flag(&more);
    let (mut command, kept) = boot.cmdline("quiet").command(engine);
    command.args(["--disk", &format!("{},format=raw", disk.display())]);
    (command, kept)
}

#[test]
fn memory_that_the_host_does_not_give_is_an_error_that_says_what_to_do() {
    const ADVICE: [&str; 4] = ["--memory", "--code-cache", "ulimit -v", "ulimit -u"];
    let scratch = Scratch::new();
    for (engine, cpus) in [("direct", "2"), ("translate", "1")] {
        let (mut command, _kept) = machine(&scratch, engine, "echo it works");
        command.args(["--cpus", cpus]);
        let works = |mib: &u64| {
            let mut command = limited(&format!("ulimit -v {}", mib << 10), &command);
            works_or_says(&mut command, &format!("{engine} with {mib} MiB"), &ADVICE)
        };
        let enough = (80..700).step_by(20).find(works);
        assert!(enough.is_some_and(|mib| mib > 128), "{engine}: {enough:?}");
    }
}

#[test]
fn descriptors_that_the_host_does_not_give_are_an_error_that_says_what_to_do() {
    let scratch = Scratch::new();
    for more in ["", "--driver-domain disk"] {
        let (mut command, _kept) = machine(&scratch, "auto", "echo it works");
        command.args(more.split_whitespace());
        let works = |files: &u32| {
            let mut command = limited(&format!("ulimit -n {files}"), &command);
            let limit = format!("{files} files {more}");
            works_or_says(&mut command, &limit, &["ulimit -n"])
        };
        assert!((4..120).step_by(4).any(|files| works(&files)), "{more}");
    }
}

/// A device that finds no descriptors when its driver asks for it could only make that wait.
#[test]
fn a_guest_that_starts_has_the_descriptors_for_its_disk() {
    const USES_IT: &str = "
        test \"$(dd if=/dev/vda bs=64k 2>/dev/null | wc -c)\" = 1048576
        echo it works
    ";
    let scratch = Scratch::new();
    for more in ["", "--driver-domain disk"] {
        let (mut command, _kept) = machine(&scratch, "translate", USES_IT);
        command.args(more.split_whitespace());
        let works = |files: &u32| {
            let mut command = limited(&format!("ulimit -n {files}"), &command);
            let finished = run(&mut command, LIMIT);
            let said = finished.status == Some(1) && finished.stderr.contains("ulimit -n");
            let works = finished.status == Some(PASSED) && finished.console.contains("it works");
            assert!(said || works, "{files} files {more}: {finished:?}");
            works
        };
        assert!((12..120).any(|files| works(&files)), "{more}");
    }
}

#[test]
fn connections_beyond_the_hosts_descriptors_fail_and_others_work_afterwards() {
    const CALLS: &str = "
        until ip route | grep -q default; do sleep 0.1; done
        n=0
        while [ $n -lt 100 ]; do sleep 4 | nc 10.0.2.2 $port >/dev/null 2>&1 & n=$((n + 1)); done
        sleep 5
        n=0
        until echo | nc 10.0.2.2 $port | grep -q welcome; do
            n=$((n + 1)); [ $n -lt 20 ] || exit 1
            sleep 0.5
        done
        echo it works
    ";
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::Relaxed);
            thread::spawn(move || {
                let _ = stream.write_all(b"welcome\n");
                // To its end, which the guest chooses.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            });
        }
    });
    let boot = Boot::script(CLOUD, &format!("port={port}\n{CALLS}"));
    let (command, _kept) = boot.flag("--debug-exit").cmdline("quiet").command("auto");
    let finished = run(&mut limited("ulimit -n 90", &command), LIMIT);
    finished.expect(PASSED).says("it works");
    let calls = calls.load(Ordering::Relaxed);
    assert!((10..100).contains(&calls), "{calls} came through");
}

/// Writes two pieces, of which the second has no room; then, when the host has made some, a third.
const FULL: &str = "
    dd if=/dev/urandom of=/tmp/first bs=1M count=2 2>/dev/null
    dd if=/tmp/first of=/dev/vda bs=1M conv=fsync 2>/dev/null || exit 3
    dd if=/dev/zero bs=1M count=9 2>/dev/null | tr '\\0' x >/tmp/second
    dd if=/tmp/second of=/dev/vda bs=1M seek=4 conv=fsync 2>/dev/null && exit 4
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda bs=1M count=2 2>/dev/null | cmp - /tmp/first || exit 5
    sha256sum </tmp/first | sed 's/^/the first: /'
    echo it is full
    sleep 2
    [ -z \"$third\" ] || dd if=/tmp/first of=/dev/vda bs=1M seek=6 conv=fsync 2>/dev/null || exit 6
";

/// The sum that the guest told of its first piece is that of the image's first bytes.
#[track_caller]
fn first_piece_is_there(finished: &Finished, raw: &Path) {
    let mut bytes = vec![0; 2 * MIB as usize];
    File::open(raw)
        .unwrap()
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    let copy = raw.with_extension("first");
    fs::write(&copy, bytes).unwrap();
    let sum = Command::new("sha256sum").arg(&copy).output().unwrap();
    let sum = String::from_utf8_lossy(&sum.stdout)[..64].to_owned();
    let told = format!("the first: {sum}");
    assert!(finished.console.contains(&told), "{}", finished.console);
}

#[test]
fn a_full_file_system_is_an_error_in_the_guest_and_with_room_it_goes_on() {
    /// Mounts a small file system, makes the image and a file that goes when the guest says that it is full; copies the image out.
    const AROUND: &str = "set -e
        mount -t tmpfs -o size=7M tmpfs \"$M\"
        case $F in raw) truncate -s 64M \"$M/disk\" ;; *) \"$0\" image create --format qcow2 \"$M/disk\" 64M >/dev/null ;; esac
        head -c 2000000 /dev/zero >\"$M/filler\"
        ( while ! grep -q 'it is full' \"$M.console\" 2>/dev/null; do sleep 0.1; done; rm \"$M/filler\" ) &
        status=0
        \"$0\" \"$@\" --disk \"$M/disk,format=$F\" >\"$M.console\" || status=$?
        cat \"$M.console\"
        \"$0\" image convert --format raw \"$M/disk\" \"$M.raw\" >/dev/null
        exit $status";
    let unshare = ["-rm", "true"];
    if !Command::new("unshare")
        .args(unshare)
        .status()
        .is_ok_and(|s| s.success())
    {
        eprintln!("SKIPPED: this host gives no namespace to mount a small file system in");
        return;
    }
    let scratch = Scratch::new();
    for (format, more) in [("raw", ""), ("qcow2", "--driver-domain disk")] {
        let mount = scratch.path(&format!("{format}{}", more.len()));
        fs::create_dir(&mount).unwrap();
        let boot = Boot::script(CLOUD, &format!("third=yes\n{FULL}"));
        let boot = boot.flag(&format!("--debug-exit --net none {more}"));
        let (command, _kept) = boot.cmdline("quiet").command("auto");
        let mut around = Command::new("timeout");
        around.args(["60", "unshare", "-rm", "sh", "-c", AROUND]);
        around.arg(command.get_program()).args(command.get_args());
        let finished = run(around.env("M", &mount).env("F", format), LIMIT);
        let finished = finished.expect(PASSED).says("make room there");
        first_piece_is_there(&finished, &mount.with_extension("raw"));
    }
}

#[test]
fn a_disk_that_may_not_grow_is_an_error_in_the_guest() {
    let scratch = Scratch::new();
    let disk = scratch.path("disk");
    for more in ["", "--driver-domain disk"] {
        File::create(&disk).unwrap().set_len(4 * MIB).unwrap();
        // Longer than may be written to.
        File::options()
            .write(true)
            .open(&disk)
            .unwrap()
            .set_len(320 * MIB)
            .unwrap();
        let script = FULL.replace("seek=4", "seek=200");
        let flags = format!(
            "--debug-exit --code-cache 32M {more} --disk {},format=raw",
            disk.display()
        );
        let boot = Boot::script(CLOUD, &script).memory("192M").flag(&flags);
        let (command, _kept) = boot.cmdline("quiet").command("auto");
        // In 512 bytes: guest memory is a file in memory that it holds for too.
        let finished = run(
            &mut limited(&format!("ulimit -f {}", 196 << 11), &command),
            LIMIT,
        );
        let finished = finished.expect(PASSED).says("ulimit -f");
        first_piece_is_there(&finished, &disk);
    }
    let (command, _kept) = Boot::script(CLOUD, "exit 0").command("auto");
    let finished = run(&mut limited("ulimit -f 2048", &command), LIMIT);
    finished.expect(1).says("ulimit -f");
}

#[test]
fn what_was_flushed_is_there_after_the_monitor_was_killed() {
    const WRITER: &str = "
        n=0
        while true; do
            yes \"block $n\" | head -c 4096 >/tmp/block
            dd if=/tmp/block of=/dev/vda bs=4096 seek=$n conv=fsync 2>/dev/null
            n=$((n + 1))
            echo \"flushed $n.\"
        done
    ";
    let scratch = Scratch::new();
    for (format, more) in [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "--driver-domain disk"),
    ] {
        let (disk, raw) = (scratch.path("disk"), scratch.path("raw"));
        let mut create = Command::new(DOPPEL);
        create
            .args(["image", "create", "--format", format])
            .arg(&disk)
            .arg("64M");
        run(&mut create, LIMIT).expect(0);
        let flags = format!(
            "--net none {more} --disk {},format={format}",
            disk.display()
        );
        let boot = Boot::script(CLOUD, WRITER).cmdline("quiet").flag(&flags);
        let (mut command, _kept) = boot.command("auto");
        let mut machine = Running::start(&mut command);
        machine.until("flushed", 40);
        machine.child.kill().unwrap();
        machine.child.wait().unwrap();
        let mut convert = Command::new(DOPPEL);
        convert
            .args(["image", "convert", "--format", "raw"])
            .arg(&disk)
            .arg(&raw);
        // The process of a disk may take a moment to end.
        let start = Instant::now();
        while run(&mut convert, LIMIT).status != Some(0) {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "the image stays in use"
            );
            thread::sleep(Duration::from_millis(100));
        }
        let image = fs::read(&raw).unwrap();
        for n in 0..40 {
            let text = format!("block {n}\n");
            assert!(
                image[n * 4096..].starts_with(text.as_bytes()),
                "{format} {more}: {text}"
            );
        }
        fs::remove_file(&disk).unwrap();
        fs::remove_file(&raw).unwrap();
    }
}

/// Of a guest that ends with 1.
const COMPLAINED: i32 = 35;

/// A guest whose watchdogs complain after two and three seconds, and that looks at its clocks.
const WATCHED: &str = "
    echo 1 >/proc/sys/kernel/watchdog_thresh
    seconds() { cut -d. -f1 /proc/uptime; }
    uptime=$(seconds) wall=$(date +%s)
    echo ready
    while [ $(($(seconds) - uptime)) -lt 7 ]; do true; done
    uptime=$(($(seconds) - uptime)) wall=$(($(date +%s) - wall))
    echo \"uptime $uptime wall $wall\"
    [ $((uptime - wall)) -le 1 ] && [ $((wall - uptime)) -le 1 ] || exit 3
    ! dmesg | grep -E 'soft lockup|detected stall|self-detected|clocksource.*unstable|hung_task|BUG:'
";

/// What such a guest showed after its machine was stopped for four seconds; nothing where it had no complaint.
fn complaint_after_a_stop(engine: &str, cpus: u32) -> Option<String> {
    let flags = format!("--debug-exit --net none --cpus {cpus}");
    let boot = Boot::script(CLOUD, WATCHED).flag(&flags);
    let boot = boot.cmdline("quiet rcupdate.rcu_cpu_stall_timeout=3");
    let (mut command, _kept) = boot.command(engine);
    let mut machine = Running::start(&mut command);
    machine.until("ready", 1);
    let start = Instant::now();
    let pid = Pid::from_raw(machine.child.id() as i32);
    thread::sleep(Duration::from_millis(500));
    kill(pid, Signal::SIGSTOP).unwrap();
    thread::sleep(Duration::from_secs(4));
    kill(pid, Signal::SIGCONT).unwrap();
    machine.until("uptime", 1);
    assert!(wait(&mut machine.child, LIMIT), "it hangs");
    let status = machine.child.wait().unwrap().code();
    let console = machine.console();
    assert!(
        matches!(status, Some(PASSED | COMPLAINED)),
        "{engine}: {status:?} {console}"
    );
    // The seconds of the stop have passed for the guest.
    let took = start.elapsed();
    assert!(took < Duration::from_secs(11), "{engine}: {took:?}");
    (status == Some(COMPLAINED)).then_some(console)
}

/// A stop within the guest's own handler of a tick is one that it may look at before anybody could tell it (`machine/src/clock_pages.rs`).
#[test]
fn a_machine_that_is_stopped_for_seconds_goes_on_at_the_hosts_time_and_nothing_in_it_complains() {
    for (engine, cpus) in [("auto", 2), ("translate", 1)] {
        let complaints: Vec<_> = (0..3)
            .map_while(|_| complaint_after_a_stop(engine, cpus))
            .collect();
        assert!(complaints.len() < 3, "{engine}: {complaints:?}");
    }
}

#[test]
fn a_storm_of_signals_disturbs_nothing() {
    let scratch = Scratch::new();
    let script = format!(
        "{WORK}
        dd if=/tmp/file of=/dev/vda bs=4k conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        head -c 1000000 /dev/vda | cmp - /tmp/file
        mount -t virtiofs t /mnt
        cmp /mnt/Cargo.toml /mnt/Cargo.toml"
    );
    for engine in ["direct", "translate"] {
        let (mut command, _kept) = machine(&scratch, engine, &script);
        command.args(["--cpus", "2"]);
        let (over, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut child = command
            .stdout(File::create(scratch.path("console")).unwrap())
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let ended = thread::scope(|scope| {
            scope.spawn(|| {
                // The machine takes its signals from the moment on that it runs.
                thread::sleep(Duration::from_millis(300));
                while !over.load(Ordering::Relaxed) {
                    // A stop interrupts system calls even where no handler runs.
                    let storm = [
                        Signal::SIGWINCH,
                        Signal::SIGCHLD,
                        Signal::SIGSTOP,
                        Signal::SIGCONT,
                    ];
                    for signal in storm {
                        let _ = kill(pid, signal);
                    }
                    sent.fetch_add(4, Ordering::Relaxed);
                    thread::sleep(Duration::from_micros(300));
                }
                let _ = kill(pid, Signal::SIGCONT);
            });
            let ended = wait(&mut child, LIMIT);
            over.store(true, Ordering::Relaxed);
            ended
        });
        let console = fs::read_to_string(scratch.path("console")).unwrap();
        let status = child.wait().unwrap().code();
        assert!(
            ended && status == Some(PASSED),
            "{engine}: {status:?}\n{console}"
        );
        assert!(sent.load(Ordering::Relaxed) > 1000);
    }
}

/// The processes below one, and theirs.
fn processes_below(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let children = tasks.flatten().map(|task| task.path().join("children"));
    let children = children
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect::<String>();
    let children: Vec<u32> = children
        .split_whitespace()
        .filter_map(|n| n.parse().ok())
        .collect();
    let theirs: Vec<u32> = children
        .iter()
        .flat_map(|pid| processes_below(*pid))
        .collect();
    [children, theirs].concat()
}

/// Works on where a program of its is killed, and counts it; a wrong result is a failure.
const SURVIVOR: &str = "
    head -c 1000000 /dev/urandom >/tmp/file
    sum=$(sha256sum </tmp/file)
    echo ready
    n=0
    while [ ! -e /mnt/over ] && [ $n -lt 3000 ]; do
        now=$(sha256sum </tmp/file)
        [ -z \"$now\" ] || [ \"$now\" = \"$sum\" ] || echo it is wrong
        n=$((n + 1))
    done
    ! dmesg | grep -E 'BUG:|lockup|stall'
    echo it works
";

#[test]
fn processes_that_run_user_code_may_be_killed_and_the_guest_goes_on() {
    for whole in [false, true] {
        let scratch = Scratch::new();
        let share = scratch.path("share");
        fs::create_dir(&share).unwrap();
        // Whoever dies, the script is run again until it comes to its end.
        let script = format!(
            "mount -t virtiofs t /mnt; cat >/tmp/s <<'END'\n{SURVIVOR}\nEND\nuntil sh /tmp/s; do true; done"
        );
        let flags = format!(
            "--debug-exit --net none --cpus 2 --direct always --share t={}",
            share.display()
        );
        let boot = Boot::script(CLOUD, &script).cmdline("quiet").flag(&flags);
        let (mut command, _kept) = boot.command("direct");
        let said = scratch.path("said");
        command.stderr(File::create(&said).unwrap());
        let mut machine = Running::start(&mut command);
        machine.until("ready", 1);
        for n in 1..=12 {
            thread::sleep(Duration::from_millis(120));
            let all = processes_below(machine.child.id());
            // The first makes all the others.
            let victim = if whole && n == 6 {
                all.first()
            } else {
                all.get(1 + n * 7 % all.len().max(1))
            };
            if let Some(pid) = victim {
                let _ = kill(Pid::from_raw(*pid as i32), Signal::SIGKILL);
            }
        }
        fs::write(share.join("over"), "").unwrap();
        machine.until("it works", 1);
        assert!(wait(&mut machine.child, LIMIT), "it hangs");
        let said = fs::read_to_string(&said).unwrap();
        // Init may have been hit, too; then the guest's kernel panics, as it does on a machine.
        assert_eq!(machine.child.wait().unwrap().code(), Some(PASSED), "{said}");
        if whole {
            assert!(
                said.contains("the guest goes on") || said.contains("it is translated"),
                "{said}"
            );
        }
    }
}

#[test]
fn what_is_typed_and_what_ends_a_machine_reaches_user_code_that_is_executed_directly() {
    const BUSY: &str = "
        ( while true; do true; done ) &
        echo ready
        n=0
        while read line; do n=$((n + 1)); [ $n -lt 50 ] || echo it works; done </dev/ttyS0
        while true; do true; done
    ";
    let boot = Boot::script(CLOUD, BUSY).cmdline("quiet");
    let (mut command, _kept) = boot.flag("--net none --direct always").command("direct");
    let mut machine = Running::start_typing(&mut command);
    machine.until("ready", 1);
    let mut keys = machine.child.stdin.take().unwrap();
    for _ in 0..200 {
        keys.write_all(b"line\n").unwrap();
        thread::sleep(Duration::from_millis(3));
    }
    machine.until("it works", 1);
    kill(Pid::from_raw(machine.child.id() as i32), Signal::SIGTERM).unwrap();
    assert!(wait(&mut machine.child, LIMIT), "it hangs");
    assert_eq!(machine.child.wait().unwrap().code(), Some(1));
}

#[test]
fn counters_that_cannot_be_written_say_so() {
    let boot = Boot::script(CLOUD, "exit 0").flag("--stats /dev/full --net none");
    let finished = boot.doppel("auto", LIMIT);
    finished.expect(1).says("/dev/full").says("make room there");
}
