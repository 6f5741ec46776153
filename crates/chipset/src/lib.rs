//! Legacy PC devices: IOAPIC, PIC, PIT, RTC, 16550, i8042, ACPI PM, fw_cfg, debug ports.
#![no_std]
extern crate alloc;
