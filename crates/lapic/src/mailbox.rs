//! The lock-free inbox of a vCPU's APIC.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::message::DeliveryMode;

const VECTORS: u32 = 1 << 0;
const NMI: u32 = 1 << 1;
const INIT: u32 = 1 << 2;
const START_UP: u32 = 1 << 3;
const EXT_INT: u32 = 1 << 4;
const LINT0_CHANGED: u32 = 1 << 5;
const LINT1: u32 = 1 << 6;
/// The level of the LINT0 pin: stays when events are taken.
const LINT0_LEVEL: u32 = 1 << 15;
const START_UP_VECTOR_SHIFT: u32 = 24;

/// Interrupts posted to one vCPU and not yet seen by it. Any thread posts, the vCPU's thread takes with
/// [`crate::Lapic::collect`].
///
/// Each posting function returns whether the vCPU has to be kicked, which is when the mailbox held no event before:
/// whoever posted that earlier event has kicked, and the vCPU looks into the mailbox again before it sleeps or enters
/// the guest.
#[derive(Debug, Default)]
pub struct Mailbox {
    events: AtomicU32,
    vectors: [AtomicU64; 4],
    level: [AtomicU64; 4],
}

/// What [`crate::Lapic::collect`] found besides interrupt vectors, which went into the IRR. To be acted on in this
/// order: INIT, start-up, NMI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Received {
    /// An INIT arrived; the APIC has been through it, the vCPU has yet to.
    pub init: bool,
    /// A start-up message arrived, after the INIT if there was one: the vector.
    pub start_up: Option<u8>,
    /// A non-maskable interrupt arrived.
    pub nmi: bool,
}

/// The raw contents of a mailbox.
pub(crate) struct Taken {
    pub(crate) vectors: [u64; 4],
    pub(crate) level: [u64; 4],
    pub(crate) init: bool,
    pub(crate) start_up: Option<u8>,
    pub(crate) nmi: bool,
    pub(crate) ext_int: bool,
    pub(crate) lint0: bool,
    pub(crate) lint1: bool,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is something for the vCPU to collect: the cheap test for its run loop.
    #[inline]
    pub fn has_events(&self) -> bool {
        self.events.load(Ordering::Acquire) & !LINT0_LEVEL & 0xFFFF != 0
    }

