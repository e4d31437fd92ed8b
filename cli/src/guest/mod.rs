//! The default guest: a Debian kernel and an initramfs, assembled from Debian's packages on first use.
//!
//! Nothing of it is shipped. apt fetches and verifies the packages (`apt`), their files are read as a stream
//! (`package`), the initramfs is put together (`initramfs`, `cpio`, `modules`, `debug_exit`) and the result is kept in
//! the user's cache (`cache`). No step needs a privilege.

mod apt;
mod cache;
pub mod cpio;
mod debug_exit;
mod initramfs;
mod modules;
pub mod package;

use anyhow::{Context, Result};
use apt::Apt;
pub use apt::{HOST, Source};
use modules::Module;
use std::path::{Path, PathBuf};

/// The kernel that a guest gets when nobody names one.
pub const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
/// What a kernel's package depends on where it has neither image nor modules itself, as from Debian 14 on.
const KERNEL_PARTS: &[&str] = &["linux-binary-", "linux-modules-"];

/// stress-ng and what it is linked with, for [`packages`].
pub const STRESS_NG: &[&str] = &[
    "stress-ng",
    "libc6",
    "libapparmor1",
    "libbsd0",
    "libcrypt1",
    "libdrm2",
    "libegl1",
    "libexpat1",
    "libffi8",
    "libgbm1",
    "libgcc-s1",
    "libgles2",
    "libglvnd0",
    "libipsec-mb1",
    "libjpeg62-turbo",
    "libjudydebian1",
    "libkmod2",
    "liblzma5",
    "libmd0",
    "libsctp1",
    "libssl3",
    "libwayland-server0",
    "libxau6",
    "libxcb-randr0",
    "libxcb1",
    "libxdmcp6",
    "libxxhash0",
    "libzstd1",
    "zlib1g",
];

/// Folders of the modules tree in which the wanted modules and all their needs are.
const MODULE_FOLDERS: &[&str] = &[
    "arch/",
    "block/",
    "crypto/",
    "drivers/acpi/",
    "drivers/block/",
    "drivers/cdrom/",
    "drivers/char/",
    "drivers/dax/",
    "drivers/misc/",
    "drivers/net/net_failover",
    "drivers/net/virtio",
    "drivers/nvdimm/",
    "drivers/scsi/scsi",
    "drivers/scsi/sd_mod",
    "drivers/scsi/sr_mod",
    "drivers/scsi/virtio",
    "drivers/virtio/",
    "fs/",
    "lib/",
    "mm/",
    "net/9p/",
    "net/core/",
    "net/packet/",
    "net/vmw_vsock/",
];

/// The files to boot a guest from.
#[derive(Clone, Debug)]
pub struct Guest {
    /// A bzImage.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive; further archives may be appended to a copy of it.
    pub initrd: PathBuf,
}

/// The guest with Debian's kernel `package`, from the cache or assembled now; `progress` is told what happens, a line
/// at a time.
pub fn debian(package: &str, progress: &dyn Fn(&str)) -> Result<Guest> {
    let parts = Parts {
        package,
        kernel: HOST,
        programs: HOST,
    };
    assembled(&parts, progress)
}

/// What a guest is assembled from.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The package that has the kernel, or depends on it.
    pub package: &'a str,
    /// Where it comes from.
    pub kernel: Source<'a>,
    /// Where the programs come from, busybox above all: their architecture is that of the user land.
    pub programs: Source<'a>,
}

impl Parts<'_> {
    /// What the folder in the cache is called.
    fn name(&self) -> String {
        let mut name = self.package.to_owned();
        for source in [self.kernel, self.programs] {
            if source != HOST {
                let suite = source.suite.unwrap_or("host");
                name = format!("{name}.{suite}-{}", source.architecture);
            }
        }
        name
    }
}

/// A guest of these parts, as [`debian`] has it.
pub fn assembled(parts: &Parts, progress: &dyn Fn(&str)) -> Result<Guest> {
    let root = cache::root()?.join("guests");
    let assemble = |work: &Path| assemble(parts, work, progress);
    let folder = cache::folder(&root, &parts.name(), initramfs::recipe(), assemble)?;
    Ok(Guest {
        kernel: folder.join("vmlinuz"),
        initrd: folder.join("initrd"),
    })
}

/// Debian packages by name, verified, kept in the cache under `set`: the `.deb` files in the order of `names`.
pub fn packages(set: &str, names: &[&str], progress: &dyn Fn(&str)) -> Result<Vec<PathBuf>> {
    let root = cache::root()?.join("packages");
    let recipe = crc32fast::hash(names.join(",").as_bytes());
    let file = |name: &str| format!("{name}.deb");
    let assemble = |work: &Path| {
        let scratch = work.join("apt");
        let apt = Apt::update(&scratch, HOST, progress)?;
        for (deb, name) in apt.download(names)?.iter().zip(names) {
            std::fs::rename(deb, work.join(file(name)))?;
        }
        Ok(std::fs::remove_dir_all(scratch)?)
    };
    let folder = cache::folder(&root, set, recipe, assemble)?;
    Ok(names.iter().map(|name| folder.join(file(name))).collect())
}

