//! Why a request failed.

/// What a device tells its guest about a failed request. The backend logs the host's side of it (which file, which
/// error), so this is no more than what block protocols can express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
#[repr(u8)]
pub enum BlockError {
    /// The host could not read or write the medium.
    #[error("the host's storage failed")]
    Io = 1,
    /// The host's storage is full. What was durable before still is.
    #[error("the host's storage is full")]
    NoSpace,
    /// The range leaves the disk, or its end cannot be counted in 64 bits.
    #[error("the request leaves the disk")]
    OutOfRange,
    /// Offset or length is not a multiple of the logical block size.
    #[error("the request is not made of whole blocks")]
    Unaligned,
    /// A write to a disk that may only be read.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The storage cannot do this operation.
    #[error("the storage cannot do this operation")]
    Unsupported,
    /// The buffer is not in guest memory, or the device may not use it so.
    #[error("the request's buffer is not in guest memory")]
    Memory,
    /// The image's own tables are damaged, or could not be written, and the image is not written to any more.
    #[error("the image is damaged")]
    Corrupt,
    /// The backend dropped the request: a bug, see [`crate::abandoned`]; or it was shut down with requests under way.
    #[error("the storage dropped the request")]
    Abandoned,
}

impl BlockError {
    pub(crate) const ALL: [Self; 9] = [
        Self::Io,
        Self::NoSpace,
        Self::OutOfRange,
        Self::Unaligned,
        Self::ReadOnly,
        Self::Unsupported,
        Self::Memory,
        Self::Corrupt,
        Self::Abandoned,
    ];

    /// A number for an atomic; never 0.
    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_code(code: u8) -> Self {
        Self::ALL
            .into_iter()
            .find(|error| error.code() == code)
            .unwrap_or(Self::Io)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_survives_its_code() {
        for error in BlockError::ALL {
            assert_ne!(error.code(), 0);
            assert_eq!(BlockError::from_code(error.code()), error);
        }
    }
}
