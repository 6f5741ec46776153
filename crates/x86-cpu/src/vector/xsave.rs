//! FXSAVE, FXRSTOR and the XSAVE family for x87, SSE and AVX state (Intel SDM
//! Vol. 1 chapter 13), standard and compacted form.

use iced_x86::{Instruction, Mnemonic};

use super::{
    SoftOp,
    x87::{self, FDP, FIP, FTW, quad, set_quad},
    x87_layout::{self, MXCSR_MASK},
};
use crate::{
    fault::Fault,
    state::{Cpu, reg},
};

/// XCR0 bits.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// All components that exist.
const COMPONENTS: u64 = X87 | SSE | AVX;
/// Where the header is.
const HEADER: usize = 512;
/// Where the AVX component is, in both forms: no other one comes before it.
const AVX_OFFSET: usize = 576;
/// Bytes 128 to 255 of YMM0 to YMM15.
const AVX_SIZE: usize = 256;
/// The whole area.
const AREA: usize = AVX_OFFSET + AVX_SIZE;
/// XCOMP_BV bit 63: compacted form.
const COMPACTED: u64 = 1 << 63;
const DEFAULT_MXCSR: u32 = 0x1f80;

const XMM: usize = 160;

/// Size in bytes of the XSAVE area for the components in `xcr0`; the same in
/// both forms.
pub fn state_area(xcr0: u64) -> u32 {
    if xcr0 & AVX != 0 {
        AREA as u32
    } else {
        AVX_OFFSET as u32
    }
}

/// Number of vector registers that the present mode can name.
fn registers(cpu: &Cpu) -> usize {
    if cpu.is_64bit() { 16 } else { 8 }
}

fn wide(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        insn.mnemonic(),
        Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xsaves64 | Xrstor64 | Xrstors64
    )
}

fn put_x87(cpu: &Cpu, out: &mut [u8], wide: bool) {
    out[..24].copy_from_slice(&cpu.fpu.0[..24]);
    out[FTW + 1] = 0;
    if !wide {
        // 32-bit pointers; the selectors are deprecated and read as zero.
        out[FIP + 4..FIP + 8].fill(0);
        out[FDP + 4..FDP + 8].fill(0);
    }
    out[32..160].copy_from_slice(&cpu.fpu.0[32..160]);
}

fn put_mxcsr(cpu: &Cpu, out: &mut [u8]) {
    out[24..28].copy_from_slice(&cpu.mxcsr().to_le_bytes());
    out[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

fn put_sse(cpu: &Cpu, out: &mut [u8]) {
    for i in 0..registers(cpu) {
        out[XMM + 16 * i..][..16].copy_from_slice(&cpu.vec[i].0[..16]);
    }
}

fn take_x87(cpu: &mut Cpu, from: &[u8], wide: bool) {
    cpu.fpu.0[..24].copy_from_slice(&from[..24]);
    cpu.fpu.0[32..160].copy_from_slice(&from[32..160]);
    if !wide {
        for at in [FIP, FDP] {
            let v = quad(&cpu.fpu, at) & 0xffff_ffff;
            set_quad(&mut cpu.fpu, at, v);
        }
    }
    x87::normalize(cpu);
}

fn take_sse(cpu: &mut Cpu, from: &[u8]) {
    for i in 0..registers(cpu) {
        cpu.vec[i].0[..16].copy_from_slice(&from[XMM + 16 * i..][..16]);
    }
}

fn mxcsr_of(area: &[u8]) -> Result<u32, Fault> {
    let v = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
    if v & !MXCSR_MASK != 0 {
        Err(Fault::gp(0))
    } else {
        Ok(v)
    }
}

/// The operand's linear address, aligned to `align`.
fn area(cpu: &Cpu, insn: &Instruction, size: u64, align: u64, write: bool) -> Result<u64, Fault> {
    let at = cpu.operand_address(insn, size, write)?;
    if at % align != 0 {
        return Err(Fault::gp(0));
    }
    Ok(at)
}

/// FXSAVE and FXSAVE64.
pub(super) fn fxsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let at = area(cpu, insn, 512, 16, true)?;
    let privilege = cpu.privilege();
    cpu.probe_write_linear(at, 512, privilege)?;
    let mut out = [0; 512];
    put_x87(cpu, &mut out, wide(insn));
    put_mxcsr(cpu, &mut out);
    put_sse(cpu, &mut out);
    // Bytes beyond the last register are left as they are.
    cpu.write_linear(at, &out[..XMM + 16 * registers(cpu)], privilege)
}

/// FXRSTOR and FXRSTOR64.
pub(super) fn fxrstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let at = area(cpu, insn, 512, 16, false)?;
    let privilege = cpu.privilege();
    let mut from = [0; 512];
    cpu.read_linear(at, &mut from, privilege)?;
    let mxcsr = mxcsr_of(&from)?;
    take_x87(cpu, &from, wide(insn));
    cpu.set_mxcsr(mxcsr);
    take_sse(cpu, &from);
    Ok(())
}

