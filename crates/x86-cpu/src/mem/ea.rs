//! Effective addresses of decoded instructions, for everything but hot handlers.

use iced_x86::{Instruction, Register};

use crate::{
    fault::Fault,
    state::{Cpu, reg, seg},
};

/// The register number (0 to 15) of a general register of any size, the high
/// byte registers excepted.
pub fn gpr_number(r: Register) -> Option<usize> {
    let base = r as usize;
    if r.is_gpr64() {
        Some(base - Register::RAX as usize)
    } else if r.is_gpr32() {
        Some(base - Register::EAX as usize)
    } else if r.is_gpr16() {
        Some(base - Register::AX as usize)
    } else if (Register::SPL as usize..=Register::R15L as usize).contains(&base) {
        Some(base - Register::SPL as usize + 4)
    } else if (Register::AL as usize..=Register::BL as usize).contains(&base) {
        Some(base - Register::AL as usize)
    } else {
        None
    }
}

/// The byte offset in [`Cpu::regs`] of a general register of any size: high
/// byte registers are byte 1 of their slot.
pub fn gpr_offset(r: Register) -> Option<usize> {
    let base = r as usize;
    if (Register::AH as usize..=Register::BH as usize).contains(&base) {
        return Some((base - Register::AH as usize) * 8 + 1);
    }
    gpr_number(r).map(|n| n * 8)
}

/// The number of a segment register.
pub fn segment_number(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

impl Cpu {
    /// Segment number and offset of `insn`'s memory operand. [`Cpu::rip`] must
    /// be the instruction's address; the instruction may have been decoded at
    /// another one.
    pub fn effective_address(&self, insn: &Instruction) -> (usize, u64) {
        let segment = segment_number(insn.memory_segment());
        let base = insn.memory_base();
        if base == Register::RIP || base == Register::EIP {
            let delta = insn.memory_displacement64().wrapping_sub(insn.ip());
            let ea = self.rip.wrapping_add(delta);
            return (
                segment,
                if base == Register::EIP {
                    ea & 0xffff_ffff
                } else {
                    ea
                },
            );
        }
        let value = |r: Register| gpr_number(r).map_or(0, |n| self.regs[n]);
        let index = value(insn.memory_index()).wrapping_mul(u64::from(insn.memory_index_scale()));
        let ea = value(base)
            .wrapping_add(index)
            .wrapping_add(insn.memory_displacement64());
        (segment, ea & address_mask(insn))
    }

    /// The linear address of `insn`'s memory operand of `size` bytes, checked
    /// for the present mode.
    ///
    /// # Errors
    /// #GP or #SS.
    pub fn operand_address(
        &self,
        insn: &Instruction,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let (segment, offset) = self.effective_address(insn);
        self.linear(segment, offset, size, write)
    }

    /// A general register's value by iced's name, zero-extended.
    pub fn gpr(&self, r: Register) -> u64 {
        let Some(offset) = gpr_offset(r) else {
            return 0;
        };
        let v = self.regs[offset / 8] >> (offset % 8 * 8);
        match r.size() {
            1 => v & 0xff,
            2 => v & 0xffff,
            4 => v & 0xffff_ffff,
            _ => v,
        }
    }

    /// Sets a general register by iced's name: 32-bit writes clear the upper
    /// half, smaller ones leave the rest.
    pub fn set_gpr(&mut self, r: Register, value: u64) {
        let Some(offset) = gpr_offset(r) else { return };
        let shift = offset % 8 * 8;
        let slot = &mut self.regs[offset / 8];
        match r.size() {
            1 => *slot = *slot & !(0xff << shift) | (value & 0xff) << shift,
            2 => *slot = *slot & !0xffff | value & 0xffff,
            4 => *slot = value & 0xffff_ffff,
            _ => *slot = value,
        }
    }

    /// The stack pointer's width as a mask.
    pub fn stack_mask(&self) -> u64 {
        use crate::state::mode;
        if self.is_64bit() {
            !0
        } else if self.mode & mode::STACK32 != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets RSP, ESP or SP after the stack's width.
    pub fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let rsp = &mut self.regs[reg::RSP];
        *rsp = if mask == 0xffff {
            *rsp & !mask | value & mask
        } else {
            value & mask
        };
    }

    /// Pushes the low `size` (2, 4, 8) bytes of `value`.
    ///
    /// # Errors
    /// #SS, page faults, #AC; RSP is then unchanged.
    pub fn push(&mut self, value: u64, size: u64) -> Result<(), Fault> {
        let sp = self.regs[reg::RSP].wrapping_sub(size) & self.stack_mask();
        let at = self.linear(seg::SS, sp, size, true)?;
        let privilege = self.privilege();
        self.write_uint(at, size as usize, value, privilege)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Pops `size` (2, 4, 8) bytes.
    ///
    /// # Errors
    /// #SS, page faults, #AC; RSP is then unchanged.
    pub fn pop(&mut self, size: u64) -> Result<u64, Fault> {
        let v = self.peek(0, size)?;
        self.set_stack_pointer(self.regs[reg::RSP].wrapping_add(size));
        Ok(v)
    }

    /// Reads `size` bytes `offset` bytes above the top of the stack.
    ///
    /// # Errors
    /// As [`Self::pop`].
    pub fn peek(&mut self, offset: u64, size: u64) -> Result<u64, Fault> {
        let sp = self.regs[reg::RSP].wrapping_add(offset) & self.stack_mask();
        let at = self.linear(seg::SS, sp, size, false)?;
        let privilege = self.privilege();
        self.read_uint(at, size as usize, privilege)
    }

    /// RIP masked to the code segment's width.
    pub fn mask_ip(&self, ip: u64) -> u64 {
        use crate::state::mode;
        if self.mode & mode::CODE64 != 0 {
            ip
        } else if self.mode & mode::CODE32 != 0 {
            ip & 0xffff_ffff
        } else {
            ip & 0xffff
        }
    }

    /// Flushes the TLB; with `keep_global`, all but global translations. Code
    /// found through linear addresses will be looked up again.
    pub fn flush_tlb(&mut self, keep_global: bool) {
        self.stats.tlb_flushes += 1;
        self.tlbs.flush(keep_global);
        if keep_global {
            self.generations.end_local();
        } else {
            self.generations.end();
        }
    }

    /// Flushes one page's translation.
    pub fn flush_tlb_page(&mut self, address: u64) {
        self.tlbs.flush_page(address);
        self.generations.end_page(address);
    }
}

/// The width of `insn`'s address computation as a mask.
pub fn address_mask(insn: &Instruction) -> u64 {
    let base = insn.memory_base();
    let size = match base.size().max(insn.memory_index().size()) {
        0 => insn.memory_displ_size() as usize,
        n => n,
    };
    match size {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => !0,
    }
}
