//! What is booted: Debian's kernel, and an initramfs of the default guest, our program, and user land from Debian packages.
//!
//! Natively the same files are unpacked into a directory that is made the root.

use anyhow::{Context, Result, ensure};
use doppel_cli::guest::cpio::Archive;
use doppel_cli::guest::package::{self, Kind};
use doppel_cli::guest::{self, KERNEL_PACKAGE};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = "doppel-bench-guest";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Position-dependent and without symbols: a static program as a distribution has them.
const FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static -C strip=symbols";

/// Packages, and which of their files by the beginnings of their paths.
const PACKAGES: &[(&str, &[&str])] = &[
    ("busybox-static", &["bin/busybox"]),
    (
        "libc6",
        &[
            "lib64/",
            "lib/x86_64-linux-gnu/ld-linux",
            "lib/x86_64-linux-gnu/lib",
        ],
    ),
    ("libcrypt1", &["lib/"]),
    ("coreutils", &["bin/true"]),
    (
        "perl-base",
        &["usr/bin/perl", "usr/lib/x86_64-linux-gnu/perl-base/"],
    ),
    ("tcc", &["usr/bin/", "usr/lib/"]),
    ("libc6-dev", &["usr/include/", "usr/lib/x86_64-linux-gnu/"]),
    (
        "linux-libc-dev",
        &[
            "usr/include/linux/",
            "usr/include/asm",
            "usr/include/x86_64-linux-gnu/asm/",
        ],
    ),
    ("gcc-12", &["usr/bin/", "usr/lib/gcc/"]),
    ("cpp-12", &["usr/lib/gcc/"]),
    ("libgcc-12-dev", &["usr/lib/gcc/"]),
    ("libgcc-s1", &["lib/"]),
    ("binutils", &["usr/bin/as", "usr/bin/ld"]),
    (
        "binutils-x86-64-linux-gnu",
        &["usr/bin/x86_64-linux-gnu-as", "usr/bin/x86_64-linux-gnu-ld"],
    ),
    ("libbinutils", &["usr/lib/"]),
    ("libctf0", &["usr/lib/"]),
    ("libjansson4", &["usr/lib/"]),
    ("libisl23", &["usr/lib/"]),
    ("libmpc3", &["usr/lib/"]),
    ("libmpfr6", &["usr/lib/"]),
    ("libgmp10", &["usr/lib/"]),
    ("libzstd1", &["usr/lib/"]),
    ("zlib1g", &["lib/"]),
    ("python3.11-minimal", &["usr/bin/"]),
    ("libpython3.11-minimal", &["usr/lib/python3.11/"]),
    (
        "libpython3.11-stdlib",
        &[
            "usr/lib/python3.11/json/",
            "usr/lib/python3.11/lib-dynload/_json",
        ],
    ),
    ("libexpat1", &["lib/"]),
];
/// The only static libraries that are linked with; the others are the largest files of all.
const LIBRARIES: &[&str] = &["libtcc1.a", "libc_nonshared.a", "libgcc.a"];
/// What a compiler's package has beside the compiler, as large as this.
const OTHER_PROGRAMS: &[&str] = &["lto-dump-12", "/lto1"];

/// Commands of busybox that the shell script uses.
const APPLETS: &[&str] = &[
    "awk", "basename", "cat", "cksum", "cp", "cut", "expr", "find", "grep", "head", "ln", "ls",
    "mkdir", "mv", "rm", "sed", "sort", "tail", "tr", "uniq", "wc", "xargs",
];

const INIT: &str = include_str!("../root/init");
const WHOLE: &[(&str, &str)] = &[
    ("commands.sh", include_str!("../root/commands.sh")),
    ("program.pl", include_str!("../root/program.pl")),
    ("program.py", include_str!("../root/program.py")),
];
const C_PROGRAM: &str = include_str!("../root/program.c");
const GENERATED: usize = 400;

/// The files of a run.
pub struct Guest {
    pub kernel: PathBuf,
    /// With everything that is measured.
    pub initrd: PathBuf,
    /// The default guest with an init that only says that it runs.
    pub boot_initrd: PathBuf,
    /// The program that does the work.
    pub program: PathBuf,
    files: Vec<Entry>,
}

struct Entry {
    path: String,
    kind: Kind,
    content: Vec<u8>,
}

impl Guest {
    /// Builds and assembles it in `directory`.
    pub fn assemble(workspace: &Path, directory: &Path) -> Result<Guest> {
        let progress = |line: &str| eprintln!("bench: {line}");
        let default = guest::debian(KERNEL_PACKAGE, &progress)?;
        let program = build(workspace)?;
        let files = files(&fs::read(&program)?, &progress)?;
        let base = fs::read(&default.initrd)?;
        let guest = Guest {
            kernel: default.kernel,
            initrd: directory.join("initrd"),
            boot_initrd: directory.join("initrd-boot"),
            program,
            files,
        };
        fs::write(&guest.initrd, [base.clone(), guest.archive()].concat())?;
        let mut init = Archive::new();
        init.file("init", 0o755, INIT.as_bytes());
        fs::write(&guest.boot_initrd, [base, init.finish()].concat())?;
        Ok(guest)
    }

