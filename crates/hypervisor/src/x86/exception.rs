//! Processor exceptions (Intel SDM Vol. 3 §7.15).

use serde::{Deserialize, Serialize};

/// Exception vectors.
#[allow(missing_docs, reason = "the names are the manual's own mnemonics")]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// An exception about to be delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// Pushed on the handler's stack where the vector has one.
    pub error: Option<u32>,
    /// For #PF the linear address (CR2); for #DB the bits to set in DR6.
    pub payload: u64,
}
