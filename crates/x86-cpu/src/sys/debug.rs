//! Debug registers.

/// What the instruction in progress owes the single-step logic.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Step {
    /// TF was set when the instruction began: #DB follows it.
    pub armed: bool,
}
