//! Arithmetic flags in packed form.
//!
//! The interpreting tier computes flags with the host's own instructions and
//! keeps what `lahf; seto al` leave in AX: bit 0 is OF, bits 8 to 15 are SF ZF
//! 0 AF 0 PF 1 CF. `add al, 127; sahf` puts them back.

/// Interrupt enable.
pub const IF: u64 = 1 << 9;
/// Trap flag: single step.
pub const TF: u64 = 1 << 8;
/// Direction flag.
pub const DF: u64 = 1 << 10;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume flag.
pub const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check, or access control for SMAP.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// CPUID can be used.
pub const ID: u64 = 1 << 21;
/// I/O privilege level, both bits.
pub const IOPL: u64 = 3 << 12;

/// CF PF AF ZF SF OF.
pub const ARITHMETIC_MASK: u64 = 0x8d5;
/// Every defined flag that is not arithmetic.
pub const SYSTEM_MASK: u64 = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

/// Bits of the packed form.
#[allow(missing_docs, reason = "flag names")]
pub mod packed {
    pub const OF: u64 = 1;
    pub const CF: u64 = 1 << 8;
    pub const PF: u64 = 1 << 10;
    pub const AF: u64 = 1 << 12;
    pub const ZF: u64 = 1 << 14;
    pub const SF: u64 = 1 << 15;
}

/// Packed form to RFLAGS bits.
pub const fn to_rflags(cc: u64) -> u64 {
    (cc >> 8 & 0xd5) | (cc & 1) << 11
}

/// RFLAGS bits to packed form.
pub const fn from_rflags(rflags: u64) -> u64 {
    (rflags & 0xd5 | 2) << 8 | (rflags >> 11 & 1)
}

/// Whether condition `cond` (the low four bits of a Jcc opcode) holds.
#[inline]
pub fn condition(cc: u64, cond: u8) -> bool {
    use packed::{CF, OF, PF, SF, ZF};
    let sign_differs = (cc & SF != 0) != (cc & OF != 0);
    let holds = match cond >> 1 & 7 {
        0 => cc & OF != 0,
        1 => cc & CF != 0,
        2 => cc & ZF != 0,
        3 => cc & (CF | ZF) != 0,
        4 => cc & SF != 0,
        5 => cc & PF != 0,
        6 => sign_differs,
        _ => sign_differs || cc & ZF != 0,
    };
    holds != (cond & 1 != 0)
}
