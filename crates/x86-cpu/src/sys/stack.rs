//! A stack that is pushed to before it is the current one: interrupt delivery,
//! call gates and far calls change SS:RSP only once nothing can fault any more.

use crate::{
    fault::Fault,
    flags,
    mem::Privilege,
    state::{Cpu, Segment, cr4, reg, seg},
};

/// Where pushes go and how they are checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack {
    segment: Segment,
    rules: Rules,
    privilege: Privilege,
    /// Error code of #SS.
    error: u32,
    /// The stack pointer after the pushes so far.
    pub(super) sp: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rules {
    /// Canonical addresses.
    Flat64,
    /// Segment limit; the mask is the stack pointer's width.
    Segmented { mask: u64, protected: bool },
}

impl Stack {
    /// The present stack, under the rules of the present mode. `error` is the
    /// error code of #SS.
    pub(super) fn current(cpu: &Cpu, error: u32) -> Self {
        let rules = if cpu.is_64bit() {
            Rules::Flat64
        } else {
            Rules::Segmented {
                mask: cpu.stack_mask(),
                protected: cpu.is_protected() && !cpu.is_v86(),
            }
        };
        Self {
            segment: cpu.segments[seg::SS],
            rules,
            privilege: cpu.privilege(),
            error,
            sp: cpu.regs[reg::RSP],
        }
    }

    /// A stack of 64-bit mode for code at privilege level `cpl`.
    pub(super) fn flat(cpu: &Cpu, rsp: u64, cpl: u8, error: u32) -> Self {
        Self {
            segment: Segment::default(),
            rules: Rules::Flat64,
            privilege: privilege_at(cpu, cpl),
            error,
            sp: rsp,
        }
    }

    /// A stack of protected mode for code at privilege level `cpl`.
    pub(super) fn protected(cpu: &Cpu, segment: Segment, esp: u64, cpl: u8, error: u32) -> Self {
        let mask = if segment.big() { 0xffff_ffff } else { 0xffff };
        Self {
            segment,
            rules: Rules::Segmented {
                mask,
                protected: true,
            },
            privilege: privilege_at(cpu, cpl),
            error,
            sp: esp,
        }
    }

    /// Pushes the low `size` (2, 4, 8) bytes of `value`.
    pub(super) fn push(&mut self, cpu: &mut Cpu, value: u64, size: u64) -> Result<(), Fault> {
        let sp = self.sp.wrapping_sub(size);
        let (sp, at) = match self.rules {
            Rules::Flat64 => {
                if !cpu.canonical(sp) || !cpu.canonical(sp.wrapping_add(size - 1)) {
                    return Err(Fault::ss(self.error));
                }
                (sp, sp)
            }
            Rules::Segmented { mask, protected } => {
                let sp = sp & mask;
                if protected && self.segment.unusable || !self.segment.contains(sp, size, protected)
                {
                    return Err(Fault::ss(self.error));
                }
                (sp, self.segment.base.wrapping_add(sp) & 0xffff_ffff)
            }
        };
        cpu.write_uint(at, size as usize, value, self.privilege)?;
        self.sp = sp;
        Ok(())
    }
}

/// The privilege of explicit accesses of code at privilege level `cpl`.
fn privilege_at(cpu: &Cpu, cpl: u8) -> Privilege {
    if cpl == 3 {
        Privilege::User
    } else if cpu.cr4 & cr4::SMAP != 0 && cpu.rflags_system & flags::AC != 0 {
        Privilege::SupervisorAc
    } else {
        Privilege::Supervisor
    }
}
