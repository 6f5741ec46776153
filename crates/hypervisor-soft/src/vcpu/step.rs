//! One instruction on behalf of another backend.

use caisson_hypervisor::{Exit, HypervisorError, IoBus, x86::VcpuState};
use caisson_x86_cpu::{
    exec,
    fault::Fault,
    state::{Activity, request},
    sys, vector,
};

use super::SoftVcpu;
use crate::StepEnd;

/// x87 and SSE; with AVX.
const XCR0_SSE: u64 = 3;
const XCR0_AVX: u64 = 7;
/// CR4.OSXSAVE.
const CR4_OSXSAVE: u64 = 1 << 18;
/// Bytes of an XSAVE area before its header.
const LEGACY: usize = 512;

impl SoftVcpu {
    /// See [`Stepper::step`](crate::Stepper::step).
    pub(crate) fn step(
        &mut self,
        state: &VcpuState,
        bus: &dyn IoBus,
    ) -> Result<StepEnd, HypervisorError> {
        // Vector state that the software CPU does not have is carried around it.
        let mut loaded = state.clone();
        if !vector::valid_xcr0(&self.cpu, XCR0_AVX) {
            loaded.xsave.xcr0 &= XCR0_SSE;
        }
        loaded.xsave.xcr0 &= XCR0_AVX;
        let beyond = loaded.xsave.xcr0 != state.xsave.xcr0;
        self.load(&loaded)?;
        let vectors = self.save().xsave.area;
        // Others write the guest's memory without telling this vCPU.
        self.cache.flush(&mut self.cpu);
        let end = self.on_bus(bus, |vcpu| {
            vcpu.env.begin_step();
            let end = vcpu.step_loaded();
            vcpu.env.end_step();
            end
        });
        Ok(match end {
            StepEnd::Done(mut after) if beyond => {
                let mut vectors_after = state.xsave.clone();
                if after.xsave.area != vectors {
                    if state.cr4 & CR4_OSXSAVE != 0 {
                        return Ok(StepEnd::Failed(
                            "it changes vector registers of which the software CPU has only half"
                                .into(),
                        ));
                    }
                    // The guest reaches nothing beyond what FXSAVE stores.
                    for (to, from) in vectors_after
                        .area
                        .iter_mut()
                        .zip(&after.xsave.area)
                        .take(LEGACY)
                    {
                        *to = *from;
                    }
                    if let Some(in_use) = vectors_after.area.get_mut(LEGACY) {
                        *in_use |= XCR0_SSE as u8;
                    }
                }
                after.xsave = vectors_after;
                StepEnd::Done(after)
            }
            end => end,
        })
    }

    fn step_loaded(&mut self) -> StepEnd {
        // What the other steppers order, before guest memory is touched.
        while !self.remote().enter() {
            let bits = self
                .cpu
                .request
                .swap(0, std::sync::atomic::Ordering::SeqCst);
            if bits & request::CODE != 0 {
                self.obey();
            }
            if bits & request::EXCLUSIVE != 0 {
                self.shared.wait_exclusive();
            }
        }
        let mut outcome = exec::run_one(&mut self.cpu, &mut self.cache);
        if let Err(Fault::Exception(e)) = outcome {
            self.cpu.stats.exceptions += 1;
            outcome = sys::deliver_exception(&mut self.cpu, e).map(|()| Activity::Running);
        }
        self.remote().leave();
        match outcome {
            Ok(activity) => {
                self.cpu.activity = activity;
                StepEnd::Done(Box::new(self.save()))
            }
            Err(Fault::Parked) => {
                let pending = self.pending_exit();
                self.cpu.replay.abandon();
                match pending {
                    Some(Exit::Pending(pending)) => StepEnd::Pending(pending),
                    _ => StepEnd::Failed("an access is parked and nobody knows which".into()),
                }
            }
            Err(Fault::Shutdown) => StepEnd::Shutdown,
            Err(Fault::Exception(_)) => StepEnd::Failed("an exception escaped its delivery".into()),
            Err(Fault::Internal(what)) => StepEnd::Failed(what.into()),
        }
    }
}
