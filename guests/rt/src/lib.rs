//! Runtime of the bare-metal guests.
//!
//! A guest is one statically linked ELF that boots through PVH or Multiboot 1,
//! owns the whole machine, checks it, prints its findings on the debug console
//! (port 0xE9) and COM1 and ends through the debug-exit device (port 0xF4).
//!
//! The central idea is the *world switch*: [`context::Context`] holds a full
//! register state; [`context::Context::enter`] loads it with IRET and comes
//! back at the next exception or interrupt with everything the processor
//! reported. [`legacy::LegacyContext`] does the same for protected mode
//! without long mode, virtual-8086 mode and real mode. Tests are therefore
//! ordinary Rust that runs small pieces of machine code and looks at the result.
//!
//! Functions that touch hardware are safe to call although they can break the
//! machine in every way: a guest has nothing but its own test to lose, and the
//! compiler's view of memory is never changed behind its back by them.
#![no_std]

pub mod acpi;
pub mod apic;
pub mod boot;
pub mod check;
pub mod context;
pub mod cpu;
pub mod interrupt;
pub mod ioapic;
pub mod legacy;
pub mod memory;
pub mod paging;
pub mod percpu;
pub mod port;
pub mod print;
pub mod smp;
pub mod snippet;
pub mod tsc;

pub use check::{Group, Suite, finish};
pub use context::{Context, Exit};

/// Defines the entry of a guest: its name and its `fn(&mut Suite)`.
#[macro_export]
macro_rules! guest {
    ($name:literal, $main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main() -> ! {
            let mut suite = $crate::Suite::new($name);
            $main(&mut suite);
            $crate::finish(&suite)
        }

        #[panic_handler]
        fn panic(info: &core::panic::PanicInfo) -> ! {
            $crate::check::panicked($name, info)
        }
    };
}
