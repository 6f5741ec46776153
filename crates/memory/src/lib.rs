//! Guest physical memory: regions, dirty tracking, safe access, per-VTL views.
#![no_std]
extern crate alloc;
