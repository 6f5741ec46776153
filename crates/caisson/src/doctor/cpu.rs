//! What the host's processor gives to guests, and which backends there are.

use std::fs;
use std::thread;

use caisson_hypervisor::{
    Availability,
    x86::{ADDRESS_BITS, Base, CpuidTable, Level, Processor},
};

use super::{Finding, Status};
use crate::backend;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings = vec![instruction_sets()];
    findings.extend(models());
    findings.extend([tsc(), parallelism()]);
    findings
}

/// The processor models that each backend that works can give.
fn models() -> Vec<Finding> {
    backend::all()
        .iter()
        .filter(|backend| backend.probe().availability > Availability::Absent)
        .filter_map(|backend| Some((backend.name(), backend.offers(1).ok()?)))
        .map(|(name, offered)| judge_models(name, &offered))
        .collect()
}

fn judge_models(backend: &str, offered: &CpuidTable) -> Finding {
    let lacking = |level: &Level| {
        let table = Processor::new(Base::Level(*level)).table(offered, 1, ADDRESS_BITS);
        table.map_or_else(|e| vec![e.to_string()], |table| table.lacking(offered))
    };
    let (given, not): (Vec<_>, Vec<_>) = Level::ALL
        .into_iter()
        .map(|level| (level, lacking(&level)))
        .partition(|(_, lacking)| lacking.is_empty());
    let given: Vec<_> = given.iter().map(|(level, _)| level.name()).collect();
    let mut text = match given.as_slice() {
        [] => format!("{backend} gives none"),
        names => format!("{backend} gives {}", names.join(", ")),
    };
    match not.first() {
        None => Finding::new("processor models", Status::Ok, text),
        Some((level, lacking)) => {
            text += &format!("; for {} it lacks {}", level.name(), lacking.join(", "));
            Finding::new("processor models", Status::Note, text)
        }
    }
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

#[cfg(test)]
mod tests {
    use caisson_hypervisor::x86::{Base, CpuidTable, Level, Processor};

    use super::super::Status;
    use super::{invariant_tsc, judge_models};

    #[test]
    fn the_first_model_that_cannot_be_says_why() {
        let offers = |level| {
            let processor = Processor::new(Base::Level(level));
            processor.table(&CpuidTable::default(), 1, 39).unwrap()
        };
        let all = judge_models("x", &offers(Level::V4));
        assert_eq!(all.status, Status::Ok);
        assert_eq!(
            all.finding,
            "x gives x86-64-v1, x86-64-v2, x86-64-v3, x86-64-v4"
        );
        let two = judge_models("x", &offers(Level::V2));
        assert_eq!(two.status, Status::Note);
        assert!(
            two.finding
                .starts_with("x gives x86-64-v1, x86-64-v2; for x86-64-v3 it lacks"),
            "{}",
            two.finding
        );
        assert!(two.finding.contains("avx2"), "{}", two.finding);
        let none = judge_models("x", &CpuidTable::default());
        assert!(
            none.finding.starts_with("x gives none; for x86-64-v1"),
            "{}",
            none.finding
        );
    }

    #[test]
    fn both_flags_make_a_tsc_invariant() {
        assert!(invariant_tsc(
            "x: y\nflags\t\t: fpu constant_tsc nonstop_tsc aes\n"
        ));
        assert!(!invariant_tsc("flags\t\t: fpu constant_tsc aes\n"));
        assert!(!invariant_tsc(""));
    }
}
