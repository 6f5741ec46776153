//! A file as whatever it is, and as each protocol that begins with ELF.
#![no_main]
use caisson_firmware::{FileKind, KernelKind};
use caisson_fuzz::loader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    loader::check(None, data);
    loader::check(Some(KernelKind::LinuxElf), data);
    loader::check(Some(KernelKind::Pvh), data);
    if let Some(kind) = FileKind::of(data) {
        assert!(!kind.to_string().is_empty());
    }
});
