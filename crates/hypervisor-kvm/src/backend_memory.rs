//! RAM in guest_memfd.

use caisson_hypervisor::{BackendMemory, HypervisorError};
use caisson_memory::{Gpa, PAGE_SIZE, Region};
use kvm_bindings::{KVM_CAP_GUEST_MEMFD, KVM_CAP_USER_MEMORY2};

use crate::{partition::Shared, sys::GuestMemfd};

/// KVM_CAP_GUEST_MEMFD_FLAGS.
const GUEST_MEMFD_FLAGS: u32 = 244;

const MAKING: &str = "making guest_memfd memory";

impl Shared {
    /// Why the kernel cannot give any, if it cannot.
    fn no_guest_memfd(&self) -> Option<&'static str> {
        let has = |cap: u32| self.vm.check_extension_raw(cap.into());
        if has(KVM_CAP_USER_MEMORY2) <= 0 || has(KVM_CAP_GUEST_MEMFD) <= 0 {
            return Some("this kernel's KVM has none; use Linux 6.8 or newer, built with it");
        }
        let flags = u64::try_from(has(GUEST_MEMFD_FLAGS)).unwrap_or(0);
        if flags & GuestMemfd::FLAGS != GuestMemfd::FLAGS {
            return Some(
                "this kernel's KVM has it for confidential guests only; use Linux 6.18 or newer",
            );
        }
        None
    }
}

impl BackendMemory for Shared {
    fn ram(&self, name: &str, gpa: Gpa, len: u64) -> Result<Region, HypervisorError> {
        let refused = |reason: String| HypervisorError::Host {
            what: MAKING,
            reason,
        };
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(refused(format!("{len:#x} bytes are no whole pages")));
        }
        if let Some(reason) = self.no_guest_memfd() {
            return Err(refused(reason.into()));
        }
        let memory = GuestMemfd::new(&self.vm, len)
            .map_err(|e| refused(format!("{} MiB of \"{name}\": {e}", len >> 20)))?;
        Ok(memory.region(name, gpa))
    }
}
