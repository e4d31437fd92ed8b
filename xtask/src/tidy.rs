//! `cargo xtask tidy`: the rules of ARCHITECTURE.md that no compiler checks.
//!
//! Each rule is a function from the tree of sources to complaints, so that each can be shown to fail.

use crate::source;
use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a file or crate does wrong, with its place.
pub type Complaint = String;

/// A crate's folder and the folders of the crates it may depend on, development included. A crate that is not listed
/// is a complaint.
const ARROWS: &[(&str, &[&str])] = &[
    ("footprint", &[]),
    ("seccomp", &[]),
    ("memory", &["seccomp"]),
    ("cpu/x86", &["memory"]),
    ("cpu/translate", &["cpu/x86", "memory", "seccomp"]),
    (
        "cpu/conformance",
        &[
            "memory",
            "cpu/x86",
            "cpu/translate",
            "cpu/direct",
            "cpu/kvm",
        ],
    ),
    ("cpu/direct", &["cpu/x86", "memory", "seccomp"]),
    ("cpu/kvm", &["cpu/x86", "memory"]),
    ("io/device", &["memory"]),
    ("io/pc", &["io/device", "memory"]),
    ("io/domain", &["seccomp"]),
    ("io/block", &["io/domain", "memory", "seccomp"]),
    ("io/bootdisk", &["io/block"]),
    (
        "io/virtio",
        &[
            "io/block",
            "io/device",
            "io/net",
            "io/share",
            "memory",
            "seccomp",
        ],
    ),
    ("io/share", &["memory"]),
    ("io/net", &["io/device", "io/domain"]),
    (
        "machine",
        &[
            "memory",
            "cpu/x86",
            "cpu/translate",
            "cpu/direct",
            "cpu/kvm",
            "io/device",
            "io/pc",
            "io/block",
            "io/bootdisk",
            "io/virtio",
            "io/net",
            "io/share",
            "seccomp",
            "footprint",
        ],
    ),
    ("cli", &["machine", "seccomp", "footprint"]),
    (
        "fuzz",
        &["memory", "cpu/x86", "cpu/translate", "cpu/direct"],
    ),
    (
        "fuzz/guided",
        &[
            "memory",
            "cpu/x86",
            "cpu/translate",
            "io/device",
            "io/block",
            "io/bootdisk",
            "io/net",
            "io/share",
            "io/virtio",
            "machine",
            "fuzz",
        ],
    ),
    ("bench", &["cli", "footprint"]),
    ("bench/guest", &[]),
    ("systems", &["cli", "bench"]),
    ("suites", &["cli"]),
    ("xtask", &["footprint"]),
];

const LINES_MAX: usize = 900;
const MANIFEST: &str = "Cargo.toml";
const MAP: &str = "ARCHITECTURE.md";
/// Tables whose rows name tests in their last column.
const CLAIMS: &[&str] = &["SPEC.md", "SECURITY.md"];
const SKIPPED: &[&str] = &["target", ".git", "corpus", "artifacts"];
const UNFINISHED: &[&str] = &["todo!", "unimplemented!", "#[ignore"];

/// Every file of the workspace by its path from the root; those that are no text have no content.
pub struct Tree(BTreeMap<String, String>);

impl Tree {
    /// Reads the workspace at `root`.
    pub fn read(root: &Path) -> Result<Tree> {
        let mut tree = Tree(BTreeMap::new());
        tree.add(root, "")?;
        Ok(tree)
    }

    fn add(&mut self, root: &Path, folder: &str) -> Result<()> {
        let entries = std::fs::read_dir(root.join(folder)).context("reading the workspace")?;
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = format!("{folder}{name}");
            if entry.file_type()?.is_dir() {
                if !SKIPPED.contains(&name.as_str()) {
                    self.add(root, &format!("{path}/"))?;
                }
            } else {
                let content = std::fs::read_to_string(entry.path()).unwrap_or_default();
                self.0.insert(path, content);
            }
        }
        Ok(())
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    fn has(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        let below = format!("{path}/");
        self.0.keys().any(|p| p == path || p.starts_with(&below))
    }

    fn rust(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter().filter(|(path, _)| path.ends_with(".rs"))
    }
}

/// All rules.
pub fn check(tree: &Tree) -> Vec<Complaint> {
    let rules = [
        arrows,
        code_map,
        claims,
        documents,
        heads,
        lengths,
        unfinished,
        unsafe_code,
    ];
    rules.iter().flat_map(|rule| rule(tree)).collect()
}

