//! Guest writes that signal an event without leaving the kernel (KVM_IOEVENTFD).

use std::sync::{Arc, Weak};

use caisson_hypervisor::{
    Doorbell, DoorbellHandle, DoorbellMatch, Doorbells, Event, HypervisorError, Space,
};
use caisson_memory::Vtl;

use super::{EventPowers, descriptor};
use crate::{
    partition::Shared,
    sys::{self, IoEvent},
};

const REGISTERING: &str = "registering a doorbell";

struct KvmDoorbell {
    shared: Weak<Shared>,
    doorbell: Doorbell,
    registered: IoEvent,
    /// Keeps the descriptor open, which unregistering needs.
    _event: Arc<dyn Event>,
}

impl Doorbells for EventPowers {
    fn register(
        &self,
        vtl: Vtl,
        doorbell: Doorbell,
        event: Arc<dyn Event>,
    ) -> Result<Box<dyn DoorbellHandle>, HypervisorError> {
        let refused = |reason: String| HypervisorError::Host {
            what: REGISTERING,
            reason,
        };
        doorbell.check().map_err(refused)?;
        let (length, value) = match doorbell.matches {
            DoorbellMatch::Any => (0, None),
            DoorbellMatch::Length(length) => (length, None),
            DoorbellMatch::Value { length, value } => (length, Some(value)),
        };
        let wanted = IoEvent {
            descriptor: descriptor(REGISTERING, vtl, &*event)?,
            port: doorbell.space == Space::Pio,
            address: doorbell.address.0,
            length: length.into(),
            value,
        };
        sys::assign_ioevent(&self.0.vm, &wanted).map_err(|e| {
            refused(match e.raw_os_error() {
                Some(libc::EEXIST) => {
                    format!("{doorbell}: another one answers some of the same writes")
                }
                _ => format!("{doorbell}: {e}"),
            })
        })?;
        Ok(Box::new(KvmDoorbell {
            shared: Arc::downgrade(&self.0),
            doorbell,
            registered: wanted,
            _event: event,
        }))
    }
}

impl DoorbellHandle for KvmDoorbell {
    fn doorbell(&self) -> Doorbell {
        self.doorbell
    }
}

impl Drop for KvmDoorbell {
    fn drop(&mut self) {
        // With the partition gone, so is the doorbell.
        if let Some(shared) = self.shared.upgrade()
            && let Err(error) = sys::deassign_ioevent(&shared.vm, &self.registered)
        {
            tracing::error!(%error, doorbell = %self.doorbell, "KVM keeps a doorbell");
        }
    }
}
