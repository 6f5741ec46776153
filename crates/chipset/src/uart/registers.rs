//! Bits of the registers (PC16550D data sheet, "Registers").

/// Interrupt enable register.
pub(super) mod ier {
    pub(in super::super) const RECEIVE: u8 = 1 << 0;
    pub(in super::super) const TRANSMIT: u8 = 1 << 1;
    pub(in super::super) const LINE_STATUS: u8 = 1 << 2;
    pub(in super::super) const MODEM: u8 = 1 << 3;
    pub(in super::super) const ALL: u8 = 0x0F;
}

/// Interrupt identification register.
pub(super) mod iir {
    pub(in super::super) const MODEM: u8 = 0x00;
    pub(in super::super) const NONE: u8 = 0x01;
    pub(in super::super) const TRANSMIT: u8 = 0x02;
    pub(in super::super) const RECEIVE: u8 = 0x04;
    pub(in super::super) const LINE_STATUS: u8 = 0x06;
    pub(in super::super) const TIMEOUT: u8 = 0x0C;
    pub(in super::super) const FIFO: u8 = 0xC0;
}

/// FIFO control register.
pub(super) mod fcr {
    pub(in super::super) const ENABLE: u8 = 1 << 0;
    pub(in super::super) const CLEAR_RECEIVE: u8 = 1 << 1;
    pub(in super::super) const CLEAR_TRANSMIT: u8 = 1 << 2;
    pub(in super::super) const TRIGGER: u8 = 0xC0;
}

/// Line control register.
pub(super) mod lcr {
    pub(in super::super) const DIVISOR_LATCH: u8 = 1 << 7;
}

/// Modem control register.
pub(super) mod mcr {
    pub(in super::super) const DTR: u8 = 1 << 0;
    pub(in super::super) const RTS: u8 = 1 << 1;
    pub(in super::super) const OUT1: u8 = 1 << 2;
    pub(in super::super) const OUT2: u8 = 1 << 3;
    pub(in super::super) const LOOP: u8 = 1 << 4;
    pub(in super::super) const ALL: u8 = 0x1F;
}

/// Line status register.
pub(super) mod lsr {
    pub(in super::super) const DATA_READY: u8 = 1 << 0;
    pub(in super::super) const OVERRUN: u8 = 1 << 1;
    pub(in super::super) const TRANSMIT_EMPTY: u8 = 1 << 5;
    pub(in super::super) const IDLE: u8 = 1 << 6;
}

/// Modem status register: lines in the upper half, their changes in the lower.
pub(super) mod msr {
    pub(in super::super) const CTS: u8 = 1 << 4;
    pub(in super::super) const DSR: u8 = 1 << 5;
    pub(in super::super) const RI: u8 = 1 << 6;
    pub(in super::super) const DCD: u8 = 1 << 7;

    /// The change bits for lines that went from `before` to `after`; the ring indicator counts when it falls.
    pub(in super::super) fn deltas(before: u8, after: u8) -> u8 {
        let changed = (before ^ after) & (CTS | DSR | DCD);
        let ring_ended = before & !after & RI;
        (changed | ring_ended) >> 4
    }
}
