//! CPUID, time stamps, TLB and cache control, HLT, hints.

use iced_x86::Instruction;

use super::{control::require_cpl0, descriptor::canonical_base};
use crate::{
    fault::Fault,
    flow::Flow,
    ops::misc::full_fence,
    state::{Cpu, cr4, reg},
};

/// Bit of CPUID.1:ECX that mirrors CR4.OSXSAVE.
const OSXSAVE: u32 = 1 << 27;
/// Size of the legacy area and header of an XSAVE image.
const XSAVE_BASE: u32 = 576;

pub(super) fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    let leaf = cpu.regs[reg::RAX] as u32;
    let subleaf = cpu.regs[reg::RCX] as u32;
    let mut r = cpu.env().cpuid(leaf, subleaf);
    // What follows the vCPU's own control registers.
    match (leaf, subleaf) {
        (1, _) => {
            r[2] &= !OSXSAVE;
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                r[2] |= OSXSAVE;
            }
        }
        (0xd, 0) if r[0] != 0 => r[1] = xsave_size(cpu, cpu.xcr0, false),
        (0xd, 1) if r[0] & 2 != 0 => {
            r[1] = xsave_size(cpu, cpu.xcr0 | cpu.msr.xss, true);
        }
        _ => {}
    }
    for (slot, value) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().zip(r) {
        cpu.regs[slot] = u64::from(value);
    }
    Ok(Flow::Next)
}

/// Bytes of an XSAVE image with the components in `mask` (Intel SDM Vol. 1
/// §13.4).
fn xsave_size(cpu: &mut Cpu, mask: u64, compacted: bool) -> u32 {
    let mut end = XSAVE_BASE;
    for i in (2..63).filter(|i| mask >> i & 1 != 0) {
        let [size, offset, flags, _] = cpu.env().cpuid(0xd, i);
        end = if compacted {
            let start = if flags & 2 != 0 {
                end.next_multiple_of(64)
            } else {
                end
            };
            start.saturating_add(size)
        } else {
            end.max(offset.saturating_add(size))
        };
    }
    end
}

/// #GP(0) when CR4.TSD keeps the time stamp counter from user code.
fn require_tsc(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        Err(Fault::gp(0))
    } else {
        Ok(())
    }
}

pub(super) fn rdtsc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_tsc(cpu)?;
    let tsc = cpu.env().tsc();
    cpu.regs[reg::RAX] = tsc & 0xffff_ffff;
    cpu.regs[reg::RDX] = tsc >> 32;
    Ok(Flow::Next)
}

pub(super) fn rdtscp(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    // It waits for what comes before (Intel SDM Vol. 2, RDTSCP).
    full_fence();
    rdtsc(cpu, insn)?;
    cpu.regs[reg::RCX] = cpu.msr.tsc_aux;
    Ok(Flow::Next)
}

pub(super) fn rdpid(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    cpu.set_gpr(insn.op0_register(), cpu.msr.tsc_aux);
    Ok(Flow::Next)
}

/// No performance counter exists.
pub(super) fn rdpmc(_: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    Err(Fault::gp(0))
}

pub(super) fn invlpg(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    let (segment, ea) = cpu.effective_address(insn);
    // Neither limits nor canonical form are checked.
    let address = cpu.regs[reg::SEG_BASE + segment].wrapping_add(ea);
    cpu.flush_tlb_page(cpu.wrap_linear(address));
    Ok(Flow::EndBlock)
}

/// INVPCID. Translations are not tagged with PCIDs: nothing of another PCID is
/// ever cached, so each type flushes what is there.
pub(super) fn invpcid(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    let kind = cpu.gpr(insn.op0_register());
    let at = cpu.operand_address(insn, 16, false)?;
    let privilege = cpu.privilege();
    let mut bytes = [0; 16];
    cpu.read_linear(at, &mut bytes, privilege)?;
    let all = u128::from_le_bytes(bytes);
    let (pcid, address) = (all as u64, (all >> 64) as u64);
    let pcide = cpu.cr4 & cr4::PCIDE != 0;
    let bad = kind > 3
        || pcid >> 12 != 0
        || kind < 2 && pcid != 0 && !pcide
        || kind == 0 && !canonical_base(cpu, address);
    if bad {
        return Err(Fault::gp(0));
    }
    match kind {
        0 => cpu.flush_tlb_page(address),
        2 => cpu.flush_tlb(false),
        _ => cpu.flush_tlb(true),
    }
    Ok(Flow::EndBlock)
}

/// INVD, WBINVD, WBNOINVD: guest memory has no caches of its own.
pub(super) fn cache(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    Ok(Flow::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: checked like a load of one byte.
pub(super) fn cache_line(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let (segment, ea) = cpu.effective_address(insn);
    // Code segments that may not be read are allowed.
    let at = if cpu.is_64bit() || segment != crate::state::seg::CS {
        cpu.linear(segment, ea, 1, false)?
    } else {
        cpu.wrap_linear(cpu.segments[segment].base.wrapping_add(ea))
    };
    let privilege = cpu.privilege();
    cpu.translate_data(at, false, privilege)?;
    Ok(Flow::Next)
}

pub(super) fn hlt(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    Ok(Flow::Halt)
}

pub(super) fn pause(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    cpu.env().pause();
    Ok(Flow::Next)
}

/// NOP, ENDBR, PREFETCH and reserved hints.
pub(super) fn nop(_: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    Ok(Flow::Next)
}

/// LFENCE, MFENCE, SFENCE: guest stores are the host's.
pub(super) fn memory_fence(_: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    full_fence();
    Ok(Flow::Next)
}

/// SERIALIZE: like a fence, and code is fetched anew.
pub(super) fn serialize(_: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    full_fence();
    Ok(Flow::EndBlock)
}
