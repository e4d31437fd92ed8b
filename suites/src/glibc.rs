//! glibc's own tests of its mathematical functions, built from Debian's source of it, against the C library that Debian ships.
//!
//! Problem: glibc's Makefiles build its tests against the library that they have just built, which takes an hour.
//! Idea: the tests are programs like any, and see public headers alone but for a few that say what to expect of an architecture; these are put
//! behind all others in the compiler's search. What `math/Makefile` does for each test is done here.

use crate::files::{self, progress};
use anyhow::{Context, Result, ensure};
use doppel_cli::guest;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "glibc-source";
/// In the package; tar reads its compression.
const PACKED: &str = "usr/src/glibc/glibc-2.36.tar.xz";
const FOLDER: &str = "glibc-2.36";
/// The types that a mathematical function is tested for.
const TYPES: &[&str] = &["float", "double", "ldouble"];
/// Runs the tests of one function.
const RUN: &str = "#!/bin/sh\nfor type in float double ldouble; do\n    \
    [ -e test-$type-$1 ] || continue\n    ./test-$type-$1 | tail -n 4 >$TMPDIR/math || { cat $TMPDIR/math; exit 1; }\n    \
    grep -q 'All tests passed' $TMPDIR/math || { cat $TMPDIR/math; exit 1; }\ndone\n";

/// The folder with `math`, in which the tests of these functions are, and the package that the guest needs to run them.
pub fn build(workshop: &Path, math: &[&str]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let source = guest::packages(SOURCE, &[SOURCE], &progress)?;
    let library = guest::packages("glibc", &["libc6"], &progress)?;
    let place = workshop.join("glibc");
    let recipe = files::recipe(&[&source, &library]);
    if !files::is_of(&place, &recipe) {
        files::remove(&place)?;
        files::unpack(&source, &place)?;
        let mut tar = Command::new("tar");
        let status = tar.current_dir(&place).args(["-xf", PACKED]).status();
        let status = status.context("tar cannot be run")?;
        ensure!(status.success(), "{PACKED} cannot be unpacked");
        files::mark(&place, &recipe)?;
    }
    let work = Work {
        source: place.join(FOLDER),
        objects: place.join("objects"),
        built: place.join("built"),
    };
    fs::create_dir_all(work.built.join("math"))?;
    fs::create_dir_all(&work.objects)?;
    eprintln!("suites: building what is missing of glibc's tests");
    work.math(math)?;
    let built = work.built;
    Ok((built, library))
}

struct Work {
    source: PathBuf,
    objects: PathBuf,
    built: PathBuf,
}

impl Work {
    fn math(&self, functions: &[&str]) -> Result<()> {
        let ulps = self.source.join("sysdeps/x86_64/fpu/libm-test-ulps");
        let header = self.objects.join("libm-test-ulps.h");
        self.generate(&[("-u", &ulps), ("-H", &header)])?;
        for name in TYPES {
            let text = format!("#include <test-{name}.h>\n#include <libm-test-support.c>\n");
            let object = self.support(name);
            self.gcc(&text, &object, &["-c"], &[])?;
        }
        for function in functions {
            let math = self.source.join("math");
            let table = math.join(format!("auto-libm-test-out-{function}"));
            let table = if table.exists() {
                table
            } else {
                "/dev/null".into()
            };
            let input = math.join(format!("libm-test-{function}.inc"));
            let output = self.objects.join(format!("libm-test-{function}.c"));
            self.generate(&[("-c", &input), ("-a", &table), ("-C", &output)])?;
            for name in TYPES {
                self.function(function, name)?;
            }
        }
        let run = self.built.join("math/run");
        fs::write(&run, RUN)?;
        Ok(fs::set_permissions(
            run,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?)
    }

    fn support(&self, name: &str) -> PathBuf {
        self.objects.join(format!("support-{name}.o"))
    }

    fn function(&self, function: &str, name: &str) -> Result<()> {
        let mut text = format!("#include <test-{name}.h>\n");
        for part in ["exceptions", "errno", "scalar"] {
            text += &format!("#include <test-math-{part}.h>\n");
        }
        text += &format!("#include <libm-test-{function}.c>\n");
        let program = self.built.join(format!("math/test-{name}-{function}"));
        let math = "-fno-inline -ffloat-store -fsignaling-nans -frounding-math";
        let options: Vec<&str> = math.split(' ').collect();
        self.gcc(
            &text,
            &program,
            &options,
            &[&self.support(name), "-lm".as_ref()],
        )
    }

    /// Numbers from the tables, as C, in the file that comes last.
    fn generate(&self, options: &[(&str, &PathBuf)]) -> Result<()> {
        if options.last().is_some_and(|(_, output)| output.exists()) {
            return Ok(());
        }
        let mut python = Command::new("python3");
        python.arg(self.source.join("math/gen-libm-test.py"));
        for (option, path) in options {
            python.arg(option).arg(path);
        }
        let status = python.status().context("python3 cannot be run")?;
        ensure!(status.success(), "gen-libm-test.py failed");
        Ok(())
    }

    /// Compiles a text of C, against the host's own headers first, unless that has been done.
    fn gcc(&self, text: &str, output: &Path, options: &[&str], more: &[&Path]) -> Result<()> {
        if output.exists() {
            return Ok(());
        }
        let name = output.file_name().context("no file name")?;
        let partial = self.objects.join(name).with_extension("partial");
        let file = self.objects.join(name).with_extension("test.c");
        fs::write(&file, text)?;
        let mut gcc = Command::new("gcc");
        gcc.args("-std=gnu11 -O1 -s -w -fno-builtin -D_GNU_SOURCE -DMODULE_NAME=testsuite -DTIMEOUTFACTOR=10".split(' '));
        gcc.args(["-include", "limits.h"]);
        gcc.arg("-I").arg(self.source.join("support"));
        for folder in ["math", ""] {
            gcc.arg("-iquote").arg(self.source.join(folder));
        }
        gcc.arg("-idirafter").arg(&self.objects);
        for folder in BEHIND {
            gcc.arg("-idirafter").arg(self.source.join(folder));
        }
        gcc.args(options)
            .arg(file)
            .args(more)
            .arg("-o")
            .arg(&partial);
        let status = gcc.status().context("gcc cannot be run")?;
        ensure!(status.success(), "{} cannot be built", output.display());
        Ok(fs::rename(partial, output)?)
    }
}

/// Where what is no public header is looked for.
const BEHIND: &[&str] = &[
    "math",
    "sysdeps/x86_64/fpu",
    "sysdeps/x86/fpu",
    "sysdeps/x86",
    "sysdeps/generic",
    "",
    "include",
];
