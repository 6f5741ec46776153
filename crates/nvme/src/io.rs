//! NVM commands (§6).

use alloc::{vec, vec::Vec};

use caisson_block::{BlockError, GuestBuffer, Operation, Request};

use crate::{
    command::{Command, Status},
    controller::{NAMESPACE, Nvme, Progress},
    data::{gather, prp, segments},
    identify::MAX_TRANSFER,
};

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;
/// *Force Unit Access*.
const FUA: u32 = 1 << 30;
/// *Deallocate*, of Write Zeroes.
const DEALLOCATE: u32 = 1 << 25;
/// *Attribute – Deallocate*, of Dataset Management.
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
/// Bytes of a range of Dataset Management.
const RANGE: usize = 16;

impl Nvme {
    /// Starts an NVM command.
    pub(crate) fn start(&mut self, command: &Command) -> Progress {
        match self.operations(command) {
            Ok(operations) => {
                let submit = |operation| {
                    let (request, completion) = Request::new(operation);
                    self.backend.submit(request);
                    completion
                };
                let completions: Vec<_> = operations.into_iter().map(submit).collect();
                self.kick |= !completions.is_empty();
                Progress::Under(completions)
            }
            Err(status) => Progress::Done(status.into()),
        }
    }

    /// What `command` asks of the storage, checked.
    fn operations(&mut self, command: &Command) -> Result<Vec<Operation>, Status> {
        if command.is_fused() {
            return Err(Status::INVALID_FIELD);
        }
        let all = command.opcode() == FLUSH && command.namespace() == u32::MAX;
        if command.namespace() != NAMESPACE && !all {
            return Err(Status::INVALID_NAMESPACE);
        }
        let info = self.backend.info();
        let writes = matches!(command.opcode(), WRITE | WRITE_ZEROES | DATASET_MANAGEMENT);
        if info.read_only && writes {
            return Err(Status::WRITE_PROTECTED);
        }
        let durable = command.dword(12) & FUA != 0 || !self.state.features.write_cache;
        let counters = &mut self.state.counters;
        Ok(match command.opcode() {
            FLUSH => vec![Operation::Flush],
            READ => {
                let (offset, buffer) = self.transfer(command)?;
                self.state.counters.reads += 1;
                self.state.counters.bytes_read += buffer.len();
                vec![Operation::Read { offset, buffer }]
            }
            WRITE => {
                let (offset, buffer) = self.transfer(command)?;
                self.state.counters.writes += 1;
                self.state.counters.bytes_written += buffer.len();
                vec![Operation::Write {
                    offset,
                    buffer,
                    durable,
                }]
            }
            WRITE_ZEROES => {
                counters.writes += 1;
                let (offset, len) = self.range(command.quad(10), blocks(command))?;
                vec![Operation::WriteZeroes {
                    offset,
                    len,
                    unmap: command.dword(12) & DEALLOCATE != 0,
                    durable,
                }]
            }
            DATASET_MANAGEMENT => self.deallocate(command)?,
            _ => return Err(Status::INVALID_OPCODE),
        })
    }

    /// Offset and buffer of a read or write.
    fn transfer(&self, command: &Command) -> Result<(u64, GuestBuffer), Status> {
        let (offset, len) = self.range(command.quad(10), blocks(command))?;
        if len > MAX_TRANSFER {
            return Err(Status::INVALID_FIELD);
        }
        let segments = segments(command, len, &self.memory)?;
        let buffer = GuestBuffer::new(self.memory.clone(), segments);
        Ok((offset, buffer.map_err(|_| Status::DATA_TRANSFER)?))
    }

    /// A range of blocks as offset and length in bytes.
    fn range(&self, first: u64, blocks: u64) -> Result<(u64, u64), Status> {
        let block = u64::from(self.backend.info().logical_block);
        let offset = first.checked_mul(block).ok_or(Status::OUT_OF_RANGE)?;
        let len = blocks.checked_mul(block).ok_or(Status::OUT_OF_RANGE)?;
        match offset.checked_add(len) {
            Some(end) if end <= self.backend.info().size => Ok((offset, len)),
            _ => Err(Status::OUT_OF_RANGE),
        }
    }

    /// Dataset Management (§6.7): of its hints, only that blocks are not needed any more is taken.
    fn deallocate(&self, command: &Command) -> Result<Vec<Operation>, Status> {
        let count = (command.dword(10) & 0xff) as usize + 1;
        let mut ranges = [0; 256 * RANGE];
        let ranges = ranges.get_mut(..count * RANGE).ok_or(Status::INTERNAL)?;
        let len = ranges.len() as u64;
        let place = match command.psdt() {
            0 => prp(command.quad(6), command.quad(8), len, &self.memory)?,
            _ => segments(command, len, &self.memory)?,
        };
        gather(&self.memory, &place, ranges)?;
        let supported = self.backend.info().discard_granularity.is_some();
        let mut operations = Vec::new();
        for range in ranges.as_chunks::<RANGE>().0 {
            let [_, _, _, _, l0, l1, l2, l3, first @ ..] = *range;
            let blocks = u32::from_le_bytes([l0, l1, l2, l3]);
            let (offset, len) = self.range(u64::from_le_bytes(first), blocks.into())?;
            if len > 0 {
                operations.push(Operation::Discard { offset, len });
            }
        }
        if !supported || command.dword(11) & ATTRIBUTE_DEALLOCATE == 0 {
            operations.clear();
        }
        Ok(operations)
    }
}

/// How many blocks a read, write or write-zeroes is about.
fn blocks(command: &Command) -> u64 {
    u64::from(command.dword(12) & 0xffff) + 1
}

/// What the host is told of the storage's answer.
pub(crate) fn status_of(opcode: u8, outcome: Result<(), BlockError>) -> Status {
    match outcome {
        Ok(()) => Status::SUCCESS,
        Err(BlockError::NoSpace) => Status::CAPACITY,
        Err(BlockError::OutOfRange) => Status::OUT_OF_RANGE,
        Err(BlockError::ReadOnly) => Status::WRITE_PROTECTED,
        Err(BlockError::Memory) => Status::DATA_TRANSFER,
        Err(BlockError::Unaligned) => Status::INVALID_FIELD,
        Err(_) if opcode == READ => Status::READ_ERROR,
        Err(_) if matches!(opcode, WRITE | WRITE_ZEROES) => Status::WRITE_FAULT,
        Err(_) => Status::INTERNAL,
    }
}
