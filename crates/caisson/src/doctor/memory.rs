//! RAM for guests: how much, huge pages, the overcommit policy.

use std::fs;

use caisson_config::{ByteSize, defaults};

use super::{Finding, Status};
use crate::host;

pub(super) fn findings() -> Vec<Finding> {
    vec![
        amount(),
        overcommit(),
        reserved_huge_pages(),
        transparent_huge_pages(),
    ]
}

fn mib(size: ByteSize) -> String {
    format!("{} MiB", size.bytes() >> 20)
}

fn amount() -> Finding {
    let topic = "memory";
    let (Some(total), Some(available)) = (host::memory(), host::available_memory()) else {
        return Finding::new(
            topic,
            Status::Warn,
            "/proc/meminfo does not tell how much there is",
        )
        .remedy("mount /proc");
    };
    let available = available.min(total);
    let finding = format!("{} available of {}", mib(available), mib(total));
    if available < defaults::MEMORY {
        Finding::new(topic, Status::Warn, finding).remedy(format!(
            "a machine of the default size ({}) may run out; close programs or use a smaller --memory",
            defaults::MEMORY
        ))
    } else {
        Finding::new(topic, Status::Ok, finding)
    }
}

fn overcommit() -> Finding {
    let topic = "overcommit";
    match fs::read_to_string("/proc/sys/vm/overcommit_memory")
        .as_deref()
        .map(str::trim)
    {
        Ok("2") => Finding::new(
            topic,
            Status::Warn,
            "strict accounting: a guest's whole RAM counts at once, not as it is used",
        )
        .remedy("sysctl vm.overcommit_memory=0, or keep --memory within what is left"),
        Ok(_) => Finding::new(
            topic,
            Status::Ok,
            "guest RAM costs the host only what is used",
        ),
        Err(error) => Finding::new(topic, Status::Note, format!("not known: {error}")),
    }
}

fn reserved_huge_pages() -> Finding {
    let topic = "huge pages";
    let read = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    match (read("free_hugepages"), read("nr_hugepages")) {
        (Some(free), Some(total)) if total > 0 => Finding::new(
            topic,
            Status::Ok,
            format!("{} MiB free of {} MiB reserved", free * 2, total * 2),
        ),
        (Some(_), Some(_)) => Finding::new(
            topic,
            Status::Note,
            "none are reserved; only --memory SIZE,hugepages=on needs them",
        )
        .remedy("sysctl vm.nr_hugepages=512 reserves 1 GiB"),
        _ => Finding::new(
            topic,
            Status::Note,
            "this host has no pages of 2 MiB to reserve",
        ),
    }
}

fn transparent_huge_pages() -> Finding {
    let topic = "transparent huge pages";
    // Guest RAM is a memfd, which the shmem policy governs.
    match fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled") {
        Ok(text) => match text.split(['[', ']']).nth(1) {
            Some("never" | "deny") => Finding::new(
                topic,
                Status::Note,
                "off for shared memory; guests use small pages",
            )
            .remedy("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            Some(policy) => Finding::new(topic, Status::Ok, format!("{policy} for shared memory")),
            None => Finding::new(topic, Status::Note, "not known"),
        },
        Err(_) => Finding::new(topic, Status::Note, "this host has none"),
    }
}
