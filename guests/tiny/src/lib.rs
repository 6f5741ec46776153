//! Guests of a few instructions, for what is measured around them: how soon a machine runs, how soon it is gone, what
//! an exit costs.
//!
//! They are entered through PVH in 32-bit protected mode without paging and stay there, without a stack: a hypervisor
//! that emulates the guest's kernel spends a microsecond on each instruction.
#![no_std]

/// A guest that consists of the given lines of assembly. These may use the macros `say` (a byte to the debug console),
/// `power_off` (through ACPI's PM1a control block, S5) and `stop` (halt for good).
#[macro_export]
macro_rules! tiny {
    ($($line:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".macro say byte",
            "mov al, \\byte",
            "out 0xe9, al",
            ".endm",
            // Sleep type 5 and sleep enable, at the port and with the type that Caisson's tables name.
            ".macro power_off",
            "mov dx, 0x604",
            "mov ax, 5 << 10 | 1 << 13",
            "out dx, ax",
            ".endm",
            ".macro stop",
            "77: hlt",
            "jmp 77b",
            ".endm",
            ".section .note.pvh, \"a\", @note",
            ".balign 4",
            ".long 4, 4, 18",
            ".asciz \"Xen\"",
            ".long _start_multiboot",
            // The linker script's name for the entry of the file.
            ".section .boot, \"awx\"",
            ".code32",
            ".global _start_multiboot",
            "_start_multiboot:",
            "cli",
            $($line,)+
            ".code64",
            ".text",
        );

        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo) -> ! {
            loop {}
        }
    };
}