/// Crates depend only on those that ARROWS allows, and for their tests on themselves with a feature.
fn arrows(tree: &Tree) -> Vec<Complaint> {
    let folders = crate_folders(tree);
    let mut complaints = Vec::new();
    for (path, manifest) in &tree.0 {
        let Some(folder) = path.strip_suffix("/Cargo.toml") else {
            continue;
        };
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == folder) else {
            complaints.push(format!(
                "{path}: a crate that xtask's table of arrows does not know"
            ));
            continue;
        };
        for name in dependencies(manifest) {
            match folders.get(&name) {
                Some(other) if other != folder && !allowed.contains(&other.as_str()) => {
                    complaints.push(format!("{path}: {folder} may not depend on {other}"));
                }
                _ => {}
            }
        }
    }
    complaints
}

/// The workspace's own crates: package name to folder.
fn crate_folders(tree: &Tree) -> BTreeMap<String, String> {
    let manifests = tree.0.iter().filter_map(|(path, text)| {
        let folder = path.strip_suffix(MANIFEST)?.trim_end_matches('/');
        let table: toml::Table = text.parse().ok()?;
        let name = table.get("package")?.get("name")?.as_str()?.to_owned();
        Some((name, folder.to_owned()))
    });
    manifests.collect()
}

fn dependencies(manifest: &str) -> Vec<String> {
    let table: toml::Table = manifest.parse().unwrap_or_default();
    ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|section| table.get(*section)?.as_table())
        .flat_map(|section| section.keys().cloned())
        .collect()
}

/// Every path that ARCHITECTURE.md names between backticks exists: a word with a slash in it, or with a source file's
/// ending, that does not start with one.
fn code_map(tree: &Tree) -> Vec<Complaint> {
    let Some(text) = tree.0.get(MAP) else {
        return vec![format!("{MAP} is missing")];
    };
    quoted(text)
        .filter(|word| is_path(word) && !tree.has(word))
        .map(|word| format!("{MAP}: `{word}` does not exist"))
        .collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Every source file that a document names between backticks with a folder of it exists.
fn documents(tree: &Tree) -> Vec<Complaint> {
    let exists = |word: &str| {
        let end = format!("/{word}");
        tree.rust()
            .any(|(path, _)| path == word || path.ends_with(&end))
    };
    let is_source = |word: &str| is_path(word) && word.contains('/') && word.ends_with(".rs");
    let documents = tree.0.iter().filter(|(path, _)| path.starts_with("docs/"));
    documents
        .flat_map(|(path, text)| quoted(text).map(move |word| (path, word)))
        .filter(|(_, word)| is_source(word) && !exists(word))
        .map(|(path, word)| format!("{path}: `{word}` does not exist"))
        .collect()
}

fn is_path(word: &str) -> bool {
    let characters = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let source = [".rs", ".toml", ".md", ".sh"]
        .iter()
        .any(|end| word.ends_with(end));
    !word.starts_with(['/', '.']) && word.chars().all(characters) && (word.contains('/') || source)
}

/// Every row of SPEC.md and SECURITY.md names tests that exist: files or folders with tests in them (between backticks, as in the map), or
/// functions that are tests.
fn claims(tree: &Tree) -> Vec<Complaint> {
    let names = test_names(tree);
    let of = |file: &&str| match tree.0.get(*file) {
        Some(text) => claims_of(tree, &names, file, text),
        None => vec![format!("{file} is missing")],
    };
    CLAIMS.iter().flat_map(of).collect()
}

/// The rows of a text's tables, without their heads.
fn rows(text: &str) -> impl Iterator<Item = &str> {
    let lines: Vec<&str> = text.lines().collect();
    let is_rule = |line: &str| line.starts_with("|--");
    let rows: Vec<&str> = (0..lines.len())
        .filter(|n| lines[*n].starts_with('|') && !is_rule(lines[*n]))
        .filter(|n| !lines.get(n + 1).is_some_and(|next| is_rule(next)))
        .map(|n| lines[n])
        .collect();
    rows.into_iter()
}

fn claims_of(tree: &Tree, names: &BTreeSet<&str>, file: &str, text: &str) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for row in rows(text) {
        let cell = row.trim_end_matches('|').rsplit('|').next().unwrap_or(row);
        let words = cell.split(|c: char| c.is_whitespace() || "`,:;".contains(c));
        let claims: Vec<&str> = words.filter(|w| is_path(w) || w.contains('_')).collect();
        if claims.is_empty() {
            complaints.push(format!("{file}: no test for:{row}"));
        }
        for claim in claims {
            if !names.contains(claim) && !has_tests(tree, claim) {
                complaints.push(format!("{file}: `{claim}` is no test"));
            }
        }
    }
    complaints
}

/// Whether tests are in a file, or in some file of a folder.
fn has_tests(tree: &Tree, path: &str) -> bool {
    let below = format!("{path}/");
    let mut files = tree
        .rust()
        .filter(|(p, _)| *p == path || p.starts_with(&below));
    is_path(path) && files.any(|(_, text)| !tests_of(text).is_empty())
}

