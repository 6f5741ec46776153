//! Memory for translated code: two views of the same pages, one to write and one
//! to execute, so that no page is ever both.

use core::ptr::NonNull;

/// Blocks start at multiples of this.
const ALIGN: usize = 16;

/// What the engine's host gives for translated code.
#[derive(Debug)]
pub struct CodeMemory {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    len: usize,
}

// SAFETY: addresses of memory that nobody else uses.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// `len` bytes that can be written at `write` and executed at `exec`.
    ///
    /// # Safety
    /// Both are views of the same memory, which nothing else touches, and stay
    /// mapped for as long as any cache that has been given this lives.
    pub unsafe fn new(write: NonNull<u8>, exec: NonNull<u8>, len: usize) -> Self {
        // Positions are kept in 32 bits, and distances must fit a relative jump.
        Self {
            write,
            exec,
            len: len.min(1 << 30),
        }
    }
}

/// A bump allocator of code, emptied only as a whole.
#[derive(Debug)]
pub(super) struct Placed {
    memory: CodeMemory,
    used: usize,
}

impl Placed {
    pub(super) fn new(memory: CodeMemory) -> Self {
        Self { memory, used: 0 }
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Where the next code will be.
    pub(super) fn next(&self) -> usize {
        self.used.next_multiple_of(ALIGN)
    }

    /// Puts code where [`Self::next`] said. `false` if there is no room.
    pub(super) fn place(&mut self, code: &[u8]) -> bool {
        let at = self.next();
        let Some(end) = at.checked_add(code.len()) else {
            return false;
        };
        if end > self.memory.len {
            return false;
        }
        // SAFETY: `at..end` is inside the writable view.
        unsafe {
            let to = self.memory.write.as_ptr().add(at);
            to.copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        self.used = end;
        true
    }

    /// The executable address of position `at`.
    pub(super) fn address(&self, at: usize) -> *const u8 {
        assert!(at <= self.memory.len, "positions come from this memory");
        // SAFETY: in bounds.
        unsafe { self.memory.exec.as_ptr().add(at) }
    }

    /// The position of an executable address.
    pub(super) fn position(&self, address: *const u8) -> usize {
        address as usize - self.memory.exec.as_ptr() as usize
    }

    /// Lets the jump whose displacement lies at position `site` go to `target`.
    pub(super) fn aim(&mut self, site: usize, target: usize) {
        assert!(site + 4 <= self.used, "a jump that was placed");
        let distance = target.wrapping_sub(site + 4) as u32;
        // SAFETY: in bounds. The vCPU is not in translated code now, and no other
        // one executes this memory.
        unsafe {
            let to = self.memory.write.as_ptr().add(site).cast::<u32>();
            to.write_unaligned(distance);
        }
    }

    /// Takes back everything from position `from` on.
    pub(super) fn truncate(&mut self, from: usize) {
        if self.used == from {
            return;
        }
        self.used = from;
        // The processor may have fetched what lay there, and looks for changes
        // only at the address that it executes: Intel SDM Vol. 3 §10.1.3 asks for a
        // serialising instruction.
        let _ = core::arch::x86_64::__cpuid(0);
    }
}
