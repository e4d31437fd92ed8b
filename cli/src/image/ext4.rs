//! An ext4 file system with a tree in it, made by the tools of e2fsprogs as an ordinary user.
//!
//! `mke2fs -d` would copy a directory, but its owners are the caller's and its order is the host's. Here `mke2fs` makes an empty file
//! system and `debugfs` is told each entry in the order of the names, with owner, mode and time: the result depends on nothing else, bit for
//! bit. `e2fsck` has the last word.

use super::tree::{Kind, Node, Tree};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What decides how the file system looks, beside the tree.
pub struct Look<'a> {
    /// Bytes.
    pub len: u64,
    /// As `root=UUID=` takes it.
    pub uuid: &'a str,
    /// For all times that no entry has.
    pub epoch: u64,
}

/// Nothing of the host's own mke2fs.conf.
const CONFIGURATION: &str =
    "[defaults]\n\tblocksize = 4096\n\tinode_size = 256\n\tinode_ratio = 16384\n";
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,\
     huge_file,dir_nlink,extra_isize,metadata_csum";

/// Makes it in the file `image`, with scratch files in `work`.
pub fn make(tree: &Tree, image: &Path, look: &Look, work: &Path) -> Result<()> {
    let configuration = work.join("mke2fs.conf");
    fs::write(&configuration, CONFIGURATION)?;
    let mut mke2fs = tool("mke2fs", look.epoch)?;
    mke2fs.env("MKE2FS_CONFIG", configuration);
    mke2fs.args([
        "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-L", "root",
    ]);
    mke2fs.args(["-O", FEATURES, "-U", look.uuid]);
    mke2fs.arg("-E").arg(format!(
        "hash_seed={},root_owner=0:0,lazy_itable_init=1,lazy_journal_init=0",
        look.uuid
    ));
    mke2fs.arg(image).arg(format!("{}k", look.len >> 10));
    checked(&mut mke2fs)?;
    fill(tree, image, look, work)?;
    let mut e2fsck = tool("e2fsck", look.epoch)?;
    checked(e2fsck.args(["-f", "-n"]).arg(image)).context("the new file system is not sound")?;
    Ok(())
}

/// A tool of e2fsprogs; an ordinary user may not have them in the search path.
fn tool(name: &str, epoch: u64) -> Result<Command> {
    let folders = std::env::var("PATH").unwrap_or_default();
    let folders = format!("{folders}:/usr/sbin:/sbin");
    let found = folders
        .split(':')
        .map(|folder| Path::new(folder).join(name));
    let Some(path) = found.into_iter().find(|path| path.is_file()) else {
        bail!("{name} is not installed; on Debian: apt-get install e2fsprogs");
    };
    let mut command = Command::new(path);
    command.env("E2FSPROGS_FAKE_TIME", epoch.to_string());
    command.env("SOURCE_DATE_EPOCH", epoch.to_string());
    command.env("LC_ALL", "C").stdin(Stdio::null());
    Ok(command)
}

fn checked(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| name.clone())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let shown = String::from_utf8_lossy(&output.stdout);
        bail!(
            "{name} failed ({}): {}{}",
            output.status,
            shown.trim(),
            said.trim()
        );
    }
    Ok(output)
}

fn fill(tree: &Tree, image: &Path, look: &Look, work: &Path) -> Result<()> {
    let script = work.join("debugfs");
    let mut commands = Commands::new(work.join("attributes"));
    for (path, node) in tree.entries() {
        commands.add(path, node)?;
    }
    commands.links()?;
    if let Some(root) = tree.root() {
        commands.time(root.modified)?;
        commands.owner("/", root, 0o40755)?;
    }
    fs::write(&script, commands.text)?;
    let mut debugfs = tool("debugfs", look.epoch)?;
    debugfs.args(["-w", "-f"]).arg(&script).arg(image);
    let output = checked(&mut debugfs)?;
    // It goes on after errors and ends with success; what it says beside its name is one.
    let said = String::from_utf8_lossy(&output.stderr);
    let mut errors = said.lines().filter(|line| !line.starts_with("debugfs "));
    match errors.next() {
        None => Ok(()),
        Some(error) => bail!("debugfs: {error}; is --size too small?"),
    }
}

