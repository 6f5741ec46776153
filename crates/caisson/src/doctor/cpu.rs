//! What the host's processor gives to guests, and which backends there are.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::thread;

use super::{Finding, Status};

pub(super) fn findings() -> Vec<Finding> {
    vec![instruction_sets(), tsc(), parallelism(), kvm()]
}

/// Instruction sets that the software CPU runs on the host's own units, and so offers to guests
/// as far as the host has them.
#[cfg(target_arch = "x86_64")]
fn instruction_sets() -> Finding {
    macro_rules! have {
        ($($name:tt)*) => { [$(($name, std::arch::is_x86_feature_detected!($name))),*] };
    }
    let all = have!("sse4.2" "avx" "avx2" "bmi1" "bmi2" "fma" "aes" "sha" "cmpxchg16b" "rdrand");
    let list = |present: bool| {
        all.iter()
            .filter(|(_, has)| *has == present)
            .map(|(name, _)| name.to_uppercase())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (present, absent) = (list(true), list(false));
    if absent.is_empty() {
        Finding::new("instruction sets", Status::Ok, present)
    } else {
        Finding::new(
            "instruction sets",
            Status::Note,
            format!("this host lacks {absent}, so guests do not see what needs them"),
        )
        .remedy("run on a newer processor, or pass its features through if this is itself a guest")
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instruction_sets() -> Finding {
    Finding::new(
        "instruction sets",
        Status::Fail,
        format!(
            "this host is {}; the software CPU needs an x86-64",
            std::env::consts::ARCH
        ),
    )
    .remedy("run Caisson on an x86-64 Linux host")
}

fn tsc() -> Finding {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if invariant_tsc(&cpuinfo) {
        Finding::new("time stamp counter", Status::Ok, "invariant")
    } else {
        Finding::new(
            "time stamp counter",
            Status::Warn,
            "the host does not promise an invariant one; time in guests may drift",
        )
        .remedy("if this host is itself a guest, give it an invariant TSC (invtsc)")
    }
}

fn invariant_tsc(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| {
            let has = |flag| line.split_whitespace().any(|word| word == flag);
            has("constant_tsc") && has("nonstop_tsc")
        })
}

fn parallelism() -> Finding {
    match thread::available_parallelism() {
        Ok(count) => Finding::new(
            "host CPUs",
            Status::Ok,
            format!("{count}: that many vCPUs run at the same time"),
        ),
        Err(error) => Finding::new("host CPUs", Status::Note, format!("not known: {error}")),
    }
}

fn kvm() -> Finding {
    let topic = "KVM";
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Finding::new(
            topic,
            Status::Note,
            "/dev/kvm is there, but this version does not use it yet: guests run on the software CPU",
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => Finding::new(
            topic,
            Status::Note,
            "no /dev/kvm; not needed: guests run on the software CPU",
        ),
        Err(error) => Finding::new(
            topic,
            Status::Note,
            format!(
                "/dev/kvm cannot be opened ({error}); not needed: guests run on the software CPU"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::invariant_tsc;

    #[test]
    fn both_flags_make_a_tsc_invariant() {
        assert!(invariant_tsc(
            "x: y\nflags\t\t: fpu constant_tsc nonstop_tsc aes\n"
        ));
        assert!(!invariant_tsc("flags\t\t: fpu constant_tsc aes\n"));
        assert!(!invariant_tsc(""));
    }
}
