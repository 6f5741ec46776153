//! Disks.

use alloc::string::String;
use core::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::options::shorthand;
use crate::{ByteSize, HostPath};

/// A disk: the image behind it and the device in front of it.
///
/// As an option string, the path comes first: `web.qcow2`, `root.img,format=raw,bus=nvme`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", remote = "Self")]
pub struct Disk {
    /// The image: a file, or a block device of the host's.
    pub path: HostPath,
    /// The device that the guest sees.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bus: DiskBus,
    /// The image's format; without it, the image's name and content must leave no doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// Whether the guest may only read it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub readonly: bool,
    /// Whether what the guest writes is thrown away at the end.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ephemeral: Ephemeral,
    /// What completed writes and flushes promise.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cache: DiskCache,
    /// Whether the image may name files that it is based on.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backing: Backing,
    /// What the guest can tell the disk from others by: 1 to 20 printable ASCII characters. `disk0`, … if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The unit in which the guest reads and writes: 512 bytes or 4 KiB.
    #[serde(default, skip_serializing_if = "is_default")]
    pub block: BlockSize,
    /// How much is read and written per second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<ByteSize>,
    /// How much may be read and written at once after a rest; without it, what a tenth of a second makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<ByteSize>,
    /// How many operations there are per second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// How many operations may follow each other at once after a rest; without it, what a tenth of a second makes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Disks with the same name here share one limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_group: Option<String>,
}

shorthand!(Disk);

impl Disk {
    /// The disk of the image at `path`, with everything else as is usual.
    pub fn new(path: HostPath) -> Self {
        Self {
            path,
            bus: DiskBus::default(),
            format: None,
            readonly: false,
            ephemeral: Ephemeral::default(),
            cache: DiskCache::default(),
            backing: Backing::default(),
            id: None,
            block: BlockSize::default(),
            bandwidth: None,
            bandwidth_burst: None,
            iops: None,
            iops_burst: None,
            limit_group: None,
        }
    }

    /// Whether it has a rate limit of its own.
    pub fn is_limited(&self) -> bool {
        self.bandwidth.is_some() || self.iops.is_some()
    }

    /// What limits it, to be compared with that of another disk of its group.
    pub(crate) fn limits(&self) -> [Option<u64>; 4] {
        [
            self.bandwidth.map(ByteSize::bytes),
            self.bandwidth_burst.map(ByteSize::bytes),
            self.iops,
            self.iops_burst,
        ]
    }

    /// The host paths in it, to be changed.
    pub(crate) fn paths_mut(&mut self) -> impl Iterator<Item = &mut HostPath> {
        let backing = match &mut self.backing {
            Backing::Below(folder) => Some(folder),
            Backing::Off | Backing::On => None,
        };
        let ephemeral = match &mut self.ephemeral {
            Ephemeral::Folder(folder) => Some(folder),
            Ephemeral::Off | Ephemeral::Memory => None,
        };
        core::iter::once(&mut self.path)
            .chain(backing)
            .chain(ephemeral)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The device in front of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBus {
    /// A virtio block device.
    #[default]
    Virtio,
    /// An NVMe controller with one namespace.
    Nvme,
}

/// A format of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's.
    Qcow2,
    /// Microsoft's older one.
    Vhd,
    /// Microsoft's newer one.
    Vhdx,
    /// VMware's.
    Vmdk,
}

impl DiskFormat {
    /// The name that people write.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }
}

/// What a completed write and a flush promise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskCache {
    /// Writes go through the host's page cache and are durable after a flush.
    #[default]
    Writeback,
    /// As [`DiskCache::Writeback`], but past the page cache where the alignment allows it.
    Direct,
    /// Each write is durable when it is completed.
    Writethrough,
    /// Flushes are ignored.
    Unsafe,
}

/// The unit in which a guest reads and writes a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum BlockSize {
    /// 512 bytes.
    #[default]
    Bytes512,
    /// 4096 bytes.
    Bytes4096,
}

impl BlockSize {
    /// In bytes.
    pub fn bytes(self) -> u32 {
        match self {
            Self::Bytes512 => 512,
            Self::Bytes4096 => 4096,
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.bytes()
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        match bytes {
            512 => Ok(Self::Bytes512),
            4096 => Ok(Self::Bytes4096),
            other => Err(alloc::format!("a block has 512 or 4096 bytes, not {other}")),
        }
    }
}

/// Whether and where what is written to a disk is thrown away at the end: `off`, `on` (in memory), or a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ephemeral {
    /// It is kept, in the image.
    #[default]
    Off,
    /// It is kept in memory until the end. It takes as much as the guest writes.
    Memory,
    /// It is kept in a file without a name in this folder until the end.
    Folder(HostPath),
}

/// Which files an image may name as what it is based on: `off`, `on`, or a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// None. Who can write an image could have it name any file of the host's.
    #[default]
    Off,
    /// Any.
    On,
    /// Those in this folder or below.
    Below(HostPath),
}

/// A value that is off, on, or on with a folder.
struct Switch(Result<bool, HostPath>);

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Switch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("on, off or the path of a folder")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<Switch, E> {
                Ok(Switch(Ok(on)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Switch, E> {
                Ok(Switch(match text {
                    "on" | "yes" | "true" => Ok(true),
                    "off" | "no" | "false" => Ok(false),
                    path => Err(path.parse().map_err(E::custom)?),
                }))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Ok(on) => on.serialize(serializer),
            // Such a folder is not to be taken for the word.
            Err(path)
                if matches!(
                    path.as_str(),
                    "on" | "yes" | "true" | "off" | "no" | "false"
                ) =>
            {
                alloc::format!("./{}", path.as_str()).serialize(serializer)
            }
            Err(path) => path.serialize(serializer),
        }
    }
}

macro_rules! switch {
    ($type:ident, $on:ident, $folder:ident) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Ok(match Switch::deserialize(deserializer)?.0 {
                    Ok(false) => Self::Off,
                    Ok(true) => Self::$on,
                    Err(folder) => Self::$folder(folder),
                })
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                Switch(match self {
                    Self::Off => Ok(false),
                    Self::$on => Ok(true),
                    Self::$folder(folder) => Err(folder.clone()),
                })
                .serialize(serializer)
            }
        }
    };
}

switch!(Ephemeral, Memory, Folder);
switch!(Backing, On, Below);

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    fn read(text: &str) -> Disk {
        text.parse().unwrap()
    }

    #[test]
    fn the_path_comes_first_and_the_rest_in_any_order() {
        let disk = read("web.qcow2,ephemeral,bus=nvme,backing=/images,iops=500");
        assert_eq!(disk.path.as_str(), "web.qcow2");
        assert_eq!(disk.bus, DiskBus::Nvme);
        assert_eq!(disk.ephemeral, Ephemeral::Memory);
        assert_eq!(disk.backing, Backing::Below("/images".parse().unwrap()));
        assert_eq!(disk.iops, Some(500));
        assert_eq!(
            read("path=a,ephemeral=/var/tmp").ephemeral,
            Ephemeral::Folder("/var/tmp".parse().unwrap())
        );
        assert_eq!(read("a,block=4096").block.bytes(), 4096);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        for (text, part) in [
            ("a,bus=virtoi", "virtio"),
            ("a,block=1024", "512 or 4096"),
            ("bus=nvme", "path"),
            ("a,read-only", "readonly"),
        ] {
            let said = text.parse::<Disk>().unwrap_err().to_string();
            assert!(said.contains(part), "{text}: {said}");
        }
    }
}
