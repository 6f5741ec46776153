//! Figures of this host.

use std::fs;

use caisson_config::ByteSize;

/// RAM that a process here may use: what the machine has, or less under a cgroup limit. `None`
/// when the host does not tell.
pub(crate) fn memory() -> Option<ByteSize> {
    let total = ByteSize::from_bytes(caisson_machine::host_memory()?);
    Some(cgroup_memory_limit().map_or(total, |limit| limit.min(total)))
}

/// RAM that is free or could be freed at once.
pub(crate) fn available_memory() -> Option<ByteSize> {
    meminfo("MemAvailable")
}

/// A field of `/proc/meminfo`, which counts in KiB.
fn meminfo(field: &str) -> Option<ByteSize> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, field)
}

fn parse_meminfo(text: &str, field: &str) -> Option<ByteSize> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024).map(ByteSize::from_bytes)
}

/// The lowest `memory.max` from this process's cgroup (version 2) up to the root.
fn cgroup_memory_limit() -> Option<ByteSize> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mut path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut lowest: Option<u64> = None;
    loop {
        let file = format!("/sys/fs/cgroup{}/memory.max", path.trim_end_matches('/'));
        let limit = fs::read_to_string(file).ok();
        if let Some(limit) = limit.and_then(|text| text.trim().parse().ok()) {
            lowest = Some(lowest.map_or(limit, |least| least.min(limit)));
        }
        match path.rfind('/') {
            Some(0) | None if path.len() <= 1 => break,
            Some(0) | None => path = "/",
            Some(at) => path = &path[..at],
        }
    }
    lowest.map(ByteSize::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kib() {
        let text =
            "MemTotal:       24628836 kB\nMemFree:        100 kB\nHugePages_Total:       0\n";
        assert_eq!(
            parse_meminfo(text, "MemTotal"),
            Some(ByteSize::from_bytes(24_628_836 * 1024))
        );
        assert_eq!(parse_meminfo(text, "Mem"), None);
        assert_eq!(parse_meminfo(text, "HugePages_Total"), None, "not in kB");
        assert_eq!(parse_meminfo("MemTotal: x kB", "MemTotal"), None);
    }

    #[test]
    fn this_host_has_memory() {
        let total = memory().expect("Linux tells");
        assert!(total >= ByteSize::from_mib(64));
    }
}
