//! Kernel modules: which files a list of module names needs, and in what order they load.
//!
//! Packages carry no `modules.dep` (it is made when they are installed), so dependencies come from
//! the modules' own `.modinfo` sections: `depends=` must be loaded before, `softdep=pre:` should.

use crate::deb::{self, Limits, Member};
use crate::error::ImageError;
use object::Endianness;
use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;

/// The largest module that is taken, in bytes.
const MAX_MODULE: u64 = 64 << 20;

/// A module's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its path in the guest, without a leading slash and never compressed.
    pub path: String,
    /// The relocatable ELF file.
    pub content: Vec<u8>,
}

/// Modules in the order in which they load.
#[derive(Debug, Clone, Default)]
pub struct ModuleSet {
    modules: Vec<Module>,
}

impl ModuleSet {
    /// The modules `names` of the kernel package `deb` and all that they need. Names are as
    /// modprobe(8) takes them (`-` and `_` are the same). What is built into the kernel is left out.
    ///
    /// # Errors
    /// If the package is damaged, or has no module of a name asked for or depended on.
    pub fn from_kernel_package(deb: &Path, names: &[&str]) -> Result<ModuleSet, ImageError> {
        if names.is_empty() {
            return Ok(ModuleSet::default());
        }
        let index = Index::read(deb)?;
        let mut links: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut wanted: Vec<String> = names.iter().map(|name| normal(name)).collect();
        while let Some(name) = wanted.pop() {
            if links.contains_key(&name) || index.builtin.contains(&name) {
                continue;
            }
            let Some(found) = index.files.get(&name) else {
                return Err(ImageError::Missing {
                    package: deb.display().to_string(),
                    wanted: format!("kernel module \"{name}\""),
                });
            };
            let soft = found.info.soft.iter();
            let soft = soft.filter(|name| index.files.contains_key(*name));
            let before: Vec<String> = found.info.depends.iter().chain(soft).cloned().collect();
            wanted.extend(before.iter().cloned());
            links.insert(name, before);
        }
        let paths = links
            .keys()
            .map(|name| (index.files[name].path.as_str(), name.clone()))
            .collect();
        let mut needed: BTreeMap<String, Module> = read_modules(deb, &paths)?.into_iter().collect();
        let mut modules = Vec::new();
        for name in order(&links) {
            if let Some(module) = needed.remove(&name) {
                modules.push(module);
            }
        }
        Ok(ModuleSet { modules })
    }

    /// The modules, in the order in which they load.
    pub fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.iter()
    }

    /// The folders that the modules are in, parents first, without `lib/modules`.
    pub(super) fn folders(&self) -> Vec<String> {
        let mut folders = BTreeSet::new();
        for module in &self.modules {
            let mut path = module.path.as_str();
            while let Some((parent, _)) = path.rsplit_once('/') {
                folders.insert(parent.to_owned());
                path = parent;
            }
        }
        folders.remove("lib");
        folders.remove("lib/modules");
        folders.into_iter().collect()
    }
}

/// The names with what each needs before itself; a cycle is cut where it is met.
fn order(links: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut done = Vec::new();
    let mut seen = BTreeSet::new();
    for root in links.keys() {
        let mut stack = vec![(root, false)];
        while let Some((name, ready)) = stack.pop() {
            if ready {
                done.push(name.clone());
            } else if seen.insert(name) {
                stack.push((name, true));
                for before in links.get(name).into_iter().flatten() {
                    stack.push((before, false));
                }
            }
        }
    }
    done
}

/// What a kernel package has: module files by name, and what is built into the kernel.
struct Index {
    files: BTreeMap<String, Found>,
    builtin: BTreeSet<String>,
}

struct Found {
    path: String,
    info: ModInfo,
}

impl Index {
    fn read(deb: &Path) -> Result<Index, ImageError> {
        let mut index = Index {
            files: BTreeMap::new(),
            builtin: BTreeSet::new(),
        };
        deb::for_each_file(deb, Limits::default(), |member: Member<'_>| {
            if let Some(name) = module_name(member.path) {
                let content = expand(member.path, member.content).map_err(|error| {
                    ImageError::malformed(deb, format!("{}: {error}", member.path))
                })?;
                let info = ModInfo::read(&content).ok_or_else(|| {
                    ImageError::malformed(deb, format!("{} is no module", member.path))
                })?;
                let path = member.path.to_owned();
                index.files.insert(name, Found { path, info });
            } else if member.path.ends_with("/modules.builtin") {
                let mut text = String::new();
                member
                    .content
                    .take(16 << 20)
                    .read_to_string(&mut text)
                    .map_err(|error| ImageError::malformed(deb, error.to_string()))?;
                index.builtin.extend(text.lines().filter_map(module_name));
            }
            Ok(ControlFlow::<()>::Continue(()))
        })?;
        Ok(index)
    }
}

