//! `doppel run`: a virtual machine in this process, from its parts to its exit status.

use crate::args::{Run, Serial};
use crate::devices::{ConsoleSpec, Opened, VsockSpec};
use crate::domain::{self, Domain, OpenFile};
use crate::explain;
use crate::guest;
use crate::host_error::with_advice;
use crate::own_memory_unsafe;
use crate::sandbox;
use crate::signals::{Handlers, Signals, Watch};
use crate::size;
use crate::terminal::console::Console;
use crate::terminal::{self, Raw};
use crate::told_disk::ToldDisk;
use crate::warnings;
use anyhow::{Context, Result, bail};
use doppel_machine::block::{BlockBackend, DiskSpec};
use doppel_machine::explain::{Observers, Profile};
use doppel_machine::share::{Limits, Share, ShareSpec};
use doppel_machine::{
    Backed, BootDisk, CharLink, ConsoleBackend, Death, Ending, KernelSource, Machine,
    MachineConfig, SerialBackend, Stats, StopHandle, Switch, TranslateOptions, VsockSocket,
    WindowSize, is_multiboot,
};
use doppel_seccomp::{Kind, narrowed};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// A disk that is open.
type Disk = Arc<dyn BlockBackend>;

/// How long a machine that was told to end waits for a reader of its output.
const FAREWELL: Duration = Duration::from_secs(1);

/// Orders that come within this time are one: timeout(1) sends its signal to the process and to the group that it is in.
const AT_ONCE: Duration = Duration::from_millis(250);

/// What ends a machine from outside.
#[derive(Clone, Debug)]
enum Order {
    Escape,
    Signal(String),
    Timeout(Duration),
}

/// Runs the machine that `args` describes; the exit status, or an error of the host or of usage.
pub fn run(args: &Run) -> Result<u8> {
    run_observed(args, None, None)
}

/// The same with the profile of its blocks, for so long at most.
pub fn run_observed(
    args: &Run,
    profile: Option<Arc<Profile>>,
    limit: Option<Duration>,
) -> Result<u8> {
    if args.print_sandbox {
        return sandbox::print(args);
    }
    own_memory_unsafe::prepare_allocator(args.cpus);
    end_at_panic();
    warnings::show();
    let modules = args.module.iter().map(|(file, _)| file);
    for file in args.kernel.iter().chain(&args.initrd).chain(modules) {
        check_readable(file)?;
    }
    size::check(args.memory, size::of_host())?;
    domain::check(args)?;
    raise_descriptor_limit();
    if args.sandbox {
        sandbox::begin()?;
    }
    let stats = args.stats.as_deref().map(StatsFile::create).transpose()?;
    let (disks, files) = open_disks(args)?;
    let shares = open_shares(args)?;
    let vsock = open_vsock(args)?;
    let boot = Boot::choose(args, &disks)?;
    let signals = Signals::block()?;
    let perf_map = explain::perf_map(args)?.map(Arc::new);
    if args.sandbox {
        sandbox::enter(args, &boot.files(), &files)?;
    }
    let signals = signals.watch()?;
    let lines = Lines::open(args)?;
    let observers = Observers { profile, perf_map };
    let config = MachineConfig {
        observers,
        ..configuration(args, boot, (&disks, &shares, vsock), &lines)?
    };
    let mut machine = Machine::new(config)?;
    eprintln!("doppel: {}", machine.engine());
    let session = Session::start(&machine, lines, &signals)?;
    if let Some(limit) = limit {
        session.end_after(&machine, limit)?;
    }
    own_memory_unsafe::keep_small();
    let ending = machine.run();
    let order = session.end(&ending);
    if let Some(file) = stats {
        file.write(machine.stats())?;
    }
    Ok(report(&ending?, order.as_ref()))
}

