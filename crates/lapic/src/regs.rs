//! Register numbers and bits (SDM "The Local APIC Block Diagram", table "Local APIC Register Address Map").
//!
//! A register's number is its xAPIC offset divided by 16, which is also its x2APIC MSR minus 0x800.

/// Where the APIC's registers are after reset.
pub const DEFAULT_BASE: u64 = 0xFEE0_0000;
/// How many bytes the registers take in xAPIC mode.
pub const MMIO_LEN: u64 = 0x1000;
/// The first MSR reserved for x2APIC registers.
pub const X2APIC_MSR_FIRST: u32 = 0x800;
/// The last MSR reserved for x2APIC registers.
pub const X2APIC_MSR_LAST: u32 = 0x8FF;

pub(crate) const ID: u32 = 0x02;
pub(crate) const VERSION: u32 = 0x03;
pub(crate) const TPR: u32 = 0x08;
pub(crate) const APR: u32 = 0x09;
pub(crate) const PPR: u32 = 0x0A;
pub(crate) const EOI: u32 = 0x0B;
pub(crate) const RRD: u32 = 0x0C;
pub(crate) const LDR: u32 = 0x0D;
pub(crate) const DFR: u32 = 0x0E;
pub(crate) const SVR: u32 = 0x0F;
pub(crate) const ISR: u32 = 0x10;
pub(crate) const ISR_LAST: u32 = 0x17;
pub(crate) const TMR: u32 = 0x18;
pub(crate) const TMR_LAST: u32 = 0x1F;
pub(crate) const IRR: u32 = 0x20;
pub(crate) const IRR_LAST: u32 = 0x27;
pub(crate) const ESR: u32 = 0x28;
pub(crate) const ICR: u32 = 0x30;
pub(crate) const ICR_HIGH: u32 = 0x31;
pub(crate) const LVT_FIRST: u32 = 0x32;
pub(crate) const LVT_THERMAL: u32 = 0x33;
pub(crate) const LVT_LAST: u32 = 0x37;
pub(crate) const TIMER_INITIAL: u32 = 0x38;
pub(crate) const TIMER_CURRENT: u32 = 0x39;
pub(crate) const TIMER_DIVIDE: u32 = 0x3E;
pub(crate) const SELF_IPI: u32 = 0x3F;

/// Version 0x14 (integrated APIC) with six LVT entries: the highest index, 5, in bits 16 to 23.
pub(crate) const VERSION_VALUE: u32 = 0x0005_0014;
pub(crate) const VERSION_DIRECTED_EOI: u32 = 1 << 24;

pub(crate) const SVR_ENABLE: u32 = 1 << 8;
pub(crate) const SVR_FOCUS: u32 = 1 << 9;
pub(crate) const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
pub(crate) const SVR_RESET: u32 = 0xFF;

pub(crate) const DFR_FIXED: u32 = 0x0FFF_FFFF;

pub(crate) const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub(crate) const ESR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
pub(crate) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

pub(crate) const ICR_STATUS: u32 = 1 << 12;
/// Bits of the low half of the ICR that exist, without the read-only delivery status.
pub(crate) const ICR_WRITABLE: u32 = 0x000C_CFFF;

pub(crate) const DIVIDE_WRITABLE: u32 = 0b1011;
