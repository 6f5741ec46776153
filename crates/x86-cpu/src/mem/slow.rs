//! Slow accesses: TLB misses, device registers, page-crossing operands, pages
//! that hold translated code, alignment checks and data breakpoints.

use alloc::vec::Vec;

use super::{Privilege, linear::copy};
use crate::{
    env::IoOutcome,
    fault::{Fault, vector},
    flags,
    mmu::{self, Intent},
    state::{Cpu, cr4, mode},
    tlb::meta,
};

/// The longest operand that is accessed in one go, in bytes.
pub const MAX_OPERAND: usize = 64;

/// A device register access that waits for its answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mmio {
    /// Guest physical address, or port number.
    pub address: u64,
    /// A port, not memory.
    pub port: bool,
    /// Length in bytes, 1 to 64.
    pub len: u8,
    /// What was written; `None` for a read.
    pub data: Option<Vec<u8>>,
}

/// Answers to the device accesses of the instruction in progress, so that it
/// can be restarted after a park without touching a device twice.
#[derive(Clone, Default, Debug)]
pub struct Replay {
    done: Vec<Vec<u8>>,
    next: usize,
    armed: bool,
    /// The access that parked.
    pub pending: Option<Mmio>,
}

impl Replay {
    /// A new instruction (or iteration of a REP) starts; a restarted one keeps
    /// its answers.
    #[inline]
    pub fn begin_instruction(&mut self) {
        self.next = 0;
        if self.armed {
            self.armed = false;
        } else if !self.done.is_empty() {
            self.done.clear();
        }
    }

    /// Gives the answer to the pending access and arms the restart. `false` if
    /// nothing was pending.
    pub fn answer(&mut self, mut value: Vec<u8>) -> bool {
        let Some(p) = self.pending.take() else {
            return false;
        };
        value.resize(p.len as usize, 0xff);
        self.done.push(value);
        self.armed = true;
        true
    }

    /// Restarts the instruction and asks the device again.
    pub fn retry(&mut self) {
        self.pending = None;
        self.armed = true;
    }

    /// Forgets everything: the registers were changed from outside.
    pub fn abandon(&mut self) {
        *self = Self::default();
    }
}

/// A begun access that is not simply a host pointer.
#[derive(Clone, Copy, Default, Debug)]
pub struct PendingAccess {
    /// Up to two pieces of the operand in the bounce buffer.
    pieces: [Piece; 2],
    /// Bounced: the pieces must be stored by `end_write`.
    bounced: bool,
    exclusive: bool,
    /// An unbounced store to announce when it has been made.
    announce: Option<(u64, u64)>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Piece {
    len: usize,
    /// Host address, or null for a device.
    host: usize,
    gpa: u64,
    /// The page takes stores only after `code_written`.
    announced: bool,
}

/// The first or second page of an operand, translated.
struct Target {
    gpa: u64,
    host: *mut u8,
    writable: bool,
    tagged: bool,
}

impl Cpu {
    /// Translates a data access and fills the TLB.
    pub(crate) fn translate_data(
        &mut self,
        address: u64,
        write: bool,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        self.resolve(address, write, privilege).map(|_| ())
    }

