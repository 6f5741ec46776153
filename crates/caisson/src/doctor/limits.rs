//! Resource limits that a machine could run into.

use caisson_config::{ByteSize, defaults};
use rustix::process::{Resource, getrlimit};

use super::{Finding, Status};

/// Descriptors that one machine with a few sockets and files uses, with room to spare.
const FILES_WANTED: u64 = 256;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings: Vec<Finding> = [
        size_limit(
            Resource::As,
            "address space",
            "ulimit -v",
            // Beside guest RAM: code caches, stacks of the vCPU threads, the program.
            ByteSize::from_mib(2048),
        ),
        // Guest RAM is a memfd, and the limit on file sizes holds for it too.
        size_limit(
            Resource::Fsize,
            "file size",
            "ulimit -f",
            ByteSize::from_mib(0),
        ),
        files(),
    ]
    .into_iter()
    .flatten()
    .collect();
    if findings.is_empty() {
        findings.push(Finding::new(
            "limits",
            Status::Ok,
            "none that a machine would reach",
        ));
    }
    findings
}

fn size_limit(resource: Resource, what: &str, command: &str, beside: ByteSize) -> Option<Finding> {
    let limit = getrlimit(resource).current?;
    let rest = limit.saturating_sub(beside.bytes());
    let status = if rest < defaults::MEMORY.bytes() {
        Status::Warn
    } else {
        Status::Note
    };
    Some(
        Finding::new(
            "limits",
            status,
            format!(
                "the {what} of a process is limited to {} MiB: guest RAM cannot be more than about {} MiB",
                limit >> 20,
                rest >> 20
            ),
        )
        .remedy(format!("{command} unlimited")),
    )
}

fn files() -> Option<Finding> {
    let limit = getrlimit(Resource::Nofile).current?;
    (limit < FILES_WANTED).then(|| {
        Finding::new(
            "limits",
            Status::Warn,
            format!("a process may have only {limit} files open"),
        )
        .remedy(format!("ulimit -n {FILES_WANTED}"))
    })
}