    /// Posts an interrupt; returns whether to kick the vCPU.
    pub fn post(&self, mode: DeliveryMode, vector: u8, level: bool) -> bool {
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                let (word, bit) = (usize::from(vector >> 6), 1u64 << (vector & 63));
                if level {
                    self.level[word].fetch_or(bit, Ordering::Relaxed);
                } else {
                    self.level[word].fetch_and(!bit, Ordering::Relaxed);
                }
                self.vectors[word].fetch_or(bit, Ordering::Release);
                self.set(VECTORS, 0)
            }
            DeliveryMode::Nmi => self.set(NMI, 0),
            // An INIT takes back a start-up message that came before it and was not seen.
            DeliveryMode::Init => self.set(INIT, START_UP | (0xFF << START_UP_VECTOR_SHIFT)),
            DeliveryMode::StartUp => self.set(
                START_UP | (u32::from(vector) << START_UP_VECTOR_SHIFT),
                0xFF << START_UP_VECTOR_SHIFT,
            ),
            DeliveryMode::ExtInt => self.set(EXT_INT, 0),
            DeliveryMode::Smi => false,
        }
    }

    /// Drives the LINT0 pin, which the 8259's output is wired to; returns whether to kick the vCPU. Lowering the pin
    /// needs no kick: an interrupt that is taken back before it is accepted does not happen.
    pub fn set_lint0(&self, level: bool) -> bool {
        if level {
            self.set(LINT0_LEVEL | LINT0_CHANGED, 0)
        } else {
            self.set(LINT0_CHANGED, LINT0_LEVEL);
            false
        }
    }

    /// Pulses the LINT1 pin, which the NMI button is wired to; returns whether to kick the vCPU.
    pub fn pulse_lint1(&self) -> bool {
        self.set(LINT1, 0)
    }

    fn set(&self, set: u32, clear: u32) -> bool {
        let update = |events: u32| Some((events & !clear) | set);
        let before = match self
            .events
            .fetch_update(Ordering::SeqCst, Ordering::Relaxed, update)
        {
            Ok(before) | Err(before) => before,
        };
        before & !LINT0_LEVEL & 0xFFFF == 0
    }

    pub(crate) fn take(&self) -> Taken {
        let events = self.events.fetch_and(LINT0_LEVEL, Ordering::SeqCst);
        let mut taken = Taken {
            vectors: [0; 4],
            level: [0; 4],
            init: events & INIT != 0,
            start_up: (events & START_UP != 0).then_some((events >> START_UP_VECTOR_SHIFT) as u8),
            nmi: events & NMI != 0,
            ext_int: events & EXT_INT != 0,
            lint0: events & LINT0_LEVEL != 0,
            lint1: events & LINT1 != 0,
        };
        if events & VECTORS != 0 {
            for index in 0..4 {
                taken.vectors[index] = self.vectors[index].swap(0, Ordering::Acquire);
                taken.level[index] = self.level[index].load(Ordering::Relaxed);
            }
        }
        taken
    }

    /// Empties the mailbox, for a reset of the machine. The level of LINT0 stays: it is its driver's business.
    pub fn clear(&self) {
        self.events.fetch_or(VECTORS, Ordering::SeqCst);
        self.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_event_kicks() {
        let mailbox = Mailbox::new();
        assert!(!mailbox.has_events());
        assert!(mailbox.post(DeliveryMode::Fixed, 0x40, false));
        assert!(!mailbox.post(DeliveryMode::Nmi, 0, false));
        assert!(mailbox.has_events());
        let taken = mailbox.take();
        assert_eq!((taken.vectors, taken.nmi), ([0, 1, 0, 0], true));
        assert!(!mailbox.has_events());
        assert!(mailbox.post(DeliveryMode::Fixed, 0x40, false));
    }

    #[test]
    fn init_takes_back_an_earlier_start_up() {
        let mailbox = Mailbox::new();
        mailbox.post(DeliveryMode::StartUp, 0x9A, false);
        mailbox.post(DeliveryMode::Init, 0, false);
        let taken = mailbox.take();
        assert_eq!((taken.init, taken.start_up), (true, None));
        mailbox.post(DeliveryMode::Init, 0, false);
        mailbox.post(DeliveryMode::StartUp, 0xFF, false);
        mailbox.post(DeliveryMode::StartUp, 0x12, false);
        let taken = mailbox.take();
        assert_eq!((taken.init, taken.start_up), (true, Some(0x12)));
    }

    #[test]
    fn lint0_is_a_level() {
        let mailbox = Mailbox::new();
        assert!(mailbox.set_lint0(true));
        assert!(mailbox.take().lint0);
        assert!(!mailbox.has_events());
        assert!(mailbox.take().lint0);
        assert!(!mailbox.set_lint0(false));
        assert!(!mailbox.take().lint0);
        mailbox.set_lint0(true);
        mailbox.clear();
        assert!(mailbox.take().lint0);
    }

    #[test]
    fn many_posters_lose_nothing() {
        use std::{sync::Arc, thread};
        let mailbox = Arc::new(Mailbox::new());
        let posters: std::vec::Vec<_> = (0..4u8)
            .map(|poster| {
                let mailbox = mailbox.clone();
                thread::spawn(move || {
                    for vector in poster * 60 + 16..=poster * 60 + 75 {
                        mailbox.post(DeliveryMode::Fixed, vector, vector % 2 == 0);
                    }
                })
            })
            .collect();
        let mut seen = crate::VectorSet::EMPTY;
        let mut tmr = crate::VectorSet::EMPTY;
        let mut collect = |mailbox: &Mailbox| {
            let taken = mailbox.take();
            seen.merge(taken.vectors, taken.level, &mut tmr);
        };
        while posters.iter().any(|poster| !poster.is_finished()) {
            collect(&mailbox);
        }
        for poster in posters {
            poster.join().unwrap();
        }
        collect(&mailbox);
        for vector in 16..=255 {
            assert!(seen.contains(vector), "{vector}");
            assert_eq!(tmr.contains(vector), vector % 2 == 0, "{vector}");
        }
    }
}