/// XINUSE: the components that are not in their initial state.
pub fn in_use(cpu: &Cpu) -> u64 {
    let mut bits = 0;
    let f = &cpu.fpu.0;
    let initial = f[..4] == [0x7f, 3, 0, 0]
        && f[4..24].iter().all(|&b| b == 0)
        && f[32..160].iter().all(|&b| b == 0);
    if !initial {
        bits |= X87;
    }
    let zero = |range: core::ops::Range<usize>| {
        cpu.vec[..16]
            .iter()
            .all(|v| v.0[range.clone()].iter().all(|&b| b == 0))
    };
    if !zero(0..16) {
        bits |= SSE;
    }
    if !zero(16..32) {
        bits |= AVX;
    }
    bits
}

fn requested(cpu: &Cpu) -> u64 {
    let mask = cpu.regs[reg::RDX] << 32 | cpu.regs[reg::RAX] & 0xffff_ffff;
    mask & cpu.xcr0 & COMPONENTS
}

fn put_header(out: &mut [u8], xstate_bv: u64, xcomp_bv: u64) {
    out[..8].copy_from_slice(&xstate_bv.to_le_bytes());
    out[8..16].copy_from_slice(&xcomp_bv.to_le_bytes());
}

/// XSAVE, XSAVEOPT, XSAVEC, XSAVES. XSAVEOPT and XSAVES do not use the
/// modified optimisation.
pub(super) fn xsave(cpu: &mut Cpu, insn: &Instruction, op: SoftOp) -> Result<(), Fault> {
    if op == SoftOp::Xsaves && cpu.cpl != 0 {
        return Err(Fault::gp(0));
    }
    let compacted = matches!(op, SoftOp::Xsavec | SoftOp::Xsaves);
    let rfbm = requested(cpu);
    let size = if rfbm & AVX != 0 { AREA } else { AVX_OFFSET };
    let at = area(cpu, insn, size as u64, 64, true)?;
    let privilege = cpu.privilege();
    cpu.probe_write_linear(at, size, privilege)?;

    let mut used = in_use(cpu);
    if compacted && cpu.mxcsr() != DEFAULT_MXCSR {
        used |= SSE;
    }
    let saved = if op == SoftOp::Xsave {
        rfbm
    } else {
        rfbm & used
    };
    let mut out = [0; AREA];
    put_x87(cpu, &mut out, wide(insn));
    put_mxcsr(cpu, &mut out);
    put_sse(cpu, &mut out);
    for i in 0..16 {
        out[AVX_OFFSET + 16 * i..][..16].copy_from_slice(&cpu.vec[i].0[16..32]);
    }
    let vector = registers(cpu) * 16;
    if saved & X87 != 0 {
        cpu.write_linear(at, &out[..24], privilege)?;
        cpu.write_linear(at + 32, &out[32..160], privilege)?;
    }
    let mxcsr = if compacted {
        saved & SSE != 0
    } else {
        rfbm & (SSE | AVX) != 0
    };
    if mxcsr {
        cpu.write_linear(at + 24, &out[24..32], privilege)?;
    }
    if saved & SSE != 0 {
        cpu.write_linear(at + XMM as u64, &out[XMM..XMM + vector], privilege)?;
    }
    if saved & AVX != 0 {
        cpu.write_linear(
            at + AVX_OFFSET as u64,
            &out[AVX_OFFSET..AVX_OFFSET + vector],
            privilege,
        )?;
    }
    let header = at + HEADER as u64;
    if compacted {
        let mut h = [0; 16];
        put_header(&mut h, rfbm & used, rfbm | COMPACTED);
        cpu.write_linear(header, &h, privilege)
    } else {
        let old = cpu.read_uint(header, 8, privilege)?;
        cpu.write_uint(header, 8, old & !rfbm | rfbm & used, privilege)
    }
}

