//! From a buffer to an operation (§5.2.6).

use alloc::vec::Vec;

use caisson_block::{BlockError, GuestBuffer, Operation, Segment};
use caisson_memory::{Gpa, MemoryView};

use super::{
    Blk, SECTOR,
    config::{DISCARD, MOST_SECTORS, WRITE_ZEROES},
};
use crate::{Fault, queue::Chain};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD_REQUEST: u32 = 11;
const WRITE_ZEROES_REQUEST: u32 = 13;
/// Bytes of the header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of a range of a discard or write-zeroes: sector, count, flags.
const RANGE: u64 = 16;
/// Flag of a range: the host may take the space back.
const UNMAP: u32 = 1;
/// Bytes of the ID.
const ID: usize = 20;

pub(super) const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// What a buffer comes to.
pub(super) enum Start {
    /// Something for the backend; this many bytes are written if it succeeds.
    Request { request: Operation, written: u32 },
    /// An answer at once.
    Answer { status: u8, written: u32 },
}

/// An answer without data.
const fn answer(status: u8) -> Start {
    Start::Answer { status, written: 0 }
}

/// The status that the driver finds.
pub(super) fn status_of(outcome: Result<(), BlockError>) -> u8 {
    match outcome {
        Ok(()) => OK,
        Err(BlockError::Unsupported) => UNSUPP,
        Err(_) => IOERR,
    }
}

impl Blk {
    /// Understands the buffer `chain` of `queue`.
    pub(super) fn start(
        &self,
        queue: u16,
        chain: &Chain,
        memory: &MemoryView,
    ) -> Result<Start, Fault> {
        let fault = |error| Fault::Memory { queue, error };
        let mut header = [0; HEADER as usize];
        let read = chain.read(memory, 0, &mut header).map_err(fault)?;
        if read < header.len() || chain.writable_len() == 0 {
            let what = "a block request without a header or a status";
            return Err(Fault::Request { queue, what });
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let through = self.writes_through();
        Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
            IN => {
                let len = chain.writable_len() - 1;
                let data = segments(chain.writable_pieces(0, len));
                self.transfer(memory, sector, data, |offset, buffer| Operation::Read {
                    offset,
                    buffer,
                })
            }
            OUT => {
                let len = chain.readable_len() - HEADER;
                let data = segments(chain.readable_pieces(HEADER, len));
                let start =
                    self.transfer(memory, sector, data, |offset, buffer| Operation::Write {
                        offset,
                        buffer,
                        durable: through,
                    });
                match start {
                    Start::Request { request, .. } => Start::Request {
                        request,
                        written: 0,
                    },
                    answer => answer,
                }
            }
            FLUSH => Start::Request {
                request: Operation::Flush,
                written: 0,
            },
            GET_ID => {
                let mut id = [0; ID];
                for (byte, value) in id.iter_mut().zip(self.config.id.bytes()) {
                    *byte = value;
                }
                let room = (chain.writable_len() - 1).min(ID as u64) as usize;
                let id = id.get(..room).unwrap_or_default();
                chain.write(memory, 0, id).map_err(fault)?;
                Start::Answer {
                    status: OK,
                    written: room as u32,
                }
            }
            kind @ (DISCARD_REQUEST | WRITE_ZEROES_REQUEST) => {
                let mut range = [0; RANGE as usize];
                let read = chain.read(memory, HEADER, &mut range).map_err(fault)?;
                if read < range.len() || chain.readable_len() != HEADER + RANGE {
                    return Ok(answer(UNSUPP));
                }
                self.range(kind == DISCARD_REQUEST, range)
            }
            _ => answer(UNSUPP),
        })
    }

    fn transfer(
        &self,
        memory: &MemoryView,
        sector: u64,
        segments: Vec<Segment>,
        operation: impl FnOnce(u64, GuestBuffer) -> Operation,
    ) -> Start {
        let buffer = GuestBuffer::new(memory.clone(), segments);
        match (sector.checked_mul(SECTOR), buffer) {
            (Some(offset), Ok(buffer)) => {
                let written = buffer.len() as u32;
                let request = operation(offset, buffer);
                Start::Request { request, written }
            }
            _ => answer(IOERR),
        }
    }

    /// A discard or write-zeroes of one range.
    fn range(&self, discard: bool, range: [u8; RANGE as usize]) -> Start {
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            c0,
            c1,
            c2,
            c3,
            f0,
            f1,
            f2,
            f3,
        ] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let (feature, known) = match discard {
            true => (DISCARD, 0),
            false => (WRITE_ZEROES, UNMAP),
        };
        if self.offered() & feature == 0 || flags & !known != 0 {
            return answer(UNSUPP);
        }
        let Some(offset) = sector.checked_mul(SECTOR).filter(|_| count <= MOST_SECTORS) else {
            return answer(IOERR);
        };
        let len = u64::from(count) * SECTOR;
        let request = match discard {
            true => Operation::Discard { offset, len },
            false => Operation::WriteZeroes {
                offset,
                len,
                unmap: flags & UNMAP != 0,
                durable: self.writes_through(),
            },
        };
        let written = 0;
        Start::Request { request, written }
    }
}

fn segments(pieces: impl Iterator<Item = (u64, usize)>) -> Vec<Segment> {
    let segment = |(gpa, len)| Segment {
        gpa: Gpa(gpa),
        // Each piece lies within one segment of a chain, whose length has 32 bits.
        len: len as u32,
    };
    pieces.map(segment).collect()
}
