//! Neutral x86-64 state: what a vCPU is, whichever backend runs it.

mod cpuid;
mod exception;
mod state;

pub use cpuid::{CpuidEntry, CpuidTable};
pub use exception::{Exception, vector};
pub use state::{
    ApicState, DebugRegs, DescriptorTable, Gprs, MsrEntry, PendingEvents, RunState, Segment,
    Segments, VcpuState, XsaveArea,
};