fn test_names(tree: &Tree) -> BTreeSet<&str> {
    tree.rust().flat_map(|(_, text)| tests_of(text)).collect()
}

/// The names of the functions that `#[test]` stands above, other attributes between them or not.
fn tests_of(text: &str) -> Vec<&str> {
    let after = text.split("#[test]\n").skip(1);
    after.filter_map(function_name).collect()
}

/// The name of the function that comes next, if only attributes come before it.
fn function_name(text: &str) -> Option<&str> {
    let mut lines = text.lines().map(str::trim);
    let line = lines.find(|line| !line.starts_with("#["))?;
    line.strip_prefix("fn ")?.split('(').next()
}

/// Every Rust file says first what it is.
fn heads(tree: &Tree) -> Vec<Complaint> {
    let bare = tree.rust().filter(|(_, text)| !text.starts_with("//! "));
    bare.map(|(path, _)| format!("{path}: does not open with `//!`"))
        .collect()
}

/// No Rust file is too long to be read.
fn lengths(tree: &Tree) -> Vec<Complaint> {
    let long = tree
        .rust()
        .filter(|(_, text)| text.lines().count() > LINES_MAX);
    long.map(|(path, _)| format!("{path}: more than {LINES_MAX} lines"))
        .collect()
}

/// Nothing is left to do, no test is turned off.
fn unfinished(tree: &Tree) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (path, text) in tree.rust() {
        for (number, line) in source::code(text).lines().enumerate() {
            for word in UNFINISHED.iter().filter(|word| line.contains(**word)) {
                complaints.push(format!("{path}:{}: {word}", number + 1));
            }
        }
    }
    complaints
}

/// `unsafe` only in files named for it, each block and impl with its argument.
fn unsafe_code(tree: &Tree) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (path, text) in tree.rust() {
        let name = path.rsplit('/').next().unwrap_or(path);
        let named_for_it = name.ends_with("_unsafe.rs") || name.starts_with("arch_");
        let code = source::code(text);
        for (number, after) in uses_of_unsafe(&code) {
            let place = format!("{path}:{}", number + 1);
            if !named_for_it {
                complaints.push(format!("{place}: unsafe outside *_unsafe.rs and arch_*.rs"));
            } else if needs_argument(&after) && !is_argued(text, &code, number) {
                complaints.push(format!("{place}: unsafe without a SAFETY comment"));
            }
        }
    }
    complaints
}

/// Line numbers (from 0) of the word `unsafe`, and the code that follows each.
fn uses_of_unsafe(code: &str) -> Vec<(usize, String)> {
    const WORD: &str = "unsafe";
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut uses = Vec::new();
    for (at, _) in code.match_indices(WORD) {
        let after = &code[at + WORD.len()..];
        if !code[..at].ends_with(part_of_word) && !after.starts_with(part_of_word) {
            let number = code[..at].matches('\n').count();
            uses.push((number, after.trim_start().chars().take(8).collect()));
        }
    }
    uses
}

/// Declarations of unsafe functions and attributes promise nothing; blocks, impls and extern blocks do.
fn needs_argument(after: &str) -> bool {
    after.starts_with('{') || after.starts_with("impl")
}

