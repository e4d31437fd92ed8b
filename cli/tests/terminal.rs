//! The terminal under `doppel run`: raw while the guest has it, as it was before afterwards, whatever happened.

mod support;

use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{CLOUD, DOPPEL, debian, wait};

const LONG: Duration = Duration::from_secs(60);

/// `doppel run` on a terminal of its own.
struct Session {
    doppel: Child,
    terminal: File,
    keyboard: File,
    shown: Arc<Mutex<Vec<u8>>>,
    before: Termios,
}

impl Session {
    fn start(arguments: &[&str]) -> Session {
        let size = nix::pty::Winsize {
            ws_row: 33,
            ws_col: 99,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(&size, None).unwrap();
        let terminal = File::from(slave);
        let before = tcgetattr(&terminal).unwrap();
        let end = || terminal.try_clone().unwrap();
        let doppel = Command::new(DOPPEL)
            .arg("run")
            .args(arguments)
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut screen, collected) = (keyboard.try_clone().unwrap(), shown.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                collected.lock().unwrap().extend(&buffer[..n]);
            }
        });
        Session {
            doppel,
            terminal,
            keyboard,
            shown,
            before,
        }
    }

    /// A guest that panics for want of a root, and until then has the terminal.
    fn bare() -> Session {
        let kernel = debian(CLOUD).kernel;
        let session = Session::start(&[
            "--kernel",
            kernel.to_str().unwrap(),
            "--cmdline",
            "console=ttyS0",
        ]);
        session.until("raw mode", |s| s.is_raw());
        session
    }

    fn is_raw(&self) -> bool {
        let flags = tcgetattr(&self.terminal).unwrap().local_flags;
        !flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn is_restored(&self) -> bool {
        tcgetattr(&self.terminal).unwrap() == self.before
    }

    fn shows(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).contains(text)
    }

    #[track_caller]
    fn until(&self, what: &str, condition: impl Fn(&Session) -> bool) {
        let end = Instant::now() + LONG;
        while !condition(self) {
            let shown = String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned();
            assert!(Instant::now() < end, "no {what}:\n{shown}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.doppel.id() as i32), signal).unwrap();
    }

    #[track_caller]
    fn ends(&mut self) -> Option<i32> {
        assert!(wait(&mut self.doppel, LONG), "it does not end");
        self.doppel.wait().unwrap().code()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.doppel.kill();
        let _ = self.doppel.wait();
    }
}

#[test]
fn the_escape_key_leaves_and_restores() {
    let mut session = Session::bare();
    session.press(b"\x01h");
    session.until("help", |s| s.shows("send Ctrl-A to the guest"));
    session.press(b"\x01x");
    assert_eq!(session.ends(), Some(0));
    assert!(session.is_restored());
}

#[test]
fn signals_end_it_and_restore() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut session = Session::bare();
        session.signal(signal);
        assert_eq!(session.ends(), Some(1), "{signal}");
        assert!(session.is_restored(), "{signal}");
        session.until("reason", |s| s.shows(signal.as_str()));
    }
}

#[test]
fn even_a_kill_restores() {
    for signal in [Signal::SIGKILL, Signal::SIGABRT] {
        let mut session = Session::bare();
        session.signal(signal);
        assert_eq!(session.ends(), None);
        session.until("restored terminal", Session::is_restored);
    }
}

#[test]
fn a_stop_and_continue_takes_the_terminal_back() {
    let session = Session::bare();
    session.signal(Signal::SIGSTOP);
    nix::sys::termios::tcsetattr(
        &session.terminal,
        nix::sys::termios::SetArg::TCSANOW,
        &session.before,
    )
    .unwrap();
    session.signal(Signal::SIGCONT);
    session.until("raw mode", |s| s.is_raw());
}

#[test]
fn the_default_guests_shell_is_a_terminal_like_any() {
    let mut session = Session::start(&[]);
    session.until("prompt", |s| s.shows("root@doppel:~#"));
    session.press(b"stty size; tty\r");
    session.until("window size", |s| s.shows("33 99"));
    session.press(b"sleep 1000 & jobs; fg\r");
    session.until("job", |s| s.shows("Running"));
    session.press(b"\x03");
    session.press(b"echo interrupted $?\r");
    session.until("Ctrl-C in the guest", |s| s.shows("interrupted 130"));
    session.press(b"exit\r");
    assert_eq!(session.ends(), Some(0));
    assert!(session.is_restored());
}

#[test]
fn a_console_is_a_terminal_whose_window_follows() {
    let mut session = Session::start(&["--console", "stdio"]);
    session.until("prompt", |s| s.shows("root@doppel:~#"));
    session.press(b"tty; stty size\r");
    session.until("console", |s| s.shows("/dev/hvc0") && s.shows("33 99"));
    session.press(b"stty -echo\r");
    session.press(b"echo set $((40 + 2))\r");
    session.until("shell", |s| s.shows("set 42"));
    let size = rustix::termios::Winsize {
        ws_row: 44,
        ws_col: 111,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(&session.keyboard, size).unwrap();
    // The monitor has no controlling terminal here, which would tell it.
    session.signal(Signal::SIGWINCH);
    session.until("news", |s| {
        std::thread::sleep(Duration::from_millis(200));
        (&s.keyboard).write_all(b"stty size\r").unwrap();
        s.shows("44 111")
    });
    session.press(b"sleep 1000 & jobs; fg\r");
    session.until("job", |s| s.shows("Running"));
    session.press(b"\x03");
    session.press(b"echo interrupted $?\r");
    session.until("Ctrl-C in the guest", |s| s.shows("interrupted 130"));
    session.press(b"exit\r");
    assert_eq!(session.ends(), Some(0));
    assert!(session.is_restored());
}
