//! Power-on and INIT, which KVM has no call for.

use caisson_hypervisor::{HypervisorError, x86::VcpuState};

use super::{Kernel, state};
use crate::partition::Shared;

/// Puts vCPU `index` into the state after power-on or INIT.
pub(super) fn reset(
    shared: &Shared,
    kernel: &mut Kernel,
    index: u32,
    init: bool,
) -> Result<(), HypervisorError> {
    let signature = shared.cpuid.get(1, 0)[0];
    if init {
        let state = state::get(shared, kernel)?.after_init(signature);
        return state::set(shared, kernel, &state);
    }
    let mut state = VcpuState::at_power_on(index, index == 0, signature);
    state.msrs.clone_from(&shared.msrs.at_power_on);
    if kernel.held.is_some() {
        // Most often the next thing is another state, of a kernel to start or a saved machine.
        kernel.pending = Some(Box::new(state));
        return Ok(());
    }
    state::put(shared, kernel, &state)
}
