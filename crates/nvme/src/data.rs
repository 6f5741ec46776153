//! Where a command's data is: PRP entries and lists (§4.3), SGLs (§4.4). Both become runs of guest memory.

use alloc::vec::Vec;

use caisson_block::Segment;
use caisson_memory::{Gpa, MemoryView};

use crate::command::{Command, Status};

/// Bytes of a memory page: the only size that is offered.
pub(crate) const PAGE: u64 = 4096;
/// The most descriptors of one SGL that are looked at, and the most segments of it: Linux makes at most 256.
const MAX_DESCRIPTORS: usize = 512;
const MAX_SGL_SEGMENTS: usize = 64;
/// Descriptors that are read at once.
const CHUNK: usize = 32;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// The runs of memory of `command`'s `len` bytes of data.
pub(crate) fn segments(
    command: &Command,
    len: u64,
    memory: &MemoryView,
) -> Result<Vec<Segment>, Status> {
    match command.psdt() {
        0 => prp(command.quad(6), command.quad(8), len, memory),
        1 | 2 => sgl(command.data_pointer(), len, memory),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// The runs of memory that two PRP entries mean. No more entries are read than `len` bytes need.
pub(crate) fn prp(
    first: u64,
    second: u64,
    len: u64,
    memory: &MemoryView,
) -> Result<Vec<Segment>, Status> {
    let mut runs = Runs::default();
    if !first.is_multiple_of(4) {
        return Err(Status::PRP_OFFSET);
    }
    let mut left = len;
    let now = (PAGE - first % PAGE).min(left);
    runs.push(first, now);
    left -= now;
    if left == 0 {
        return Ok(runs.0);
    }
    if left <= PAGE {
        if !second.is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET);
        }
        runs.push(second, left);
        return Ok(runs.0);
    }
    let mut list = second;
    while left > 0 {
        if !list.is_multiple_of(8) {
            return Err(Status::PRP_OFFSET);
        }
        // A list ends with its page; its last entry leads to the next list if there is more.
        let room = (PAGE - list % PAGE) / 8;
        let needed = left.div_ceil(PAGE);
        let count = room.min(needed);
        let mut bytes = [0; PAGE as usize];
        let bytes = bytes
            .get_mut(..(count * 8) as usize)
            .ok_or(Status::INTERNAL)?;
        memory
            .read(Gpa(list), bytes)
            .map_err(|_| Status::DATA_TRANSFER)?;
        let (entries, _) = bytes.as_chunks::<8>();
        let mut entries = entries.iter().map(|entry| u64::from_le_bytes(*entry));
        let pages = if needed > room { room - 1 } else { needed };
        for entry in entries.by_ref().take(pages as usize) {
            if !entry.is_multiple_of(PAGE) {
                return Err(Status::PRP_OFFSET);
            }
            let now = left.min(PAGE);
            runs.push(entry, now);
            left -= now;
        }
        if left > 0 {
            let next = entries.next().ok_or(Status::INTERNAL)?;
            // A further list begins its page, so each one brings the transfer on.
            if !next.is_multiple_of(PAGE) {
                return Err(Status::PRP_OFFSET);
            }
            list = next;
        }
    }
    Ok(runs.0)
}

