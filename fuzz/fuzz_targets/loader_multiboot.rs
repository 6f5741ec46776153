//! A file as a Multiboot 1 kernel.
#![no_main]
use caisson_firmware::KernelKind;
use caisson_fuzz::loader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| loader::check(Some(KernelKind::Multiboot), data));