fn assemble(parts: &Parts, work: &Path, progress: &dyn Fn(&str)) -> Result<()> {
    let package = parts.package;
    progress(&format!(
        "assembling a guest from Debian's {package} and {BUSYBOX_PACKAGE} (once; kept in the cache)"
    ));
    let scratch = work.join("apt");
    let apt = Apt::update(&scratch, parts.kernel, progress)?;
    let kernel_package = apt.resolve(package, "linux-image-")?;
    let mut names = apt.depends(&kernel_package, KERNEL_PARTS)?;
    names.push(kernel_package.clone());
    let kernel_debs = apt.download(&names)?;
    let busybox_deb = match parts.kernel == parts.programs {
        true => apt.download(&[BUSYBOX_PACKAGE])?,
        false => {
            let more = work.join("apt-programs");
            Apt::update(&more, parts.programs, progress)?.download(&[BUSYBOX_PACKAGE])?
        }
    };
    progress(&format!("unpacking {kernel_package}"));
    let kernel = read_kernel(&kernel_debs)?;
    let busybox = read_busybox(&busybox_deb[0])?;
    progress("writing the initramfs");
    let programs = initramfs::Programs {
        busybox: &busybox,
        debug_exit: &debug_exit::program(parts.programs.architecture)?,
    };
    let initrd = initramfs::build(&programs, &kernel.release, kernel.modules)?;
    std::fs::write(work.join("vmlinuz"), kernel.image)?;
    std::fs::write(work.join("initrd"), initrd)?;
    for folder in ["apt", "apt-programs"] {
        let folder = work.join(folder);
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
    }
    Ok(())
}

struct Kernel {
    image: Vec<u8>,
    release: String,
    modules: Vec<Module>,
}

/// Of the packages that make up a kernel.
fn read_kernel(debs: &[PathBuf]) -> Result<Kernel> {
    let (mut image, mut modules) = (None, Vec::new());
    for deb in debs {
        package::visit(deb, |mut member| {
            if let Some(release) = image_release(&member.path).map(str::to_owned) {
                image = Some((release, member.read()?));
            } else if let Some(path) = module_path(&member.path) {
                let path = path.to_owned();
                modules.push(Module::read(&path, member.read()?)?);
            }
            Ok(())
        })?;
    }
    let (release, image) = image.context("the kernel package has no vmlinuz")?;
    Ok(Kernel {
        image,
        release,
        modules,
    })
}

/// The release of the kernel whose image a file is, by the path: `/boot/vmlinuz-RELEASE`, or among its modules.
fn image_release(path: &str) -> Option<&str> {
    let among_modules = || {
        let below = path.strip_prefix("usr/lib/modules/")?;
        below.strip_suffix("/vmlinuz")
    };
    path.strip_prefix("boot/vmlinuz-").or_else(among_modules)
}

/// The path below `lib/modules/RELEASE/` of a module in one of `MODULE_FOLDERS`.
fn module_path(path: &str) -> Option<&str> {
    let below = path.strip_prefix("usr/").unwrap_or(path);
    let below = below.strip_prefix("lib/modules/")?;
    let (_, path) = below.split_once('/')?;
    let folder = path.strip_prefix("kernel/")?;
    let is_module = path.ends_with(".ko") || path.ends_with(".ko.xz");
    (is_module && MODULE_FOLDERS.iter().any(|f| folder.starts_with(f))).then_some(path)
}

fn read_busybox(deb: &Path) -> Result<Vec<u8>> {
    let mut program = None;
    package::visit(deb, |mut member| {
        if member.path.ends_with("bin/busybox") && matches!(member.kind, package::Kind::File(_)) {
            program = Some(member.read()?);
        }
        Ok(())
    })?;
    program.context("the busybox package has no program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_found_where_either_debian_release_has_them() {
        assert_eq!(
            image_release("boot/vmlinuz-6.1.0-1-amd64"),
            Some("6.1.0-1-amd64")
        );
        assert_eq!(
            image_release("usr/lib/modules/7.2+deb14/vmlinuz"),
            Some("7.2+deb14")
        );
        assert_eq!(image_release("boot/System.map-6.1.0"), None);
    }

    #[test]
    fn modules_are_found_where_either_debian_release_has_them() {
        let module = "kernel/fs/xfs/xfs.ko";
        assert_eq!(
            module_path(&format!("lib/modules/6.1.0/{module}")),
            Some(module)
        );
        let compressed = format!("usr/lib/modules/6.12/{module}.xz");
        assert_eq!(module_path(&compressed), Some("kernel/fs/xfs/xfs.ko.xz"));
        assert_eq!(
            module_path("lib/modules/6.1.0/kernel/sound/core/snd.ko"),
            None
        );
        assert_eq!(module_path("lib/modules/6.1.0/modules.order"), None);
    }
}
