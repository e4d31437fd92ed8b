//! `doppel explain` and `doppel run --perf-map`, on a guest and without one.

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Boot, CLOUD, DOPPEL, Finished, PASSED, Scratch, debian, run};

const MINUTE: Duration = Duration::from_secs(60);

fn explain(arguments: &[&str]) -> Finished {
    run(Command::new(DOPPEL).arg("explain").args(arguments), MINUTE)
}

#[test]
fn bytes_are_explained_without_a_guest() {
    explain(&[
        "--bytes",
        "48 8b 03 c3",
        "--address",
        "0x401000",
        "--cpl",
        "3",
    ])
    .expect(0)
    .says("401000  48 8b 03")
    .says("mov rax, [rbx]")
    .says("TLB check of 8 bytes for reading")
    .says("jump cache");
    explain(&["--bytes", "f3 0f b8 c1", "--cpu", "x86-64-v1"])
        .expect(0)
        .says("not as the guest's processor has it");
}

#[test]
fn usage_errors_say_what_to_write() {
    explain(&["--bytes", "4"]).expect(1).says("48 8b 03");
    explain(&["--bytes", "48 8b"]).expect(1).says("more bytes");
    explain(&["--bytes", "90", "--cpl", "1"])
        .expect(1)
        .says("0 or 3");
    explain(&["--bytes", "90", "--at", "1000"])
        .expect(1)
        .says("--help");
    explain(&["--at", "do_it"]).expect(1).says("--symbols");
    explain(&["--symbols", "/no/map"]).expect(1).says("/no/map");
    explain(&["--output", "/no/listing"])
        .expect(1)
        .says("/no/listing");
    explain(&["--engine", "interpret"])
        .expect(1)
        .says("--engine translate");
}

/// What the guest's kernel says of its symbols, from a run.
fn kernel_symbols(scratch: &Scratch) -> PathBuf {
    let boot = Boot::script(CLOUD, "grep -i ' t .*syscall' /proc/kallsyms");
    let console = boot.doppel("translate", MINUTE).expect(PASSED).console;
    let path = scratch.path("symbols");
    fs::write(&path, console.replace('\r', "")).unwrap();
    path
}

/// `doppel explain` of a guest that runs a script.
fn explain_boot(script: &str, flags: &str) -> Finished {
    let (command, _scratch) = Boot::script(CLOUD, script)
        .flag("--debug-exit")
        .flag(flags)
        .command("translate");
    let arguments = command.get_args().skip(1);
    run(Command::new(DOPPEL).arg("explain").args(arguments), MINUTE)
}

#[test]
fn the_hottest_blocks_of_a_run_are_shown_and_every_instruction_is_counted() {
    let scratch = Scratch::new();
    let (stats, listing) = (scratch.path("stats"), scratch.path("listing"));
    let flags = format!(
        "--hottest 3 --count-code --stats {} --output {}",
        stats.display(),
        listing.display()
    );
    explain_boot("true", &flags).expect(PASSED);
    let listing = fs::read_to_string(listing).unwrap();
    assert_eq!(listing.matches("\nblock ").count(), 3, "{listing}");
    let stats: serde_json::Value = serde_json::from_slice(&fs::read(stats).unwrap()).unwrap();
    let counted = &stats["counters"]["translated_instructions_run"];
    let all = format!("{counted} instructions were executed");
    assert!(listing.starts_with(&all), "{all}\n{listing}");
}

#[test]
fn a_symbol_is_found_wherever_the_kernel_lies() {
    let scratch = Scratch::new();
    let symbols = kernel_symbols(&scratch);
    let flags = format!("--at do_syscall_64 --symbols {}", symbols.display());
    explain_boot("true", &flags)
        .expect(PASSED)
        .says("do_syscall_64+0x0 (kernel)")
        .says("linked");
}

#[test]
fn a_run_can_be_ended_after_some_time() {
    let kernel = debian(CLOUD);
    let (kernel, initrd) = (kernel.kernel, kernel.initrd);
    let arguments = [
        "--seconds",
        "1",
        "--hottest",
        "1",
        "--serial",
        "none",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
    ];
    explain(&arguments).expect(0).says("\nblock ");
}

#[test]
fn a_perf_map_names_blocks() {
    let (mut command, _scratch) = Boot::script(CLOUD, "true")
        .flag("--perf-map")
        .command("translate");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let path = format!("/tmp/perf-{}.map", child.id());
    assert!(support::wait(&mut child, MINUTE));
    let map = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(map.contains(" doppel:exit\n"));
    for what in [" k:ffffffff", " u:"] {
        assert!(map.contains(what), "no {what}");
    }
    for line in map.lines() {
        let mut words = line.split(' ');
        let number = |word: Option<&str>| u64::from_str_radix(word.unwrap(), 16).unwrap();
        assert!(
            number(words.next()) > 0 && number(words.next()) > 0,
            "{line}"
        );
        assert!(words.next().is_some(), "{line}");
    }
}
