//! Guest images: Debian kernel and initramfs from packages, and their cache.
//!
//! [`ImageStore`] keeps what was fetched under the user's cache folder and makes the built-in small
//! guest, `mini`: Debian's cloud kernel with an initramfs of busybox and our own init program. `debian`, a whole
//! Debian on a disk of its own, is made in a machine that somebody else runs ([`DebianBuild`]).
//! Packages come through the host's apt, by name, and are unpacked by this crate's own code.
//!
//! What it leaves out: package scripts are never run on the host, and nothing is installed on the host.
#![forbid(unsafe_code)]

mod apt;
mod cmdline;
mod deb;
mod debian;
mod durable;
mod error;
mod initramfs;
mod lock;
mod manifest;
mod mini;
mod progress;
mod store;

pub use cmdline::{CmdlineOptions, GuestMode, default_cmdline};
pub use deb::{Limits, unpack, unpack_some};
pub use debian::{DEBIAN, DEBIAN_12, DebianBuild, DebianImage, step};
pub use error::{ImageError, human_bytes};
pub use initramfs::{INIT, InitramfsSpec, ModuleSet, build_initramfs, write_initramfs};
pub use manifest::ImageInfo;
pub use mini::{MINI, MiniImage};
pub use progress::{Progress, Silent, TerminalProgress};
pub use store::{ImageStore, Package, PackageFile};
