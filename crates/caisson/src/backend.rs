//! The hypervisor backends of this build.

use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use caisson_config::{Accel, SoftTier};
use caisson_hypervisor::{Availability, Hypervisor, Probe};
use caisson_hypervisor_kvm::Kvm;
use caisson_hypervisor_soft::{Counters, Soft, Tier};

/// Every backend, the fastest first.
pub(crate) fn all() -> Vec<Arc<dyn Hypervisor>> {
    vec![Arc::new(Kvm), Arc::new(Soft::default())]
}

/// What software CPUs report to, if they are asked to.
static COUNTERS: OnceLock<Arc<Counters>> = OnceLock::new();

/// Has the software CPUs that are chosen from now on count what they do.
pub(crate) fn count() -> Arc<Counters> {
    COUNTERS.get_or_init(Arc::default).clone()
}

/// `backend`, or if it is the software CPU, one that goes as far as `tier`.
fn at_tier(backend: Arc<dyn Hypervisor>, tier: SoftTier) -> Arc<dyn Hypervisor> {
    if backend.name() != Soft::default().name() {
        return backend;
    }
    let soft = Soft::new(match tier {
        SoftTier::Native => Tier::Native,
        _ => Tier::Interpreted,
    });
    Arc::new(match COUNTERS.get() {
        Some(counters) => soft.counting(counters.clone()),
        None => soft,
    })
}

/// Every backend with its probe. Probing runs a guest, so it is done once, and only for those who
/// leave the choice to Caisson.
fn probed() -> &'static [(Arc<dyn Hypervisor>, Probe)] {
    static PROBED: OnceLock<Vec<(Arc<dyn Hypervisor>, Probe)>> = OnceLock::new();
    PROBED.get_or_init(|| {
        let probed = |backend: Arc<dyn Hypervisor>| {
            let probe = backend.probe();
            (backend, probe)
        };
        all().into_iter().map(probed).collect()
    })
}

/// The backend that `accel` asks for, usable or not: for `auto` the first of the most available.
///
/// # Errors
/// This build has no such backend.
pub(crate) fn choose(accel: Accel, tier: SoftTier) -> Result<Arc<dyn Hypervisor>> {
    let chosen = if accel == Accel::Auto {
        // Of equals, the last is taken as the greatest.
        probed()
            .iter()
            .rev()
            .max_by_key(|(_, probe)| probe.availability)
            .map(|(backend, _)| backend.clone())
    } else {
        let name = accel.to_string();
        all().into_iter().find(|backend| backend.name() == name)
    };
    let chosen = chosen.map(|backend| at_tier(backend, tier));
    chosen.ok_or_else(|| anyhow!("this caisson was built without the backend \"{accel}\""))
}

/// The backend called `name` if it works here as meant, else `otherwise`: a saved machine goes on
/// best where it was.
pub(crate) fn like(
    name: &str,
    tier: SoftTier,
    otherwise: Arc<dyn Hypervisor>,
) -> Arc<dyn Hypervisor> {
    all()
        .into_iter()
        .find(|backend| {
            backend.name() == name && backend.probe().availability == Availability::Usable
        })
        .map(|backend| at_tier(backend, tier))
        .unwrap_or(otherwise)
}

/// What to tell who asked for `auto` and did not get the first backend that there is: one that
/// works, but slowly.
pub(crate) fn passed_over(accel: Accel, chosen: &str) -> Option<String> {
    if accel != Accel::Auto {
        return None;
    }
    probed()
        .iter()
        .take_while(|(backend, _)| backend.name() != chosen)
        .find(|(_, probe)| probe.availability == Availability::Slow)
        .map(|(backend, probe)| {
            format!(
                "taking {chosen}, because {}; --accel {} takes it all the same",
                probe.reason,
                backend.name()
            )
        })
}

/// Refuses a backend that does not work here, with its reason and remedy.
pub(crate) fn require_usable(backend: &dyn Hypervisor) -> Result<()> {
    let Some(probe) = backend.absence() else {
        return Ok(());
    };
    let remedy = probe
        .remedy
        .map(|remedy| format!("; {remedy}"))
        .unwrap_or_default();
    Err(anyhow!(
        "the backend \"{}\" does not work here: {}{remedy}",
        backend.name(),
        probe.reason
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_accelerator_names_a_backend() {
        assert_eq!(
            choose(Accel::Soft, SoftTier::default()).unwrap().name(),
            "soft"
        );
        assert_eq!(
            choose(Accel::Kvm, SoftTier::default()).unwrap().name(),
            "kvm"
        );
        let auto = choose(Accel::Auto, SoftTier::default()).unwrap();
        assert!(all().iter().any(|backend| backend.name() == auto.name()));
    }

    #[test]
    fn the_help_tells_the_limit() {
        // `--cpus` says "1 to 64 (with kvm 254)".
        assert_eq!(
            choose(Accel::Soft, SoftTier::default())
                .unwrap()
                .max_vcpus(),
            64
        );
        assert!(choose(Accel::Kvm, SoftTier::default()).unwrap().max_vcpus() <= 254);
    }

    #[test]
    fn only_auto_says_what_it_passed_over() {
        assert_eq!(passed_over(Accel::Soft, "soft"), None);
        if let Some(note) = passed_over(Accel::Auto, "soft") {
            assert!(note.contains("--accel kvm"), "{note}");
        }
    }
}
