//! Whether a description makes sense for a given backend and host.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::{ByteSize, CharBackend, Disk, Ephemeral, HugePages, MachineConfig};

/// What the backend and the host can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most vCPUs that the backend runs.
    pub max_cpus: u32,
    /// The RAM that the host has, if it is known.
    pub host_memory: Option<ByteSize>,
}

impl Limits {
    /// The least RAM that a machine can have: kernels are loaded at 1 MiB and need room there.
    pub const MIN_MEMORY: ByteSize = ByteSize::from_mib(2);
    /// RAM comes in pages of this many bytes.
    pub const PAGE: u64 = 4096;
    /// A PC has four serial ports.
    pub const MAX_SERIAL: usize = 4;
    /// How many disks a machine can have: there are other devices on the PCI bus too.
    pub const MAX_DISKS: usize = 16;
    /// The longest name that a guest can be told a disk by (Virtio 1.3 §5.2.6: 20 bytes).
    pub const MAX_DISK_ID: usize = 20;
    /// How many virtio consoles a machine can have: as many as Linux gives names to early.
    pub const MAX_CONSOLES: usize = 8;
    /// How many network cards a machine can have.
    pub const MAX_NETS: usize = 4;
    /// The longest kernel command line that x86 Linux takes, without its terminator
    /// (`COMMAND_LINE_SIZE` in the kernel's `asm/setup.h`).
    pub const MAX_CMDLINE: usize = 2047;
}

/// One thing that is wrong: the key, what is wrong with it, and the way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key in the file, which is also the flag without its dashes.
    pub key: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// A description that does not make sense: every problem found, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid(
    /// The problems, in the order of the keys.
    pub Vec<Problem>,
);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl core::error::Error for Invalid {}

impl MachineConfig {
    /// Checks the description against `limits`.
    ///
    /// # Errors
    /// Lists every problem, not only the first.
    pub fn validate(&self, limits: &Limits) -> Result<(), Invalid> {
        let mut problems = Vec::new();
        let mut report = |key, message| problems.push(Problem { key, message });

        if self.image.is_some() && self.kernel.is_some() {
            report(
                "kernel",
                "an image brings its own kernel; give either an image or a kernel".into(),
            );
        }
        if let Some(cmdline) = &self.cmdline {
            if cmdline.len() > Limits::MAX_CMDLINE {
                report(
                    "cmdline",
                    format!(
                        "it has {} bytes and Linux takes at most {}; shorten it",
                        cmdline.len(),
                        Limits::MAX_CMDLINE
                    ),
                );
            }
            if cmdline.contains(['\0', '\n']) {
                report(
                    "cmdline",
                    "it contains a NUL or a line break; the kernel would read it only up to there"
                        .into(),
                );
            }
        }
        self.check_cpus(limits, &mut report);
        self.check_command(&mut report);
        self.check_serial(&mut report);
        self.check_memory(limits, &mut report);
        self.check_disks(&mut report);
        self.check_net(&mut report);
        if let Some(debug_exit) = &self.debug_exit
            && debug_exit.port > 0xfffc
        {
            report(
                "debug-exit",
                format!(
                    "port {:#x} leaves no room for its four bytes; use one up to 0xfffc",
                    debug_exit.port
                ),
            );
        }

        if problems.is_empty() {
            Ok(())
        } else {
            Err(Invalid(problems))
        }
    }

