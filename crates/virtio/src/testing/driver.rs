//! A driver that keeps to the rules, for rings of either format.

use alloc::{collections::BTreeMap, vec::Vec};
use core::sync::atomic::Ordering;

use caisson_memory::{Gpa, MemoryView};

use crate::queue::{RingFeatures, RingPlace};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// The driver's side of one virtqueue (§2.7, §2.8).
pub struct Driver {
    memory: MemoryView,
    place: RingPlace,
    features: RingFeatures,
    /// Free descriptors of a split ring, or free buffer IDs of a packed one.
    free: Vec<u16>,
    /// What each buffer in the ring takes: its descriptors, or how many entries.
    taken: BTreeMap<u16, Vec<u16>>,
    room: u16,
    available: u16,
    available_wrap: bool,
    /// Split: how far the device knows of. Packed: how many entries were added since it was last asked.
    published: u16,
    used: u16,
    used_wrap: bool,
}

impl Driver {
    /// A ring at `place`, all of it free. Its parts are cleared.
    ///
    /// # Panics
    /// When the ring is not in memory.
    pub fn new(memory: &MemoryView, place: RingPlace, features: RingFeatures) -> Self {
        let size = u64::from(place.size);
        let parts = [
            (place.descriptors, 16 * size),
            (place.driver, if features.packed { 4 } else { 6 + 2 * size }),
            (place.device, if features.packed { 4 } else { 6 + 8 * size }),
        ];
        for (gpa, len) in parts {
            memory
                .fill(Gpa(gpa), len, 0)
                .expect("the ring is in memory");
        }
        Self {
            memory: memory.clone(),
            place,
            features,
            free: (0..place.size).rev().collect(),
            taken: BTreeMap::new(),
            room: place.size,
            available: 0,
            available_wrap: true,
            published: 0,
            used: 0,
            used_wrap: true,
        }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write(Gpa(gpa), bytes).expect("it is in memory");
    }

    fn load(&self, gpa: u64) -> u16 {
        let value = self.memory.load_u16(Gpa(gpa), Ordering::SeqCst);
        value.expect("it is in memory")
    }

    fn store(&self, gpa: u64, value: u16) {
        self.memory
            .store_u16(Gpa(gpa), value, Ordering::SeqCst)
            .expect("it is in memory");
    }

    fn descriptor(&self, table: u64, index: u16, segment: (u64, u32), words: [u16; 2]) {
        let at = table + 16 * u64::from(index);
        self.put(at, &segment.0.to_le_bytes());
        self.put(at + 8, &segment.1.to_le_bytes());
        self.put(at + 12, &words[0].to_le_bytes());
        self.put(at + 14, &words[1].to_le_bytes());
    }

    /// Adds a buffer of `segments` (address, length, whether the device writes it), through an indirect table at
    /// `table` if one is given. `None` if there is no room. The device learns of it with [`Driver::publish`], of a
    /// packed ring at once.
    pub fn add(&mut self, segments: &[(u64, u32, bool)], table: Option<u64>) -> Option<u16> {
        let entries = if table.is_some() { 1 } else { segments.len() };
        if segments.is_empty() || entries > usize::from(self.room) {
            return None;
        }
        let flags = |writable: bool| if writable { WRITE } else { 0 };
        if let Some(table) = table {
            for (index, (gpa, len, writable)) in (0u16..).zip(segments) {
                let more = usize::from(index) + 1 < segments.len();
                let next = if more { NEXT } else { 0 };
                let words = match self.features.packed {
                    true => [0, flags(*writable)],
                    false => [flags(*writable) | next, index + 1],
                };
                self.descriptor(table, index, (*gpa, *len), words);
            }
        }
        let whole;
        let segments = match table {
            Some(table) => {
                whole = [(table, 16 * segments.len() as u32, false)];
                &whole[..]
            }
            None => segments,
        };
        let indirect = if table.is_some() { INDIRECT } else { 0 };
        self.room -= entries as u16;
        if self.features.packed {
            return Some(self.add_packed(segments, indirect, flags));
        }
        let indices: Vec<u16> = (0..entries).filter_map(|_| self.free.pop()).collect();
        for (n, (gpa, len, writable)) in segments.iter().enumerate() {
            let next = indices.get(n + 1).copied();
            let more = if next.is_some() { NEXT } else { 0 };
            let words = [flags(*writable) | more | indirect, next.unwrap_or(0)];
            self.descriptor(self.place.descriptors, indices[n], (*gpa, *len), words);
        }
        let slot = u64::from(self.available % self.place.size);
        self.store(self.place.driver + 4 + 2 * slot, indices[0]);
        self.available = self.available.wrapping_add(1);
        let head = indices[0];
        self.taken.insert(head, indices);
        Some(head)
    }

