//! Choice of handlers: types and const parameters from run-time facts.

use crate::{ops::alu, uop::Handler};

/// `match`es an operand size and names the type.
macro_rules! width {
    ($size:expr, $W:ident => $e:expr) => {
        match $size {
            1 => {
                type $W = u8;
                let handler: $crate::uop::Handler = $e;
                handler
            }
            2 => {
                type $W = u16;
                let handler: $crate::uop::Handler = $e;
                handler
            }
            4 => {
                type $W = u32;
                let handler: $crate::uop::Handler = $e;
                handler
            }
            _ => {
                type $W = u64;
                let handler: $crate::uop::Handler = $e;
                handler
            }
        }
    };
}
pub(super) use width;

/// `match`es an operand size of 2, 4 or 8 bytes.
macro_rules! wide {
    ($size:expr, $W:ident => $e:expr) => {
        match $size {
            2 => {
                type $W = u16;
                let handler: $crate::uop::Handler = $e;
                handler
            }
            4 => {
                type $W = u32;
                let handler: $crate::uop::Handler = $e;
                handler
            }
            _ => {
                type $W = u64;
                let handler: $crate::uop::Handler = $e;
                handler
            }
        }
    };
}
pub(super) use wide;

/// `match`es a place and names its form and whether it is slow.
macro_rules! place {
    ($p:expr, $F:ident, $S:ident => $e:expr) => {
        match ($p.slow, $p.form) {
            (true, _) => {
                const $F: u8 = 2;
                const $S: bool = true;
                $e
            }
            (_, 0) => {
                const $F: u8 = 0;
                const $S: bool = false;
                $e
            }
            (_, 1) => {
                const $F: u8 = 1;
                const $S: bool = false;
                $e
            }
            _ => {
                const $F: u8 = 2;
                const $S: bool = false;
                $e
            }
        }
    };
}
pub(super) use place;

/// A comparison that a Jcc may be fused with.
#[derive(Clone, Copy)]
pub(super) struct Compare {
    /// TEST, not CMP.
    pub(super) test: bool,
    /// Operand size in bytes.
    pub(super) size: u8,
    /// Operand forms.
    pub(super) operands: Operands,
}

/// Operand forms of a comparison.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Operands {
    /// Two registers.
    Registers,
    /// Register and immediate.
    Immediate,
    /// One is in memory, reached by this address form.
    Memory(u8),
}

macro_rules! pairs {
    ($pair:expr, $P:ident => $e:expr) => {
        match $pair {
            0 => {
                const $P: u8 = 0;
                $e
            }
            1 => {
                const $P: u8 = 1;
                $e
            }
            2 => {
                const $P: u8 = 2;
                $e
            }
            3 => {
                const $P: u8 = 3;
                $e
            }
            4 => {
                const $P: u8 = 4;
                $e
            }
            5 => {
                const $P: u8 = 5;
                $e
            }
            6 => {
                const $P: u8 = 6;
                $e
            }
            _ => {
                const $P: u8 = 7;
                $e
            }
        }
    };
}

/// The handler of `compare` followed by a Jcc of condition pair `pair`.
pub(super) fn fused(compare: Compare, pair: u8) -> Handler {
    pairs!(pair, P => width!(compare.size, W => match (compare.operands, compare.test) {
        (Operands::Registers, false) => alu::fused_r::<alu::Cmp, W, false, P, false>,
        (Operands::Registers, true) => alu::fused_r::<alu::Test, W, true, P, false>,
        (Operands::Immediate, false) => alu::fused_r::<alu::Cmp, W, false, P, true>,
        (Operands::Immediate, true) => alu::fused_r::<alu::Test, W, true, P, true>,
        (Operands::Memory(0), false) => alu::fused_m::<alu::Cmp, W, false, P, 0>,
        (Operands::Memory(0), true) => alu::fused_m::<alu::Test, W, true, P, 0>,
        (Operands::Memory(1), false) => alu::fused_m::<alu::Cmp, W, false, P, 1>,
        (Operands::Memory(1), true) => alu::fused_m::<alu::Test, W, true, P, 1>,
        (Operands::Memory(_), false) => alu::fused_m::<alu::Cmp, W, false, P, 2>,
        (Operands::Memory(_), true) => alu::fused_m::<alu::Test, W, true, P, 2>,
    }))
}
