//! Accesses to linear addresses for everything that is not a hot handler:
//! system instructions, descriptor tables, string instructions' slow cases.

use super::slow::MAX_OPERAND;
use crate::{
    fault::Fault,
    state::{Cpu, cr4},
    tlb::Tlb,
};

/// With whose rights an access is made (Intel SDM Vol. 3 §5.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2 with EFLAGS.AC clear; and the processor's own accesses to
    /// descriptor tables, TSS and interrupt stacks at any CPL.
    Supervisor,
    /// CPL 0 to 2 with EFLAGS.AC set: SMAP lets it pass.
    SupervisorAc,
}

impl Privilege {
    /// The TLB array with translations checked for this privilege.
    pub fn tlb_index(self) -> usize {
        match self {
            Self::User => Tlb::USER,
            Self::Supervisor => Tlb::KERNEL,
            Self::SupervisorAc => Tlb::KERNEL_AC,
        }
    }
}

impl Cpu {
    /// The privilege of the current instruction's explicit data accesses.
    pub fn privilege(&self) -> Privilege {
        let ac = self.rflags_system & crate::flags::AC != 0;
        match self.cpl {
            3 => Privilege::User,
            _ if ac && self.cr4 & cr4::SMAP != 0 => Privilege::SupervisorAc,
            _ => Privilege::Supervisor,
        }
    }

    /// Reads `buf.len()` bytes at linear `address`. Faults before any byte of
    /// `buf` that lies beyond the fault is valid.
    ///
    /// # Errors
    /// Page faults, parked device reads.
    pub fn read_linear(
        &mut self,
        address: u64,
        buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let mut at = address;
        for chunk in buf.chunks_mut(MAX_OPERAND) {
            let p = self.begin_read(at, chunk.len(), privilege)?;
            // SAFETY: `begin_read` vouches for `chunk.len()` bytes at `p`.
            unsafe { copy(chunk.as_mut_ptr(), p, chunk.len()) };
            at = self.wrap_linear(at.wrapping_add(chunk.len() as u64));
        }
        Ok(())
    }

    /// Writes `data` at linear `address`. Up to [`MAX_OPERAND`] bytes either all
    /// land or none; longer ones land piece by piece.
    ///
    /// # Errors
    /// Page faults, parked device writes.
    pub fn write_linear(
        &mut self,
        address: u64,
        data: &[u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let mut at = address;
        for chunk in data.chunks(MAX_OPERAND) {
            let p = self.begin_write(at, chunk.len(), privilege)?;
            // SAFETY: `begin_write` vouches for `chunk.len()` bytes at `p`.
            unsafe { copy(p, chunk.as_ptr(), chunk.len()) };
            self.end_write()?;
            at = self.wrap_linear(at.wrapping_add(chunk.len() as u64));
        }
        Ok(())
    }

    /// Reads a little-endian integer of `size` (1, 2, 4, 8) bytes.
    ///
    /// # Errors
    /// As [`Self::read_linear`].
    pub fn read_uint(
        &mut self,
        address: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<u64, Fault> {
        let mut b = [0; 8];
        self.read_linear(address, &mut b[..size.min(8)], privilege)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes the low `size` (1, 2, 4, 8) bytes of `value`.
    ///
    /// # Errors
    /// As [`Self::write_linear`].
    pub fn write_uint(
        &mut self,
        address: u64,
        size: usize,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        self.write_linear(address, &value.to_le_bytes()[..size.min(8)], privilege)
    }

    /// Checks that `len` bytes at `address` could be written, without writing.
    /// Sets accessed and dirty bits as a write would.
    ///
    /// # Errors
    /// The page fault that the write would raise.
    pub fn probe_write_linear(
        &mut self,
        address: u64,
        len: usize,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        if len == 0 {
            return Ok(());
        }
        let last = self.wrap_linear(address.wrapping_add(len as u64 - 1));
        self.translate_data(address, true, privilege)?;
        if address >> 12 != last >> 12 {
            self.translate_data(last & !0xfff, true, privilege)?;
        }
        Ok(())
    }

    /// Linear addresses are 32 bits wide outside of IA-32e mode.
    #[inline]
    pub fn wrap_linear(&self, address: u64) -> u64 {
        if self.is_long() {
            address
        } else {
            address & 0xffff_ffff
        }
    }
}

/// Copies between guest memory and our own.
///
/// # Safety
/// Both ranges must be mapped for `n` bytes and not overlap.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, n: usize) {
    use super::fast::Word;
    // SAFETY: the caller vouches for both ranges; sizes match the arms.
    unsafe {
        match n {
            1 => u8::store(to, u8::load(from)),
            2 => u16::store(to, u16::load(from)),
            4 => u32::store(to, u32::load(from)),
            8 => u64::store(to, u64::load(from)),
            _ => core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _,
                inout("rsi") from => _, options(nostack, preserves_flags)),
        }
    }
}
