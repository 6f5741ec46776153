//! Small pieces of machine code, written as assembly, usable as bytes.

/// The bytes of an assembly snippet in 64-bit code.
#[macro_export]
macro_rules! code64 {
    ($($line:expr),+ $(,)?) => { $crate::snippet_bytes!(".code64", $($line),+) };
}

/// The bytes of an assembly snippet in 32-bit code.
#[macro_export]
macro_rules! code32 {
    ($($line:expr),+ $(,)?) => { $crate::snippet_bytes!(".code32", $($line),+) };
}

/// The bytes of an assembly snippet in 16-bit code.
#[macro_export]
macro_rules! code16 {
    ($($line:expr),+ $(,)?) => { $crate::snippet_bytes!(".code16", $($line),+) };
}

/// Assembles into a read-only section and gives the bytes; labels 2 and 3 are taken.
#[macro_export]
macro_rules! snippet_bytes {
    ($mode:expr, $($line:expr),+) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: the section holds the bytes between the two labels for good.
        unsafe {
            core::arch::asm!(
                "lea {start}, [rip + 771f]",
                "lea {end}, [rip + 772f]",
                ".pushsection .rodata.snippets, \"a\", @progbits",
                $mode,
                "771:",
                $($line,)+
                "772:",
                ".code64",
                ".popsection",
                start = out(reg) start,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags)
            );
            core::slice::from_raw_parts(start, end.offset_from(start) as usize)
        }
    }};
}
