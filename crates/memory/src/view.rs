//! Memory as one trust level sees it.

use alloc::sync::Arc;
use core::{ptr::NonNull, sync::atomic::Ordering};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::{
    Gpa, GuestMemory, MemoryError, PAGE_SIZE, Perms, Pinned, Region, RegionKind, Vtl, access,
};

/// Decides what each page allows a trust level. Asked per page, so it must be
/// quick; it may change while the machine runs.
pub trait VtlPermissions: Send + Sync {
    /// The permissions of `vtl` on the page that holds `gpa`.
    fn permissions(&self, vtl: Vtl, gpa: Gpa) -> Perms;
}

/// What a device holds to reach guest memory: the region table seen through
/// one trust level's permissions. Every access is bounds-checked, volatile
/// (the guest may change the bytes at any time) and notes dirty pages
/// and tells who watches.
#[derive(Clone)]
pub struct MemoryView {
    memory: GuestMemory,
    vtl: Vtl,
    permissions: Option<Arc<dyn VtlPermissions>>,
}

impl MemoryView {
    /// A view of `memory` with every permission, as [`Vtl::VTL0`] has on a
    /// machine without trust levels.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            vtl: Vtl::VTL0,
            permissions: None,
        }
    }

    /// A view for `vtl` that asks `permissions` before each access.
    pub fn with_permissions(
        memory: GuestMemory,
        vtl: Vtl,
        permissions: Arc<dyn VtlPermissions>,
    ) -> Self {
        Self {
            memory,
            vtl,
            permissions: Some(permissions),
        }
    }

    /// The trust level whose eyes these are.
    pub fn vtl(&self) -> Vtl {
        self.vtl
    }

    /// Calls `f` with the region and host byte range of each piece of
    /// `gpa..gpa+len`, in order.
    fn pieces(
        &self,
        gpa: Gpa,
        len: u64,
        wanted: Perms,
        mut f: impl FnMut(&Region, *mut u8, u64, u64),
    ) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped { gpa, len };
        gpa.checked_add(len).ok_or(unmapped)?;
        self.check(gpa, len, wanted)?;
        // Two passes, so that a range with a hole is refused before a byte moves.
        let mut at = 0;
        while at < len {
            let here = Gpa(gpa.0 + at);
            let r = self.memory.find(here).ok_or(unmapped)?;
            if wanted.contains(Perms::WRITE) && r.kind() == RegionKind::Rom {
                return Err(MemoryError::Denied { gpa: here, wanted });
            }
            at += (r.end() - here.0).min(len - at);
        }
        at = 0;
        while at < len {
            let here = Gpa(gpa.0 + at);
            let Some(r) = self.memory.find(here) else {
                return Err(unmapped);
            };
            let n = (r.end() - here.0).min(len - at);
            let offset = here.0 - r.gpa().0;
            // SAFETY: `offset < r.len()`, so the address is inside the region's mapping.
            let host = unsafe { r.host().as_ptr().add(offset as usize) };
            f(r, host, n, at);
            if wanted.contains(Perms::WRITE) {
                if let Some(d) = r.dirty() {
                    d.mark(offset, n);
                }
                self.memory.tell_written(here, n);
            }
            at += n;
        }
        Ok(())
    }

    fn check(&self, gpa: Gpa, len: u64, wanted: Perms) -> Result<(), MemoryError> {
        let Some(p) = &self.permissions else {
            return Ok(());
        };
        let mut page = gpa.0 & !(PAGE_SIZE - 1);
        while page < gpa.0 + len {
            if !p.permissions(self.vtl, Gpa(page)).contains(wanted) {
                return Err(MemoryError::Denied {
                    gpa: Gpa(page),
                    wanted,
                });
            }
            let Some(next) = page.checked_add(PAGE_SIZE) else {
                break;
            };
            page = next;
        }
        Ok(())
    }

    /// Copies guest memory at `gpa` into `buf`.
    ///
    /// # Errors
    /// Unmapped or denied addresses; `buf` is then untouched.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let out = buf.as_mut_ptr();
        self.pieces(gpa, buf.len() as u64, Perms::READ, |_, host, n, at| {
            // SAFETY: `host` has `n` bytes inside its region, `out + at` has `n`
            // bytes inside `buf`, and host mappings never overlap Rust objects.
            unsafe { access::copy(out.add(at as usize), host, n as usize) }
        })
    }

    /// Copies `data` into guest memory at `gpa`.
    ///
    /// # Errors
    /// Unmapped, read-only or denied addresses; nothing is written then.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let from = data.as_ptr();
        self.pieces(gpa, data.len() as u64, Perms::WRITE, |_, host, n, at| {
            // SAFETY: as in `read`, with the directions swapped.
            unsafe { access::copy(host, from.add(at as usize), n as usize) }
        })
    }

    /// Fills `len` bytes at `gpa` with `byte`.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn fill(&self, gpa: Gpa, len: u64, byte: u8) -> Result<(), MemoryError> {
        self.pieces(gpa, len, Perms::WRITE, |_, host, n, _| {
            // SAFETY: `host` has `n` bytes inside its region.
            unsafe { access::fill(host, byte, n as usize) }
        })
    }

    /// The host memory behind `ranges` (address and length in bytes), in their order, for a transfer by the host's
    /// kernel. It stays mapped for as long as it is held; permissions are those of now.
    ///
    /// # Errors
    /// Unmapped or denied addresses; for [`Perms::WRITE`] also read-only ones.
    pub fn pin(
        &self,
        ranges: impl IntoIterator<Item = (Gpa, u64)>,
        wanted: Perms,
    ) -> Result<Pinned, MemoryError> {
        let mut pinned = Pinned::default();
        for (gpa, len) in ranges {
            let unmapped = MemoryError::Unmapped { gpa, len };
            let end = gpa.checked_add(len).ok_or(unmapped)?.0;
            self.check(gpa, len, wanted)?;
            let mut here = gpa;
            while here.0 < end {
                let region = self.memory.find(here).ok_or(unmapped)?;
                if wanted.contains(Perms::WRITE) && region.kind() == RegionKind::Rom {
                    return Err(MemoryError::Denied { gpa: here, wanted });
                }
                let n = (region.end() - here.0).min(end - here.0);
                let offset = (here.0 - region.gpa().0) as usize;
                // SAFETY: `offset` and `n` more bytes are in the region, which the table keeps mapped.
                unsafe {
                    let host: NonNull<u8> = region.host().add(offset);
                    pinned.push_guest(&self.memory, here, host, n as usize);
                }
                here.0 += n;
            }
        }
        Ok(pinned)
    }

    /// Reads a value of plain bytes.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_obj<T: FromBytes + IntoBytes + FromZeros>(
        &self,
        gpa: Gpa,
    ) -> Result<T, MemoryError> {
        let mut v = T::new_zeroed();
        self.read(gpa, v.as_mut_bytes())?;
        Ok(v)
    }

    /// Writes a value of plain bytes.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_obj<T: IntoBytes + Immutable>(&self, gpa: Gpa, v: &T) -> Result<(), MemoryError> {
        self.write(gpa, v.as_bytes())
    }

    /// Loads a naturally aligned 16-bit value in one access (a ring index).
    ///
    /// # Errors
    /// Unmapped, denied or unaligned addresses.
    pub fn load_u16(&self, gpa: Gpa, order: Ordering) -> Result<u16, MemoryError> {
        let mut v = 0;
        self.aligned(gpa, 2)?;
        self.pieces(gpa, 2, Perms::READ, |_, host, _, _| {
            // SAFETY: aligned, inside the region, and only accessed atomically or volatilely.
            v = unsafe { access::load_u16(host.cast(), order) };
        })?;
        Ok(v)
    }

    /// Stores a naturally aligned 16-bit value in one access.
    ///
    /// # Errors
    /// Unmapped, read-only, denied or unaligned addresses.
    pub fn store_u16(&self, gpa: Gpa, v: u16, order: Ordering) -> Result<(), MemoryError> {
        self.aligned(gpa, 2)?;
        self.pieces(gpa, 2, Perms::WRITE, |_, host, _, _| {
            // SAFETY: as in `load_u16`.
            unsafe { access::store_u16(host.cast(), v, order) }
        })
    }

    fn aligned(&self, gpa: Gpa, size: u64) -> Result<(), MemoryError> {
        if gpa.0.is_multiple_of(size) {
            Ok(())
        } else {
            Err(MemoryError::Unaligned(gpa))
        }
    }

    /// The table behind the view, for backends that map it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}