    fn resolve(
        &mut self,
        address: u64,
        write: bool,
        privilege: Privilege,
    ) -> Result<Target, Fault> {
        let index = privilege.tlb_index();
        let e = self.tlbs.entry(index, address);
        let offset = address & 0xfff;
        let wanted = if write { e.tag_w } else { e.tag_r };
        if address ^ wanted < 4096 {
            let gpa = e.meta & !0xfff | offset;
            // SAFETY: a filled entry's host page is 4096 bytes.
            let host = unsafe { e.host.add(offset as usize) };
            return Ok(Target {
                gpa,
                host,
                writable: write,
                tagged: write,
            });
        }
        self.stats.tlb_misses += 1;
        let intent = if write { Intent::Write } else { Intent::Read };
        let t = mmu::translate(self, address, intent, privilege)?;
        let page = t.gpa >> 12;
        let Some(h) = self.env().host_page(page) else {
            return Ok(Target {
                gpa: t.gpa,
                host: core::ptr::null_mut(),
                writable: true,
                tagged: false,
            });
        };
        // A page whose PTE is not dirty yet gets its write tag with the first store.
        let tagged =
            h.writable && t.writable && !self.watches(address) && self.env().allow_write_tag(page);
        if !self.watches(address) {
            let mut flags = if t.global { meta::GLOBAL } else { 0 };
            if t.user {
                flags |= meta::USER;
            }
            if t.large {
                flags |= meta::LARGE;
            }
            self.tlbs.fill(index, address, t.gpa, h.host, tagged, flags);
        }
        // SAFETY: host pages are 4096 bytes.
        let host = unsafe { h.host.add(offset as usize) };
        Ok(Target {
            gpa: t.gpa,
            host,
            writable: h.writable,
            tagged,
        })
    }

    /// Whether a data breakpoint may be in the page of `address`.
    fn watches(&self, address: u64) -> bool {
        self.dr7 & 0xff != 0
            && (0..4).any(|i| self.dr7 >> (2 * i) & 3 != 0 && self.dr[i] >> 12 == address >> 12)
    }

    fn check_alignment(
        &self,
        address: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        if self.mode & mode::ALIGN != 0
            && privilege == Privilege::User
            && matches!(size, 2 | 4 | 8)
            && !address.is_multiple_of(size as u64)
        {
            return Err(Fault::with_error(vector::AC, 0));
        }
        Ok(())
    }

    /// Notes data breakpoints that an access hits; the #DB comes after the instruction.
    fn match_breakpoints(&mut self, address: u64, size: usize, write: bool) {
        if self.dr7 & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let kind = self.dr7 >> (16 + 4 * i) & 3;
            let len = [1, 2, 8, 4][(self.dr7 >> (18 + 4 * i) & 3) as usize];
            let start = self.dr[i] & !(len - 1);
            let hit =
                address < start.wrapping_add(len) && start < address.wrapping_add(size as u64);
            if hit && (kind == 3 || kind == 1 && write) {
                // DR6 reports a match even of a disabled breakpoint, but only an
                // enabled one traps.
                if self.dr7 >> (2 * i) & 3 != 0 {
                    self.pending_db |= 1 << i;
                    self.break_block = true;
                }
            }
        }
    }