fn read_modules(
    deb: &Path,
    paths: &BTreeMap<&str, String>,
) -> Result<Vec<(String, Module)>, ImageError> {
    let mut modules = Vec::new();
    if paths.is_empty() {
        return Ok(modules);
    }
    deb::for_each_file(deb, Limits::default(), |member: Member<'_>| {
        let Some(name) = paths.get(member.path) else {
            return Ok(ControlFlow::Continue(()));
        };
        let content = expand(member.path, member.content)
            .map_err(|error| ImageError::malformed(deb, format!("{}: {error}", member.path)))?;
        let stem = member
            .path
            .find(".ko")
            .map_or(member.path, |at| &member.path[..at]);
        let path = format!("{}.ko", stem.strip_prefix("usr/").unwrap_or(stem));
        modules.push((name.clone(), Module { path, content }));
        Ok(if modules.len() == paths.len() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    Ok(modules)
}

/// A module's content, decompressed if its name says so.
fn expand(path: &str, content: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let reader: &mut dyn Read = match path.rsplit('.').next() {
        Some("xz") => {
            let stream = liblzma::stream::Stream::new_stream_decoder(MAX_MODULE, 0)?;
            &mut liblzma::read::XzDecoder::new_stream(content, stream)
        }
        Some("zst") => &mut zstd::stream::read::Decoder::new(content)?,
        Some("gz") => &mut flate2::read::GzDecoder::new(content),
        _ => content,
    };
    reader.take(MAX_MODULE + 1).read_to_end(&mut out)?;
    if out.len() as u64 > MAX_MODULE {
        return Err(io::Error::other("larger than any kernel module"));
    }
    Ok(out)
}

/// The module's name, if `path` is a module's: `kernel/drivers/virtio/virtio-ring.ko.xz` is
/// `virtio_ring`.
fn module_name(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (stem, rest) = file.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"]
        .contains(&rest)
        .then(|| normal(stem))
}

fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ModInfo {
    depends: Vec<String>,
    soft: Vec<String>,
}

impl ModInfo {
    fn read(module: &[u8]) -> Option<ModInfo> {
        let header = FileHeader64::<Endianness>::parse(module).ok()?;
        let endian = header.endian().ok()?;
        let sections = header.sections(endian, module).ok()?;
        let (_, section) = sections.section_by_name(endian, b".modinfo")?;
        Some(ModInfo::parse(section.data(endian, module).ok()?))
    }

    fn parse(section: &[u8]) -> ModInfo {
        let mut info = ModInfo::default();
        for entry in section.split(|&byte| byte == 0) {
            let Some((key, value)) = std::str::from_utf8(entry)
                .ok()
                .and_then(|entry| entry.split_once('='))
            else {
                continue;
            };
            match key {
                "depends" => info
                    .depends
                    .extend(value.split(',').filter(|name| !name.is_empty()).map(normal)),
                "softdep" => {
                    let mut before = false;
                    for word in value.split_whitespace() {
                        match word {
                            "pre:" => before = true,
                            "post:" => before = false,
                            name if before => info.soft.push(normal(name)),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_paths() {
        assert_eq!(
            module_name("lib/modules/6.1/kernel/a/virtio-ring.ko.xz").as_deref(),
            Some("virtio_ring")
        );
        assert_eq!(
            module_name("kernel/fs/ext4/ext4.ko").as_deref(),
            Some("ext4")
        );
        assert_eq!(module_name("lib/modules/6.1/modules.order"), None);
        assert_eq!(module_name("a/x.kondo"), None);
    }

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let info = ModInfo::parse(
            b"license=GPL\0depends=virtio,virtio-ring\0softdep=pre: crc32c-intel x post: y\0\xff\0depends=\0",
        );
        assert_eq!(info.depends, ["virtio", "virtio_ring"]);
        assert_eq!(info.soft, ["crc32c_intel", "x"]);
        assert_eq!(ModInfo::read(b"\x7fELF"), None);
    }

    #[test]
    fn a_module_loads_after_what_it_needs_even_in_a_cycle() {
        let links = |pairs: &[(&str, &[&str])]| {
            pairs
                .iter()
                .map(|(name, before)| {
                    (
                        (*name).to_owned(),
                        before.iter().map(|b| (*b).to_owned()).collect(),
                    )
                })
                .collect::<BTreeMap<String, Vec<String>>>()
        };
        let tree = links(&[("a", &["b", "c"]), ("b", &["d"]), ("c", &["d"]), ("d", &[])]);
        let sorted = order(&tree);
        let at = |name: &str| sorted.iter().position(|n| n == name).unwrap();
        assert_eq!(sorted.len(), 4);
        assert!(at("d") < at("b") && at("d") < at("c") && at("b") < at("a") && at("c") < at("a"));
        assert_eq!(order(&links(&[("x", &["y"]), ("y", &["x"])])).len(), 2);
    }

    #[test]
    fn folders_come_parents_first() {
        let set = ModuleSet {
            modules: vec![Module {
                path: "lib/modules/6.1/kernel/fs/x.ko".into(),
                content: Vec::new(),
            }],
        };
        assert_eq!(
            set.folders(),
            [
                "lib/modules/6.1",
                "lib/modules/6.1/kernel",
                "lib/modules/6.1/kernel/fs"
            ]
        );
    }
}
