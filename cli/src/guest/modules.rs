//! Kernel modules: what each says of itself, and the closure of a wish list under "needs".
//!
//! A Debian kernel package carries no `modules.dep` (depmod makes it at installation), but each module names what it
//! needs in its `.modinfo` section, so the closure and the indices that modprobe reads are worked out from the modules.

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// One module as the package has it.
pub struct Module {
    /// Its name with underscores, as the kernel knows it.
    pub name: String,
    /// Its path below `lib/modules/RELEASE/`, without a compression suffix.
    pub path: String,
    /// The ELF file, uncompressed.
    pub elf: Vec<u8>,
    needs: Vec<String>,
    aliases: Vec<String>,
}

impl Module {
    /// Reads a module that the package has at `path` (below `lib/modules/RELEASE/`), compressed by xz if it says so.
    pub fn read(path: &str, file: Vec<u8>) -> Result<Module> {
        let (path, elf) = match path.strip_suffix(".xz") {
            Some(path) => (path, unpack_xz(&file)?),
            None => (path, file),
        };
        let information = information(&elf).with_context(|| format!("reading {path}"))?;
        let values = |key: &str| -> Vec<String> {
            let values = information.iter().filter(|(k, _)| k == key);
            values.map(|(_, v)| v.clone()).collect()
        };
        let needs = values("depends");
        let needs = needs.iter().flat_map(|list| list.split(','));
        Ok(Module {
            name: canonical(stem(path)),
            path: path.to_owned(),
            needs: needs.filter(|n| !n.is_empty()).map(canonical).collect(),
            aliases: values("alias"),
            elf,
        })
    }
}

/// The kernel's own spelling of a module name.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn stem(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.strip_suffix(".ko").unwrap_or(file)
}

fn unpack_xz(file: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Vec::new();
    lzma_rs::xz_decompress(&mut &file[..], &mut elf)
        .map_err(|error| anyhow::anyhow!("unpacking a module: {error:?}"))?;
    Ok(elf)
}

/// The `key=value` strings of `.modinfo`.
fn information(elf: &[u8]) -> Result<Vec<(String, String)>> {
    let file = object::File::parse(elf)?;
    let section = file.section_by_name(".modinfo").context("no .modinfo")?;
    let strings = section.data()?.split(|&byte| byte == 0);
    let pairs = strings.filter_map(|s| std::str::from_utf8(s).ok()?.split_once('='));
    Ok(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
}

/// The modules of `wanted` that exist among `available`, and all that they need. A wanted module that the package does
/// not have is taken as built into the kernel; a needed one that is missing is an error.
pub fn closure(available: Vec<Module>, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut by_name: BTreeMap<String, Module> = available
        .into_iter()
        .map(|module| (module.name.clone(), module))
        .collect();
    let mut open: Vec<String> = wanted.iter().map(|name| canonical(name)).collect();
    open.retain(|name| by_name.contains_key(name));
    let mut taken = BTreeSet::new();
    while let Some(name) = open.pop() {
        let Some(module) = by_name.get(&name) else {
            bail!(
                "a kernel module needs {name}, which its package does not have where it was looked for"
            );
        };
        if taken.insert(name) {
            open.extend(module.needs.iter().cloned());
        }
    }
    Ok(taken.iter().filter_map(|n| by_name.remove(n)).collect())
}

/// `modules.dep`: every module's path and the paths of all that it needs, in the order to load from right to left.
pub fn dependency_index(modules: &[Module]) -> String {
    let by_name: BTreeMap<&str, &Module> = modules.iter().map(|m| (m.name.as_str(), m)).collect();
    let mut index = String::new();
    for module in modules {
        let mut needed = Vec::new();
        gather(module, &by_name, &mut needed);
        let paths: Vec<&str> = needed.iter().map(|m| m.path.as_str()).collect();
        let _ = writeln!(index, "{}: {}", module.path, paths.join(" "));
    }
    index
}

/// Appends what `module` needs, each after all that need it.
fn gather<'a>(module: &Module, all: &BTreeMap<&str, &'a Module>, needed: &mut Vec<&'a Module>) {
    for name in &module.needs {
        let Some(need) = all.get(name.as_str()) else {
            continue;
        };
        needed.retain(|m| m.name != need.name);
        needed.push(need);
        gather(need, all, needed);
    }
}

/// `modules.alias`: which device or file system asks for which module.
pub fn alias_index(modules: &[Module]) -> String {
    let mut index = String::new();
    for module in modules {
        for alias in &module.aliases {
            let _ = writeln!(index, "alias {alias} {}", module.name);
        }
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, needs: &[&str]) -> Module {
        Module {
            name: name.to_owned(),
            path: format!("kernel/{name}.ko"),
            elf: Vec::new(),
            needs: needs.iter().map(|n| (*n).to_owned()).collect(),
            aliases: vec![format!("fs-{name}")],
        }
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn the_closure_takes_what_is_needed_and_nothing_else() {
        let all = vec![
            module("virtio_blk", &["virtio_ring"]),
            module("virtio_ring", &["virtio"]),
            module("virtio", &[]),
            module("xfs", &[]),
        ];
        let taken = closure(all, &["virtio-blk", "built_in"]).unwrap();
        assert_eq!(names(&taken), ["virtio", "virtio_blk", "virtio_ring"]);
    }

    #[test]
    fn a_missing_need_is_an_error() {
        let broken = vec![module("xfs", &["libcrc32c"])];
        let error = closure(broken, &["xfs"]).err().unwrap();
        assert!(error.to_string().contains("libcrc32c"));
    }

    #[test]
    fn a_module_comes_after_everything_that_needs_it() {
        let all = [
            module("a", &["c", "b"]),
            module("b", &["c"]),
            module("c", &[]),
        ];
        let index = dependency_index(&all);
        assert_eq!(
            index.lines().next().unwrap(),
            "kernel/a.ko: kernel/b.ko kernel/c.ko"
        );
        assert_eq!(alias_index(&all[2..]), "alias fs-c c\n");
    }
}