/// A thread of the monitor that panics is not there for the guest any more, whatever it was for, and others may wait for it for ever.
fn end_at_panic() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let name = thread.name().unwrap_or("a thread without a name");
        let why = with_advice(&info.to_string().replace('\n', " "));
        eprintln!(
            "doppel: the machine ends here, for a thread of the monitor ({name}) cannot go on; what the guest has flushed is on its disks. \
             Where the host is not short of memory or threads, this is a bug: {why}"
        );
        std::process::exit(1);
    }));
}

/// The disks, open and locked for as long as the machine runs; and the files of those that have processes, which open them again.
fn open_disks(args: &Run) -> Result<(Vec<Disk>, Vec<OpenFile>)> {
    let apart = args.driver_domain.contains(&Domain::Disk);
    let open = |spec: &DiskSpec| {
        let (disk, files) = match apart {
            true => domain::disk(spec, args.sandbox).context("--disk")?,
            false => (spec.open().context("--disk")?, Vec::new()),
        };
        let told: Disk = Arc::new(ToldDisk::new(disk, spec.path.clone()));
        anyhow::Ok((told, files))
    };
    let disks: Result<Vec<_>> = args.devices.disks().map(open).collect();
    let (disks, files): (_, Vec<_>) = disks?.into_iter().unzip();
    Ok((disks, files.concat()))
}

/// The shared directories, open for as long as the machine runs.
fn open_shares(args: &Run) -> Result<Vec<Arc<Share>>> {
    let specs: Vec<_> = args.devices.shares().collect();
    let mut tags = BTreeSet::new();
    if let Some(twice) = specs.iter().find(|spec| !tags.insert(&spec.tag)) {
        bail!("--share: two directories have the tag {}", twice.tag);
    }
    let limits = Limits::of_process(specs.len());
    let open = |spec: &&ShareSpec| Ok(Arc::new(Share::open(spec, limits)?));
    specs.iter().map(open).collect()
}

/// The host's end of the socket device. In the sandbox nothing of its directory could be made or removed.
fn open_vsock(args: &Run) -> Result<Option<Arc<VsockSocket>>> {
    let open = |spec: &VsockSpec| {
        let socket = VsockSocket::open(&spec.path).with_context(|| {
            format!(
                "--vsock: nobody can listen at {}; name a path of at most 107 bytes in a directory that is yours, where nothing is",
                spec.path.display()
            )
        });
        socket.map(Arc::new)
    };
    args.devices.vsock().map(open).transpose()
}

/// A guest's connections and open files are descriptors of ours. The usual limit is low for the sake of old programs only; where it stays,
/// the guest has fewer of them.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

/// What is to be booted.
struct Boot {
    kernel: KernelSource,
    initrd: Option<PathBuf>,
    cmdline: String,
}

impl Boot {
    /// The host's files that it is read from.
    fn files(&self) -> Vec<PathBuf> {
        let kernel = match &self.kernel {
            KernelSource::File(path) => Some(path.clone()),
            KernelSource::Disk(_) => None,
        };
        kernel.into_iter().chain(self.initrd.clone()).collect()
    }

    fn choose(args: &Run, disks: &[Disk]) -> Result<Boot> {
        let given = args.cmdline.clone();
        if let Some(kernel) = &args.kernel {
            return Ok(Boot {
                kernel: kernel.into(),
                initrd: args.initrd.clone(),
                cmdline: given.unwrap_or_else(|| match is_multiboot(&kernel.into()) {
                    Ok(true) => String::new(),
                    // What is wrong with it is said when it is loaded.
                    _ => consoles(args),
                }),
            });
        }
        if let (Some(spec), Some(disk)) = (args.devices.disks().next(), disks.first()) {
            return Ok(Boot {
                kernel: KernelSource::Disk(BootDisk {
                    disk: disk.clone(),
                    name: spec.path.clone(),
                    cmdline: given,
                }),
                initrd: args.initrd.clone(),
                // What there is already names the serial port, or is given it.
                cmdline: match args.cmdline {
                    None if args.devices.has_console_on_stdio() => CONSOLE_TOO.to_owned(),
                    _ => String::new(),
                },
            });
        }
        let progress = |line: &str| eprintln!("doppel: {line}");
        let guest = guest::debian(guest::KERNEL_PACKAGE, &progress).context(
            "the default guest could not be assembled; name a kernel of your own with --kernel FILE (and --initrd FILE)",
        )?;
        Ok(Boot {
            kernel: guest.kernel.into(),
            initrd: Some(args.initrd.clone().unwrap_or(guest.initrd)),
            cmdline: given.unwrap_or_else(|| default_cmdline(args)),
        })
    }
}