    /// Begins a read of `size` (1 to 64) bytes; the pointer holds them until the
    /// next access.
    ///
    /// # Errors
    /// Page faults, alignment faults, parked device reads.
    pub fn begin_read(
        &mut self,
        address: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<*mut u8, Fault> {
        self.check_alignment(address, size, privilege)?;
        let first = 4096 - (address as usize & 0xfff);
        let a = self.resolve(address, false, privilege)?;
        if size <= first && !a.host.is_null() {
            self.match_breakpoints(address, size, false);
            return Ok(a.host);
        }
        let n = size.min(first);
        let b = if size > first {
            Some(self.resolve(
                self.wrap_linear(address.wrapping_add(first as u64)),
                false,
                privilege,
            )?)
        } else {
            None
        };
        self.fetch_piece(&a, 0, n)?;
        if let Some(b) = b {
            self.fetch_piece(&b, n, size - n)?;
        }
        self.match_breakpoints(address, size, false);
        Ok(self.bounce.0.as_mut_ptr())
    }

    fn fetch_piece(&mut self, t: &Target, at: usize, len: usize) -> Result<(), Fault> {
        if t.host.is_null() {
            let mut data = [0; MAX_OPERAND];
            self.device_read(false, t.gpa, &mut data[..len])?;
            self.bounce.0[at..at + len].copy_from_slice(&data[..len]);
        } else {
            // SAFETY: `len` bytes at `host` are inside its page; `bounce` has 64.
            unsafe { copy(self.bounce.0.as_mut_ptr().add(at), t.host, len) };
        }
        Ok(())
    }

    /// Begins a store of `size` (1 to 64) bytes: the caller writes through the
    /// pointer, then calls [`Self::end_write`]. Every fault comes here, none there.
    ///
    /// # Errors
    /// Page faults, alignment faults.
    pub fn begin_write(
        &mut self,
        address: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<*mut u8, Fault> {
        self.begin_store(address, size, privilege)
    }

    /// Begins a read-modify-write: as [`Self::begin_write`], with the old bytes
    /// behind the pointer. With `locked`, no other vCPU sees anything between
    /// old and new value.
    ///
    /// # Errors
    /// Page faults, alignment faults, parked device reads.
    pub fn begin_rmw(
        &mut self,
        address: u64,
        size: usize,
        privilege: Privilege,
        locked: bool,
    ) -> Result<*mut u8, Fault> {
        let p = self.begin_store(address, size, privilege)?;
        if self.access.bounced {
            if locked {
                self.env().begin_exclusive();
                self.access.exclusive = true;
            }
            let mut at = 0;
            for piece in self.access.pieces {
                if piece.len == 0 {
                    continue;
                }
                let t = Target {
                    gpa: piece.gpa,
                    host: piece.host as *mut u8,
                    writable: true,
                    tagged: true,
                };
                if let Err(e) = self.fetch_piece(&t, at, piece.len) {
                    self.cancel_write();
                    return Err(e);
                }
                at += piece.len;
            }
        }
        Ok(p)
    }

    /// Gives up a begun write: nothing was stored.
    pub fn cancel_write(&mut self) {
        if self.access.exclusive {
            self.env().end_exclusive();
        }
        self.access = PendingAccess::default();
    }

    fn begin_store(
        &mut self,
        address: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<*mut u8, Fault> {
        self.check_alignment(address, size, privilege)?;
        self.access = PendingAccess::default();
        let first = 4096 - (address as usize & 0xfff);
        let a = self.resolve(address, true, privilege)?;
        if size <= first && a.tagged {
            self.match_breakpoints(address, size, true);
            return Ok(a.host);
        }
        let b = if size > first {
            Some(self.resolve(
                self.wrap_linear(address.wrapping_add(first as u64)),
                true,
                privilege,
            )?)
        } else {
            None
        };
        self.match_breakpoints(address, size, true);
        if size <= first && a.writable && !a.host.is_null() {
            // A page with code in it: the store may go straight to memory, and
            // is announced once it is there.
            self.access.announce = Some((a.gpa, size as u64));
            return Ok(a.host);
        }
        let piece = |t: &Target, len| Piece {
            len,
            // ROM takes no store: it goes to the bus like a device's.
            host: if t.writable { t.host as usize } else { 0 },
            gpa: t.gpa,
            announced: !t.tagged,
        };
        let n = size.min(first);
        self.access.pieces[0] = piece(&a, n);
        if let Some(b) = b {
            self.access.pieces[1] = piece(&b, size - n);
        }
        self.access.bounced = true;
        Ok(self.bounce.0.as_mut_ptr())
    }

    /// Ends a store begun by [`Self::begin_write`] or [`Self::begin_rmw`].
    ///
    /// # Errors
    /// Only parked device writes: memory was checked at the beginning.
    pub fn end_write(&mut self) -> Result<(), Fault> {
        if !self.access.bounced {
            if let Some((gpa, len)) = self.access.announce.take()
                && self.env().code_written(gpa, len)
            {
                self.break_block = true;
            }
            return Ok(());
        }
        let access = core::mem::take(&mut self.access);
        let result = self.store_pieces(&access);
        if access.exclusive {
            self.env().end_exclusive();
        }
        result
    }

    fn store_pieces(&mut self, access: &PendingAccess) -> Result<(), Fault> {
        let bytes = self.bounce.0;
        let mut at = 0;
        for piece in access.pieces.iter().filter(|p| p.len != 0) {
            let data = &bytes[at..at + piece.len];
            if piece.host == 0 {
                self.device_write(false, piece.gpa, data)?;
            } else {
                // SAFETY: `len` bytes at `host` are inside their page.
                unsafe { copy(piece.host as *mut u8, data.as_ptr(), piece.len) };
                if piece.announced && self.env().code_written(piece.gpa, piece.len as u64) {
                    self.break_block = true;
                }
            }
            at += piece.len;
        }
        Ok(())
    }

    /// Reads a device register (`port`: I/O port) or its remembered answer.
    ///
    /// # Errors
    /// [`Fault::Parked`].
    pub fn device_read(&mut self, port: bool, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        if let Some(v) = self.replay.done.get(self.replay.next) {
            self.replay.next += 1;
            let n = v.len().min(data.len());
            data[..n].copy_from_slice(&v[..n]);
            return Ok(());
        }
        let outcome = if port {
            self.stats.pio += 1;
            self.env().port_read(address as u16, data)
        } else {
            self.stats.mmio += 1;
            self.env().mmio_read(address, data)
        };
        match outcome {
            IoOutcome::Done => {
                self.replay.done.push(data.to_vec());
                self.replay.next += 1;
                Ok(())
            }
            IoOutcome::Parked => {
                self.replay.pending = Some(Mmio {
                    address,
                    port,
                    len: data.len() as u8,
                    data: None,
                });
                Err(Fault::Parked)
            }
        }
    }

    /// Writes a device register (`port`: I/O port), unless it was written
    /// before the restart.
    ///
    /// # Errors
    /// [`Fault::Parked`].
    pub fn device_write(&mut self, port: bool, address: u64, data: &[u8]) -> Result<(), Fault> {
        if self.replay.next < self.replay.done.len() {
            self.replay.next += 1;
            return Ok(());
        }
        let outcome = if port {
            self.stats.pio += 1;
            self.env().port_write(address as u16, data)
        } else {
            self.stats.mmio += 1;
            self.env().mmio_write(address, data)
        };
        // A device write may change anything: let the engine look around.
        self.break_block = true;
        match outcome {
            IoOutcome::Done => {
                self.replay.done.push(Vec::new());
                self.replay.next += 1;
                Ok(())
            }
            IoOutcome::Parked => {
                self.replay.pending = Some(Mmio {
                    address,
                    port,
                    len: data.len() as u8,
                    data: Some(data.to_vec()),
                });
                Err(Fault::Parked)
            }
        }
    }

    /// The linear address of `size` bytes at `offset` in segment `segment`,
    /// after the checks of the present mode (Intel SDM Vol. 3 §6.3 to §6.5).
    ///
    /// # Errors
    /// #GP or #SS.
    pub fn linear(
        &self,
        segment: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        use crate::state::seg;
        let s = &self.segments[segment];
        let fault = if segment == seg::SS {
            Fault::ss(0)
        } else {
            Fault::gp(0)
        };
        if self.is_64bit() {
            let base = if segment >= seg::FS { s.base } else { 0 };
            let address = base.wrapping_add(offset);
            let last = address.wrapping_add(size.wrapping_sub(1));
            return if self.canonical(address) && self.canonical(last) {
                Ok(address)
            } else {
                Err(fault)
            };
        }
        let v86_or_real = !self.is_protected() || self.rflags_system & flags::VM != 0;
        if !v86_or_real {
            if s.unusable {
                return Err(fault);
            }
            let code = s.kind() & 8 != 0;
            let rw = s.kind() & 2 != 0;
            if if write { code || !rw } else { code && !rw } {
                return Err(fault);
            }
        }
        let offset = offset & 0xffff_ffff;
        if s.contains(offset, size, !v86_or_real) {
            Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(fault)
        }
    }

    /// Whether `address` is canonical for the present linear-address width.
    #[inline]
    pub fn canonical(&self, address: u64) -> bool {
        let shift = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        ((address as i64) << shift >> shift) as u64 == address
    }
}
