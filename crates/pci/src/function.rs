//! One function: its configuration space and what the registers there do.

use alloc::{string::String, sync::Arc, vec::Vec};

use caisson_device::{
    Access, AddressRange, Claim, ClaimSink, Inspector, Line, MsiSink, StateError,
};

use crate::{
    BarKind, BarSpec, FUNCTION_PAGE, FunctionAddress, FunctionState, InterruptPin, MsixSpec, bar,
    config_space::{self, ConfigSpace},
    msi::{self, MsiCapability},
    msix::{self, Msix},
};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

const IO_ENABLE: u16 = 1;
const MEMORY_ENABLE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const PARITY_RESPONSE: u16 = 1 << 6;
const SERR_ENABLE: u16 = 1 << 8;
const INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who made a function and what it is (PCI Local Bus 3.0 §6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, 24 bits.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// Where a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number on bus 0.
    pub address: FunctionAddress,
    /// Guest physical address of bus 0 in the ECAM window.
    pub ecam: u64,
}

impl Place {
    /// The claim of the function's configuration page: the first of its device.
    pub fn claim(&self) -> Claim {
        let base = self.ecam + self.address.ecam_offset();
        Claim::new(
            AddressRange::mmio(base, FUNCTION_PAGE),
            "configuration space",
        )
    }
}

/// A capability whose registers are plain bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID (PCI Local Bus 3.0, appendix H).
    pub id: u8,
    /// Its bytes after the ID and the pointer to the next.
    pub body: Vec<u8>,
    /// Which bits of the body the guest may write; bytes that are missing here are fixed.
    pub writable: Vec<u8>,
}

/// What a function has.
#[derive(Clone, Debug)]
pub struct FunctionSpec {
    /// Where it is.
    pub place: Place,
    /// What it is.
    pub identity: Identity,
    /// Its base address registers.
    pub bars: Vec<BarSpec>,
    /// The pin it drives, if it does.
    pub pin: Option<InterruptPin>,
    /// How many MSI vectors it asks for: a power of two up to 32, or 0 for no MSI.
    pub msi: u8,
    /// Its MSI-X structures, if it has them.
    pub msix: Option<MsixSpec>,
    /// Capabilities besides MSI and MSI-X. They come first in the list, in this order.
    pub capabilities: Vec<Capability>,
}

/// What a function may affect.
#[derive(Clone)]
pub struct FunctionHandles {
    /// Where its ranges are published: base address register `n` is region `n` + 1 of the device.
    pub claims: Arc<dyn ClaimSink>,
    /// Takes its messages.
    pub msi: Arc<dyn MsiSink>,
    /// What its pin is wired to.
    pub line: Option<Line>,
}

/// A function that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("PCI function {address} cannot be: {what}")]
pub struct SpecError {
    /// Which function.
    pub address: FunctionAddress,
    /// What is wrong.
    pub what: &'static str,
}

/// A PCI function. Its device hands it the accesses to its configuration page and to the range with its MSI-X
/// structures, and raises interrupts through it.
pub struct Function {
    spec: FunctionSpec,
    handles: FunctionHandles,
    pub(crate) space: ConfigSpace,
    offsets: Vec<usize>,
    msi: Option<MsiCapability>,
    pub(crate) msix: Option<Msix>,
    /// What is published, per base address register.
    decoded: [Option<AddressRange>; bar::COUNT],
    pub(crate) intx: bool,
}