/// Has Linux take the first virtio console besides.
const CONSOLE_TOO: &str = "console=hvc0";

/// Where a kernel is to have its console.
fn consoles(args: &Run) -> String {
    match args.devices.has_console_on_stdio() {
        true => format!("console=ttyS0 {CONSOLE_TOO}"),
        false => "console=ttyS0".to_owned(),
    }
}

/// The default guest's command line: the console, and what the terminal there is like.
fn default_cmdline(args: &Run) -> String {
    let console = consoles(args);
    let on_terminal = args.serial() == Serial::Stdio || args.devices.has_console_on_stdio();
    match terminal::size() {
        Some((rows, columns)) if on_terminal => {
            let name = std::env::var("TERM").unwrap_or_default();
            let plain = |c: char| c.is_ascii_alphanumeric() || "-+._".contains(c);
            let name = Some(name).filter(|n| !n.is_empty() && n.chars().all(plain));
            let name = name.as_deref().unwrap_or("vt220");
            format!("{console} doppel.tty={rows}x{columns},{name}")
        }
        _ => console,
    }
}

fn configuration(
    args: &Run,
    boot: Boot,
    (disks, shares, vsock): (&[Disk], &[Arc<Share>], Option<Arc<VsockSocket>>),
    lines: &Lines,
) -> Result<MachineConfig> {
    let (source, sink) = lines.serial.ends();
    let opened = Opened {
        disks,
        networks: domain::networks(args),
        shares,
        consoles: lines.backends(),
        vsock,
        counted: args.stats.is_some(),
    };
    let devices = args.devices.configurations(opened);
    Ok(MachineConfig {
        engine: args.engine,
        cpus: args.cpus,
        cpu: args.cpu,
        memory: args.memory,
        memory_backing: domain::backing(args),
        memory_ahead: args.memory_ahead,
        initrd: boot.initrd,
        modules: args.module.clone(),
        cmdline: format!("{} {}", boot.cmdline, args.append)
            .trim()
            .to_owned(),
        serial: SerialBackend { sink, source },
        devices: devices.context("the host has no descriptors left")?,
        virtio: args.virtio,
        no_reboot: args.no_reboot,
        debug_exit: args.debug_exit,
        test_devices: args.test_devices,
        translate: translate_options(args),
        direct: args.direct,
        count: args.count_code,
        weigh: args.stats.is_some(),
        ..MachineConfig::new(boot.kernel)
    })
}

fn translate_options(args: &Run) -> TranslateOptions {
    let options = TranslateOptions {
        translate_limit: args.translate_limit,
        cache_size: args.code_cache as usize,
        ..TranslateOptions::default()
    };
    let off = args.translate_without.iter();
    off.filter_map(|name| Switch::named(name))
        .fold(options, |options, switch| options.without(switch))
}

fn check_readable(path: &Path) -> Result<()> {
    let advice = || {
        format!(
            "{} cannot be opened; name a file that exists and is readable",
            path.display()
        )
    };
    // Asked before it is opened: to open a FIFO waits for a writer.
    if !path.metadata().with_context(advice)?.is_file() {
        bail!("{} is no regular file", path.display());
    }
    File::open(path).map(|_| ()).with_context(advice)
}

