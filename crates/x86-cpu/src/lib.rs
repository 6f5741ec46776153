//! x86-64 decoder tables and instruction semantics: the core of the software
//! CPU, and the emulator that other backends call for single instructions.
//!
//! The crate knows no thread, file or clock; what it needs is asked of an
//! [`env::Env`]. It runs guest x86-64 on host x86-64: arithmetic and its flags
//! are the host's own instructions, vector and x87 instructions run verbatim on
//! registers loaded from [`state::Cpu`] (see [`vector`]).
#![no_std]
#![cfg(target_arch = "x86_64")]
extern crate alloc;

pub mod build;
pub mod cache;
pub mod cpuid;
pub mod env;
pub mod exec;
pub mod fault;
pub mod flags;
pub mod flow;
pub mod generation;
pub mod jit;
pub mod mem;
pub mod mmu;
pub mod ops;
pub mod state;
pub mod sys;
#[cfg(test)]
pub(crate) mod testenv;
pub mod tlb;
pub mod uop;
pub mod vector;