    fn check_cpus(&self, limits: &Limits, report: &mut impl FnMut(&'static str, String)) {
        let max = limits.max_cpus;
        if self.cpus == 0 {
            report(
                "cpus",
                format!("0 vCPUs cannot run anything; choose 1 to {max}"),
            );
        } else if self.cpus > max {
            report(
                "cpus",
                format!(
                    "{} vCPUs are more than this backend runs; choose 1 to {max}",
                    self.cpus
                ),
            );
        }
    }

    fn check_command(&self, report: &mut impl FnMut(&'static str, String)) {
        let Some(program) = self.command.first() else {
            return;
        };
        if self.kernel.is_some() {
            report(
                "command",
                "it is run by an image's init, and a kernel was given instead of an image; \
                 drop the kernel, or put the command into your initrd"
                    .into(),
            );
        }
        if program.is_empty() {
            report(
                "command",
                "the program's name is empty; name a program in the guest".into(),
            );
        }
        if self.command.iter().any(|word| word.contains('\0')) {
            report(
                "command",
                "an argument contains a NUL byte, which no program can be given".into(),
            );
        }
    }

    fn check_serial(&self, report: &mut impl FnMut(&'static str, String)) {
        if self.serial.len() > Limits::MAX_SERIAL {
            report(
                "serial",
                format!(
                    "{} ports are given and a PC has {} (COM1 to COM4); drop some",
                    self.serial.len(),
                    Limits::MAX_SERIAL
                ),
            );
        }
        if !self.command.is_empty() && self.serial.len() > 1 {
            report(
                "serial",
                "COM2 carries the command's input and output; give one port at most with a command"
                    .into(),
            );
        }
        if self.console.len() > Limits::MAX_CONSOLES {
            report(
                "console",
                format!(
                    "{} consoles are given and a machine has at most {}; drop some",
                    self.console.len(),
                    Limits::MAX_CONSOLES
                ),
            );
        }
        let users = |backend: &CharBackend| {
            self.serial
                .iter()
                .chain(&self.console)
                .chain(self.debugcon.iter())
                .filter(|other| *other == backend)
                .count()
        };
        if users(&CharBackend::Stdio) > 1 {
            report(
                "serial",
                "stdio is given to more than one port; keep it for one and use file=PATH, \
                 socket=PATH or null for the others"
                    .into(),
            );
        }
        let mut paths: Vec<&str> = self
            .serial
            .iter()
            .chain(&self.console)
            .chain(self.debugcon.iter())
            .filter_map(|backend| backend.path().map(|path| path.as_str()))
            .collect();
        paths.sort_unstable();
        if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            report(
                "serial",
                format!(
                    "\"{}\" is given to more than one port; give each port its own",
                    twice[0]
                ),
            );
        }
    }

    fn check_net(&self, report: &mut impl FnMut(&'static str, String)) {
        if self.net.len() > Limits::MAX_NETS {
            report(
                "net",
                format!(
                    "{} network cards are more than there is room for; use at most {}",
                    self.net.len(),
                    Limits::MAX_NETS
                ),
            );
        }
        for mtu in self.cards().filter_map(|net| net.mtu) {
            if !(1280..=65521).contains(&mtu) {
                report(
                    "net",
                    format!("an mtu of {mtu} is not possible; choose 1280 to 65521"),
                );
            }
        }
    }

    fn check_disks(&self, report: &mut impl FnMut(&'static str, String)) {
        if self.disk.len() > Limits::MAX_DISKS {
            report(
                "disk",
                format!(
                    "{} disks are given and a machine has at most {}; drop some",
                    self.disk.len(),
                    Limits::MAX_DISKS
                ),
            );
        }
        for (index, disk) in self.disk.iter().enumerate() {
            let path = disk.path.as_str();
            let mut wrong = |what: &str| report("disk", format!("\"{path}\": {what}"));
            if disk.readonly && disk.ephemeral != Ephemeral::Off {
                wrong(
                    "nothing is written to a read-only disk, so nothing can be thrown away; \
                     drop readonly or ephemeral",
                );
            }
            if let Some(id) = &disk.id {
                let fits = (1..=Limits::MAX_DISK_ID).contains(&id.len());
                if !fits || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                    wrong("an id has 1 to 20 printable ASCII characters and no space; shorten it");
                }
            }
            if disk.bandwidth.is_some_and(|rate| rate.bytes() == 0) || disk.iops == Some(0) {
                wrong("with a limit of 0 it would never answer; give at least 1");
            }
            if disk.bandwidth.is_none() && disk.bandwidth_burst.is_some()
                || disk.iops.is_none() && disk.iops_burst.is_some()
            {
                wrong("a burst goes with its limit; give bandwidth or iops too");
            }
            if let Some(group) = &disk.limit_group {
                let mut limited = self.disk.iter().filter(|other| {
                    other.limit_group.as_ref() == Some(group) && other.is_limited()
                });
                match limited.next() {
                    None => wrong(
                        "no disk of its limit-group has a limit; give one of them bandwidth or iops",
                    ),
                    Some(first) if disk.is_limited() && disk.limits() != first.limits() => wrong(
                        "its limit-group has another limit already; give the limit to one disk of \
                         the group only",
                    ),
                    Some(_) => {}
                }
            }
            let same = |other: &Disk| other.path == disk.path;
            let writes = |other: &Disk| !other.readonly && other.ephemeral == Ephemeral::Off;
            let earlier = self.disk.iter().take(index).find(|other| same(other));
            if let Some(earlier) = earlier
                && (writes(disk) || writes(earlier))
            {
                wrong(
                    "it is given twice and written to; have it once, or make all of them readonly \
                     or ephemeral",
                );
            }
        }
        let mut ids: Vec<&str> = self
            .disk
            .iter()
            .filter_map(|disk| disk.id.as_deref())
            .collect();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            report(
                "disk",
                format!(
                    "two disks have the id \"{}\"; the guest could not tell them apart",
                    twice[0]
                ),
            );
        }
    }

    fn check_memory(&self, limits: &Limits, report: &mut impl FnMut(&'static str, String)) {
        let size = self.memory.size;
        if size < Limits::MIN_MEMORY {
            report(
                "memory",
                format!(
                    "{size} is too little for any kernel; give at least {} \
                     (Debian wants 128M)",
                    Limits::MIN_MEMORY
                ),
            );
        }
        let page = if self.memory.hugepages == HugePages::On {
            2 << 20
        } else {
            Limits::PAGE
        };
        if !size.bytes().is_multiple_of(page) {
            let up = size.bytes().checked_next_multiple_of(page);
            let down = size.bytes() - size.bytes() % page;
            report(
                "memory",
                format!(
                    "{size} is not a multiple of the page size, {}; use {}",
                    ByteSize::from_bytes(page),
                    ByteSize::from_bytes(up.unwrap_or(down))
                ),
            );
        }
        if let Some(host) = limits.host_memory
            && size > host
        {
            report(
                "memory",
                format!(
                    "{size} is more than this host has, {}; give less",
                    mib(host)
                ),
            );
        }
    }
}

/// The size in whole MiB, for figures that are seldom round.
fn mib(size: ByteSize) -> ByteSize {
    ByteSize::from_mib(size.bytes() >> 20)
}
