//! The function 00:00.0, by which software knows that there is a PCI bus.

use alloc::{string::String, sync::Arc, vec::Vec};

use caisson_device::{
    Access, Claim, ClaimSink, Device, Inspector, Msi, MsiSink, Outcome, ResetKind, SaveState,
    StateError, StateRecord,
};
use serde::{Deserialize, Serialize};

use crate::{
    Function, FunctionAddress, FunctionHandles, FunctionSpec, FunctionState, Identity, Place,
};

/// A host bridge without registers of its own: the ECAM window and the ranges for base address registers are where
/// the machine's tables say, and do not move.
pub struct HostBridge {
    name: String,
    function: Function,
}

#[derive(Clone, Serialize, Deserialize)]
struct HostBridgeState {
    function: FunctionState,
}

impl SaveState for HostBridgeState {
    const ID: &'static str = "pci-host-bridge";
    const VERSION: u16 = 1;
}

/// The bridge has no ranges and sends no messages.
struct Nothing;

impl ClaimSink for Nothing {
    fn set(&self, _: u32, _: Option<Claim>) {}
}

impl MsiSink for Nothing {
    fn send(&self, _: Msi) {}
}

impl HostBridge {
    /// Red Hat's vendor ID, which the virtio devices have from the first too.
    const VENDOR: u16 = 0x1b36;
    /// The ID that Red Hat gives to a PCI Express host bridge without registers.
    const DEVICE: u16 = 0x0008;
    /// Bridge, host.
    const CLASS: u32 = 0x06_00_00;

    /// The bridge of the bus whose ECAM window begins at `ecam`.
    ///
    /// # Errors
    /// None that happen: the function has nothing that could contradict itself.
    pub fn new(ecam: u64) -> Result<Self, crate::SpecError> {
        let address = FunctionAddress::default();
        let spec = FunctionSpec {
            place: Place { address, ecam },
            identity: Identity {
                vendor: Self::VENDOR,
                device: Self::DEVICE,
                revision: 0,
                class: Self::CLASS,
                subsystem_vendor: 0,
                subsystem: 0,
            },
            bars: Vec::new(),
            pin: None,
            msi: 0,
            msix: None,
            capabilities: Vec::new(),
        };
        let handles = FunctionHandles {
            claims: Arc::new(Nothing),
            msi: Arc::new(Nothing),
            line: None,
        };
        Ok(Self {
            name: "pci-host-bridge".into(),
            function: Function::new(spec, handles)?,
        })
    }
}

impl Device for HostBridge {
    fn name(&self) -> &str {
        &self.name
    }

    fn claims(&self) -> Vec<Claim> {
        alloc::vec![self.function.place().claim()]
    }

    fn read(&mut self, at: Access, data: &mut [u8]) -> Outcome {
        self.function.read_config(at.offset, data);
        Outcome::Done
    }

    fn write(&mut self, at: Access, data: &[u8]) -> Outcome {
        self.function.write_config(at.offset, data);
        Outcome::Done
    }

    fn reset(&mut self, _: ResetKind) {
        self.function.reset();
    }

    fn save(&self) -> Result<StateRecord, StateError> {
        let function = self.function.state();
        HostBridgeState { function }.to_record()
    }

    fn restore(&mut self, record: &StateRecord) -> Result<(), StateError> {
        let state = HostBridgeState::from_record(record)?;
        self.function.restore(&state.function)
    }

    fn inspect(&self, inspector: &mut Inspector) {
        self.function.inspect(inspector);
    }
}
