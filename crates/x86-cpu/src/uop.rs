//! Micro-operations: decoded instructions in the form in which they run.

use crate::state::Cpu;

/// Runs one micro-operation and, by a tail call, the ones after it. Returns
/// one of [`Next`]'s codes at the block's end.
pub type Handler = unsafe extern "sysv64" fn(*mut Cpu, *const Uop) -> u32;

/// Codes that a handler returns.
#[derive(Clone, Copy, Debug)]
pub struct Next;

impl Next {
    /// Not taken, or off the end: the block's successor 0.
    pub const FALL: u32 = 0;
    /// Branch taken: the block's successor 1.
    pub const TAKEN: u32 = 1;
    /// [`Cpu::rip`] is set; look it up.
    pub const LOOKUP: u32 = 2;
    /// [`Cpu::fault`] and [`Cpu::rip`] are set.
    pub const FAULT: u32 = 3;
    /// HLT; [`Cpu::rip`] is the next instruction.
    pub const HALT: u32 = 4;
}

/// One micro-operation. Registers are byte offsets into [`Cpu::regs`].
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Uop {
    /// What to run.
    pub handler: Handler,
    /// Immediate, or a pointer into the block cache for slow instructions.
    pub imm: u64,
    /// Address displacement.
    pub disp: i32,
    /// Offset of the instruction's first byte in its page.
    pub off: u16,
    /// Operation-specific.
    pub aux: u16,
    /// Instruction length.
    pub len: u8,
    /// How many instructions of the block come after this one.
    pub left: u8,
    /// Destination register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Base register.
    pub base: u8,
    /// Index register.
    pub index: u8,
    /// log2 of the index's scale.
    pub scale: u8,
    /// Segment (bits 0 to 2) and log2 of the address width in bytes (bits 4 to 5).
    pub seg: u8,
}

const _: () = assert!(size_of::<Uop>() == 32 || size_of::<Uop>() == 64);