/// The serial port and the consoles.
struct Lines {
    serial: Console,
    consoles: Vec<(Console, Arc<CharLink>)>,
    /// Which of the consoles has standard input and output; else the serial port may have it.
    on_stdio: Option<usize>,
    serial_on_stdio: bool,
    window: Arc<WindowSize>,
}

impl Lines {
    fn open(args: &Run) -> Result<Lines> {
        let specs: Vec<_> = args.devices.consoles().collect();
        let has_stdio = |n: &usize| specs[*n].to == Serial::Stdio;
        let mut on_stdio = (0..specs.len()).filter(has_stdio);
        let serial = args.serial();
        let serial_on_stdio = serial == Serial::Stdio;
        let first = on_stdio.next();
        if on_stdio.next().is_some() || (first.is_some() && serial_on_stdio) {
            bail!(
                "--console: one console or serial port alone can have stdio; lead the others to file=PATH or none"
            );
        }
        let open = |spec: &&ConsoleSpec| {
            let console = Console::open("--console", &spec.to)?;
            let link = Arc::new(CharLink::default());
            let frontend: Arc<dyn Backed> = link.clone();
            console.connect(Arc::downgrade(&frontend));
            Ok((console, link))
        };
        let (rows, columns) = terminal::size().unwrap_or_default();
        Ok(Lines {
            serial: Console::open("--serial", &serial)?,
            consoles: specs.iter().map(open).collect::<Result<_>>()?,
            on_stdio: first,
            serial_on_stdio,
            window: Arc::new(WindowSize::new(rows, columns)),
        })
    }

    /// The consoles as the machine sees them.
    fn backends(&self) -> Vec<(ConsoleBackend, Arc<CharLink>)> {
        let all = self.consoles.iter().enumerate();
        let backend = |(n, (console, link)): (usize, &(Console, Arc<CharLink>))| {
            let (source, sink) = console.ends();
            let on_stdio = self.on_stdio == Some(n);
            let size = (on_stdio && terminal::size().is_some()).then(|| self.window.clone());
            (ConsoleBackend { sink, source, size }, link.clone())
        };
        all.map(backend).collect()
    }

    /// The one that has standard input and output.
    fn on_stdio(&self) -> Option<&Console> {
        match self.on_stdio {
            Some(n) => self.consoles.get(n).map(|(console, _)| console),
            None => self.serial_on_stdio.then_some(&self.serial),
        }
    }

    /// What tells the guest of another size of the window.
    fn resizer(&self) -> impl Fn() + Send + 'static {
        let link = self.on_stdio.and_then(|n| self.consoles.get(n));
        let (link, window) = (link.map(|(_, link)| link.clone()), self.window.clone());
        move || {
            if let (Some(link), Some((rows, columns))) = (&link, terminal::size()) {
                window.set(rows, columns);
                link.backend_ready();
            }
        }
    }

    fn finish(&mut self, limit: Option<Duration>) {
        self.serial.finish(limit);
        for (console, _) in &mut self.consoles {
            console.finish(limit);
        }
    }
}

/// The user's side of a running machine: terminal, serial port, consoles, signals.
struct Session {
    lines: Lines,
    raw: Option<Raw>,
    order: Arc<OnceLock<Order>>,
}

impl Session {
    fn start(machine: &Machine, lines: Lines, signals: &Watch) -> Result<Session> {
        let raw = match lines.on_stdio() {
            Some(_) => Raw::new()?,
            None => None,
        };
        let frontend = Arc::downgrade(&machine.serial_frontend());
        lines.serial.connect(frontend);
        let order = Arc::new(OnceLock::new());
        let end = ender(machine.stop_handle(), order.clone());
        match (lines.on_stdio(), &raw) {
            (Some(console), Some(_)) => {
                eprintln!("doppel: Ctrl-A x leaves, Ctrl-A h tells more; Ctrl-C goes to the guest");
                let end = end.clone();
                console.listen_to_terminal(move || end(Order::Escape))?;
            }
            (Some(console), None) => console.listen_to_pipe()?,
            (None, _) => {}
        }
        let again = raw.as_ref().map(Raw::again);
        signals.tell(Handlers {
            end: Box::new(move |name| end(Order::Signal(name.to_owned()))),
            continued: Box::new(move || again.iter().for_each(|again| again())),
            resized: Box::new(lines.resizer()),
        });
        Ok(Session { lines, raw, order })
    }

