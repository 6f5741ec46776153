//! The hypervisor backends of this build.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use caisson_config::Accel;
use caisson_hypervisor::{Availability, Hypervisor};
use caisson_hypervisor_soft::Soft;

/// Every backend, the fastest first.
pub(crate) fn all() -> Vec<Arc<dyn Hypervisor>> {
    vec![Arc::new(Soft)]
}

/// The backend that `accel` asks for, usable or not: for `auto` the first of the most available.
///
/// # Errors
/// This build has no such backend.
pub(crate) fn choose(accel: Accel) -> Result<Arc<dyn Hypervisor>> {
    let mut best: Option<(Availability, Arc<dyn Hypervisor>)> = None;
    for backend in all() {
        if accel != Accel::Auto {
            if backend.name() == accel.to_string() {
                return Ok(backend);
            }
            continue;
        }
        let availability = backend.probe().availability;
        if best.as_ref().is_none_or(|(most, _)| availability > *most) {
            best = Some((availability, backend));
        }
    }
    best.map(|(_, backend)| backend)
        .ok_or_else(|| anyhow!("this caisson was built without the backend \"{accel}\""))
}

/// Refuses a backend that does not work here, with its reason and remedy.
pub(crate) fn require_usable(backend: &dyn Hypervisor) -> Result<()> {
    let probe = backend.probe();
    if probe.availability > Availability::Absent {
        return Ok(());
    }
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
        assert_eq!(choose(Accel::Soft).unwrap().name(), "soft");
        let auto = choose(Accel::Auto).unwrap();
        assert!(all().iter().any(|backend| backend.name() == auto.name()));
    }

    #[test]
    fn the_help_tells_the_limit() {
        // `--cpus` says "1 to 64".
        assert_eq!(choose(Accel::Auto).unwrap().max_vcpus(), 64);
    }
}
