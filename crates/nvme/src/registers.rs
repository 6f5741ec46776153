//! Controller registers and doorbells (§3.1).

use crate::{
    controller::{Nvme, Shutdown},
    data::PAGE,
    events::{INVALID_DOORBELL, INVALID_VALUE},
    queue::{CompletionQueue, MAX_ADMIN_ENTRIES, MAX_ENTRIES, SubmissionQueue},
};

const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
/// Bytes of the registers that are there.
const IMAGE: usize = 0x38;
/// Where the doorbells begin.
const DOORBELLS: u64 = 0x1000;
/// How long the host waits for a change of [`CC_EN`] at least, in units of 500 ms.
const TIMEOUT: u64 = 60;
/// Version 1.4.
pub(crate) const VERSION: u32 = 0x0001_0400;

const CC_EN: u32 = 1;
/// Command set, page size and arbitration: all of them offered as 0 only.
const CC_FIXED: u32 = 0b111_1111_111 << 4;
/// The only sizes of entries: 64 bytes of a command (2^6), 16 of a completion (2^4).
const CC_ENTRIES: u32 = 4 << 20 | 6 << 16;
const CC_SHN: u32 = 0b11 << 14;
/// What of the register can be written.
const CC_WRITABLE: u32 = 0x00ff_fff1;

const CSTS_RDY: u32 = 1;
const CSTS_CFS: u32 = 1 << 1;

impl Nvme {
    /// Memory page 4 KiB, NVM command set, physically contiguous queues, no subsystem reset.
    fn capabilities(&self) -> u64 {
        u64::from(MAX_ENTRIES - 1) | 1 << 16 | TIMEOUT << 24 | 1 << 37
    }

    fn status(&self) -> u32 {
        let mut status = 0;
        if self.state.ready {
            status |= CSTS_RDY;
        }
        if self.state.fatal {
            status |= CSTS_CFS;
        }
        status
            | match self.state.shutdown {
                Shutdown::Off => 0,
                Shutdown::Draining | Shutdown::Flushing => 1 << 2,
                Shutdown::Done => 2 << 2,
            }
    }

