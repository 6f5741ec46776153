//! Events that raise an interrupt without the process (KVM_IRQFD).

use std::{
    os::fd::RawFd,
    sync::{Arc, Weak},
};

use caisson_hypervisor::{Event, HypervisorError, InterruptEvent, InterruptEvents, Msi};
use caisson_memory::Vtl;
use parking_lot::Mutex;

use super::{EventPowers, descriptor, gone};
use crate::{partition::Shared, routes::is_heard, sys};

const BINDING: &str = "binding an event to an interrupt";

struct KvmInterrupt {
    shared: Weak<Shared>,
    event: Arc<dyn Event>,
    descriptor: RawFd,
    binding: Mutex<Binding>,
}

/// What the kernel knows of it.
#[derive(Default)]
struct Binding {
    /// Kept while it is masked.
    gsi: Option<u32>,
    /// Whether the kernel listens to the event. While it does not, signals wait
    /// in the event.
    armed: bool,
}

impl InterruptEvents for EventPowers {
    fn register(
        &self,
        vtl: Vtl,
        event: Arc<dyn Event>,
        msi: Option<Msi>,
    ) -> Result<Box<dyn InterruptEvent>, HypervisorError> {
        let interrupt = KvmInterrupt {
            shared: Arc::downgrade(&self.0),
            descriptor: descriptor(BINDING, vtl, &*event)?,
            event,
            binding: Mutex::default(),
        };
        interrupt.update(msi)?;
        Ok(Box::new(interrupt))
    }
}

fn refused(e: std::io::Error) -> HypervisorError {
    HypervisorError::Host {
        what: BINDING,
        reason: match e.raw_os_error() {
            Some(libc::EBUSY) => "the event belongs to another interrupt".into(),
            _ => e.to_string(),
        },
    }
}

impl KvmInterrupt {
    fn disarm(&self, shared: &Shared, binding: &mut Binding) -> Result<(), HypervisorError> {
        if let Some(gsi) = binding.gsi
            && binding.armed
        {
            sys::deassign_irq_event(&shared.vm, self.descriptor, gsi).map_err(refused)?;
            binding.armed = false;
        }
        Ok(())
    }
}

impl InterruptEvent for KvmInterrupt {
    fn update(&self, msi: Option<Msi>) -> Result<(), HypervisorError> {
        let shared = self.shared.upgrade().ok_or_else(|| gone(BINDING))?;
        let mut binding = self.binding.lock();
        let Some(msi) = msi else {
            return self.disarm(&shared, &mut binding);
        };
        if !is_heard(msi) {
            self.disarm(&shared, &mut binding)?;
            return Err(HypervisorError::Host {
                what: BINDING,
                reason: format!("no local APIC hears messages to {:#x}", msi.address),
            });
        }
        let gsi = match binding.gsi {
            Some(gsi) => {
                shared.routes.redirect(&shared.vm, gsi, msi)?;
                gsi
            }
            None => *binding.gsi.insert(shared.routes.claim(&shared.vm, msi)?),
        };
        if !binding.armed {
            sys::assign_irq_event(&shared.vm, self.descriptor, gsi).map_err(refused)?;
            binding.armed = true;
            // The kernel raised what had waited, and leaves it in the event;
            // from now on it takes each signal out.
            self.event.take();
        }
        Ok(())
    }

    fn is_pending(&self) -> bool {
        !self.binding.lock().armed && self.event.is_signalled()
    }
}

impl Drop for KvmInterrupt {
    fn drop(&mut self) {
        // With the partition gone, so is the binding.
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let binding = &mut *self.binding.lock();
        if let Err(error) = self.disarm(&shared, binding) {
            tracing::error!(%error, "KVM keeps an event");
            // Its route has to stay, or another event would get it.
            return;
        }
        if let Some(gsi) = binding.gsi {
            shared.routes.release(&shared.vm, gsi);
        }
    }
}
