//! Descriptor-table registers, and questions about selectors: LGDT, LIDT,
//! LLDT, LTR and their stores, LAR, LSL, VERR, VERW, ARPL.

use iced_x86::{Code, Instruction, OpKind};

use super::{
    control::{read_word, require_cpl0, require_umip, store_word},
    descriptor::{Descriptor, canonical_base, is_null, kind, rpl, selector_error},
};
use crate::{
    fault::Fault,
    flags::packed,
    flow::Flow,
    state::{Cpu, Segment, Table, seg},
};

/// #UD outside of protected mode.
fn require_protected(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.is_protected() && !cpu.is_v86() {
        Ok(())
    } else {
        Err(Fault::ud())
    }
}

fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<Table, Fault> {
    require_cpl0(cpu)?;
    let long = cpu.is_64bit();
    let base_size = if long { 8 } else { 4 };
    let at = cpu.operand_address(insn, 2 + base_size, false)?;
    let privilege = cpu.privilege();
    let mut bytes = [0; 16];
    let used = 2 + base_size as usize;
    cpu.read_linear(at, &mut bytes[..used], privilege)?;
    let all = u128::from_le_bytes(bytes);
    let limit = all as u16;
    let mut base = (all >> 16) as u64;
    if matches!(insn.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if long && !canonical_base(cpu, base) {
        return Err(Fault::gp(0));
    }
    Ok(Table { base, limit })
}

pub(super) fn lgdt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    cpu.gdtr = load_table(cpu, insn)?;
    Ok(Flow::Next)
}

pub(super) fn lidt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    cpu.idtr = load_table(cpu, insn)?;
    Ok(Flow::Next)
}

fn store_table(cpu: &mut Cpu, insn: &Instruction, table: Table) -> Result<Flow, Fault> {
    require_umip(cpu)?;
    let size = if cpu.is_64bit() { 10 } else { 6 };
    let at = cpu.operand_address(insn, size, true)?;
    let privilege = cpu.privilege();
    let image = u128::from(table.limit) | u128::from(table.base) << 16;
    cpu.write_linear(at, &image.to_le_bytes()[..size as usize], privilege)?;
    Ok(Flow::Next)
}

pub(super) fn sgdt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    store_table(cpu, insn, cpu.gdtr)
}

pub(super) fn sidt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    store_table(cpu, insn, cpu.idtr)
}

pub(super) fn sldt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    require_umip(cpu)?;
    store_word(cpu, insn, u64::from(cpu.segments[seg::LDTR].selector))?;
    Ok(Flow::Next)
}

pub(super) fn str(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    require_umip(cpu)?;
    store_word(cpu, insn, u64::from(cpu.segments[seg::TR].selector))?;
    Ok(Flow::Next)
}

/// A system segment with the 64-bit base that IA-32e mode gives it.
fn wide_base(cpu: &mut Cpu, d: &Descriptor, error: u32) -> Result<Segment, Fault> {
    let mut s = d.segment;
    if cpu.is_long() {
        let Some(high) = d.fetch_high(cpu)? else {
            return Err(Fault::gp(error));
        };
        s.base |= high << 32;
        if high >> 40 & 0x1f != 0 || !canonical_base(cpu, s.base) {
            return Err(Fault::gp(error));
        }
    }
    Ok(s)
}

/// What `selector`, not null, would put into LDTR. `bad` makes the fault for
/// everything that is wrong with it, `absent` the one for P clear.
pub(super) fn ldt_segment(
    cpu: &mut Cpu,
    selector: u16,
    bad: impl Fn(u32) -> Fault,
    absent: impl Fn(u32) -> Fault,
    ext: u32,
) -> Result<Segment, Fault> {
    let error = selector_error(selector, ext);
    let d = match Descriptor::fetch(cpu, selector)? {
        Some(d) if selector & 4 == 0 && d.segment.system_kind() == Some(kind::LDT) => d,
        _ => return Err(bad(error)),
    };
    if !d.segment.present() {
        return Err(absent(error));
    }
    wide_base(cpu, &d, error)
}

pub(super) fn lldt(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    require_cpl0(cpu)?;
    let selector = read_word(cpu, insn)?;
    cpu.segments[seg::LDTR] = if is_null(selector) {
        Segment::null(selector)
    } else {
        ldt_segment(cpu, selector, Fault::gp, Fault::np, 0)?
    };
    Ok(Flow::Next)
}