    fn add_packed(
        &mut self,
        segments: &[(u64, u32, bool)],
        indirect: u16,
        flags: impl Fn(bool) -> u16,
    ) -> u16 {
        let id = self.free.pop().expect("as many IDs as entries");
        let first = self.available;
        let mut first_flags = 0;
        for (n, (gpa, len, writable)) in segments.iter().enumerate() {
            let more = if n + 1 < segments.len() { NEXT } else { 0 };
            let own = if self.available_wrap { AVAILABLE } else { USED };
            let word = flags(*writable) | more | indirect | own;
            let before = self.load(self.place.descriptors + 16 * u64::from(self.available) + 14);
            // The first is made available last.
            let shown = if n == 0 { before } else { word };
            if n == 0 {
                first_flags = word;
            }
            self.descriptor(
                self.place.descriptors,
                self.available,
                (*gpa, *len),
                [id, shown],
            );
            self.available += 1;
            if self.available == self.place.size {
                (self.available, self.available_wrap) = (0, !self.available_wrap);
            }
        }
        let at = self.place.descriptors + 16 * u64::from(first) + 14;
        self.store(at, first_flags);
        self.published += segments.len() as u16;
        self.taken.insert(id, alloc::vec![0; segments.len()]);
        id
    }

    /// Shows the device what was added, and tells whether it wants to be notified.
    pub fn publish(&mut self) -> bool {
        if self.features.packed {
            let flags = self.load(self.place.device + 2) & 3;
            let event = self.load(self.place.device);
            let count = core::mem::take(&mut self.published);
            if flags != 2 || !self.features.event_idx {
                return flags != 1;
            }
            let mut slot = event & 0x7fff;
            if (event & 0x8000 != 0) != self.available_wrap {
                slot = slot.wrapping_sub(self.place.size);
            }
            return self.available.wrapping_sub(slot).wrapping_sub(1) < count;
        }
        self.store(self.place.driver + 2, self.available);
        let (old, new) = (self.published, self.available);
        self.published = new;
        if self.features.event_idx {
            let event = self.load(self.place.device + 4 + 8 * u64::from(self.place.size));
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        self.load(self.place.device) & 1 == 0
    }

    /// Takes the next buffer that the device gave back: its ID and how many bytes were written.
    ///
    /// # Panics
    /// When the device gives back what it was not given.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let (id, written) = if self.features.packed {
            let at = self.place.descriptors + 16 * u64::from(self.used);
            let flags = self.load(at + 14);
            let both = (flags & AVAILABLE != 0, flags & USED != 0);
            if both != (self.used_wrap, self.used_wrap) {
                return None;
            }
            let id = self.load(at + 12);
            let slots = self.taken.get(&id).expect("a buffer in the ring").len() as u16;
            self.used += slots;
            if self.used >= self.place.size {
                (self.used, self.used_wrap) = (self.used - self.place.size, !self.used_wrap);
            }
            let mut written = [0; 4];
            self.memory.read(Gpa(at + 8), &mut written).ok()?;
            (id, u32::from_le_bytes(written))
        } else {
            if self.load(self.place.device + 2) == self.used {
                return None;
            }
            let at = self.place.device + 4 + 8 * u64::from(self.used % self.place.size);
            let mut element = [0; 8];
            self.memory.read(Gpa(at), &mut element).ok()?;
            self.used = self.used.wrapping_add(1);
            let [i0, i1, i2, i3, w0, w1, w2, w3] = element;
            let id = u32::from_le_bytes([i0, i1, i2, i3]);
            (id as u16, u32::from_le_bytes([w0, w1, w2, w3]))
        };
        let taken = self.taken.remove(&id).expect("a buffer in the ring");
        self.room += taken.len() as u16;
        match self.features.packed {
            true => self.free.push(id),
            false => self.free.extend(taken.into_iter().rev()),
        }
        Some((id, written))
    }

    /// Says that no interrupts are wanted, or (with an index event, if that was negotiated) one at the next buffer.
    pub fn want_interrupts(&self, wanted: bool) {
        match (self.features.packed, wanted) {
            (true, true) if self.features.event_idx => {
                let wrap = if self.used_wrap { 0x8000 } else { 0 };
                self.store(self.place.driver, self.used | wrap);
                self.store(self.place.driver + 2, 2);
            }
            (true, _) => self.store(self.place.driver + 2, u16::from(!wanted)),
            (false, _) => {
                self.store(self.place.driver, u16::from(!wanted));
                let event = self.place.driver + 4 + 2 * u64::from(self.place.size);
                let at = if wanted {
                    self.used
                } else {
                    self.used.wrapping_sub(1)
                };
                self.store(event, at);
            }
        }
    }

    /// How many entries are free.
    pub fn room(&self) -> u16 {
        self.room
    }

    /// Where the ring is.
    pub fn place(&self) -> &RingPlace {
        &self.place
    }
}
