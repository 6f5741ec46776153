//! How far the software CPU goes with code that runs often.

/// The most that is done with guest code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Tier {
    /// It is decoded and interpreted.
    #[default]
    Interpreted,
    /// What runs often is translated to host code: see [`caisson_x86_cpu::jit`].
    Native,
}