impl Function {
    /// The function in its power-on state.
    ///
    /// # Errors
    /// A spec that contradicts itself or does not fit into configuration space.
    pub fn new(spec: FunctionSpec, handles: FunctionHandles) -> Result<Self, SpecError> {
        let address = spec.place.address;
        let fail = |what| SpecError { address, what };
        check(&spec).map_err(fail)?;
        let mut space = ConfigSpace::new();
        header(&mut space, &spec, &handles);
        let mut list = CapabilityList::default();
        let mut offsets = Vec::new();
        for capability in &spec.capabilities {
            let at = list
                .add(&mut space, capability.id, capability.body.len() + 2)
                .map_err(fail)?;
            let mut writable = capability.writable.clone();
            writable.resize(capability.body.len(), 0);
            space.put(at + 2, &capability.body, &writable);
            offsets.push(at);
        }
        let msi = (spec.msi > 0)
            .then(|| {
                let at = list.add(&mut space, msi::ID, msi::LEN)?;
                Ok(MsiCapability::place(&mut space, at, spec.msi))
            })
            .transpose()
            .map_err(fail)?;
        let msix = spec
            .msix
            .map(|msix| {
                let at = list.add(&mut space, msix::ID, msix::LEN)?;
                Ok(Msix::place(&mut space, at, msix))
            })
            .transpose()
            .map_err(fail)?;
        Ok(Self {
            spec,
            handles,
            space,
            offsets,
            msi,
            msix,
            decoded: [None; bar::COUNT],
            intx: false,
        })
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.spec.place
    }

    /// Where in configuration space the capability `index` of [`FunctionSpec::capabilities`] is.
    pub fn capability_offset(&self, index: usize) -> Option<u64> {
        self.offsets.get(index).map(|offset| *offset as u64)
    }

    /// The base address register that an access hits; `None` for the configuration page.
    pub fn bar_of(&self, at: &Access) -> Option<u8> {
        at.region.checked_sub(1).map(|index| index as u8)
    }

    /// Where base address register `index` answers now.
    pub fn bar_range(&self, index: u8) -> Option<AddressRange> {
        self.decoded.get(usize::from(index)).copied().flatten()
    }

    /// Whether the guest lets the function access memory.
    pub fn is_bus_master(&self) -> bool {
        self.command() & BUS_MASTER != 0
    }

    /// Whether MSI-X is switched on.
    pub fn msix_enabled(&self) -> bool {
        self.msix
            .as_ref()
            .is_some_and(|msix| msix.enabled(&self.space))
    }

    /// Whether interrupts are messages, not a level at the pin.
    pub fn uses_messages(&self) -> bool {
        self.msix_enabled() || self.msi.is_some_and(|msi| msi.enabled(&self.space))
    }

    /// How many MSI-X vectors it has.
    pub fn msix_vectors(&self) -> u16 {
        self.spec.msix.map_or(0, |msix| msix.vectors)
    }

    fn command(&self) -> u16 {
        self.space.u16(COMMAND)
    }