pub(super) fn ltr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    require_cpl0(cpu)?;
    let selector = read_word(cpu, insn)?;
    if is_null(selector) {
        return Err(Fault::gp(0));
    }
    let error = selector_error(selector, 0);
    let Some(mut d) = Descriptor::fetch(cpu, selector)? else {
        return Err(Fault::gp(error));
    };
    let available = match d.segment.system_kind() {
        Some(kind::TSS) => true,
        Some(kind::TSS16) => !cpu.is_long(),
        _ => false,
    };
    if !available || selector & 4 != 0 {
        return Err(Fault::gp(error));
    }
    if !d.segment.present() {
        return Err(Fault::np(error));
    }
    let wide = wide_base(cpu, &d, error)?;
    d.mark_busy(cpu, true)?;
    cpu.segments[seg::TR] = Segment {
        attributes: d.segment.attributes,
        ..wide
    };
    Ok(Flow::Next)
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    if on {
        cpu.cc |= packed::ZF;
    } else {
        cpu.cc &= !packed::ZF;
    }
}

/// The descriptor that a question is about, if `selector` may see it.
fn visible(
    cpu: &mut Cpu,
    selector: u16,
    system_kinds: &[u16],
) -> Result<Option<Descriptor>, Fault> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = Descriptor::fetch(cpu, selector)? else {
        return Ok(None);
    };
    let s = d.segment;
    let known = s.system_kind().is_none_or(|k| system_kinds.contains(&k));
    let reachable = s.is_conforming() || s.dpl() >= cpu.cpl.max(rpl(selector));
    Ok((known && reachable).then_some(d))
}

pub(super) fn lar(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    let selector = read_word(cpu, insn)?;
    let kinds: &[u16] = if cpu.is_long() {
        &[2, 9, 0xb, 0xc]
    } else {
        &[1, 2, 3, 4, 5, 9, 0xb, 0xc]
    };
    let found = visible(cpu, selector, kinds)?;
    if let Some(d) = found {
        cpu.set_gpr(insn.op0_register(), d.raw >> 32 & 0x00ff_ff00);
    }
    set_zf(cpu, found.is_some());
    Ok(Flow::Next)
}

pub(super) fn lsl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    let selector = read_word(cpu, insn)?;
    let kinds: &[u16] = if cpu.is_long() {
        &[2, 9, 0xb]
    } else {
        &[1, 2, 3, 9, 0xb]
    };
    let found = visible(cpu, selector, kinds)?;
    if let Some(d) = found {
        cpu.set_gpr(insn.op0_register(), u64::from(d.segment.limit));
    }
    set_zf(cpu, found.is_some());
    Ok(Flow::Next)
}

pub(super) fn verr(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    let selector = read_word(cpu, insn)?;
    let ok = visible(cpu, selector, &[])?.is_some_and(|d| d.segment.is_readable());
    set_zf(cpu, ok);
    Ok(Flow::Next)
}

pub(super) fn verw(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    let selector = read_word(cpu, insn)?;
    let ok = visible(cpu, selector, &[])?.is_some_and(|d| d.segment.is_writable_data());
    set_zf(cpu, ok);
    Ok(Flow::Next)
}

pub(super) fn arpl(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    require_protected(cpu)?;
    let source = cpu.gpr(insn.op1_register()) as u16;
    let adjust = |v: u16| {
        let raise = v & 3 < source & 3;
        (if raise { v & !3 | source & 3 } else { v }, raise)
    };
    let raised = if insn.op0_kind() == OpKind::Memory {
        // The destination is written whether it changes or not.
        let at = cpu.operand_address(insn, 2, true)?;
        let privilege = cpu.privilege();
        let old = cpu.read_uint(at, 2, privilege)? as u16;
        let (new, raised) = adjust(old);
        cpu.write_uint(at, 2, u64::from(new), privilege)?;
        raised
    } else {
        let (new, raised) = adjust(cpu.gpr(insn.op0_register()) as u16);
        cpu.set_gpr(insn.op0_register(), u64::from(new));
        raised
    };
    set_zf(cpu, raised);
    Ok(Flow::Next)
}