/// XRSTOR and XRSTORS.
pub(super) fn xrstor(cpu: &mut Cpu, insn: &Instruction, op: SoftOp) -> Result<(), Fault> {
    if op == SoftOp::Xrstors && cpu.cpl != 0 {
        return Err(Fault::gp(0));
    }
    let rfbm = requested(cpu);
    let at = area(cpu, insn, AVX_OFFSET as u64, 64, false)?;
    let privilege = cpu.privilege();
    let mut from = [0; AREA];
    cpu.read_linear(at, &mut from[..AVX_OFFSET], privilege)?;
    let field = |at: usize| {
        let mut b = [0; 8];
        b.copy_from_slice(&from[at..at + 8]);
        u64::from_le_bytes(b)
    };
    let (xstate_bv, xcomp_bv) = (field(HEADER), field(HEADER + 8));
    let enabled = cpu.xcr0 & COMPONENTS;
    let compacted = xcomp_bv & COMPACTED != 0;
    // The standard form leaves the header's end unchecked.
    let checked = if compacted { 64 } else { 24 };
    let reserved = from[HEADER + 16..HEADER + checked].iter().any(|&b| b != 0);
    let valid = if compacted {
        xcomp_bv & !COMPACTED & !enabled == 0 && xstate_bv & !(xcomp_bv & !COMPACTED) == 0
    } else {
        op == SoftOp::Xrstor && xstate_bv & !enabled == 0 && xcomp_bv == 0
    };
    if !valid || reserved {
        return Err(Fault::gp(0));
    }
    let load = rfbm & xstate_bv;
    let mxcsr = if compacted && load & SSE == 0 {
        (rfbm & SSE != 0).then_some(DEFAULT_MXCSR)
    } else if rfbm & (SSE | if compacted { 0 } else { AVX }) != 0 {
        Some(mxcsr_of(&from)?)
    } else {
        None
    };
    if load & AVX != 0 {
        let high = area(cpu, insn, AREA as u64, 64, false)? + AVX_OFFSET as u64;
        cpu.read_linear(high, &mut from[AVX_OFFSET..], privilege)?;
    }
    if load & X87 != 0 {
        take_x87(cpu, &from, wide(insn));
    } else if rfbm & X87 != 0 {
        x87_layout::initialize(&mut cpu.fpu);
        cpu.fpu.0[32..160].fill(0);
    }
    if let Some(v) = mxcsr {
        cpu.set_mxcsr(v);
    }
    if load & SSE != 0 {
        take_sse(cpu, &from);
    } else if rfbm & SSE != 0 {
        for i in 0..registers(cpu) {
            cpu.vec[i].0[..16].fill(0);
        }
    }
    if rfbm & AVX != 0 {
        // Not loaded means zero, which is what `from` holds then.
        for i in 0..registers(cpu) {
            cpu.vec[i].0[16..32].copy_from_slice(&from[AVX_OFFSET + 16 * i..][..16]);
        }
    }
    Ok(())
}

/// XGETBV.
pub(super) fn xgetbv(cpu: &mut Cpu) -> Result<(), Fault> {
    let v = match cpu.regs[reg::RCX] as u32 {
        0 => cpu.xcr0,
        // CPUID.(EAX=0Dh,ECX=1):EAX bit 2.
        1 if cpu.env().cpuid(0xd, 1)[0] >> 2 & 1 != 0 => cpu.xcr0 & in_use(cpu),
        _ => return Err(Fault::gp(0)),
    };
    cpu.regs[reg::RAX] = v & 0xffff_ffff;
    cpu.regs[reg::RDX] = v >> 32;
    Ok(())
}

/// XSETBV.
pub(super) fn xsetbv(cpu: &mut Cpu) -> Result<(), Fault> {
    let v = cpu.regs[reg::RDX] << 32 | cpu.regs[reg::RAX] & 0xffff_ffff;
    if cpu.cpl != 0 || cpu.regs[reg::RCX] as u32 != 0 || !valid_xcr0(cpu, v) {
        return Err(Fault::gp(0));
    }
    cpu.xcr0 = v;
    cpu.update_mode();
    Ok(())
}

/// Whether XCR0 may hold `v`: x87 always, AVX only with SSE and where offered.
pub fn valid_xcr0(cpu: &Cpu, v: u64) -> bool {
    let avx = cpu.vector.features().contains(iced_x86::CpuidFeature::AVX);
    let known = if avx { COMPONENTS } else { X87 | SSE };
    v & X87 != 0 && v & !known == 0 && v & (SSE | AVX) != AVX
}
