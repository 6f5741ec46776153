//! x86-64 decoder tables and instruction semantics: the core of the software CPU.
#![no_std]
extern crate alloc;
