//! `doppel image`: disks that people have, made, shown and copied.
//!
//! [`build`] puts a distribution's packages on a disk that boots: mmdebstrap makes the system ([`debian`]), a tree holds it with owners
//! and modes that an ordinary user could not give files ([`tree`]), e2fsprogs makes a file system of it ([`ext4`]), and that goes behind a
//! partition table into the image. UUIDs follow from what goes in, times are no later than the release, and every order is that of
//! the names, so that the same packages give the same image.

pub mod args;
mod debian;
mod ext4;
pub(crate) mod sources;
mod tree;
mod work;

use anyhow::{Context, Result, bail};
use args::{Build, Convert, Create, Image, Info};
use doppel_machine::block::{self, BlockBackend, DiskSpec, Format};
use doppel_machine::bootdisk::gpt::{self, Guid};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read};
use std::path::Path;
use std::time::Instant;
use tree::Tree;
use work::Work;

use crate::terminal::printable;

/// Does what was asked for.
pub fn image(what: &Image) -> Result<()> {
    match what {
        Image::Build(args) => build(args),
        Image::Create(args) => create(args),
        Image::Info(args) => info(args),
        Image::Convert(args) => convert(args),
    }
}

/// Smallest disk for a Debian.
const SIZE_MIN: u64 = 1 << 30;
/// Bytes that are copied at a time, a cluster of a new qcow2 image.
const PIECE: usize = 64 << 10;
/// Days on which releases came out, in seconds: no file in an image is younger, unless SOURCE_DATE_EPOCH says otherwise.
const RELEASES: &[(&str, u64)] = &[
    ("bullseye", 1_628_899_200),
    ("bookworm", 1_686_355_200),
    ("trixie", 1_754_697_600),
];

/// The time that an image is from, in seconds since 1970.
fn epoch(release: &str) -> Result<u64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        let what = "SOURCE_DATE_EPOCH is a number of seconds since 1970";
        return text.parse().context(what);
    }
    let found = RELEASES.iter().find(|(name, _)| *name == release);
    Ok(found.map_or(RELEASES[RELEASES.len() - 1].1, |(_, epoch)| *epoch))
}

fn build(args: &Build) -> Result<()> {
    if args.output.exists() {
        bail!(
            "{} is there already; remove it or name another file",
            args.output.display()
        );
    }
    if args.size < SIZE_MIN || !args.size.is_multiple_of(gpt::ALIGNMENT) {
        bail!("--size: a disk for Debian has whole MiB, and 1G at least");
    }
    let start = Instant::now();
    let progress = |what: &str| eprintln!("doppel: {:4} s  {what}", start.elapsed().as_secs());
    let release = match &args.system.release {
        Some(release) => release.clone(),
        None => sources::host_release()?,
    };
    let work = Work::guarded(&args.output)?;
    progress(&format!("assembling Debian {release}"));
    let mut tree = Tree::new(work.path(), epoch(&release)?);
    debian::assemble(args, &release, &mut tree, &work, &progress)?;
    debian::clean(&mut tree);
    let identity = Identity::new(args, &release, &tree)?;
    debian::furnish(&mut tree, args, &identity.file_system)?;
    progress("making the file system");
    let table = gpt::new_table(args.size, identity.disk, identity.partition);
    let look = ext4::Look {
        len: table.len,
        uuid: &identity.file_system,
        epoch: epoch(&release)?,
    };
    let file_system = work.path().join("file-system");
    ext4::make(&tree, &file_system, &look, work.path())?;
    progress("writing the image");
    let image = work.path().join("image");
    let disk = new_disk(&image, format_of(&args.output), args.size)?;
    write(&*disk, 0, &table.head)?;
    copy(&mut File::open(&file_system)?, &*disk, table.start)?;
    write(&*disk, args.size - table.tail.len() as u64, &table.tail)?;
    finish(disk, &image, &args.output)?;
    progress(&format!("{} is ready", args.output.display()));
    eprintln!(
        "doppel: boot it with: doppel run --disk {}",
        args.output.display()
    );
    Ok(())
}

/// The names that tell this disk from all others: they follow from what is on it.
struct Identity {
    disk: Guid,
    partition: Guid,
    file_system: String,
}

impl Identity {
    fn new(args: &Build, release: &str, tree: &Tree) -> Result<Identity> {
        let key = args.ssh_key.as_ref().map(fs::read).transpose()?;
        let mut inputs = Sha256::new();
        for input in [
            release.as_bytes(),
            args.hostname.as_bytes(),
            &args.size.to_le_bytes(),
            &key.unwrap_or_default(),
            tree.text("var/lib/dpkg/status")?.as_bytes(),
        ] {
            inputs.update((input.len() as u64).to_le_bytes());
            inputs.update(input);
        }
        let guid = |what: &str| uuid(inputs.clone().chain_update(what));
        Ok(Identity {
            disk: guid("disk"),
            partition: guid("partition"),
            file_system: guid("file system").to_string(),
        })
    }
}

