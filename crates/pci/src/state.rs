//! The saved state of a function, as a part of its device's.

use caisson_device::StateError;
use serde::{Deserialize, Serialize};

use crate::{Function, config_space};

/// What a guest could have changed in a [`Function`]. It is part of the record of the device that owns the function, and
/// changes only with that record's version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// The 256 bytes of configuration space.
    config: alloc::vec::Vec<u8>,
    /// The MSI-X table, empty without MSI-X.
    msix_table: alloc::vec::Vec<u8>,
    /// The MSI-X pending bits.
    msix_pending: alloc::vec::Vec<u64>,
    /// The MSI pending bits.
    msi_pending: u32,
    /// The level that the device wants at the pin.
    intx: bool,
}

impl FunctionState {
    pub(crate) fn of(function: &Function) -> Self {
        let msix = function.msix.as_ref();
        Self {
            config: function.space.bytes().to_vec(),
            msix_table: msix.map(|msix| msix.table().to_vec()).unwrap_or_default(),
            msix_pending: msix.map(|msix| msix.pending().to_vec()).unwrap_or_default(),
            msi_pending: function.msi_pending(),
            intx: function.intx,
        }
    }

    /// Puts the registers into `function`. What a guest cannot write is not taken over.
    pub(crate) fn apply(&self, function: &mut Function) -> Result<(), StateError> {
        let invalid = |what| StateError::Invalid {
            id: "pci-function",
            what,
        };
        let config: &[u8; config_space::LEN] = self
            .config
            .as_slice()
            .try_into()
            .map_err(|_| invalid("its configuration space does not have 256 bytes"))?;
        function.space.restore(config);
        let same_table = match &mut function.msix {
            Some(msix) => msix.restore(&self.msix_table, &self.msix_pending),
            None => self.msix_table.is_empty(),
        };
        if !same_table {
            return Err(invalid("its MSI-X table has another length"));
        }
        function.restore_msi_pending(self.msi_pending);
        function.intx = self.intx;
        Ok(())
    }
}
