//! Networks, end to end: what the default guest's own programs reach, and what reaches them.

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::{Boot, CLOUD, DOPPEL, Finished, PASSED, Running, Scratch, backends, run};

const SCRIPT: &str = include_str!("scripts/network.sh");
const MINUTE: Duration = Duration::from_secs(60);

fn data() -> Vec<u8> {
    (0..3_000_017u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn sha256(data: &[u8]) -> String {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("data"), data).unwrap();
    let sum = Command::new("sha256sum").arg(scratch.path("data")).output();
    let sum = String::from_utf8(sum.unwrap().stdout).unwrap();
    sum.split_whitespace().next().unwrap().to_owned()
}

/// A port of the loopback that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Serves every client of a port of the loopback.
fn serve(client: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        listener
            .incoming()
            .for_each(|stream| client(stream.unwrap()))
    });
    port
}

fn http(data: Vec<u8>) -> u16 {
    serve(move |mut client| {
        let _request = client.read(&mut [0; 4096]);
        let head = format!(
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            data.len()
        );
        let _ = client.write_all(head.as_bytes());
        let _ = client.write_all(&data);
    })
}

/// Reads to the end and answers with the check sum.
fn sink() -> u16 {
    serve(|mut client| {
        let mut data = Vec::new();
        client.read_to_end(&mut data).unwrap();
        client.write_all(sha256(&data).as_bytes()).unwrap();
    })
}

/// A name server for which every name is 192.0.2.77.
fn name_server() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..n].to_vec();
            let asks_for_ipv4 = answer[n - 3] == 1;
            answer[2..4].copy_from_slice(&[0x81, 0x80]);
            if asks_for_ipv4 {
                answer[7] = 1;
                answer.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    port
}

fn user_network(engine: &str, options: &str) -> Finished {
    user_network_with(engine, options, "")
}

fn user_network_with(engine: &str, options: &str, flags: &str) -> Finished {
    let data = data();
    let sum = sha256(&data);
    let words = format!(
        "quiet http={} sink={} closed={} sum={sum}",
        http(data),
        sink(),
        free_port()
    );
    let net = format!("--net user,dns=127.0.0.1:{}{options}", name_server());
    Boot::script(CLOUD, SCRIPT)
        .cmdline(&words)
        .flag(&net)
        .flag(flags)
        .doppel(engine, 4 * MINUTE)
}

#[test]
fn the_default_guest_reaches_the_hosts_servers() {
    user_network("translate", "")
        .expect(PASSED)
        .says("step: refused");
}

#[test]
fn it_does_where_its_thread_does_everything() {
    user_network("translate", ",at-once=off")
        .expect(PASSED)
        .says("step: refused");
}

#[test]
fn it_does_with_large_packets() {
    user_network("translate", ",mtu=9000").expect(PASSED);
}

#[test]
fn it_does_interpreted() {
    user_network("interpret", "").expect(PASSED);
}

#[test]
fn it_does_on_each_engine_with_its_network_in_a_process_of_its_own() {
    for engine in ["translate", "direct", "interpret"] {
        user_network_with(engine, "", "--driver-domain net").expect(PASSED);
    }
    user_network_with("translate", ",at-once=off", "--driver-domain net").expect(PASSED);
}

#[test]
fn without_a_network_there_is_no_card_and_with_nothing_said_there_is_one() {
    let script = "[ ! -e /sys/class/net/eth0 ]";
    Boot::script(CLOUD, script)
        .flag("--net none")
        .doppel("translate", MINUTE)
        .expect(PASSED);
    Boot::script(CLOUD, "[ -e /sys/class/net/eth0 ]")
        .doppel("translate", MINUTE)
        .expect(PASSED);
}

