//! The protocol by which the host runs one command in the small built-in guest.
//!
//! The guest's `/init` and the host talk over the second serial port. [`wire`] is what both sides
//! share: frames, checksums and messages, without allocation, so that the guest program compiles
//! the very same files. [`Session`] is the host's side of a conversation: it does no input or
//! output of its own; bytes from the port go in, events and bytes for the port come out.
//!
//! The guest is hostile: whatever it sends costs the host a bounded amount of memory and time
//! linear in the bytes received, and ends at worst in a [`ProtocolError`].
//!
//! What it leaves out: retransmission. An emulated serial port loses nothing, so a lost frame means
//! that somebody else wrote to the port, and the session ends rather than deliver altered output.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod session;
mod start;
pub mod wire;

pub use session::{ProtocolError, Session, SessionEvent};
pub use start::{StartError, StartRequest};
