//! Why an instruction did not complete.

/// Exception vectors (Intel SDM Vol. 3 §7.15).
#[allow(missing_docs, reason = "the manual's mnemonics")]
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
    pub const XM: u8 = 19;
}

/// An exception to be delivered to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exception {
    /// 0 to 31.
    pub vector: u8,
    /// Error code, where the vector has one.
    pub error: Option<u32>,
    /// #PF: the linear address for CR2. #DB: bits for DR6.
    pub payload: u64,
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The guest gets an exception. RIP is the instruction's (or, for traps,
    /// the next one's: whoever raises it has set it).
    Exception(Exception),
    /// A device access waits for its answer; the instruction will be restarted.
    Parked,
    /// A triple fault.
    Shutdown,
    /// The engine met something that it cannot do; never the guest's doing.
    Internal(&'static str),
}

impl Fault {
    /// #GP with an error code.
    pub const fn gp(error: u32) -> Self {
        Self::with_error(vector::GP, error)
    }
    /// #SS with an error code.
    pub const fn ss(error: u32) -> Self {
        Self::with_error(vector::SS, error)
    }
    /// #TS with an error code.
    pub const fn ts(error: u32) -> Self {
        Self::with_error(vector::TS, error)
    }
    /// #NP with an error code.
    pub const fn np(error: u32) -> Self {
        Self::with_error(vector::NP, error)
    }
    /// #UD.
    pub const fn ud() -> Self {
        Self::simple(vector::UD)
    }
    /// #NM.
    pub const fn nm() -> Self {
        Self::simple(vector::NM)
    }
    /// An exception without an error code.
    pub const fn simple(vector: u8) -> Self {
        Self::Exception(Exception {
            vector,
            error: None,
            payload: 0,
        })
    }
    /// An exception with an error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self::Exception(Exception {
            vector,
            error: Some(error),
            payload: 0,
        })
    }
    /// #PF.
    pub const fn page(error: u32, address: u64) -> Self {
        Self::Exception(Exception {
            vector: vector::PF,
            error: Some(error),
            payload: address,
        })
    }
}