/// Tries until somebody answers.
fn get(port: u16, path: &str) -> String {
    let end = Instant::now() + MINUTE;
    loop {
        let mut answer = String::new();
        let got = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            stream.shutdown(Shutdown::Write)?;
            stream.read_to_string(&mut answer)
        });
        if got.is_ok() && !answer.is_empty() {
            return answer;
        }
        assert!(Instant::now() < end, "{got:?} {answer}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_forwarded_port_leads_to_a_server_in_the_guest() {
    let script = "mkdir -p /tmp/www; echo hello from the guest >/tmp/www/index.html
        httpd -p 80 -h /tmp/www; echo serving; sleep 60";
    let port = free_port();
    let net = format!("--net user,restrict,hostfwd=tcp:127.0.0.1:{port}-:80");
    let boot = Boot::script(CLOUD, script).cmdline("quiet").flag(&net);
    let (mut command, _scratch) = boot.command("translate");
    let mut running = Running::start(&mut command);
    running.until("serving", 1);
    for _ in 0..20 {
        let answer = get(port, "/index.html");
        assert!(answer.contains("hello from the guest"), "{answer}");
    }
}

#[test]
fn a_reboot_opens_the_forwarded_ports_again() {
    let net = format!("--net user,hostfwd=tcp::{}-:22", free_port());
    let boot = Boot::script(CLOUD, "echo booted; reboot -f").flag(&net);
    let (mut command, _scratch) = boot.cmdline("quiet").command("translate");
    Running::start(&mut command).until("booted", 2);
}

#[test]
fn two_machines_at_a_switch_reach_each_other() {
    switch_between(["", "--driver-domain net"]);
}

#[test]
fn two_machines_do_whose_places_at_the_switch_have_processes_of_their_own() {
    switch_between(["--driver-domain net"; 2]);
}

fn switch_between(flags: [&str; 2]) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("cli-test-{}-{number}", std::process::id());
    let net = format!("--net switch={name}");
    let address = |n: u8| format!("killall udhcpc; ip addr add 10.1.0.{n}/24 dev eth0");
    let server = format!(
        "{}\nmkdir -p /tmp/www; cd /tmp/www; dd if=/dev/urandom of=data bs=1M count=8 2>/dev/null\n\
         sha256sum <data >sum; httpd -p 80 -h /tmp/www; echo serving; sleep 60",
        address(1)
    );
    let client = format!(
        "{}\nping -c 3 10.1.0.1 || exit 1\n\
         wget -q -O /tmp/sum http://10.1.0.1/sum || exit 2\n\
         wget -q -O /tmp/data http://10.1.0.1/data || exit 3\n\
         sha256sum </tmp/data | cmp - /tmp/sum || exit 4",
        address(2)
    );
    let boot = Boot::script(CLOUD, &server).cmdline("quiet").flag(&net);
    let (mut command, _scratch) = boot.flag(flags[0]).command("translate");
    let mut running = Running::start(&mut command);
    running.until("serving", 1);
    // The place is taken again by the next process.
    if let [pid] = backends("net", &name)[..] {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
        assert!(killed.unwrap().success());
        let next = |pids: Vec<u32>| pids.len() == 1 && pids != [pid];
        let end = Instant::now() + MINUTE;
        while !next(backends("net", &name)) {
            assert!(Instant::now() < end, "no other process");
            thread::sleep(Duration::from_millis(20));
        }
    }
    Boot::script(CLOUD, &client)
        .cmdline("quiet")
        .flag(&net)
        .flag(flags[1])
        .doppel("translate", MINUTE)
        .expect(PASSED);
}

#[test]
fn mistakes_and_refusals_say_what_to_do() {
    let fails = |net: &str, hint: &str| {
        let arguments = ["run", "--net", net];
        run(Command::new(DOPPEL).args(arguments), MINUTE)
            .expect(1)
            .says(hint);
    };
    fails("bridge", "switch=NAME");
    fails("user,hostfwd=2222", "2222-:22");
    fails("user,colour=red", "hostfwd=");
    fails("switch=../x", "letters");
    fails("tap=", "tap=NAME");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    fails(
        &format!("user,hostfwd=tcp::{port}-:22"),
        "the port is taken",
    );
}

/// What a tap device's absence or presence looks like depends on the host: an ordinary user has none.
#[test]
fn a_tap_device_that_the_user_does_not_have_is_an_error_that_tells_of_the_way() {
    let owner = std::fs::metadata("/proc/self").unwrap();
    let root = std::os::unix::fs::MetadataExt::uid(&owner) == 0;
    if root {
        eprintln!("SKIPPED: root may make any tap device");
        return;
    }
    let arguments = ["run", "--net", "tap=doppel-test"];
    run(Command::new(DOPPEL).args(arguments), MINUTE)
        .expect(1)
        .says("tap");
}

