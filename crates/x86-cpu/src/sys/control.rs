//! Control and debug registers (Intel SDM Vol. 3 §2.5, §18.2; Vol. 2B, MOV).

use iced_x86::{Instruction, OpKind};

use super::debug::{debug_exception, dr6};
use crate::{
    fault::Fault,
    flags,
    flow::Flow,
    mmu,
    state::{Cpu, cr0, cr4, efer, seg},
};

/// #GP(0) unless at privilege level 0 (which V86 mode never is).
pub(super) fn require_cpl0(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cpl == 0 {
        Ok(())
    } else {
        Err(Fault::gp(0))
    }
}

/// #GP(0) for instructions that UMIP takes away from user code.
pub(super) fn require_umip(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cpl > 0 && cpu.cr4 & cr4::UMIP != 0 {
        Err(Fault::gp(0))
    } else {
        Ok(())
    }
}

/// MOV to and from control registers.
pub(super) fn mov_cr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let store = to.is_cr();
    let number = if store { to } else { from }.number();
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Fault::ud());
    }
    require_cpl0(cpu)?;
    if store {
        let value = cpu.gpr(from);
        match number {
            0 => set_cr0(cpu, value)?,
            2 => cpu.cr2 = value,
            3 => set_cr3(cpu, value)?,
            4 => set_cr4(cpu, value)?,
            _ => {
                if value > 15 {
                    return Err(Fault::gp(0));
                }
                cpu.env().set_cr8(value as u8);
            }
        }
        return Ok(Flow::EndBlock);
    }
    let value = match number {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => u64::from(cpu.env().cr8()),
    };
    cpu.set_gpr(to, value);
    Ok(Flow::Next)
}

/// CR0 bits that exist.
const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// Writes CR0, with the checks of MOV to CR0 and the mode changes that follow.
fn set_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let new = value & CR0_DEFINED | cr0::ET;
    let changed = new ^ cpu.cr0;
    let paging = new & cr0::PG != 0;
    let bad = value >> 32 != 0
        || paging && new & cr0::PE == 0
        || new & cr0::NW != 0 && new & cr0::CD == 0
        || !paging && cpu.cr4 & cr4::PCIDE != 0
        || !paging && cpu.is_64bit();
    if bad {
        return Err(Fault::gp(0));
    }
    let mut efer = cpu.efer;
    if changed & cr0::PG != 0 {
        if paging && efer & efer::LME != 0 {
            let tss16 = matches!(cpu.segments[seg::TR].kind(), 1 | 3);
            if cpu.cr4 & cr4::PAE == 0 || cpu.segments[seg::CS].long() || tss16 {
                return Err(Fault::gp(0));
            }
            efer |= efer::LMA;
        } else {
            efer &= !efer::LMA;
        }
    }
    let pae = paging && cpu.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
    if pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
        cpu.pdptes = mmu::load_pdptes(cpu, cpu.cr3)?;
    }
    cpu.cr0 = new;
    cpu.efer = efer;
    // The TLB holds rights that depend on WP, and translations of the old mode.
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cpu.flush_tlb(false);
    }
    cpu.update_mode();
    Ok(())
}

fn set_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let mut new = value;
    if cpu.is_long() {
        if cpu.cr4 & cr4::PCIDE != 0 {
            // Bit 63 asks to keep what is cached for the PCID: a hint.
            new &= !(1 << 63);
        }
        if new >> cpu.phys_bits != 0 {
            return Err(Fault::gp(0));
        }
    } else {
        new &= 0xffff_ffff;
        if cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 {
            cpu.pdptes = mmu::load_pdptes(cpu, new)?;
        }
    }
    cpu.cr3 = new;
    cpu.flush_tlb(true);
    Ok(())
}

/// CR4 bits that the guest may set, after the CPUID that it sees.
fn cr4_supported(cpu: &mut Cpu) -> u64 {
    let [_, _, ecx1, edx1] = cpu.env().cpuid(1, 0);
    let [_, ebx7, ecx7, _] = cpu.env().cpuid(7, 0);
    let features = [
        (edx1, 4, cr4::TSD),
        (edx1, 2, cr4::DE),
        (edx1, 3, cr4::PSE),
        (edx1, 6, cr4::PAE),
        (edx1, 7, cr4::MCE),
        (edx1, 13, cr4::PGE),
        (edx1, 24, cr4::OSFXSR),
        (edx1, 25, cr4::OSXMMEXCPT),
        (ecx7, 2, cr4::UMIP),
        (ecx7, 16, cr4::LA57),
        (ebx7, 0, cr4::FSGSBASE),
        (ecx1, 17, cr4::PCIDE),
        (ecx1, 26, cr4::OSXSAVE),
        (ebx7, 7, cr4::SMEP),
        (ebx7, 20, cr4::SMAP),
    ];
    features
        .iter()
        .filter(|(register, bit, _)| register >> bit & 1 != 0)
        .fold(cr4::PCE, |mask, (_, _, flag)| mask | flag)
}

