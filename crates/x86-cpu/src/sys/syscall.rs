//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (Intel SDM Vol. 2B; AMD APM Vol. 3
//! for what they do outside of 64-bit mode).

use iced_x86::{Code, Instruction};

use super::{control::require_cpl0, debug::dr6};
use crate::{
    fault::Fault,
    flags,
    flow::Flow,
    state::{Cpu, Segment, efer, reg, seg},
};

/// "Auth" of "AuthenticAMD", in EBX of CPUID leaf 0.
const AMD: u32 = 0x6874_7541;

/// Whether the guest's CPUID names AMD: the vendors differ in which modes
/// these instructions work.
fn is_amd(cpu: &mut Cpu) -> bool {
    cpu.env().cpuid(0, 0)[1] == AMD
}

/// A flat code segment: 64-bit or 32-bit.
fn code(selector: u16, long: bool, cpl: u8) -> Segment {
    flat(selector, if long { 0xa09b } else { 0xc09b }, cpl)
}

/// A flat stack segment.
fn stack(selector: u16, cpl: u8) -> Segment {
    flat(selector, 0xc093, cpl)
}

fn flat(selector: u16, attributes: u16, cpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attributes: attributes | u16::from(cpl) << 5,
        unusable: false,
    }
}

/// Changes the privilege level with flat segments.
fn switch(cpu: &mut Cpu, cs: Segment, ss: Segment, cpl: u8, rip: u64) {
    cpu.segments[seg::CS] = cs;
    cpu.segments[seg::SS] = ss;
    cpu.cpl = cpl;
    cpu.rip = rip;
    // TF is judged as the instruction leaves it, not as it found it.
    cpu.step.armed = false;
    if cpu.rflags_system & flags::TF != 0 {
        cpu.pending_db |= dr6::BS;
    }
    cpu.update_mode();
}

pub(super) fn syscall(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let from_64bit = cpu.is_64bit();
    if cpu.efer & efer::SCE == 0 || !from_64bit && !is_amd(cpu) || !cpu.is_protected() {
        return Err(Fault::ud());
    }
    let next = cpu.mask_ip(cpu.rip.wrapping_add(insn.len() as u64));
    let star = cpu.msr.star;
    let selector = (star >> 32) as u16 & !3;
    let long = cpu.is_long();
    let target = if long {
        let saved = cpu.rflags() & !flags::RF;
        cpu.regs[11] = saved;
        let masked = saved & !cpu.msr.sfmask;
        cpu.set_rflags(masked);
        if from_64bit {
            cpu.msr.lstar
        } else {
            cpu.msr.cstar
        }
    } else {
        let kept = cpu.rflags() & !(flags::VM | flags::IF | flags::RF);
        cpu.set_rflags(kept);
        star & 0xffff_ffff
    };
    cpu.regs[reg::RCX] = next;
    let cs = code(selector, long, 0);
    let ss = stack(selector.wrapping_add(8), 0);
    switch(cpu, cs, ss, 0, target);
    Ok(Flow::Jump)
}

/// Flags that SYSRET takes from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

pub(super) fn sysret(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let in_64bit = cpu.is_64bit();
    if cpu.efer & efer::SCE == 0 || !in_64bit && !is_amd(cpu) || !cpu.is_protected() {
        return Err(Fault::ud());
    }
    require_cpl0(cpu)?;
    let to_64bit = insn.code() == Code::Sysretq;
    let rip = cpu.regs[reg::RCX];
    // AMD's processors return, and fault at the first fetch (APM Vol. 3, SYSRET, which lists no check).
    if to_64bit && !is_amd(cpu) && !cpu.canonical(rip) {
        return Err(Fault::gp(0));
    }
    let base = (cpu.msr.star >> 48) as u16;
    if cpu.is_long() {
        cpu.set_rflags(cpu.regs[11] & SYSRET_FLAGS);
    } else {
        cpu.rflags_system |= flags::IF;
    }
    let (cs, rip) = if to_64bit {
        (code(base.wrapping_add(16) | 3, true, 3), rip)
    } else {
        (code(base | 3, false, 3), rip & 0xffff_ffff)
    };
    switch(cpu, cs, stack(base.wrapping_add(8) | 3, 3), 3, rip);
    Ok(Flow::Jump)
}

/// SYSENTER_CS as a selector; #GP(0) if it is null.
fn sysenter_selector(cpu: &Cpu) -> Result<u16, Fault> {
    let selector = cpu.msr.sysenter_cs as u16 & !3;
    if selector == 0 || !cpu.is_protected() {
        return Err(Fault::gp(0));
    }
    Ok(selector)
}

pub(super) fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    let long = cpu.is_long();
    if long && is_amd(cpu) {
        return Err(Fault::ud());
    }
    let selector = sysenter_selector(cpu)?;
    let mask = if long { !0 } else { 0xffff_ffff };
    cpu.rflags_system &= !(flags::VM | flags::IF | flags::RF);
    cpu.regs[reg::RSP] = cpu.msr.sysenter_esp & mask;
    let cs = code(selector, long, 0);
    let ss = stack(selector.wrapping_add(8), 0);
    let rip = cpu.msr.sysenter_eip & mask;
    switch(cpu, cs, ss, 0, rip);
    Ok(Flow::Jump)
}

pub(super) fn sysexit(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    if cpu.is_long() && is_amd(cpu) {
        return Err(Fault::ud());
    }
    let selector = sysenter_selector(cpu)?;
    require_cpl0(cpu)?;
    let to_64bit = insn.code() == Code::Sysexitq;
    let (mut rip, mut rsp) = (cpu.regs[reg::RDX], cpu.regs[reg::RCX]);
    let offset = if to_64bit {
        if !cpu.canonical(rip) || !cpu.canonical(rsp) {
            return Err(Fault::gp(0));
        }
        32
    } else {
        rip &= 0xffff_ffff;
        rsp &= 0xffff_ffff;
        16
    };
    cpu.regs[reg::RSP] = rsp;
    let cs = selector.wrapping_add(offset) | 3;
    let ss = cs.wrapping_add(8);
    switch(cpu, code(cs, to_64bit, 3), stack(ss, 3), 3, rip);
    Ok(Flow::Jump)
}
