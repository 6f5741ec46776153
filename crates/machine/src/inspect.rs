//! The tree of values that shows what a machine is doing.

use std::time::Duration;

use caisson_device::{Clock, Inspector, Space};
use serde::Serialize;

use crate::{
    Machine, Phase,
    io::bus::UNCLAIMED_KINDS,
    run::vcpus::{EXIT_KINDS, VcpuReport},
};

/// How long running vCPUs get to publish their counters.
const PATIENCE: Duration = Duration::from_millis(100);

impl Machine {
    /// The state of the machine and of every device and vCPU, as a tree. The guest runs on; values of different
    /// devices are not of the same instant unless it is paused.
    pub fn inspect(&self) -> Inspector {
        let shared = self.shared();
        let phase = self.phase();
        let mut tree = Inspector::new();
        tree.text("name", &*shared.name)
            .text("backend", shared.backend)
            .text(
                "phase",
                match phase {
                    Phase::Created => "created",
                    Phase::Running => "running",
                    Phase::Paused => "paused",
                    Phase::Ended => "ended",
                },
            )
            .u64("time-ns", shared.clock.now())
            .u64("tsc-hz", shared.partition.tsc_hz())
            .u64("resets", *shared.resets.lock());
        tree.child("memory", |memory| {
            memory.u64("ram-bytes", shared.memory.ram_size());
            for region in shared.memory.regions() {
                memory.child(region.name(), |node| {
                    node.hex("gpa", region.gpa().0).u64("bytes", region.len());
                });
            }
        });
        tree.child("vcpus", |vcpus| {
            for (index, report) in shared.vcpus.report(PATIENCE).iter().enumerate() {
                vcpus.child(index.to_string(), |node| vcpu(node, report));
            }
        });
        tree.child("bus", |bus| {
            bus.child("unclaimed", |node| {
                for (kind, (count, last)) in UNCLAIMED_KINDS
                    .iter()
                    .zip(shared.bus.unclaimed().snapshot())
                {
                    node.u64(*kind, count);
                    if count > 0 {
                        node.hex(format!("last-of-{kind}"), last);
                    }
                }
            });
            bus.u64("hidden-ranges", shared.bus.claims().hidden());
            let map = shared.bus.map();
            for (space, name) in [(Space::Pio, "ports"), (Space::Mmio, "memory")] {
                bus.child(name, |node| {
                    for claimed in map.ranges(space) {
                        let last = claimed.range.last().unwrap_or(claimed.range.base);
                        let owner =
                            format!("{} {}", claimed.claimant.owner, claimed.claimant.label);
                        node.text(
                            format!("{:#x}-{last:#x}", claimed.range.base),
                            owner.trim_end(),
                        );
                    }
                });
            }
        });
        tree.child("ports", |ports| {
            for port in &shared.ports {
                ports.child(&*port.name, |node| {
                    node.u64("bytes-sent", port.output.total());
                });
            }
        });
        tree.child("devices", |devices| {
            for slot in shared.pc.devices() {
                devices.child(&**slot.name(), |node| slot.lock().inspect(node));
            }
        });
        tree
    }
}

fn vcpu(node: &mut Inspector, report: &VcpuReport) {
    node.child("exits", |exits| {
        for (kind, count) in EXIT_KINDS.iter().zip(report.exits) {
            exits.u64(*kind, count);
        }
    });
    report.stats.show(node);
}

/// Shows counters under the names that they serialise with.
trait Show {
    fn show(&self, node: &mut Inspector);
}

impl<T: Serialize> Show for T {
    fn show(&self, node: &mut Inspector) {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(self) else {
            return;
        };
        for (name, value) in fields {
            if let Some(value) = value.as_u64() {
                node.u64(name.replace('_', "-"), value);
            }
        }
    }
}
