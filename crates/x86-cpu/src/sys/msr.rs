//! RDMSR, WRMSR and the MSRs that the core owns (Intel SDM Vol. 4).

use iced_x86::Instruction;

use super::{control::require_cpl0, descriptor::canonical_base};
use crate::{
    fault::Fault,
    flow::Flow,
    state::{Cpu, cr0, efer, reg, seg},
};

/// MSR numbers.
#[allow(missing_docs, reason = "the manual's names")]
pub mod index {
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// EFER.AIBRSE: automatic IBRS, which changes nothing that the core does.
const EFER_AIBRSE: u64 = 1 << 21;
/// IA32_MISC_ENABLE bits that say what the processor lacks: BTS and PEBS.
const MISC_ENABLE_READ_ONLY: u64 = 1 << 11 | 1 << 12;

/// Reads MSR `number`. `None` is #GP(0).
pub fn read(cpu: &mut Cpu, number: u32) -> Option<u64> {
    let m = &cpu.msr;
    Some(match number {
        index::SYSENTER_CS => m.sysenter_cs,
        index::SYSENTER_ESP => m.sysenter_esp,
        index::SYSENTER_EIP => m.sysenter_eip,
        index::MISC_ENABLE => m.misc_enable,
        index::PAT => m.pat,
        index::EFER => cpu.efer,
        index::STAR => m.star,
        index::LSTAR => m.lstar,
        index::CSTAR => m.cstar,
        index::FMASK => m.sfmask,
        index::FS_BASE => cpu.segments[seg::FS].base,
        index::GS_BASE => cpu.segments[seg::GS].base,
        index::KERNEL_GS_BASE => m.kernel_gs_base,
        index::TSC_AUX => m.tsc_aux,
        _ => return cpu.env().read_msr(number),
    })
}

/// Writes MSR `number` as WRMSR does. `None` is #GP(0).
pub fn write(cpu: &mut Cpu, number: u32, value: u64) -> Option<()> {
    let addresses = matches!(
        number,
        index::SYSENTER_ESP
            | index::SYSENTER_EIP
            | index::LSTAR
            | index::CSTAR
            | index::FS_BASE
            | index::GS_BASE
            | index::KERNEL_GS_BASE
    );
    if addresses && !canonical_base(cpu, value) {
        return None;
    }
    let m = &mut cpu.msr;
    match number {
        index::SYSENTER_CS => m.sysenter_cs = value & 0xffff_ffff,
        index::SYSENTER_ESP => m.sysenter_esp = value,
        index::SYSENTER_EIP => m.sysenter_eip = value,
        index::MISC_ENABLE => m.misc_enable = value | MISC_ENABLE_READ_ONLY,
        index::PAT => {
            // Eight memory types: UC WC WT WP WB UC-.
            let valid = value
                .to_le_bytes()
                .iter()
                .all(|t| matches!(t, 0 | 1 | 4..=7));
            if !valid {
                return None;
            }
            m.pat = value;
        }
        index::EFER => return write_efer(cpu, value),
        index::STAR => m.star = value,
        index::LSTAR => m.lstar = value,
        index::CSTAR => m.cstar = value,
        index::FMASK => m.sfmask = value & 0xffff_ffff,
        index::FS_BASE => set_base(cpu, seg::FS, value),
        index::GS_BASE => set_base(cpu, seg::GS, value),
        index::KERNEL_GS_BASE => m.kernel_gs_base = value,
        index::TSC_AUX => {
            if value >> 32 != 0 {
                return None;
            }
            m.tsc_aux = value;
        }
        _ => return cpu.env().write_msr(number, value).then_some(()),
    }
    Some(())
}

/// Sets the base of FS or GS.
pub(super) fn set_base(cpu: &mut Cpu, segment: usize, base: u64) {
    cpu.segments[segment].base = base;
    cpu.regs[reg::SEG_BASE + segment] = base;
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Option<()> {
    let [_, _, _, features] = cpu.env().cpuid(0x8000_0001, 0);
    let auto_ibrs = cpu.env().cpuid(0x8000_0000, 0)[0] >= 0x8000_0021
        && cpu.env().cpuid(0x8000_0021, 0)[0] & 1 << 8 != 0;
    let mut allowed = efer::LMA;
    for (offered, bit) in [
        (features & 1 << 11 != 0, efer::SCE),
        (features & 1 << 29 != 0, efer::LME),
        (features & 1 << 20 != 0, efer::NXE),
        (auto_ibrs, EFER_AIBRSE),
    ] {
        if offered {
            allowed |= bit;
        }
    }
    let changed = value ^ cpu.efer;
    if value & !allowed != 0 || changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return None;
    }
    // LMA only follows paging.
    cpu.efer = value & !efer::LMA | cpu.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        cpu.flush_tlb(false);
    }
    cpu.update_mode();
    Some(())
}

pub(super) fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    let number = cpu.regs[reg::RCX] as u32;
    let value = read(cpu, number).ok_or(Fault::gp(0))?;
    cpu.regs[reg::RAX] = value & 0xffff_ffff;
    cpu.regs[reg::RDX] = value >> 32;
    Ok(Flow::Next)
}

pub(super) fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    require_cpl0(cpu)?;
    let number = cpu.regs[reg::RCX] as u32;
    let value = cpu.regs[reg::RAX] & 0xffff_ffff | cpu.regs[reg::RDX] << 32;
    write(cpu, number, value).ok_or(Fault::gp(0))?;
    // The engine's own MSRs may make an interrupt due or change what CPUID says.
    Ok(Flow::EndBlock)
}
