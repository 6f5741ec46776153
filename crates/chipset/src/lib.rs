//! The devices that every PC has had since the eighties, and the few that virtual ones add.
//!
//! | module | device | addresses |
//! |---|---|---|
//! | [`interrupts`] | 8259 pair, ELCR, I/O APIC | ports 0x20, 0xA0, 0x4D0; 0xFEC00000 |
//! | [`pit`] | 8254 interval timer, port B | ports 0x40, 0x61 |
//! | [`i8042`] | keyboard controller, keyboard, mouse | ports 0x60, 0x64 |
//! | [`rtc`] | MC146818 clock and CMOS memory | port 0x70 |
//! | [`uart`] | 16550A serial port | ports 0x3F8, … |
//! | [`acpi_pm`] | ACPI fixed hardware: power management, PM timer, GPEs | given by its user |
//! | [`power`] | fast-reset port 0x92, reset register 0xCF9 | ports 0x92, 0xCF9 |
//! | [`config_ports`] | PCI configuration ports, with the reset register among them | port 0xCF8 |
//! | [`fw_cfg`] | firmware configuration interface | port 0x510 |
//! | [`debug`] | debug console, debug exit, POST code | ports 0xE9, 0xF4, 0x80 |
//!
//! Each is a [`caisson_device::Device`]: a state machine that knows no thread, file or host clock.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod acpi_pm;
pub mod config_ports;
pub mod debug;
pub mod fw_cfg;
pub mod i8042;
pub mod interrupts;
pub mod pit;
pub mod power;
pub mod rtc;
#[cfg(feature = "testing")]
pub mod testing;
pub mod uart;