/// A UUID of version 8 ("custom", RFC 9562) made of a hash.
fn uuid(hash: Sha256) -> Guid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finalize()[..16]);
    // As it stands on disk, the third group is little-endian.
    bytes[7] = bytes[7] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Guid(bytes)
}

fn format_of(path: &Path) -> Format {
    let extension = path.extension().and_then(|e| e.to_str());
    match extension {
        Some("raw" | "img") => Format::Raw,
        _ => Format::Qcow2,
    }
}

type Disk = std::sync::Arc<dyn BlockBackend>;

fn new_disk(path: &Path, format: Format, size: u64) -> Result<Disk> {
    block::create(path, format, size)?;
    let mut spec = DiskSpec::new(path);
    spec.format = Some(format);
    Ok(spec.open()?)
}

fn write(disk: &dyn BlockBackend, offset: u64, bytes: &[u8]) -> Result<()> {
    let what = || format!("writing the image at {offset:#x}");
    disk.write_at(offset, &[IoSlice::new(bytes)])
        .with_context(what)
}

/// Copies what is not zeros.
fn copy(from: &mut impl Read, to: &dyn BlockBackend, mut offset: u64) -> Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        // Pieces end where clusters do.
        let room = PIECE - offset as usize % PIECE;
        let mut n = 0;
        while n < room {
            match from.read(&mut piece[n..room])? {
                0 => break,
                more => n += more,
            }
        }
        if n == 0 {
            return Ok(());
        }
        if piece[..n].iter().any(|byte| *byte != 0) {
            write(to, offset, &piece[..n])?;
        }
        offset += n as u64;
    }
}

/// Makes the image durable and gives it its name, if nobody has taken that meanwhile.
fn finish(disk: Disk, image: &Path, output: &Path) -> Result<()> {
    disk.flush().context("writing the image")?;
    drop(disk);
    block::settle(image, output).with_context(|| output.display().to_string())
}

fn create(args: &Create) -> Result<()> {
    if args.size == 0 {
        bail!("a disk has one sector at least");
    }
    Ok(block::create(&args.path, args.format, args.size)?)
}

fn info(args: &Info) -> Result<()> {
    let info = block::info(&args.path, args.format)?;
    let mib = |bytes: u64| format!("{bytes} bytes ({:.1} MiB)", bytes as f64 / 1048576.0);
    println!("format:      {}", info.format);
    println!("disk:        {}", mib(info.disk_len));
    println!("on the host: {}", mib(info.host_len));
    if let Some(cluster) = info.cluster_size {
        println!("clusters:    {cluster} bytes");
    }
    if let Some((name, format)) = info.backing {
        let format = format.unwrap_or_else(|| "guessed".to_owned());
        let below = printable(&format!("{name} (format: {format})"));
        println!("stands on:   {below}");
    }
    Ok(())
}

fn convert(args: &Convert) -> Result<()> {
    let mut from = DiskSpec::new(&args.from);
    (from.format, from.read_only) = (args.from_format, true);
    let from = from.open()?;
    let work = Work::guarded(&args.to)?;
    let image = work.path().join("image");
    let to = new_disk(&image, args.format, from.len())?;
    copy(&mut Reading(&*from, 0), &*to, 0)?;
    finish(to, &image, &args.to)
}

/// A disk read from its start to its end.
struct Reading<'a>(&'a dyn BlockBackend, u64);

