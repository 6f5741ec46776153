//! Memory for decoded code: filled from its start, emptied only as a whole,
//! and never moved.

use alloc::{
    alloc::{Layout, alloc, dealloc, handle_alloc_error},
    vec::Vec,
};
use core::{arch::asm, ptr::NonNull};

/// Every object starts at a multiple of this.
const ALIGN: usize = 32;
/// Bytes taken from the allocator at a time, and most that one object may take:
/// a huge page.
const REGION: usize = 2 << 20;
/// Bytes of the first region asked of the host at a time: taking its pages one
/// fault at a time costs more than building the blocks that fill them. Later
/// regions are asked for whole; what runs that much code gains by huge pages.
const STEP: usize = 64 << 10;
/// Bytes that [`Arena::prepare`] has ready.
const AHEAD: usize = 16 << 10;
/// Bytes that most blocks fit in.
const PREFETCH: usize = 384;
const LAYOUT: Layout = match Layout::from_size_align(REGION, REGION) {
    Ok(layout) => layout,
    Err(_) => panic!("both are powers of two"),
};

/// A bump allocator for objects that need no drop.
pub(super) struct Arena {
    regions: Vec<Region>,
    /// The region in use.
    current: usize,
    /// Bytes of it that are taken.
    used: usize,
}

struct Region {
    start: NonNull<u8>,
    /// Bytes from the start that the host has been asked for.
    ready: usize,
}

impl Arena {
    pub(super) fn new() -> Self {
        Self {
            regions: Vec::new(),
            current: 0,
            used: 0,
        }
    }

    /// Bytes taken since the last [`Self::clear`].
    pub(super) fn taken(&self) -> usize {
        self.current * REGION + self.used
    }

    /// Bytes of host memory behind the arena, about.
    pub(super) fn memory(&self) -> usize {
        self.regions.iter().map(|r| r.ready).sum()
    }

    /// Takes everything back; the memory is kept for what comes next.
    pub(super) fn clear(&mut self) {
        self.current = 0;
        self.used = 0;
    }

    /// Starts to bring the next bytes into the processor's cache, to be there
    /// when they are written, and has `populate` bring in the next pages, if few
    /// are left.
    pub(super) fn prepare(&mut self, populate: impl FnOnce(*mut u8, usize)) {
        // Before anything touches the next region, so that it can be a huge page.
        self.make_room(AHEAD);
        let step = if self.current == 0 { STEP } else { REGION };
        let region = &mut self.regions[self.current];
        if region.ready < REGION && self.used + AHEAD > region.ready {
            let len = step.min(REGION - region.ready);
            // SAFETY: `ready` is at most REGION.
            populate(unsafe { region.start.as_ptr().add(region.ready) }, len);
            region.ready += len;
        }
        for ahead in (0..PREFETCH).step_by(64) {
            let at = region
                .start
                .as_ptr()
                .wrapping_add(self.used + PREFETCH + ahead);
            // SAFETY: a hint, which reads and writes nothing at any address.
            unsafe {
                asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
            }
        }
    }

    /// Goes on to the next region if the current one has less than `size` bytes
    /// left.
    fn make_room(&mut self, size: usize) {
        if self.used + size > REGION {
            self.current += 1;
            self.used = 0;
        }
        if self.current == self.regions.len() {
            self.regions.push(Region::new());
        }
    }

    /// Room for `count` objects, not yet initialised. It is the caller's until
    /// the next [`Self::take`].
    pub(super) fn reserve<T: Copy>(&mut self, count: usize) -> *mut T {
        const { assert!(align_of::<T>() <= ALIGN) };
        let size = count * size_of::<T>();
        assert!(size <= REGION, "more than any block needs");
        self.make_room(size);
        let region = &self.regions[self.current];
        // SAFETY: `used + size` is at most REGION.
        unsafe { region.start.as_ptr().add(self.used).cast() }
    }

    /// Room for `count` objects, not yet initialised. Valid until the next
    /// [`Self::clear`]. After a [`Self::reserve`] of as many or more it is the
    /// same place.
    pub(super) fn take<T: Copy>(&mut self, count: usize) -> *mut T {
        let at = self.reserve(count);
        self.used += (count * size_of::<T>()).next_multiple_of(ALIGN);
        let region = &mut self.regions[self.current];
        if self.used > region.ready {
            region.ready = self.used.next_multiple_of(STEP);
        }
        at
    }

    /// Keeps a copy of `value` until the next [`Self::clear`].
    pub(super) fn keep<T: Copy>(&mut self, value: T) -> *mut T {
        let at = self.take::<T>(1);
        // SAFETY: room for one, aligned.
        unsafe { at.write(value) };
        at
    }
}

impl Region {
    fn new() -> Self {
        // SAFETY: the layout has a size.
        let start = unsafe { alloc(LAYOUT) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(LAYOUT)
        };
        Self { start, ready: 0 }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.start.as_ptr(), LAYOUT) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_stay_apart_and_aligned() {
        let mut arena = Arena::new();
        let mut last = core::ptr::null_mut::<u8>();
        for i in 0..100_000u64 {
            let at = arena.keep([i; 5]);
            assert_eq!(at as usize % ALIGN, 0);
            assert_ne!(at.cast(), last);
            last = at.cast();
        }
        assert_eq!(arena.regions.len(), 100_000 * 64 / REGION + 1);
        assert!(arena.memory() >= arena.taken());
        let first = arena.regions[0].start;
        arena.clear();
        assert_eq!(arena.keep(1u8), first.as_ptr());
        assert_eq!(arena.regions.len(), 100_000 * 64 / REGION + 1);
    }

    #[test]
    fn what_was_reserved_is_taken() {
        let mut arena = Arena::new();
        arena.take::<u8>(REGION - 4 * ALIGN);
        let at = arena.reserve::<u8>(5 * ALIGN);
        assert_eq!(at, arena.regions[1].start.as_ptr());
        assert_eq!(arena.take::<u8>(2 * ALIGN), at);
        assert_eq!(arena.taken(), REGION + 2 * ALIGN);
    }

    #[test]
    fn an_object_of_a_whole_region_fits() {
        let mut arena = Arena::new();
        arena.keep(1u8);
        let whole = arena.take::<u8>(REGION);
        assert_eq!(whole, arena.regions[1].start.as_ptr());
        arena.keep(1u8);
        assert_eq!(arena.regions.len(), 3);
    }

    #[test]
    fn pages_are_asked_for_ahead_and_once() {
        let mut arena = Arena::new();
        let mut asked = 0;
        for _ in 0..REGION / 64 {
            arena.prepare(|at, n| {
                assert_eq!(at as usize % n, 0);
                asked += n;
            });
            arena.take::<u8>(64);
            assert!(asked >= arena.taken());
        }
        assert_eq!(asked, 2 * REGION);
        assert_eq!(arena.memory(), 2 * REGION);
        arena.clear();
        arena.prepare(|_, _| panic!("they are there"));
    }
}
