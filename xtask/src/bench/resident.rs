//! What a process keeps in memory, by what it is for.

use std::{collections::BTreeMap, fmt, fs};

use anyhow::{Context, Result};

/// The name of guest RAM among the mappings of `caisson`.
const GUEST_RAM: &str = "memfd:caisson-ram";

/// Resident memory in KiB, by kind of mapping.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    guest: u64,
    own: BTreeMap<String, u64>,
}

impl Resident {
    /// Of the process `pid`.
    pub(super) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps");
        Ok(Self::parse(
            &fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?,
        ))
    }

    /// KiB beyond guest RAM.
    pub(super) fn beyond_guest(&self) -> u64 {
        self.own.values().sum()
    }

    /// From the text of `smaps` (proc_pid_smaps(5)).
    fn parse(text: &str) -> Self {
        let mut resident = Self::default();
        let mut kind = String::new();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let Some(first) = words.next() else { continue };
            if first == "Rss:" {
                let kib: u64 = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
                if kind.contains(GUEST_RAM) {
                    resident.guest += kib;
                } else if kib > 0 {
                    *resident.own.entry(kind.clone()).or_default() += kib;
                }
            } else if !first.ends_with(':') {
                let permissions = words.next().unwrap_or("");
                let name = words.skip(3).collect::<Vec<_>>().join(" ");
                kind = name_of(permissions, &name);
            }
        }
        resident
    }
}

/// What a mapping is for, from its permissions and its name.
fn name_of(permissions: &str, name: &str) -> String {
    let what = match name {
        "" => "heap of threads, stacks, tables of the software CPU",
        "[heap]" => "heap",
        "[stack]" => "stack of the main thread",
        name if name.starts_with('[') => "kernel's own",
        name => name.trim_start_matches('/').trim_end_matches(" (deleted)"),
    };
    let kind = match permissions.as_bytes() {
        [_, _, b'x', ..] => "code",
        [_, b'w', ..] => "data",
        _ => "constants",
    };
    match name {
        "" | "[heap]" | "[stack]" => what.to_owned(),
        _ => format!("{what} ({kind})"),
    }
}

impl fmt::Display for Resident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.beyond_guest();
        writeln!(
            f,
            "resident: {} KiB of guest RAM, and {total} KiB beyond it:",
            self.guest
        )?;
        let mut kinds: Vec<_> = self.own.iter().collect();
        kinds.sort_by_key(|(_, kib)| core::cmp::Reverse(**kib));
        for (kind, kib) in kinds {
            writeln!(f, "  {kib:>8} KiB  {kind}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let text = "\
7f00-7f10 rw-s 00000000 00:01 5    /memfd:caisson-ram (deleted)
Rss:                 100 kB
VmFlags: rd wr
7f20-7f30 r-xp 00000000 00:01 6    /usr/bin/caisson
Rss:                  30 kB
7f30-7f40 rw-p 00000000 00:00 0
Rss:                   7 kB
7f50-7f60 rw-p 00000000 00:00 0    [heap]
Rss:                   0 kB
";
        let resident = Resident::parse(text);
        assert_eq!(resident.guest, 100);
        assert_eq!(resident.beyond_guest(), 37);
        assert_eq!(resident.own.get("usr/bin/caisson (code)"), Some(&30));
        assert!(resident.to_string().contains("37 KiB beyond"), "{resident}");
    }
}