fn set_cr4(cpu: &mut Cpu, new: u64) -> Result<(), Fault> {
    let changed = new ^ cpu.cr4;
    if new & !cr4_supported(cpu) != 0 {
        return Err(Fault::gp(0));
    }
    let long = cpu.is_long();
    let bad = long && (new & cr4::PAE == 0 || changed & cr4::LA57 != 0)
        || changed & new & cr4::PCIDE != 0 && (!long || cpu.cr3 & 0xfff != 0);
    if bad {
        return Err(Fault::gp(0));
    }
    let reloads = cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP;
    if cpu.cr0 & cr0::PG != 0 && new & cr4::PAE != 0 && !long && changed & reloads != 0 {
        cpu.pdptes = mmu::load_pdptes(cpu, cpu.cr3)?;
    }
    cpu.cr4 = new;
    let flushes = reloads | cr4::PCIDE | cr4::SMAP | cr4::LA57;
    if changed & flushes != 0 {
        cpu.flush_tlb(false);
    }
    cpu.update_mode();
    Ok(())
}

pub(super) fn clts(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    cpu.cr0 &= !cr0::TS;
    cpu.update_mode();
    Ok(Flow::EndBlock)
}

pub(super) fn lmsw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    let value = read_word(cpu, insn)?;
    // PE can be set this way, not cleared.
    let new = cpu.cr0 & !0xe | u64::from(value) & 0xf;
    let flush = (new ^ cpu.cr0) & cr0::PE != 0;
    cpu.cr0 = new;
    if flush {
        cpu.flush_tlb(false);
    }
    cpu.update_mode();
    Ok(Flow::EndBlock)
}

pub(super) fn smsw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_umip(cpu)?;
    store_word(cpu, insn, cpu.cr0)?;
    Ok(Flow::Next)
}

/// Reads a 16-bit register or memory operand, the first or only one that is
/// not a system register.
pub(super) fn read_word(cpu: &mut Cpu, insn: &Instruction) -> Result<u16, Fault> {
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Memory => {
                let at = cpu.operand_address(insn, 2, false)?;
                let privilege = cpu.privilege();
                return cpu.read_uint(at, 2, privilege).map(|v| v as u16);
            }
            OpKind::Register if insn.op_register(i).is_gpr() => {
                let last = i + 1 == insn.op_count();
                if last || insn.op_count() == 1 {
                    return Ok(cpu.gpr(insn.op_register(i)) as u16);
                }
            }
            _ => {}
        }
    }
    Err(Fault::Internal("no 16-bit operand"))
}

/// Stores into the first operand: 16 bits if it is memory, all that fits if it
/// is a register.
pub(super) fn store_word(cpu: &mut Cpu, insn: &Instruction, value: u64) -> Result<(), Fault> {
    if insn.op0_kind() == OpKind::Memory {
        let at = cpu.operand_address(insn, 2, true)?;
        let privilege = cpu.privilege();
        return cpu.write_uint(at, 2, value, privilege);
    }
    cpu.set_gpr(insn.op0_register(), value);
    Ok(())
}

/// DR6 bits that software can change; the rest reads as ones (or bit 12, zero).
const DR6_WRITABLE: u64 = 0xe00f;
const DR6_ONES: u64 = 0xffff_0ff0;
/// DR7 likewise; bit 10 is one.
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// General detect.
const DR7_GD: u64 = 1 << 13;

/// MOV to and from debug registers.
pub(super) fn mov_dr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let store = to.is_dr();
    let mut number = if store { to } else { from }.number();
    if number > 7 || matches!(number, 4 | 5) && cpu.cr4 & cr4::DE != 0 {
        return Err(Fault::ud());
    }
    require_cpl0(cpu)?;
    if cpu.dr7 & DR7_GD != 0 {
        return Err(debug_exception(dr6::BD));
    }
    if matches!(number, 4 | 5) {
        number += 2;
    }
    if !store {
        let value = match number {
            6 => cpu.dr6,
            7 => cpu.dr7,
            n => cpu.dr[n],
        };
        cpu.set_gpr(to, value);
        return Ok(Flow::Next);
    }
    let value = cpu.gpr(from);
    if number >= 6 && value >> 32 != 0 {
        return Err(Fault::gp(0));
    }
    match number {
        6 => cpu.dr6 = value & DR6_WRITABLE | DR6_ONES,
        7 => cpu.dr7 = value & DR7_WRITABLE | 0x400,
        n => cpu.dr[n] = value,
    }
    // An RF left by an earlier IRET ends with this instruction.
    cpu.rflags_system &= !flags::RF;
    // Pages with data breakpoints must not have TLB entries.
    cpu.flush_tlb(false);
    cpu.update_mode();
    Ok(Flow::EndBlock)
}