    /// A read of the configuration page.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    /// A write to the configuration page. Ranges that it moves are published, interrupts that it sets free are sent.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.space.write(offset, data);
        self.publish();
        self.deliver();
    }

    /// A read at `offset` of the range of base address register `bar`, if the MSI-X structures are there.
    pub fn read_msix(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        match &self.msix {
            Some(msix) if msix.spec.bar == bar => {
                msix.read(offset, data);
                true
            }
            _ => false,
        }
    }

    /// A write at `offset` of the range of base address register `bar`, if the MSI-X structures are there.
    pub fn write_msix(&mut self, bar: u8, offset: u64, data: &[u8]) -> bool {
        match &mut self.msix {
            Some(msix) if msix.spec.bar == bar => {
                msix.write(offset, data);
                self.deliver();
                true
            }
            _ => false,
        }
    }

    /// Sends the message of `vector` with MSI-X or MSI, whichever is on. While it is masked, or the function may not
    /// write to memory, it stays pending. With neither on nothing happens: then there is the pin,
    /// [`Function::set_intx`].
    pub fn signal(&mut self, vector: u16) {
        if let Some(msix) = &mut self.msix
            && msix.enabled(&self.space)
        {
            msix.set_pending(vector, true);
        } else if let Some(msi) = self.msi
            && msi.enabled(&self.space)
        {
            let (number, _) = msi.message(&self.space, vector);
            let pending = msi.pending(&self.space) | 1 << number;
            msi.set_pending(&mut self.space, pending);
        } else {
            return;
        }
        self.deliver();
    }

    /// Withdraws a message of `vector` that is still pending.
    pub fn withdraw(&mut self, vector: u16) {
        if let Some(msix) = &mut self.msix {
            msix.set_pending(vector, false);
        }
    }

    /// Asserts or releases the interrupt pin. It has no effect outside while messages are in use or the guest has
    /// switched the pin off.
    pub fn set_intx(&mut self, asserted: bool) {
        self.intx = asserted;
        self.drive_pin();
    }

    fn drive_pin(&mut self) {
        let Some(line) = &self.handles.line else {
            return;
        };
        self.space.set_bits(STATUS, STATUS_INTERRUPT, self.intx);
        let off = self.space.u16(COMMAND) & INTX_DISABLE != 0;
        line.set(self.intx && !off && !self.uses_messages());
    }

    /// Sends what is pending and not masked, and drives the pin.
    fn deliver(&mut self) {
        self.drive_pin();
        if !self.is_bus_master() {
            return;
        }
        if let Some(msix) = &mut self.msix
            && msix.enabled(&self.space)
        {
            let mut from = 0;
            while let Some((vector, message)) = msix.next_deliverable(&self.space, from) {
                msix.set_pending(vector, false);
                self.handles.msi.send(message);
                from = vector + 1;
            }
        } else if let Some(msi) = self.msi
            && msi.enabled(&self.space)
        {
            let pending = msi.pending(&self.space);
            for number in (0..32).filter(|number| pending >> number & 1 != 0) {
                if !msi.masked(&self.space, number) {
                    let left = msi.pending(&self.space) & !(1 << number);
                    msi.set_pending(&mut self.space, left);
                    let (_, message) = msi.message(&self.space, number as u16);
                    self.handles.msi.send(message);
                }
            }
        }
    }

    /// Publishes the ranges that the registers now mean, where they differ from what is published.
    fn publish(&mut self) {
        let command = self.command();
        for spec in &self.spec.bars {
            let enabled = command
                & match spec.kind {
                    BarKind::Io => IO_ENABLE,
                    BarKind::Memory32 | BarKind::Memory64 => MEMORY_ENABLE,
                };
            let range = match enabled {
                0 => None,
                _ => spec.range(&self.space),
            };
            if let Some(decoded) = self.decoded.get_mut(usize::from(spec.index))
                && *decoded != range
            {
                *decoded = range;
                let claim = range.map(|range| Claim::new(range, spec.label));
                self.handles.claims.set(u32::from(spec.index) + 1, claim);
            }
        }
    }

    /// Puts everything into the state after a reset: nothing answers but the configuration page, the pin is low.
    pub fn reset(&mut self) {
        self.space.reset();
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.intx = false;
        self.publish();
        self.drive_pin();
    }

    /// What a guest could have changed.
    pub fn state(&self) -> FunctionState {
        FunctionState::of(self)
    }

    /// Takes over `state`, publishes its ranges and drives the pin.
    ///
    /// # Errors
    /// It is of a function with other MSI-X structures, or cannot be.
    pub fn restore(&mut self, state: &FunctionState) -> Result<(), StateError> {
        state.apply(self)?;
        self.publish();
        self.drive_pin();
        Ok(())
    }

    /// Gives back the pending bits of MSI, which no guest writes.
    pub(crate) fn msi_pending(&self) -> u32 {
        self.msi.map_or(0, |msi| msi.pending(&self.space))
    }

    pub(crate) fn restore_msi_pending(&mut self, pending: u32) {
        if let Some(msi) = self.msi {
            let asked = u32::from(self.spec.msi);
            let mask = u32::MAX >> (32 - asked.clamp(1, 32));
            msi.set_pending(&mut self.space, pending & mask);
        }
    }

    /// Shows the registers that matter.
    pub fn inspect(&self, inspector: &mut Inspector) {
        inspector
            .text("address", alloc::format!("{}", self.spec.place.address))
            .hex("command", self.command())
            .hex("status", self.space.u16(STATUS))
            .bool("intx", self.intx)
            .bool("msi-x", self.msix_enabled());
        inspector.child("bars", |node| {
            for spec in &self.spec.bars {
                let text: String = match self.bar_range(spec.index) {
                    Some(range) => alloc::format!("{} ({range})", spec.label),
                    None => alloc::format!("{} (off)", spec.label),
                };
                node.text(alloc::format!("{}", spec.index), text);
            }
        });
    }
}