/// Kills of the process of a network while its guest transfers.
const KILLS: u32 = 30;

/// A server of `data` that says whether it is enough, and one that answers whole uploads with the check sum.
fn servers(data: Vec<u8>, enough: Arc<AtomicBool>) -> (u16, u16) {
    let http = serve(move |mut client| {
        let mut request = [0; 4096];
        let n = client.read(&mut request).unwrap_or(0);
        let asks = String::from_utf8_lossy(&request[..n]).contains("GET /enough");
        let body = match (asks, enough.load(Ordering::SeqCst)) {
            (false, _) => &data[..],
            (true, true) => b"yes",
            (true, false) => b"no",
        };
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = client
            .write_all(head.as_bytes())
            .and_then(|()| client.write_all(body));
    });
    let sink = serve(|mut client| {
        let mut data = Vec::new();
        // What a killed process leaves is no end.
        if client.read_to_end(&mut data).is_ok() {
            let _ = client.write_all(sha256(&data).as_bytes());
        }
    });
    (http, sink)
}

#[test]
fn the_process_of_a_network_is_killed_over_and_over_and_the_guest_sees_lost_packets_at_most() {
    let script = include_str!("scripts/network_domain.sh");
    for engine in ["translate", "direct"] {
        let data = data();
        let (sum, enough) = (sha256(&data), Arc::new(AtomicBool::new(false)));
        let (http, sink) = servers(data, enough.clone());
        let port = free_port();
        let scratch = Scratch::new();
        let stats = scratch.path("stats");
        let net = format!(
            "--stats {} --driver-domain net --net user,dns=127.0.0.1:{},hostfwd=tcp::{port}-:80",
            stats.display(),
            name_server()
        );
        let words = format!("quiet http={http} sink={sink} sum={sum}");
        let boot = Boot::script(CLOUD, script).cmdline(&words).flag(&net);
        let finished = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                assert!(get(port, "/index.html").contains("hello from the guest"));
                let mut kills = 0;
                let mut pause = 5;
                while kills < KILLS {
                    thread::sleep(Duration::from_millis(pause));
                    pause = (pause * 7 + 13) % 400 + 5;
                    for pid in backends("net", &format!(":{port}-")) {
                        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
                        kills += u32::from(killed.unwrap().success());
                    }
                    // The port is there again.
                    if kills % 5 == 0 {
                        assert!(get(port, "/index.html").contains("hello from the guest"));
                    }
                }
                enough.store(true, Ordering::SeqCst);
            });
            let finished = boot.doppel(engine, 4 * MINUTE);
            killer.join().unwrap();
            finished
        });
        let finished = finished.expect(PASSED);
        // One that is hardly there may be killed twice.
        let restarts = support::restarts(&stats, "net", 0);
        let likely = u64::from(KILLS / 2)..=u64::from(KILLS);
        assert!(likely.contains(&restarts), "{restarts} of {KILLS}");
        let told = finished
            .console
            .lines()
            .find(|line| line.contains("transfers:"));
        println!("{engine}: {}", told.unwrap());
        assert!(backends("net", &format!(":{port}-")).is_empty());
    }
}

#[test]
fn the_process_of_a_network_ends_with_the_monitor_and_comes_back_with_a_reboot() {
    let port = free_port();
    let mark = format!(":{port}-");
    let net = format!("--driver-domain net --net user,hostfwd=tcp::{port}-:22");
    let boot = Boot::script(CLOUD, "echo booted; reboot -f").flag(&net);
    let (mut command, _scratch) = boot.cmdline("quiet").command("translate");
    let mut machine = Running::start(&mut command);
    machine.until("booted", 2);
    let pid = machine.child.id().to_string();
    let killed = Command::new("kill").args(["-9", &pid]).status();
    assert!(killed.unwrap().success());
    let end = Instant::now() + MINUTE;
    while !backends("net", &mark).is_empty() {
        assert!(Instant::now() < end, "it goes on");
        thread::sleep(Duration::from_millis(20));
    }
}
