//! What a vCPU asks of the machine around it.

use caisson_memory::{Gpa, Vtl};

/// The two address spaces of device registers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Space {
    /// Memory-mapped: addresses are guest physical.
    Mmio,
    /// x86 I/O ports, 0 to 0xFFFF.
    Pio,
}

/// One access as the guest made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// Who asks.
    pub vtl: Vtl,
    /// The vCPU's index, from zero.
    pub vcpu: u32,
    /// Ports or memory.
    pub space: Space,
    /// Address in that space.
    pub address: Gpa,
}

/// How the bus answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum BusAnswer {
    /// Done; a read's bytes are in the buffer.
    Done,
    /// The answer comes later: leave [`Vcpu::run`](crate::Vcpu::run) with the
    /// instruction not yet retired, to be completed by
    /// [`Vcpu::complete`](crate::Vcpu::complete).
    Park,
}

/// The machine as seen from a vCPU. Called from vCPU threads, on the exit
/// path: implementations take no lock to find the device.
pub trait IoBus: Send + Sync {
    /// Reads 1 to 64 bytes. Bytes that nobody claims read as ones.
    fn read(&self, access: Access, data: &mut [u8]) -> BusAnswer;
    /// Writes 1 to 64 bytes.
    fn write(&self, access: Access, data: &[u8]) -> BusAnswer;
    /// An MSR that the backend does not own. `None` raises #GP(0).
    fn read_msr(&self, vtl: Vtl, vcpu: u32, msr: u32) -> Option<u64> {
        let _ = (vtl, vcpu, msr);
        None
    }
    /// As [`Self::read_msr`]; `false` raises #GP(0).
    fn write_msr(&self, vtl: Vtl, vcpu: u32, msr: u32, value: u64) -> bool {
        let _ = (vtl, vcpu, msr, value);
        false
    }
    /// A local APIC finished a level-triggered interrupt: tell the I/O APICs.
    fn eoi(&self, vtl: Vtl, vector: u8);
    /// The interrupt acknowledge cycle of the 8259 pair: its vector.
    fn acknowledge_pic(&self) -> u8;
}

/// A bus with nothing on it, for tests of bare vCPUs.
#[derive(Debug, Default)]
pub struct NullBus;

impl IoBus for NullBus {
    fn read(&self, _: Access, data: &mut [u8]) -> BusAnswer {
        data.fill(0xff);
        BusAnswer::Done
    }
    fn write(&self, _: Access, _: &[u8]) -> BusAnswer {
        BusAnswer::Done
    }
    fn eoi(&self, _: Vtl, _: u8) {}
    fn acknowledge_pic(&self) -> u8 {
        0xff
    }
}
