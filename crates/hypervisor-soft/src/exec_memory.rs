//! Executable memory: one memfd mapped twice, writable at one address and
//! executable at another, so that no page is ever both.

use std::{io, ptr::NonNull};

use caisson_x86_cpu::jit::CodeMemory;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// Room for all thunks: their number is bounded by the instruction set.
const THUNKS: usize = 16 << 20;
const ALIGN: usize = 32;

/// Memory mapped twice.
#[derive(Debug)]
pub(crate) struct TwoViews {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    len: usize,
}

// SAFETY: an address range, handed on only with an owner's contract.
unsafe impl Send for TwoViews {}

impl TwoViews {
    /// Maps `len` bytes; nothing is touched yet.
    pub(crate) fn new(name: &str, len: usize) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        let map = |prot| -> io::Result<NonNull<u8>> {
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let p = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &fd, 0)? };
            NonNull::new(p.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(exec) => Ok(Self { write, exec, len }),
            Err(e) => {
                // SAFETY: mapped above, not handed out.
                let _ = unsafe { munmap(write.as_ptr().cast(), len) };
                Err(e)
            }
        }
    }

    /// The memory for a code cache.
    ///
    /// # Safety
    /// It is asked for once, and these views outlive the cache that gets it.
    pub(crate) unsafe fn lend(&self) -> CodeMemory {
        // SAFETY: two views of one memory that nothing else touches, by the
        // caller's contract.
        unsafe { CodeMemory::new(self.write, self.exec, self.len) }
    }
}

impl Drop for TwoViews {
    fn drop(&mut self) {
        // SAFETY: whoever runs code from here is gone before the owner is.
        unsafe {
            let _ = munmap(self.write.as_ptr().cast(), self.len);
            let _ = munmap(self.exec.as_ptr().cast(), self.len);
        }
    }
}

/// A bump allocator of executable memory for native thunks. The partition owns
/// it and outlives every vCPU that runs thunks.
#[derive(Debug)]
pub(crate) struct ExecMemory {
    views: TwoViews,
    used: usize,
}

impl ExecMemory {
    /// Maps the memory; nothing is touched yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            views: TwoViews::new("caisson-thunks", THUNKS)?,
            used: 0,
        })
    }

    /// Places `code` and returns its executable address.
    pub(crate) fn place(&mut self, code: &[u8]) -> Option<*const u8> {
        let at = self.used.next_multiple_of(ALIGN);
        let end = at.checked_add(code.len())?;
        if end > self.views.len {
            return None;
        }
        // SAFETY: `at..end` is inside the writable mapping and handed out once.
        unsafe {
            let to = self.views.write.as_ptr().add(at);
            std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
        }
        self.used = end;
        // SAFETY: in bounds of the executable mapping.
        Some(unsafe { self.views.exec.as_ptr().add(at) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placed_code_runs_and_room_ends() {
        let mut m = ExecMemory::new().unwrap();
        // mov eax, 42; ret
        let p = m.place(&[0xb8, 42, 0, 0, 0, 0xc3]).unwrap();
        // SAFETY: the bytes are a function of this type.
        let f = unsafe { std::mem::transmute::<*const u8, extern "C" fn() -> u32>(p) };
        assert_eq!(f(), 42);
        assert!(m.place(&vec![0; THUNKS]).is_none());
    }
}
