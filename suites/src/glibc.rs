//! glibc's own tests of its mathematical and string functions, built from Debian's source of it, against the C library that Debian ships.
//!
//! Problem: glibc's Makefiles build its tests against the library that they have just built, which takes an hour.
//! Idea: the tests are programs like any, and see public headers alone but for a few that say what to expect of an architecture; these are put
//! behind all others in the compiler's search. What `math/Makefile` and `string/Makefile` do for each test is done here.

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

/// The folder with `math` and `string`, in which the tests of these functions are, and the package that the guest needs to run them.
pub fn build(workshop: &Path, math: &[&str], string: &[&str]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let source = guest::packages(SOURCE, &[SOURCE], &progress)?;
    let library = guest::packages("glibc", &["libc6"], &progress)?;
    let place = workshop.join("glibc");
    let built = place.join("built");
    let recipe = files::recipe(&[&source, &library]) + &math.join(",") + &string.join(",");
    if !files::is_of(&place, &recipe) {
        eprintln!("suites: building tests of glibc");
        files::remove(&place)?;
        files::unpack(&source, &place)?;
        let tar = Command::new("tar")
            .current_dir(&place)
            .args(["-xf", PACKED])
            .status();
        ensure!(
            tar.context("tar cannot be run")?.success(),
            "{PACKED} cannot be unpacked"
        );
        let work = Work {
            source: place.join(FOLDER),
            objects: place.join("objects"),
            built: built.clone(),
        };
        for folder in [&work.objects, &built.join("math"), &built.join("string")] {
            fs::create_dir_all(folder)?;
        }
        work.math(math)?;
        work.string(string)?;
        files::mark(&place, &recipe)?;
    }
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

    /// Numbers from the tables, as C.
    fn generate(&self, options: &[(&str, &PathBuf)]) -> Result<()> {
        let mut python = Command::new("python3");
        python.arg(self.source.join("math/gen-libm-test.py"));
        for (option, path) in options {
            python.arg(option).arg(path);
        }
        let status = python.status().context("python3 cannot be run")?;
        ensure!(status.success(), "gen-libm-test.py failed");
        Ok(())
    }

    fn string(&self, tests: &[&str]) -> Result<()> {
        fs::write(self.objects.join("config.h"), "")?;
        let library = self.objects.join("libsupport.a");
        let mut ar = Command::new("ar");
        ar.arg("rc").arg(&library);
        for name in SUPPORT {
            let object = self.objects.join(format!("{name}.o"));
            let text = format!("#include <support/{name}.c>\n");
            self.gcc(&text, &object, &["-c", "-w"], &[])?;
            ar.arg(object);
        }
        let status = ar.status().context("ar cannot be run")?;
        ensure!(status.success(), "ar failed");
        for test in tests {
            let text = format!("#include <string/test-{test}.c>\n");
            let program = self.built.join(format!("string/test-{test}"));
            self.gcc(&text, &program, &[], &[&library])?;
        }
        Ok(())
    }

    /// Compiles a text of C, against the host's own headers first.
    fn gcc(&self, text: &str, output: &Path, options: &[&str], more: &[&Path]) -> Result<()> {
        let name = output.file_name().context("no file name")?;
        let file = self.objects.join(name).with_extension("test.c");
        fs::write(&file, text)?;
        let mut gcc = Command::new("gcc");
        gcc.args("-std=gnu11 -O1 -s -w -fno-builtin -D_GNU_SOURCE -DMODULE_NAME=testsuite -DTIMEOUTFACTOR=10".split(' '));
        gcc.args(["-include", "limits.h"]);
        gcc.args(PATHS.iter().map(|path| format!("-D{path}_PATH=\"/tmp\"")));
        gcc.arg("-I").arg(self.source.join("support"));
        for folder in ["math", "string", ""] {
            gcc.arg("-iquote").arg(self.source.join(folder));
        }
        gcc.arg("-idirafter").arg(&self.objects);
        for folder in BEHIND {
            gcc.arg("-idirafter").arg(self.source.join(folder));
        }
        gcc.args(options).arg(file).args(more).arg("-o").arg(output);
        let status = gcc.status().context("gcc cannot be run")?;
        ensure!(status.success(), "{} cannot be built", output.display());
        Ok(())
    }
}

/// Where what is no public header is looked for.
const BEHIND: &[&str] = &[
    "math",
    "string",
    "sysdeps/x86_64/fpu",
    "sysdeps/x86/fpu",
    "sysdeps/x86",
    "sysdeps/generic",
    "",
    "include",
];

/// Of the library that all tests share, what those of strings need.
const SUPPORT: &[&str] = &[
    "check",
    "delayed_exit",
    "ignore_stderr",
    "support_paths",
    "support_record_failure",
    "support_test_main",
    "temp_file",
    "write_message",
    "xasprintf",
    "xcalloc",
    "xfork",
    "xmalloc",
    "xmmap",
    "xmprotect",
    "xmunmap",
    "xrealloc",
    "xsignal",
    "xstrdup",
    "xwaitpid",
    "xsysconf",
    "support_quote_blob",
    "support_test_compare_blob",
    "support_test_compare_failure",
    "support_test_compare_string",
    "support_stack_alloc",
];

/// What `support_paths.c` is told.
const PATHS: &[&str] = &[
    "SRCDIR",
    "OBJDIR",
    "OBJDIR_ELF_LDSO",
    "INSTDIR",
    "LIBDIR",
    "BINDIR",
    "SBINDIR",
    "ROOTSBINDIR",
    "SLIBDIR",
    "COMPLOCALEDIR",
];