fn check(spec: &FunctionSpec) -> Result<(), &'static str> {
    let mut taken = [false; bar::COUNT];
    for bar in &spec.bars {
        bar.check()?;
        let first = usize::from(bar.index);
        for taken in taken.iter_mut().skip(first).take(bar.registers()) {
            if core::mem::replace(taken, true) {
                return Err("two ranges want the same base address register");
            }
        }
    }
    if spec.msi > 32 || spec.msi > 0 && !spec.msi.is_power_of_two() {
        return Err("MSI has 1, 2, 4, 8, 16 or 32 vectors");
    }
    let Some(msix) = &spec.msix else {
        return Ok(());
    };
    if !(1..=msix::MAX_VECTORS).contains(&msix.vectors) {
        return Err("MSI-X has 1 to 2048 vectors");
    }
    let bar = spec.bars.iter().find(|bar| bar.index == msix.bar);
    let Some(bar) = bar.filter(|bar| bar.kind != BarKind::Io) else {
        return Err("the MSI-X structures are in a memory range of the function");
    };
    let (table, pending) = (u64::from(msix.table), u64::from(msix.pending));
    let (table_end, pending_end) = (table + msix.table_len(), pending + msix.pending_len());
    let apart = table_end <= pending || pending_end <= table;
    if !apart || table % 8 != 0 || pending % 8 != 0 || table_end.max(pending_end) > bar.size {
        return Err("the MSI-X structures are apart, aligned to 8 bytes and inside their range");
    }
    Ok(())
}

/// The header of type 0 (PCI Local Bus 3.0 §6.1).
fn header(space: &mut ConfigSpace, spec: &FunctionSpec, handles: &FunctionHandles) {
    let identity = &spec.identity;
    space.put_fixed(0x00, &identity.vendor.to_le_bytes());
    space.put_fixed(0x02, &identity.device.to_le_bytes());
    let mut command = BUS_MASTER | PARITY_RESPONSE | SERR_ENABLE | INTX_DISABLE;
    for bar in &spec.bars {
        command |= match bar.kind {
            BarKind::Io => IO_ENABLE,
            BarKind::Memory32 | BarKind::Memory64 => MEMORY_ENABLE,
        };
    }
    space.put(COMMAND, &[0; 2], &command.to_le_bytes());
    let [prog_if, sub_class, base_class, _] = identity.class.to_le_bytes();
    space.put_fixed(0x08, &[identity.revision, prog_if, sub_class, base_class]);
    // Cache line size, which has no effect here.
    space.put(0x0c, &[0], &[!0]);
    for bar in &spec.bars {
        bar.place(space);
    }
    space.put_fixed(0x2c, &identity.subsystem_vendor.to_le_bytes());
    space.put_fixed(0x2e, &identity.subsystem.to_le_bytes());
    if let Some(pin) = spec.pin {
        let line = handles
            .line
            .as_ref()
            .map_or(0xff, |line| line.number() as u8);
        space.put(INTERRUPT_LINE, &[line, pin as u8], &[!0, 0]);
    }
}

/// Lays capabilities out one after another.
struct CapabilityList {
    next: usize,
    link: usize,
}

impl Default for CapabilityList {
    fn default() -> Self {
        Self {
            next: 0x40,
            link: CAPABILITIES,
        }
    }
}

impl CapabilityList {
    /// Room for `len` bytes, linked into the list under `id`.
    fn add(&mut self, space: &mut ConfigSpace, id: u8, len: usize) -> Result<usize, &'static str> {
        let at = self.next;
        if at + len > config_space::LEN {
            return Err("its capabilities do not fit into 256 bytes");
        }
        space.put_fixed(STATUS, &[STATUS_CAPABILITIES]);
        space.put_fixed(self.link, &[at as u8]);
        space.put_fixed(at, &[id, 0]);
        self.link = at + 1;
        self.next = (at + len).next_multiple_of(4);
        Ok(at)
    }
}
