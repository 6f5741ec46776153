//! A file as a Linux bzImage.
#![no_main]
use caisson_firmware::KernelKind;
use caisson_fuzz::loader;

libfuzzer_sys::fuzz_target!(|data: &[u8]| loader::check(Some(KernelKind::LinuxBzImage), data));
