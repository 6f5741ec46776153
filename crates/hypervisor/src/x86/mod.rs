//! Neutral x86-64 state: what a vCPU is, whichever backend runs it.

mod cpuid;
mod exception;
mod features;
mod level;
mod processor;
mod reset;
mod state;
mod tsc;

pub use cpuid::{CpuidEntry, CpuidTable};
pub use exception::{Exception, vector};
pub use features::Feature;
pub use level::Level;
pub use processor::{
    ADDRESS_BITS, BRAND_LEN, Base, HYPERVISOR_NAME, Processor, ProcessorError, Vendor,
};
pub use state::{
    ApicState, DebugRegs, DescriptorTable, Gprs, MsrEntry, PendingEvents, RunState, Segment,
    Segments, VcpuState, XsaveArea,
};
pub use tsc::same_tsc_frequency;