/// The runs of memory that an SGL means. It must describe exactly `len` bytes (§4.4: longer ones are not announced).
fn sgl(first: [u8; 16], len: u64, memory: &MemoryView) -> Result<Vec<Segment>, Status> {
    let mut runs = Runs::default();
    let (mut sum, mut seen) = (0u64, 0usize);
    let mut next = first;
    for _ in 0..MAX_SGL_SEGMENTS {
        let descriptor = Descriptor::new(next)?;
        let last = match descriptor.kind {
            Kind::Data => {
                // Only in the command itself: in a list it is dealt with below.
                sum = sum.saturating_add(descriptor.len);
                runs.push(descriptor.address, descriptor.len);
                return whole(runs, sum, len);
            }
            Kind::Segment => false,
            Kind::LastSegment => true,
        };
        if descriptor.len == 0 || !descriptor.len.is_multiple_of(DESCRIPTOR) {
            return Err(Status::SGL_SEGMENT);
        }
        let count = (descriptor.len / DESCRIPTOR) as usize;
        seen = seen.saturating_add(count);
        if seen > MAX_DESCRIPTORS {
            return Err(Status::SGL_COUNT);
        }
        let mut link = None;
        let mut at = descriptor.address;
        let mut left = count;
        while left > 0 {
            let now = left.min(CHUNK);
            let mut bytes = [0; CHUNK * DESCRIPTOR as usize];
            let bytes = bytes
                .get_mut(..now * DESCRIPTOR as usize)
                .ok_or(Status::INTERNAL)?;
            memory
                .read(Gpa(at), bytes)
                .map_err(|_| Status::DATA_TRANSFER)?;
            let (descriptors, _) = bytes.as_chunks::<16>();
            for (index, bytes) in descriptors.iter().enumerate() {
                let entry = Descriptor::new(*bytes)?;
                if entry.kind == Kind::Data {
                    sum = sum.saturating_add(entry.len);
                    runs.push(entry.address, entry.len);
                    continue;
                }
                // What leads on stands at the end, and not in the last segment.
                if last || index + 1 != left {
                    return Err(Status::SGL_SEGMENT);
                }
                link = Some(*bytes);
            }
            at = at.saturating_add(now as u64 * DESCRIPTOR);
            left -= now;
        }
        match link {
            Some(link) => next = link,
            None => return whole(runs, sum, len),
        }
    }
    Err(Status::SGL_COUNT)
}

fn whole(runs: Runs, sum: u64, len: u64) -> Result<Vec<Segment>, Status> {
    match sum == len {
        true => Ok(runs.0),
        false => Err(Status::SGL_LENGTH),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Segment,
    LastSegment,
}

struct Descriptor {
    kind: Kind,
    address: u64,
    len: u64,
}

impl Descriptor {
    fn new(bytes: [u8; 16]) -> Result<Self, Status> {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            _,
            _,
            _,
            kind,
        ] = bytes;
        let kind = match kind {
            0x00 => Kind::Data,
            0x20 => Kind::Segment,
            0x30 => Kind::LastSegment,
            _ => return Err(Status::SGL_TYPE),
        };
        Ok(Self {
            kind,
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]).into(),
        })
    }
}

/// Runs of memory; neighbours become one.
#[derive(Default)]
struct Runs(Vec<Segment>);

impl Runs {
    fn push(&mut self, address: u64, len: u64) {
        if len == 0 {
            return;
        }
        if let Some(before) = self.0.last_mut()
            && before.gpa.checked_add(before.len.into()) == Some(Gpa(address))
            && let Ok(longer) = u32::try_from(u64::from(before.len) + len)
        {
            before.len = longer;
            return;
        }
        self.0.push(Segment {
            gpa: Gpa(address),
            // One page, or what a descriptor's 32 bits say.
            len: len as u32,
        });
    }
}

/// Writes the start of `data` to the runs in their order.
pub(crate) fn scatter(
    memory: &MemoryView,
    segments: &[Segment],
    data: &[u8],
) -> Result<(), Status> {
    let mut rest = data;
    for segment in segments {
        let (now, later) = rest.split_at(rest.len().min(segment.len as usize));
        memory
            .write(segment.gpa, now)
            .map_err(|_| Status::DATA_TRANSFER)?;
        rest = later;
    }
    Ok(())
}

/// Fills `data` from the runs in their order.
pub(crate) fn gather(
    memory: &MemoryView,
    segments: &[Segment],
    data: &mut [u8],
) -> Result<(), Status> {
    let mut rest = data;
    for segment in segments {
        let (now, later) = rest.split_at_mut(rest.len().min(segment.len as usize));
        memory
            .read(segment.gpa, now)
            .map_err(|_| Status::DATA_TRANSFER)?;
        rest = later;
    }
    Ok(())
}
