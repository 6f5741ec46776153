//! What host and guest share: checksums, frames and messages. No allocation, no dependencies.
//!
//! A frame on the wire:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | sync: `CA 15` |
//! | 2 | 1 | kind, see [`ToGuest`] and [`ToHost`] |
//! | 3 | 1 | sequence number, from 0, one per frame and direction, wrapping |
//! | 4 | 2 | payload length, little-endian, at most [`MAX_PAYLOAD`] |
//! | 6 | 2 | low half of the CRC-32 of bytes 2 to 5 |
//! | 8 | n | payload |
//! | 8+n | 4 | CRC-32 of the payload, little-endian |
//!
//! The header has a checksum of its own so that noise which resembles a header cannot make the
//! receiver wait for a payload that never comes. Bytes between frames are skipped; a missing frame
//! shows in the sequence number.
//!
//! Flow control: the guest's [`ToHost::Hello`] grants a window in *wire bytes*, counting whole
//! frames of every kind. The host never has more than that under way; the guest gives the bytes
//! back with [`ToHost::Credit`] once it has consumed a frame, so the buffers of its terminal layer
//! cannot overrun. Nothing of the kind is needed the other way: the port itself blocks.

mod crc;
mod frame;
mod message;

pub use crc::crc32;
pub use frame::{Decoder, Event, HEADER, MAX_FRAME, MAX_PAYLOAD, TRAILER, encode_frame};
pub use message::{
    ExitStatus, MAX_START, START_FIXED, StartHeader, ToGuest, ToHost, VERSION, WINDOW, WireError,
};