impl Read for Reading<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let n = (self.0.len() - self.1).min(into.len() as u64) as usize;
        self.0
            .read_at(self.1, &mut [IoSliceMut::new(&mut into[..n])])?;
        self.1 += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const UUID: &str = "01234567-89ab-8def-8123-456789abcdef";

    /// A small system as a tar stream, in whatever order.
    fn system(reverse: bool) -> Vec<u8> {
        let mut members = vec![
            ("./", b'5', 0o755, 0, ""),
            ("./boot/", b'5', 0o755, 0, ""),
            (
                "./boot/vmlinuz-6.1.0-9-cloud-amd64",
                b'0',
                0o644,
                0,
                "the kernel",
            ),
            (
                "./boot/initrd.img-6.1.0-9-cloud-amd64",
                b'0',
                0o600,
                0,
                "the RAM disk",
            ),
            ("./etc/", b'5', 0o755, 0, ""),
            ("./etc/shadow", b'0', 0o640, 42, "root:*:1::::::"),
            ("./etc/shadow-", b'0', 0o640, 42, "old"),
            ("./etc/a \"quoted\" name", b'0', 0o644, 0, "x"),
            ("./usr/", b'5', 0o755, 0, ""),
            ("./usr/su", b'0', 0o4755, 0, "su"),
            ("./var/lib/dpkg/status", b'0', 0o644, 0, "Package: base\n"),
            ("./var/log/dpkg.log", b'0', 0o644, 0, "today"),
            (
                "./zlink",
                b'2',
                0o777,
                0,
                "boot/vmlinuz-6.1.0-9-cloud-amd64",
            ),
            ("./etc/hard", b'1', 0o4755, 0, "./usr/su"),
            ("./dev/null", b'3', 0o666, 0, ""),
        ];
        if reverse {
            members.reverse();
        }
        let mut archive = tar::Builder::new(Vec::new());
        for (path, kind, mode, gid, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_mode(mode);
            header.set_uid(0);
            header.set_gid(gid);
            header.set_mtime(1_600_000_000);
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
            if matches!(kind, b'1' | b'2') {
                header.set_size(0);
                archive.append_link(&mut header, path, content).unwrap();
            } else {
                header.set_size(content.len() as u64);
                archive
                    .append_data(&mut header, path, content.as_bytes())
                    .unwrap();
            }
        }
        archive.into_inner().unwrap()
    }

    fn has_tools() -> bool {
        let found = Path::new("/sbin/mke2fs").exists() && Path::new("/sbin/debugfs").exists();
        if !found {
            eprintln!("SKIPPED: e2fsprogs is not installed");
        }
        found
    }

    fn file_system(work: &Work, reverse: bool) -> PathBuf {
        let store = work.path().join(format!("store-{reverse}"));
        fs::create_dir(&store).unwrap();
        let mut tree = Tree::new(&store, 1_650_000_000);
        tree.read(&*system(reverse)).unwrap();
        debian::clean(&mut tree);
        tree.file("etc/fstab", 0o644, b"").unwrap();
        let image = work.path().join(format!("image-{reverse}"));
        let look = ext4::Look {
            len: 32 << 20,
            uuid: UUID,
            epoch: 1_650_000_000,
        };
        ext4::make(&tree, &image, &look, &store).unwrap();
        image
    }

    fn work(name: &str) -> Work {
        Work::new(&std::env::temp_dir().join(name)).unwrap()
    }

    /// What `debugfs` says to a request.
    fn debugfs(image: &Path, request: &str) -> String {
        let mut command = std::process::Command::new("/sbin/debugfs");
        let output = command.args(["-R", request]).arg(image).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_file_system_has_owners_modes_links_and_times_and_depends_on_nothing_else() {
        if !has_tools() {
            return;
        }
        let work = work("doppel-image-file-system");
        let image = file_system(&work, false);
        let stat = |path: &str| debugfs(&image, &format!("stat {path}"));
        let shadow = stat("/etc/shadow");
        assert!(
            shadow.contains("Mode:  0640") && shadow.contains("Group:    42"),
            "{shadow}"
        );
        assert!(shadow.contains("mtime: 0x5f5e1000"), "{shadow}");
        let su = stat("/etc/hard");
        assert!(
            su.contains("Mode:  04755") && su.contains("Links: 2"),
            "{su}"
        );
        let names = debugfs(&image, "ls -p /etc");
        assert!(
            names.contains("a \"quoted\" name") && !names.contains("shadow-"),
            "{names}"
        );
        assert!(!debugfs(&image, "ls -p /var/log").contains("dpkg.log"));
        let other = file_system(&work, true);
        assert!(
            fs::read(image).unwrap() == fs::read(other).unwrap(),
            "the order of the tar stream shows"
        );
    }

    #[test]
    fn what_is_built_is_found_by_the_boot_loader() {
        if !has_tools() {
            return;
        }
        let work = work("doppel-image-boot");
        let file_system = file_system(&work, false);
        let size = 40 << 20;
        let table = gpt::new_table(size, Guid([1; 16]), Guid([2; 16]));
        let disk = new_disk(&work.path().join("disk"), Format::Qcow2, size).unwrap();
        write(&*disk, 0, &table.head).unwrap();
        copy(&mut File::open(&file_system).unwrap(), &*disk, table.start).unwrap();
        let found = doppel_machine::bootdisk::find(&disk, 1 << 20).unwrap();
        assert_eq!(found.kernel, b"the kernel");
        assert_eq!(found.initrd.as_deref(), Some(&b"the RAM disk"[..]));
        assert_eq!(found.cmdline, format!("root=UUID={UUID} ro"));
    }

    #[test]
    fn a_file_system_that_is_too_small_is_an_error_that_says_so() {
        if !has_tools() {
            return;
        }
        let work = work("doppel-image-small");
        let mut tree = Tree::new(work.path(), 0);
        let random: Vec<u8> = (0..12u32 << 20)
            .map(|n| (n.wrapping_mul(n) >> 7) as u8)
            .collect();
        tree.file("big", 0o644, &random).unwrap();
        let look = ext4::Look {
            len: 8 << 20,
            uuid: UUID,
            epoch: 0,
        };
        let error = ext4::make(&tree, &work.path().join("image"), &look, work.path()).unwrap_err();
        assert!(error.to_string().contains("--size"), "{error:#}");
    }
}
