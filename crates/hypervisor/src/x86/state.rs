//! The architectural state of one x86-64 vCPU.

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use super::Exception;

/// General registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Gprs {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: encoding order.
    pub regs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 40 to 55 as in the descriptor: type, S, DPL, P, AVL, L,
    /// D/B, G (limit bits 16:19 zero).
    pub attributes: u16,
    /// A null or otherwise unusable segment.
    pub unusable: bool,
}

/// The segment registers and system segments.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the registers' own")]
pub struct Segments {
    pub es: Segment,
    pub cs: Segment,
    pub ss: Segment,
    pub ds: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ldtr: Segment,
    pub tr: Segment,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Debug registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DebugRegs {
    /// DR0 to DR3.
    pub address: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// A model-specific register and its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MsrEntry {
    /// ECX of RDMSR.
    pub index: u32,
    /// EDX:EAX.
    pub value: u64,
}

/// The XSAVE area in the standard (non-compacted) format of Intel SDM Vol. 1
/// §13.4, with XCR0.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct XsaveArea {
    /// XCR0.
    pub xcr0: u64,
    /// 512 bytes legacy region, 64 bytes header, extended region.
    pub area: Vec<u8>,
}

/// The local APIC's registers.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ApicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The register page: register at offset `16 * n` is word `n`. x2APIC ICR
    /// high half in word 0x31.
    pub regs: Vec<u32>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// Nanoseconds of machine time until the current-count timer fires, if it is armed and the backend
    /// knows. For whoever looks at the state: the timer itself goes on from its current count.
    pub timer_remaining_ns: Option<u64>,
}

/// Whether the vCPU executes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum RunState {
    /// It executes instructions.
    #[default]
    Running,
    /// HLT.
    Halted,
    /// After INIT, or an application processor after reset.
    WaitForSipi,
    /// Shutdown after a triple fault.
    Shutdown,
}

/// Events half way into the processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PendingEvents {
    /// An exception to be delivered before the next instruction.
    pub exception: Option<Exception>,
    /// An external interrupt accepted from the APIC or PIC but not delivered.
    pub interrupt: Option<u8>,
    /// NMI pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Interrupts are held off for one instruction (STI).
    pub sti_shadow: bool,
    /// Interrupts and debug traps are held off for one instruction (MOV SS, POP SS).
    pub mov_ss_shadow: bool,
    /// Start-up IPI vector received, not yet acted on.
    pub sipi: Option<u8>,
    /// INIT received, not yet acted on.
    pub init: bool,
}

/// Everything a vCPU is. A snapshot taken on one backend restores on another.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "control registers are named as in the manual")]
pub struct VcpuState {
    pub gprs: Gprs,
    pub segments: Segments,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub debug: DebugRegs,
    /// MSRs other than EFER, APIC base and the deadline. The TSC is among them.
    pub msrs: Vec<MsrEntry>,
    pub xsave: XsaveArea,
    pub apic: ApicState,
    pub events: PendingEvents,
    pub run_state: RunState,
}