/// The script for debugfs.
struct Commands {
    text: String,
    folder: Option<String>,
    /// Further names of files that have several.
    names: BTreeMap<String, Vec<String>>,
    attributes: PathBuf,
    count: u32,
}

impl Commands {
    fn new(attributes: PathBuf) -> Commands {
        Commands {
            text: String::new(),
            folder: None,
            names: BTreeMap::new(),
            attributes,
            count: 0,
        }
    }

    fn add(&mut self, path: &str, node: &Node) -> Result<()> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        if let Kind::Hardlink(target) = &node.kind {
            self.names
                .entry(target.clone())
                .or_default()
                .push(path.to_owned());
            return Ok(());
        }
        if self.folder.as_deref() != Some(folder) {
            self.line(&["cd", &quoted(&format!("/{folder}"))?])?;
            self.folder = Some(folder.to_owned());
        }
        self.time(node.modified)?;
        let name = quoted(name)?;
        let kind = match &node.kind {
            Kind::Directory => {
                self.line(&["mkdir", &name])?;
                0o040_000
            }
            Kind::File(content) => {
                let content = content.to_str().context("a path that is not UTF-8")?;
                self.line(&["write", &quoted(content)?, &name])?;
                0o100_000
            }
            Kind::Symlink(target) => {
                return self.line(&["symlink", &name, &quoted(target)?]);
            }
            Kind::Device(kind, major, minor) => {
                self.line(&[
                    "mknod",
                    &name,
                    &kind.to_string(),
                    &major.to_string(),
                    &minor.to_string(),
                ])?;
                if *kind == 'c' { 0o020_000 } else { 0o060_000 }
            }
            Kind::Hardlink(_) => return Ok(()),
        };
        self.owner(&name, node, kind | node.mode)?;
        self.extended(&name, node)
    }

    /// Times of what comes next.
    fn time(&mut self, seconds: u64) -> Result<()> {
        self.line(&["set_current_time", &format!("@{seconds}")])
    }

    fn owner(&mut self, name: &str, node: &Node, mode: u32) -> Result<()> {
        self.line(&["sif", name, "mode", &format!("0{mode:o}")])?;
        for (field, value) in [("uid", node.uid), ("gid", node.gid)] {
            if value != 0 {
                self.line(&["sif", name, field, &value.to_string()])?;
            }
        }
        Ok(())
    }

    fn extended(&mut self, name: &str, node: &Node) -> Result<()> {
        for (key, value) in &node.attributes {
            self.count += 1;
            let file = self.attributes.with_extension(self.count.to_string());
            fs::write(&file, value)?;
            let file = file.to_str().context("a path that is not UTF-8")?;
            self.line(&["ea_set", "-f", &quoted(file)?, name, key])?;
        }
        Ok(())
    }

    /// Further names, once all files are there. debugfs does not count them by itself.
    fn links(&mut self) -> Result<()> {
        for (path, names) in std::mem::take(&mut self.names) {
            let path = quoted(&format!("/{path}"))?;
            for name in &names {
                self.line(&["ln", &path, &quoted(&format!("/{name}"))?])?;
            }
            let count = names.len() + 1;
            self.line(&["sif", &path, "links_count", &count.to_string()])?;
        }
        Ok(())
    }

    fn line(&mut self, words: &[&str]) -> Result<()> {
        Ok(writeln!(self.text, "{}", words.join(" "))?)
    }
}

/// A word for debugfs, whatever is in it.
fn quoted(word: &str) -> Result<String> {
    if word.contains('\n') {
        bail!("a name with a line break: {word:?}");
    }
    Ok(format!("\"{}\"", word.replace('"', "\"\"")))
}