    /// A read at `offset` of the registers. Doorbells read as zeroes.
    pub(crate) fn read_registers(&self, offset: u64, data: &mut [u8]) {
        let state = &self.state;
        let mut image = [0; IMAGE];
        let mut put = |at: u64, bytes: &[u8]| {
            if let Some(place) = image.get_mut(at as usize..at as usize + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &self.capabilities().to_le_bytes());
        put(8, &VERSION.to_le_bytes());
        put(INTMS, &state.masked.to_le_bytes());
        put(INTMC, &state.masked.to_le_bytes());
        put(CC, &state.configuration.to_le_bytes());
        put(0x1c, &self.status().to_le_bytes());
        put(AQA, &state.admin_sizes.to_le_bytes());
        put(ASQ, &state.admin_submission.to_le_bytes());
        put(ACQ, &state.admin_completion.to_le_bytes());
        for (at, byte) in (offset..).zip(data) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// A write at `offset` of the registers: of one dword, or of two at once. Others have no effect.
    pub(crate) fn write_registers(&mut self, offset: u64, data: &[u8]) {
        let (dwords, rest) = data.as_chunks::<4>();
        if !offset.is_multiple_of(4) || !rest.is_empty() {
            return;
        }
        for (at, dword) in (offset..).step_by(4).zip(dwords) {
            let value = u32::from_le_bytes(*dword);
            if at >= DOORBELLS {
                self.ring((at - DOORBELLS) / 4, value);
            } else {
                self.write_register(at, value);
            }
        }
    }

    fn write_register(&mut self, at: u64, value: u32) {
        let state = &mut self.state;
        let off = state.configuration & CC_EN == 0;
        let low = |old: u64| old & !0xffff_ffff | u64::from(value) & !(PAGE - 1);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            // For a pin and MSI; with MSI-X the vector's own mask is used (§3.1.3).
            INTMS => state.masked |= value,
            INTMC => state.masked &= !value,
            CC => self.configure(value & CC_WRITABLE),
            // §3.1.8: not changed while the controller is enabled.
            AQA if off => state.admin_sizes = value & 0x0fff_0fff,
            ASQ if off => state.admin_submission = low(state.admin_submission),
            0x2c if off => state.admin_submission = high(state.admin_submission),
            ACQ if off => state.admin_completion = low(state.admin_completion),
            0x34 if off => state.admin_completion = high(state.admin_completion),
            _ => {}
        }
        self.drive_pin();
    }

    fn configure(&mut self, value: u32) {
        let before = core::mem::replace(&mut self.state.configuration, value);
        let (was, is) = (before & CC_EN != 0, value & CC_EN != 0);
        if was && !is {
            self.state.resetting = true;
        }
        if value & CC_SHN != 0 && before & CC_SHN == 0 && self.state.shutdown == Shutdown::Off {
            self.state.shutdown = Shutdown::Draining;
        }
        if is && !was && !self.state.resetting {
            self.enable();
        }
        self.wake();
    }

    /// Makes the admin queues as the registers say.
    fn enable(&mut self) {
        let state = &mut self.state;
        let sizes = state.admin_sizes;
        let (submission, completion) = ((sizes & 0xfff) + 1, (sizes >> 16 & 0xfff) + 1);
        let sized = |size: u32| (2..=MAX_ADMIN_ENTRIES).contains(&size);
        let configured =
            state.configuration & CC_FIXED == 0 && state.configuration & 0x00ff_0000 == CC_ENTRIES;
        if !configured || !sized(submission) || !sized(completion) {
            state.fatal = true;
            return;
        }
        let queue = SubmissionQueue::new(state.admin_submission, submission, 0);
        set(&mut state.submission, 0, Some(queue));
        let queue = CompletionQueue::new(state.admin_completion, completion, Some(0));
        set(&mut state.completion, 0, Some(queue));
        state.shutdown = Shutdown::Off;
        state.ready = true;
    }

    /// Ends a reset, once nothing is under way any more (§7.3.2). Registers of the admin queues stay.
    pub(crate) fn finish_reset(&mut self) {
        let state = &mut self.state;
        state.submission.fill(None);
        state.completion.fill(None);
        state.done.clear();
        state.ready = false;
        state.fatal = false;
        state.resetting = false;
        state.shutdown = Shutdown::Off;
        state.masked = 0;
        state.features.reset(self.backend.info().write_cache);
        state.events.reset();
        self.flights.clear();
        self.flush = None;
        self.drive_pin();
        if self.state.configuration & CC_EN != 0 {
            self.enable();
        }
    }

    /// Whether the host wants commands to be carried out.
    pub(crate) fn is_at_work(&self) -> bool {
        let state = &self.state;
        state.ready && !state.fatal && !state.resetting && state.shutdown == Shutdown::Off
    }

    /// A write to doorbell `index` (§3.1.16, §3.1.17).
    fn ring(&mut self, index: u64, value: u32) {
        if !self.state.ready || self.state.fatal || self.state.resetting {
            return;
        }
        let queue = usize::try_from(index / 2).unwrap_or(usize::MAX);
        let state = &mut self.state;
        let failure = if index % 2 == 0 {
            match state.submission.get_mut(queue) {
                Some(Some(queue)) if value < queue.size => {
                    queue.tail = value;
                    None
                }
                Some(Some(_)) => Some(INVALID_VALUE),
                _ => Some(INVALID_DOORBELL),
            }
        } else {
            match state.completion.get_mut(queue) {
                Some(Some(queue)) if value < queue.size => {
                    queue.head = value;
                    None
                }
                Some(Some(_)) => Some(INVALID_VALUE),
                _ => Some(INVALID_DOORBELL),
            }
        };
        match failure {
            Some(information) => state.events.doorbell_error(information),
            None if index % 2 == 1 => self.drive_pin(),
            None => {}
        }
        self.wake();
    }
}

fn set<T>(list: &mut [T], index: usize, value: T) {
    if let Some(place) = list.get_mut(index) {
        *place = value;
    }
}
