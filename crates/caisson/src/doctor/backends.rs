//! Which hypervisor backends work here.

use caisson_hypervisor::{Availability, Probe};

use super::{Finding, Status};
use crate::backend;

pub(super) fn findings() -> Vec<Finding> {
    let probes: Vec<(&str, Probe)> = backend::all()
        .iter()
        .map(|backend| (backend.name(), backend.probe()))
        .collect();
    judge(&probes)
}

/// One backend that works is enough; only when there is none do machines not run.
fn judge(probes: &[(&'static str, Probe)]) -> Vec<Finding> {
    let any = probes
        .iter()
        .any(|(_, probe)| probe.availability > Availability::Absent);
    probes
        .iter()
        .map(|(name, probe)| {
            let status = match probe.availability {
                Availability::Usable => Status::Ok,
                Availability::Slow => Status::Warn,
                Availability::Absent if any => Status::Note,
                Availability::Absent => Status::Fail,
            };
            let finding = Finding::new("backend", status, format!("{name}: {}", probe.reason));
            match &probe.remedy {
                Some(remedy) => finding.remedy(remedy.clone()),
                None => finding,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_backend_is_enough() {
        let probe = |availability| Probe {
            availability,
            reason: "because".into(),
            remedy: Some("change it".into()),
        };
        let statuses = |list: &[Availability]| -> Vec<Status> {
            let probes: Vec<_> = list.iter().map(|a| ("x", probe(*a))).collect();
            judge(&probes)
                .iter()
                .map(|finding| finding.status)
                .collect()
        };
        assert_eq!(
            statuses(&[Availability::Absent, Availability::Usable]),
            [Status::Note, Status::Ok]
        );
        assert_eq!(
            statuses(&[Availability::Slow, Availability::Absent]),
            [Status::Warn, Status::Note]
        );
        assert_eq!(statuses(&[Availability::Absent]), [Status::Fail]);
    }
}
