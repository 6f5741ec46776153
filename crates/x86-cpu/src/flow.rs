//! Where execution goes after an instruction.

/// What an instruction executed outside of the hot handlers did to the flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// On to the next instruction; RIP is the caller's to advance.
    Next,
    /// RIP has been set (branches, returns, mode changes): look the code up anew.
    Jump,
    /// As [`Flow::Next`], but what was decoded or translated before may no longer
    /// hold (control registers, segments, flags like TF or AC): end the block.
    EndBlock,
    /// HLT: RIP is the caller's to advance, then the vCPU sleeps.
    Halt,
}