    /// The rows of the program: group and name.
    pub fn rows(&self) -> Result<Vec<(String, String)>> {
        let output = Command::new(&self.program).arg("list").output()?;
        let text = String::from_utf8(output.stdout)?;
        let pair = |line: &str| {
            let (group, row) = line.split_once(' ')?;
            Some((group.to_owned(), row.to_owned()))
        };
        Ok(text.lines().filter_map(pair).collect())
    }

    fn archive(&self) -> Vec<u8> {
        let mut archive = Archive::new();
        for entry in &self.files {
            match &entry.kind {
                Kind::File(mode) => archive.file(&entry.path, *mode, &entry.content),
                Kind::Symlink(target) => archive.symlink(&entry.path, target),
            }
        }
        archive.finish()
    }

    /// Writes the files below `root`, which is to be the root of the native run.
    pub fn unpack(&self, root: &Path) -> Result<()> {
        fs::create_dir_all(root.join("tmp"))?;
        fs::create_dir_all(root.join("dev"))?;
        fs::write(root.join("dev/null"), "")?; // enough for those who read it; nobody here writes to it
        for entry in &self.files {
            let path = root.join(&entry.path);
            fs::create_dir_all(path.parent().context("a file without a directory")?)?;
            match &entry.kind {
                Kind::File(mode) => {
                    fs::write(&path, &entry.content)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
                Kind::Symlink(target) => symlink(target, &path)?,
            }
        }
        Ok(())
    }
}

/// The measured program, compiled.
fn build(workspace: &Path) -> Result<PathBuf> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let directory = workspace.join("target/bench");
    let status = Command::new(cargo)
        .args(["build", "--release", "--quiet", "--package", PROGRAM])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&directory)
        .current_dir(workspace)
        .env("RUSTFLAGS", FLAGS)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .context("running cargo")?;
    ensure!(status.success(), "{PROGRAM} was not built");
    Ok(directory.join(TARGET).join("release").join(PROGRAM))
}

fn files(program: &[u8], progress: &dyn Fn(&str)) -> Result<Vec<Entry>> {
    let mut files = from_packages(progress)?;
    let mut add = |path: &str, mode, content: &[u8]| {
        files.push(Entry {
            path: path.to_owned(),
            kind: Kind::File(mode),
            content: content.to_owned(),
        });
    };
    add("init", 0o755, INIT.as_bytes());
    add("bench/guest", 0o755, program);
    for (name, text) in WHOLE {
        add(&format!("bench/whole/{name}"), 0o644, text.as_bytes());
    }
    add("bench/whole/program.c", 0o644, c_program().as_bytes());
    files.extend(APPLETS.iter().map(|applet| Entry {
        path: format!("bench/bin/{applet}"),
        kind: Kind::Symlink("/bin/busybox".to_owned()),
        content: Vec::new(),
    }));
    Ok(files)
}

fn from_packages(progress: &dyn Fn(&str)) -> Result<Vec<Entry>> {
    let names: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
    let debs = guest::packages("bench", &names, progress)?;
    let mut entries = Vec::new();
    for (deb, (_, wanted)) in debs.iter().zip(PACKAGES) {
        package::visit(deb, |mut member| {
            if is_wanted(&member.path, wanted) {
                entries.push(Entry {
                    path: member.path.clone(),
                    kind: member.kind.clone(),
                    content: content(&mut member)?,
                });
            }
            Ok(())
        })?;
    }
    Ok(entries)
}

fn is_wanted(path: &str, beginnings: &[&str]) -> bool {
    let is_library = || LIBRARIES.iter().any(|name| path.ends_with(name));
    beginnings.iter().any(|start| path.starts_with(start))
        && (!path.ends_with(".a") || is_library())
        && !OTHER_PROGRAMS.iter().any(|name| path.ends_with(name))
}

fn content(member: &mut package::Member) -> Result<Vec<u8>> {
    match member.kind {
        Kind::File(_) => member.read(),
        Kind::Symlink(_) => Ok(Vec::new()),
    }
}

/// The C program, with generated functions that call one another in a chain.
fn c_program() -> String {
    let mut text = C_PROGRAM.to_owned();
    text.push_str("\nstatic uint32_t f0(uint32_t a, uint32_t b) { return a ^ b; }\n");
    for n in 1..GENERATED {
        text.push_str(&c_function(n));
    }
    let last = GENERATED - 1;
    text.push_str(&format!(
        "uint32_t generated(uint32_t a, uint32_t b) {{ return f{last}(a, b); }}\n"
    ));
    text
}

fn c_function(n: usize) -> String {
    let before = n - 1;
    format!(
        "static uint32_t f{n}(uint32_t a, uint32_t b)\n{{\n    uint32_t sum = {n};\n    \
         for (int i = 0; i < {}; i++) {{\n        if (a & (1u << i))\n            sum += b * {}u + i;\n        \
         else\n            sum ^= (a >> 3) + \"doppel\"[i % 6];\n    }}\n    return f{before}(b + sum, a - {n});\n}}\n",
        n % 7 + 1,
        n * 7919,
    )
}
