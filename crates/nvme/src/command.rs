//! Commands and completions as they lie in memory (§4.2, §4.6).

/// Bytes of a command.
pub(crate) const COMMAND_LEN: u64 = 64;
/// Bytes of a completion.
pub(crate) const COMPLETION_LEN: u64 = 16;

/// A command, as read from its queue once.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    bytes: [u8; COMMAND_LEN as usize],
}

impl Command {
    pub(crate) fn new(bytes: [u8; COMMAND_LEN as usize]) -> Self {
        Self { bytes }
    }

    /// Command dword `index`, 0 to 15.
    pub(crate) fn dword(&self, index: usize) -> u32 {
        let bytes = self.bytes.get(4 * index..).and_then(|b| b.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// Command dwords `index` and `index` + 1.
    pub(crate) fn quad(&self, index: usize) -> u64 {
        u64::from(self.dword(index)) | u64::from(self.dword(index + 1)) << 32
    }

    pub(crate) fn opcode(&self) -> u8 {
        self.dword(0) as u8
    }

    /// Whether it is one half of a fused operation.
    pub(crate) fn is_fused(&self) -> bool {
        self.dword(0) >> 8 & 0b11 != 0
    }

    /// How its data is described: 0 by PRPs, 1 and 2 by an SGL.
    pub(crate) fn psdt(&self) -> u32 {
        self.dword(0) >> 14 & 0b11
    }

    pub(crate) fn id(&self) -> u16 {
        (self.dword(0) >> 16) as u16
    }

    pub(crate) fn namespace(&self) -> u32 {
        self.dword(1)
    }

    /// The 16 bytes of its data pointer.
    pub(crate) fn data_pointer(&self) -> [u8; 16] {
        let bytes = self.bytes.get(24..).and_then(|b| b.first_chunk());
        bytes.copied().unwrap_or_default()
    }
}

/// Status code type and status code (§4.6.1.2), with the *Do Not Retry* bit where trying again makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u16);

const DO_NOT_RETRY: u16 = 1 << 14;

impl Status {
    pub(crate) const SUCCESS: Self = Self(0);
    pub(crate) const INVALID_OPCODE: Self = Self(DO_NOT_RETRY | 0x01);
    pub(crate) const INVALID_FIELD: Self = Self(DO_NOT_RETRY | 0x02);
    pub(crate) const DATA_TRANSFER: Self = Self(0x04);
    pub(crate) const INTERNAL: Self = Self(0x06);
    pub(crate) const INVALID_NAMESPACE: Self = Self(DO_NOT_RETRY | 0x0b);
    pub(crate) const SEQUENCE: Self = Self(DO_NOT_RETRY | 0x0c);
    pub(crate) const SGL_SEGMENT: Self = Self(DO_NOT_RETRY | 0x0d);
    pub(crate) const SGL_COUNT: Self = Self(DO_NOT_RETRY | 0x0e);
    pub(crate) const SGL_LENGTH: Self = Self(DO_NOT_RETRY | 0x0f);
    pub(crate) const SGL_TYPE: Self = Self(DO_NOT_RETRY | 0x11);
    pub(crate) const PRP_OFFSET: Self = Self(DO_NOT_RETRY | 0x13);
    pub(crate) const WRITE_PROTECTED: Self = Self(DO_NOT_RETRY | 0x20);
    pub(crate) const OUT_OF_RANGE: Self = Self(DO_NOT_RETRY | 0x80);
    pub(crate) const CAPACITY: Self = Self(DO_NOT_RETRY | 0x81);
    pub(crate) const COMPLETION_QUEUE: Self = Self(DO_NOT_RETRY | 0x100);
    pub(crate) const QUEUE_IDENTIFIER: Self = Self(DO_NOT_RETRY | 0x101);
    pub(crate) const QUEUE_SIZE: Self = Self(DO_NOT_RETRY | 0x102);
    pub(crate) const EVENT_LIMIT: Self = Self(DO_NOT_RETRY | 0x105);
    pub(crate) const INTERRUPT_VECTOR: Self = Self(DO_NOT_RETRY | 0x108);
    pub(crate) const LOG_PAGE: Self = Self(DO_NOT_RETRY | 0x109);
    pub(crate) const QUEUE_DELETION: Self = Self(DO_NOT_RETRY | 0x10c);
    pub(crate) const NOT_SAVEABLE: Self = Self(DO_NOT_RETRY | 0x10d);
    pub(crate) const WRITE_FAULT: Self = Self(0x280);
    pub(crate) const READ_ERROR: Self = Self(0x281);

    pub(crate) fn is_success(self) -> bool {
        self == Self::SUCCESS
    }

    /// Whether it tells of the medium, not of the command.
    pub(crate) fn is_media_error(self) -> bool {
        self.0 >> 8 & 7 == 2
    }
}

/// What a command comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: Status,
    /// Completion dword 0.
    pub(crate) result: u32,
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        Self { status, result: 0 }
    }
}

impl Answer {
    pub(crate) fn of(result: Result<u32, Status>) -> Self {
        match result {
            Ok(result) => Self {
                status: Status::SUCCESS,
                result,
            },
            Err(status) => status.into(),
        }
    }
}
