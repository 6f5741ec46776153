//! Local APIC access in xAPIC and x2APIC mode.

use crate::cpu::{msr, rdmsr, wrmsr};
use crate::memory::{read, write};

/// Register offsets of the memory-mapped page.
#[allow(missing_docs)]
pub mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xA0;
    pub const EOI: u32 = 0xB0;
    pub const LDR: u32 = 0xD0;
    pub const DFR: u32 = 0xE0;
    pub const SVR: u32 = 0xF0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PMC: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const TIMER_INITIAL: u32 = 0x380;
    pub const TIMER_CURRENT: u32 = 0x390;
    pub const TIMER_DIVIDE: u32 = 0x3E0;
    pub const SELF_IPI: u32 = 0x3F0;
}

/// APIC base MSR: this is the boot processor.
pub const BSP: u64 = 1 << 8;
/// APIC base MSR: x2APIC mode.
pub const EXTD: u64 = 1 << 10;
/// APIC base MSR: enabled.
pub const ENABLE: u64 = 1 << 11;
/// LVT: masked.
pub const MASKED: u32 = 1 << 16;
/// LVT timer: periodic.
pub const PERIODIC: u32 = 1 << 17;
/// LVT timer: TSC deadline.
pub const DEADLINE: u32 = 2 << 17;
/// ICR: level assert.
pub const ASSERT: u32 = 1 << 14;
/// ICR: delivery still pending.
pub const PENDING: u32 = 1 << 12;
/// ICR delivery modes.
#[allow(missing_docs)]
pub mod mode {
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1 << 8;
    pub const NMI: u32 = 4 << 8;
    pub const INIT: u32 = 5 << 8;
    pub const STARTUP: u32 = 6 << 8;
}
/// ICR shorthands.
#[allow(missing_docs)]
pub mod shorthand {
    pub const SELF: u32 = 1 << 18;
    pub const ALL: u32 = 2 << 18;
    pub const OTHERS: u32 = 3 << 18;
}
/// Divide configuration for a divisor of 1.
pub const DIVIDE_BY_1: u32 = 0xB;
/// Divide configuration for a divisor of 16.
pub const DIVIDE_BY_16: u32 = 0x3;

/// Physical address of the register page.
pub fn base() -> u64 {
    rdmsr(msr::APIC_BASE) & 0x000F_FFFF_FFFF_F000
}

/// Whether the running processor is in x2APIC mode.
pub fn is_x2apic() -> bool {
    rdmsr(msr::APIC_BASE) & EXTD != 0
}

/// Reads a register by its xAPIC offset, in the current mode.
pub fn get(offset: u32) -> u32 {
    if is_x2apic() {
        rdmsr(msr::X2APIC + offset / 16) as u32
    } else {
        read(base() + u64::from(offset))
    }
}

/// Writes a register by its xAPIC offset, in the current mode.
pub fn set(offset: u32, value: u32) {
    if is_x2apic() {
        wrmsr(msr::X2APIC + offset / 16, value.into());
    } else {
        write(base() + u64::from(offset), value);
    }
}

/// Software-enables the APIC with the given spurious vector and accepts all
/// priorities.
pub fn enable(spurious: u8) {
    set(reg::SVR, 0x100 | u32::from(spurious));
    set(reg::TPR, 0);
}

/// Ends the interrupt in service.
pub fn eoi() {
    set(reg::EOI, 0);
}

/// This processor's APIC ID.
pub fn id() -> u32 {
    if is_x2apic() {
        get(reg::ID)
    } else {
        get(reg::ID) >> 24
    }
}

/// Sends an inter-processor interrupt; waits until it is delivered.
pub fn send(destination: u32, command: u32) {
    if is_x2apic() {
        wrmsr(
            msr::X2APIC + reg::ICR / 16,
            u64::from(destination) << 32 | u64::from(command),
        );
    } else {
        set(reg::ICR_HIGH, destination << 24);
        set(reg::ICR, command);
        for _ in 0..1_000_000 {
            if get(reg::ICR) & PENDING == 0 {
                break;
            }
        }
    }
}

/// One bit of the IRR, ISR or TMR.
pub fn bit(register: u32, vector: u8) -> bool {
    get(register + u32::from(vector / 32) * 16) >> (vector % 32) & 1 != 0
}
