//! Holes in files, as Unix systems tell of them.

use std::{fs::File, io, ops::Range};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// What file systems say that do not tell of holes. On Linux two of them are the same number.
const NOT_TOLD: [Errno; 4] = [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::NOTTY];

/// The parts of the first `len` bytes of a file that are not holes; all of it
/// where the file system does not tell. Moves the file's position.
pub(super) fn data_of(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(len),
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) if NOT_TOLD.contains(&error) => {
                ranges.push(at..len);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        if end <= start {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}
