//! What stands still while the machine's clock does: the time stamp counter and
//! the APIC's timers, which the kernel runs by the host's clock.

use std::io;

use kvm_bindings::kvm_lapic_state;

use super::Kernel;
use crate::{msr, sys};

/// A vCPU's time while it stands still.
#[derive(Clone)]
pub(crate) struct Held {
    /// The guest's TSC.
    pub(crate) tsc: u64,
    /// IA32_TSC_DEADLINE.
    pub(crate) deadline: u64,
    /// The APIC with its current count.
    pub(crate) apic: kvm_lapic_state,
}

impl Kernel {
    /// Stops the vCPU's time; `host_tsc` is the moment, the same for all vCPUs.
    /// Where the kernel does not tell the offset, the counter is read a little later.
    pub(crate) fn hold(&mut self, host_tsc: u64) -> io::Result<()> {
        if self.held.is_some() {
            return Ok(());
        }
        let tsc = match sys::tsc_offset(&self.fd) {
            Some(offset) => host_tsc.wrapping_add(offset),
            None => msr::read(&self.fd, msr::TSC)?,
        };
        self.held = Some(Held {
            tsc,
            deadline: msr::read(&self.fd, msr::TSC_DEADLINE)?,
            apic: self.fd.get_lapic().map_err(sys::error)?,
        });
        Ok(())
    }

    /// Lets the vCPU's time go on from where it stood.
    pub(crate) fn release(&mut self, host_tsc: u64) -> io::Result<()> {
        let Some(held) = self.held.take() else {
            return Ok(());
        };
        let offset = held.tsc.wrapping_sub(host_tsc);
        // Some kernels take the offset and ignore it.
        let moved = sys::set_tsc_offset(&self.fd, offset).is_ok()
            && sys::tsc_offset(&self.fd) == Some(offset);
        if !moved {
            msr::write(&self.fd, msr::TSC, held.tsc)?;
        }
        self.fd.set_lapic(&held.apic).map_err(sys::error)?;
        if held.deadline != 0 {
            msr::write(&self.fd, msr::TSC_DEADLINE, held.deadline)?;
        }
        Ok(())
    }
}
