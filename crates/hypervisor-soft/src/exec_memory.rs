//! Executable memory for native thunks: one memfd mapped twice, writable at one
//! address and executable at another, so that no page is ever both.

use std::{io, ptr::NonNull};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

/// Room for all thunks: their number is bounded by the instruction set.
const SIZE: usize = 16 << 20;
const ALIGN: usize = 32;

/// A bump allocator of executable memory.
#[derive(Debug)]
pub(crate) struct ExecMemory {
    write: NonNull<u8>,
    exec: NonNull<u8>,
    used: usize,
}

// SAFETY: an address range, written only through `&mut self`.
unsafe impl Send for ExecMemory {}

impl ExecMemory {
    /// Maps the memory; nothing is touched yet.
    pub(crate) fn new() -> io::Result<Self> {
        let fd = memfd_create("caisson-thunks", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, SIZE as u64)?;
        let map = |prot| -> io::Result<NonNull<u8>> {
            // SAFETY: a fresh mapping at an address of the kernel's choice.
            let p = unsafe { mmap(std::ptr::null_mut(), SIZE, prot, MapFlags::SHARED, &fd, 0)? };
            NonNull::new(p.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
        };
        let write = map(ProtFlags::READ | ProtFlags::WRITE)?;
        match map(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(exec) => Ok(Self {
                write,
                exec,
                used: 0,
            }),
            Err(e) => {
                // SAFETY: mapped above, not handed out.
                let _ = unsafe { munmap(write.as_ptr().cast(), SIZE) };
                Err(e)
            }
        }
    }

    /// Places `code` and returns its executable address.
    pub(crate) fn place(&mut self, code: &[u8]) -> Option<*const u8> {
        let at = self.used.next_multiple_of(ALIGN);
        let end = at.checked_add(code.len())?;
        if end > SIZE {
            return None;
        }
        // SAFETY: `at..end` is inside the writable mapping and handed out once.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(at), code.len())
        };
        self.used = end;
        // SAFETY: in bounds of the executable mapping.
        Some(unsafe { self.exec.as_ptr().add(at) })
    }
}

impl Drop for ExecMemory {
    fn drop(&mut self) {
        // SAFETY: the partition owns this and outlives every vCPU that runs thunks.
        unsafe {
            let _ = munmap(self.write.as_ptr().cast(), SIZE);
            let _ = munmap(self.exec.as_ptr().cast(), SIZE);
        }
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
        assert!(m.place(&vec![0; SIZE]).is_none());
    }
}