    /// Ends the machine after some time.
    fn end_after(&self, machine: &Machine, limit: Duration) -> Result<()> {
        let (stop, order) = (machine.stop_handle(), self.order.clone());
        thread::Builder::new()
            .name("time limit".to_owned())
            .spawn(narrowed(Kind::Console, move || {
                thread::sleep(limit);
                if order.set(Order::Timeout(limit)).is_ok() {
                    stop.stop();
                }
            }))
            .context("a thread cannot be started")?;
        Ok(())
    }

    /// Gives the terminal back once the guest's last output is out.
    fn end(mut self, ending: &Result<Ending, doppel_machine::MachineError>) -> Option<Order> {
        let told = matches!(ending, Ok(Ending::Stopped));
        self.lines.finish(told.then_some(FAREWELL));
        drop(self.raw);
        self.order.get().cloned()
    }
}

/// Carries out the first order; at a later one, nobody waits any more (the watchdog sees to the terminal).
fn ender(stop: StopHandle, order: Arc<OnceLock<Order>>) -> impl Fn(Order) + Clone + Send + 'static {
    let first = Arc::new(OnceLock::new());
    move |given| {
        // The first counts; what it was is told in the end.
        let _ = order.set(given);
        stop.stop();
        if first.get_or_init(Instant::now).elapsed() > AT_ONCE {
            std::process::exit(1);
        }
    }
}

/// Tells how it ended; the exit status.
fn report(ending: &Ending, order: Option<&Order>) -> u8 {
    match ending {
        Ending::PoweredOff => 0,
        Ending::Halted => {
            eprintln!("doppel: the guest halted");
            0
        }
        Ending::Reset => {
            eprintln!("doppel: the guest asked for a reboot (--no-reboot)");
            0
        }
        Ending::DebugExit(status) => *status,
        Ending::Died(death) => {
            eprint!("{}", obituary(death));
            2
        }
        Ending::Stopped => match order {
            Some(Order::Signal(name)) => {
                eprintln!("doppel: ended by {name}");
                1
            }
            Some(Order::Timeout(limit)) => {
                eprintln!("doppel: ended after {limit:?}");
                0
            }
            _ => {
                eprintln!("\ndoppel: left");
                0
            }
        },
    }
}

fn obituary(death: &Death) -> String {
    let mut text = format!(
        "doppel: the guest died: {}\n{}",
        death.cause, death.registers
    );
    if !death.trace.is_empty() {
        text.push_str("last instructions:\n");
    }
    for line in &death.trace {
        text.push_str(&format!("  {line}\n"));
    }
    text
}

/// The file of `--stats`, made at the start so that a bad path shows then.
struct StatsFile<'a>(&'a Path, File);

impl StatsFile<'_> {
    fn create(path: &Path) -> Result<StatsFile<'_>> {
        let file = File::create(path).with_context(|| {
            format!(
                "--stats: {} cannot be written; name a file in a directory that is yours",
                path.display()
            )
        })?;
        Ok(StatsFile(path, file))
    }

    fn write(self, stats: &Stats) -> Result<()> {
        let mut file = BufWriter::new(self.1);
        serde_json::to_writer_pretty(&mut file, stats)?;
        writeln!(file)
            .and_then(|()| file.flush())
            .with_context(|| format!("writing {}", self.0.display()))
    }
}