/// Whether a comment with SAFETY stands at line `number` or right above the statement it belongs to.
fn is_argued(text: &str, code: &str, number: usize) -> bool {
    let text: Vec<&str> = text.lines().collect();
    let code: Vec<&str> = code.lines().collect();
    let has_word = |line: usize| text[line].contains("// SAFETY:");
    if has_word(number) {
        return true;
    }
    for line in (0..number).rev() {
        if has_word(line) {
            return true;
        }
        let code = code[line].trim();
        let ends_another = code.ends_with([';', '}']) || (code.ends_with('{') && line + 1 < number);
        if text[line].trim().is_empty() || ends_another {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Tree {
        let own = |(path, text): &(&str, &str)| (path.to_string(), text.to_string());
        Tree(files.iter().map(own).collect())
    }

    const MEMORY: (&str, &str) = ("memory/Cargo.toml", "[package]\nname = \"doppel-memory\"\n");

    fn x86(section: &str, dependency: &str) -> String {
        format!("[package]\nname = \"doppel-x86\"\n[{section}]\n{dependency}.workspace = true\n")
    }

    #[test]
    fn an_arrow_that_is_allowed_passes_and_its_reverse_does_not() {
        let down = x86("dependencies", "doppel-memory");
        assert!(arrows(&tree(&[MEMORY, ("cpu/x86/Cargo.toml", &down)])).is_empty());
        for section in ["dependencies", "dev-dependencies"] {
            let up = format!("{}[{section}]\ndoppel-x86.workspace = true\n", MEMORY.1);
            let x86 = x86("dependencies", "libc");
            let found = arrows(&tree(&[(MEMORY.0, &up), ("cpu/x86/Cargo.toml", &x86)]));
            assert_eq!(found.len(), 1, "{found:?}");
        }
        let itself = x86("dev-dependencies", "doppel-x86");
        assert!(arrows(&tree(&[("cpu/x86/Cargo.toml", &itself)])).is_empty());
    }

    #[test]
    fn an_unknown_crate_is_a_complaint() {
        assert_eq!(arrows(&tree(&[("utils/Cargo.toml", "")])).len(), 1);
    }

    #[test]
    fn a_path_that_the_map_names_must_exist() {
        let files = [
            (
                MAP,
                "`cpu/x86`, `memory/src/lib.rs`, `/dev/kvm`, `a b/c`, `x`",
            ),
            ("cpu/x86/a.rs", ""),
        ];
        assert_eq!(
            code_map(&tree(&files)),
            ["ARCHITECTURE.md: `memory/src/lib.rs` does not exist"]
        );
        assert_eq!(code_map(&tree(&[])).len(), 1, "no map at all");
    }

    #[test]
    fn documents_name_source_files_that_exist() {
        let text = "`a/src/lib.rs`, `src/lib.rs`, `plan.rs`, `rc/lib.rs`, `src/gone.rs`, `a/src/`";
        let files = [("docs/a.md", text), ("a/src/lib.rs", "//! A.\n")];
        assert_eq!(
            documents(&tree(&files)),
            [
                "docs/a.md: `rc/lib.rs` does not exist",
                "docs/a.md: `src/gone.rs` does not exist"
            ]
        );
    }

    #[test]
    fn a_promise_names_tests_that_exist() {
        let test = "//! Tests.\n#[test]\n#[cfg(unix)]\nfn it_works() {}\nfn it_helps() {}\n";
        let complaints = |cell: &str| {
            let two = "| a | b |\n|---|---|\n| works too | it_works |\n";
            let spec =
                format!("# Spec\n\n{two}\n| promise | test |\n|---|---|\n| it works | {cell} |\n");
            claims(&tree(&[
                ("SPEC.md", "# Spec\n"),
                ("SECURITY.md", &spec),
                ("a/tests/b.rs", test),
                ("a/src/c.rs", ""),
            ]))
        };
        for good in [
            "`a/tests/b.rs`: it_works",
            "it_works",
            "`a/tests`, run by CI",
        ] {
            assert_eq!(complaints(good), [""; 0], "{good}");
        }
        for bad in ["it_helps", "`a/src/c.rs`", "`a/tests/d.rs`", "surely", ""] {
            assert_eq!(complaints(bad).len(), 1, "{bad}");
        }
        assert_eq!(claims(&tree(&[])).len(), 2, "no promises at all");
    }

    #[test]
    fn a_file_without_head_a_long_file_and_unfinished_work_are_complaints() {
        assert_eq!(heads(&tree(&[("a.rs", "fn f() {}")])).len(), 1);
        assert!(heads(&tree(&[("a.rs", "//! What it is.\n")])).is_empty());
        assert_eq!(lengths(&tree(&[("a.rs", &"\n".repeat(901))])).len(), 1);
        assert!(lengths(&tree(&[("a.rs", &"\n".repeat(900))])).is_empty());
        let source = "fn f() { todo!() }\n#[ignore]\n// todo!\n";
        assert_eq!(
            unfinished(&tree(&[("a.rs", source)])),
            ["a.rs:1: todo!", "a.rs:2: #[ignore"]
        );
    }

    #[test]
    fn unsafe_has_its_place() {
        let argued = "// SAFETY: nothing happens\nunsafe {}\n";
        assert_eq!(unsafe_code(&tree(&[("a.rs", argued)])).len(), 1);
        assert!(unsafe_code(&tree(&[("a_unsafe.rs", argued)])).is_empty());
        assert!(unsafe_code(&tree(&[("arch_x86.rs", argued)])).is_empty());
        assert!(
            unsafe_code(&tree(&[(
                "a.rs",
                "//! unsafe\nlet not_unsafe = \"unsafe\";\n"
            )]))
            .is_empty()
        );
    }

    #[test]
    fn unsafe_has_its_argument() {
        let complaints = |source: &str| unsafe_code(&tree(&[("a_unsafe.rs", source)])).len();
        assert_eq!(complaints("unsafe {}\n"), 1);
        assert_eq!(
            complaints("// SAFETY: for the first\nlet a = unsafe { 1 };\nlet b = unsafe { 2 };\n"),
            1
        );
        assert_eq!(
            complaints("// SAFETY: long\n// argument\nlet a =\n    unsafe { 1 };\n"),
            0
        );
        assert_eq!(complaints("unsafe impl Send for A {}\n"), 1);
        assert_eq!(complaints("unsafe fn f() {}\n"), 0);
        assert_eq!(complaints("// SAFETY: far\n\nunsafe {}\n"), 1);
    }
}
