//! The PCI bus and a virtio device on it, against PCI Local Bus 3.0 and Virtio
//! 1.3: configuration space by both ways, ranges that are sized and moved,
//! messages and the pin, rings of both formats, and what a device does with a
//! broken ring. The device is the entropy device 00:01.0.
#![no_std]
#![no_main]

mod device;
mod pci;
mod rings;

use caisson_guest_rt::{Suite, apic, cpu, guest, ioapic};

guest!("virtio", main);

fn main(suite: &mut Suite) {
    ioapic::mask_pics();
    apic::enable(0xFF);
    cpu::sti();
    pci::run(suite);
    rings::run(suite);
}
