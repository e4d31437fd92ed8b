//! `cargo run --release -p doppel-bench --bin network`: the user network of Doppel and of QEMU's TCG, in turns.
//!
//! The same guest (the default guest with Debian's iperf3) talks to servers on the host's loopback: TCP both ways, pings of the
//! gateway, and short connections one after another. docs/network.md has the figures.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use doppel_cli::guest::cpio::Archive;
use doppel_cli::guest::{self, KERNEL_PACKAGE, package};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PACKAGES: &[&str] = &["iperf3", "libiperf0", "libsctp1", "libssl3", "libc6"];
const SCRIPT: &str = include_str!("network.sh");
const ROWS: &[(&str, &str, bool)] = &[
    ("up", "TCP to the host, Mbit/s", true),
    ("down", "TCP from the host, Mbit/s", true),
    ("ping", "ping of the gateway, median, ms", false),
    ("connections", "connections a second", true),
];

/// Compares the user networks of Doppel and QEMU's TCG.
#[derive(Parser)]
struct Args {
    /// How often everybody does everything.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The build of Doppel.
    #[arg(long, default_value = "target/release/doppel")]
    doppel: PathBuf,
    /// What it is told of the network, with other options behind it ("user --driver-domain net"); several are compared.
    #[arg(long, default_values_t = ["user".to_owned()])]
    net: Vec<String>,
    /// Without QEMU.
    #[arg(long)]
    no_qemu: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let directory = Path::new("target/bench");
    std::fs::create_dir_all(directory)?;
    let progress = |line: &str| eprintln!("{line}");
    let guest = guest::debian(KERNEL_PACKAGE, &progress)?;
    let initrd = directory.join("initrd-network");
    let mut archive = std::fs::read(&guest.initrd)?;
    archive.extend(overlay()?);
    std::fs::write(&initrd, archive)?;
    let (_iperf, port) = iperf()?;
    let words = format!("console=ttyS0 quiet iperf={port} greeter={}", greeter()?);
    let mut names: Vec<String> = args.net.iter().map(|net| format!("Doppel {net}")).collect();
    if !args.no_qemu {
        names.push("TCG".to_owned());
    }
    let mut results = vec![vec![Vec::new(); names.len()]; ROWS.len()];
    for round in 0..args.rounds {
        for turn in 0..names.len() {
            let which = (round + turn) % names.len();
            let mut command = match args.net.get(which) {
                Some(net) => doppel(&args.doppel, net),
                None => qemu(),
            };
            let dash = if which < args.net.len() { "--" } else { "-" };
            let append = if which < args.net.len() {
                "cmdline"
            } else {
                "append"
            };
            command.arg(format!("{dash}kernel")).arg(&guest.kernel);
            command.arg(format!("{dash}initrd")).arg(&initrd);
            command.arg(format!("{dash}{append}")).arg(&words);
            let values = run(&mut command).with_context(|| names[which].clone())?;
            for (row, value) in values.into_iter().enumerate() {
                results[row][which].push(value);
            }
        }
    }
    show(&names, &results);
    Ok(())
}

/// iperf3 and its libraries, and the script.
fn overlay() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.file("doppel/script", 0o755, SCRIPT.as_bytes());
    let wanted = |path: &str| {
        path == "usr/bin/iperf3"
            || path.starts_with("lib")
            || path.contains("/lib/x86_64-linux-gnu/lib")
    };
    for deb in guest::packages("network", PACKAGES, &|line| eprintln!("{line}"))? {
        package::add(&mut archive, &deb, wanted)?;
    }
    Ok(archive.finish())
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The host's iperf3 as a server on the loopback.
fn iperf() -> Result<(Server, u16)> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let server = Command::new("iperf3")
        .args(["-s", "-B", "127.0.0.1", "-p", &port.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .context("the host needs iperf3 (apt-get install iperf3)")?;
    let server = Server(server);
    for _ in 0..100 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Ok((server, port));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    anyhow::bail!("iperf3 does not listen")
}

/// Says a word to every client.
fn greeter() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.write_all(b"hello\n");
        }
    });
    Ok(port)
}

fn doppel(program: &Path, net: &str) -> Command {
    let mut command = Command::new(program);
    command.args([
        "run",
        "--engine",
        "translate",
        "--debug-exit",
        "--no-reboot",
    ]);
    command.args(["--memory", "512M", "--net"]);
    command.args(net.split_whitespace());
    command
}

fn qemu() -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(
        "-accel tcg -cpu max -smp 1 -m 512 -nodefaults -display none -serial stdio -no-reboot \
         -device isa-debug-exit,iobase=0xf4,iosize=4 -netdev user,id=n -device virtio-net-pci,netdev=n"
            .split_whitespace(),
    );
    command
}

/// Boots, and reads a value for each row.
fn run(command: &mut Command) -> Result<Vec<f64>> {
    let output = Command::new("timeout")
        .arg("180")
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("result {name} ")));
        line.and_then(|value| value.trim().parse().ok())
    };
    let values: Option<Vec<f64>> = ROWS.iter().map(|(name, ..)| value(name)).collect();
    ensure!(values.is_some(), "it said:\n{text}");
    Ok(values.unwrap_or_default())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn show(names: &[String], results: &[Vec<Vec<f64>>]) {
    println!("| | {} |", names.join(" | "));
    println!("|---|{}", "--:|".repeat(names.len()));
    for ((_, what, _), row) in ROWS.iter().zip(results) {
        let cell = |values: &Vec<f64>| {
            let (low, high) = values.iter().fold((f64::MAX, 0f64), |(low, high), v| {
                (low.min(*v), high.max(*v))
            });
            format!("{:.2} ({low:.2}–{high:.2})", median(values))
        };
        let cells: Vec<_> = row.iter().map(cell).collect();
        println!("| {what} | {} |", cells.join(" | "));
    }
    if names.last().is_none_or(|name| name != "TCG") {
        return;
    }
    for ((_, what, more_is_better), row) in ROWS.iter().zip(results) {
        let (own, tcg) = (median(&row[0]), median(&row[names.len() - 1]));
        let ratio = if *more_is_better {
            own / tcg
        } else {
            tcg / own
        };
        println!("{what}: {ratio:.2} times as good as TCG");
    }
}
