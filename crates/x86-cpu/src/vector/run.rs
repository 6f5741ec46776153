//! Runs planned instructions: memory operands, exceptions, special cases.

use iced_x86::{Instruction, OpKind};

use super::{Access, Kind, Memory, Op, SLOW, dot, float, mmx, soft, x87, x87_layout::MXCSR_MASK};
use crate::{
    fault::{Fault, vector},
    flow::Flow,
    mem::{address_mask, segment_number},
    state::{Cpu, VecReg, mode, reg},
};

/// MXCSR.FZ.
const FLUSH_TO_ZERO: u32 = 1 << 15;
/// All exceptions masked.
const ALL_MASKS: u32 = 0x1f80;
/// MXCSR.UE.
const UNDERFLOW: u32 = 1 << 4;

/// Executes `insn` after its plan. [`Cpu::rip`] must be its address; the caller
/// advances it.
///
/// # Errors
/// The exception that the instruction raises; a parked device access.
pub fn run(cpu: &mut Cpu, insn: &Instruction, op: &Op) -> Result<Flow, Fault> {
    match op.kind {
        Kind::Soft(s) => return soft::run(cpu, insn, s),
        Kind::X87 => x87::run(cpu, insn, op)?,
        Kind::Native { float, mmx } => native(cpu, insn, op, float, mmx)?,
        Kind::Divide { signed } => divide(cpu, insn, op, signed)?,
        Kind::BitString => {
            let m = op.memory.unwrap_or(NO_MEMORY);
            let address = bit_string_address(cpu, insn, &m)?;
            let p = begin(cpu, address, &m)?;
            call_and_store(cpu, op, p)?;
        }
    }
    Ok(Flow::Next)
}

const NO_MEMORY: Memory = Memory {
    size: 1,
    access: Access::Read,
    align_mask: 0,
    locked: false,
};

/// The linear address of the memory operand, checked but for paging.
pub(super) fn address(cpu: &Cpu, insn: &Instruction, m: &Memory) -> Result<u64, Fault> {
    if m.align_mask != 0 {
        // Found before a non-canonical address is.
        let (segment, offset) = cpu.effective_address(insn);
        let linear = offset.wrapping_add(cpu.regs[reg::SEG_BASE + segment]);
        if linear & u64::from(m.align_mask) != 0 {
            return Err(Fault::gp(0));
        }
    }
    cpu.operand_address(insn, u64::from(m.size), m.access != Access::Read)
}

fn begin(cpu: &mut Cpu, address: u64, m: &Memory) -> Result<*mut u8, Fault> {
    let privilege = cpu.privilege();
    match m.access {
        Access::Read => cpu.begin_read(address, m.size.into(), privilege),
        Access::Write => cpu.begin_write(address, m.size.into(), privilege),
        Access::ReadWrite => cpu.begin_rmw(address, m.size.into(), privilege, m.locked),
    }
}

/// Calls the thunk; ends or cancels the store that was begun for it.
fn call_and_store(cpu: &mut Cpu, op: &Op, p: *mut u8) -> Result<u32, Fault> {
    let store = op.memory.is_some_and(|m| m.access != Access::Read);
    let saved = (cpu.regs, cpu.cc);
    // SAFETY: `op` was prepared for this vCPU's instruction; `p` is valid for
    // its memory operand, if it has one.
    let raised = unsafe { (op.thunk)(cpu, &op.args, p) };
    if store {
        if raised != 0 {
            cpu.cancel_write();
        } else if let Err(f) = cpu.end_write() {
            // The instruction will be restarted as a whole.
            (cpu.regs, cpu.cc) = saved;
            return Err(f);
        }
    }
    Ok(raised)
}

fn native(cpu: &mut Cpu, insn: &Instruction, op: &Op, float: bool, mmx: bool) -> Result<(), Fault> {
    if mmx {
        x87::check_pending(cpu)?;
    }
    if float && op.memory.is_some_and(|m| m.access != Access::Read) {
        return float_store(cpu, insn, op);
    }
    let p = match &op.memory {
        None => core::ptr::null_mut(),
        Some(m) => {
            let at = address(cpu, insn, m)?;
            begin(cpu, at, m)?
        }
    };
    if mmx {
        mmx::enter(cpu);
    }
    let raised = if float {
        call_float(cpu, insn, op, p)?
    } else {
        call_and_store(cpu, op, p)?
    };
    if raised != 0 {
        return Err(simd_exception(cpu, raised));
    }
    if mmx {
        mmx::mark_written(cpu, insn);
    }
    Ok(())
}

/// A conversion to memory: stores only if no unmasked exception is raised.
fn float_store(cpu: &mut Cpu, insn: &Instruction, op: &Op) -> Result<(), Fault> {
    let m = op.memory.unwrap_or(NO_MEMORY);
    let at = address(cpu, insn, &m)?;
    let privilege = cpu.privilege();
    cpu.probe_write_linear(at, m.size.into(), privilege)?;
    let mut scratch = VecReg([0; 64]);
    let register = Op {
        memory: None,
        ..*op
    };
    let mxcsr = cpu.mxcsr();
    let raised = call_float_into(cpu, insn, &register, &mut scratch)?;
    if raised != 0 {
        return Err(simd_exception(cpu, raised));
    }
    cpu.write_linear(at, &scratch.0[..m.size as usize], privilege)
        .inspect_err(|_| cpu.set_mxcsr(mxcsr))
}

fn call_float(cpu: &mut Cpu, insn: &Instruction, op: &Op, p: *mut u8) -> Result<u32, Fault> {
    // SAFETY: as in `call_and_store`.
    let raised = unsafe { (op.thunk)(cpu, &op.args, p) };
    if raised != SLOW {
        return Ok(raised);
    }
    Ok(underflow_unmasked(cpu, insn, op, p, None))
}

fn call_float_into(
    cpu: &mut Cpu,
    insn: &Instruction,
    op: &Op,
    scratch: &mut VecReg,
) -> Result<u32, Fault> {
    let p = scratch.0.as_mut_ptr();
    // SAFETY: `scratch` is as large as any operand.
    let raised = unsafe { (op.thunk)(cpu, &op.args, p) };
    if raised != SLOW {
        return Ok(raised);
    }
    Ok(underflow_unmasked(cpu, insn, op, p, Some(scratch)))
}

/// Runs an instruction while the underflow exception is unmasked. The host runs
/// with it masked, and then reports only underflows that lose precision; a tiny
/// result that is exact shows as a denormal. Returns the raised flags if one of
/// them is unmasked.
fn underflow_unmasked(
    cpu: &mut Cpu,
    insn: &Instruction,
    op: &Op,
    p: *mut u8,
    scratch: Option<&VecReg>,
) -> u32 {
    let guest = cpu.mxcsr();
    let saved = (cpu.regs, cpu.cc, cpu.fpu);
    let register = insn.op_register(0);
    let number = register.number() % 32;
    let old = cpu.vec[number];
    // With the exception unmasked, flush-to-zero has no effect.
    let masked = (guest | ALL_MASKS) & !(FLUSH_TO_ZERO | 0x3f);
    // SAFETY: the caller vouches for `p`; a thunk was made, so the host has it.
    let tiny_step = dot::is_dot_product(insn)
        && unsafe { dot::has_tiny_step(cpu, insn, p.cast_const(), masked) };
    cpu.set_mxcsr(masked);
    // SAFETY: the caller vouches for `p`.
    unsafe { (op.thunk)(cpu, &op.args, p) };
    let mut raised = cpu.mxcsr() & 0x3f;
    let tiny = float::can_underflow(insn.mnemonic()).is_some_and(|(size, scalar)| {
        let bytes = match scratch {
            Some(s) => &s.0[..op_width(insn)],
            None => &cpu.vec[number].0[..if scalar { size } else { op_width(insn) }],
        };
        bytes.chunks_exact(size).any(is_denormal)
    });
    if tiny || tiny_step {
        raised |= UNDERFLOW;
    }
    if raised & !(guest >> 7) == 0 {
        cpu.set_mxcsr(guest | raised);
        return 0;
    }
    (cpu.regs, cpu.cc, cpu.fpu) = saved;
    if register.is_vector_register() {
        cpu.vec[number] = old;
    }
    cpu.set_mxcsr(guest);
    raised
}

fn op_width(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::Register => insn.op_register(0).size().min(32),
        _ => insn.memory_size().size().min(32),
    }
}

pub(super) fn is_denormal(element: &[u8]) -> bool {
    let mut b = [0; 8];
    b[..element.len()].copy_from_slice(element);
    let v = u64::from_le_bytes(b);
    let (fraction, exponent) = match element.len() {
        2 => (10, 0x1f),
        4 => (23, 0xff),
        _ => (52, 0x7ff),
    };
    v & ((1 << fraction) - 1) != 0 && v >> fraction & exponent == 0
}

/// Adds raised SIMD exception flags to MXCSR and gives the exception. An
/// exception found before the computation hides those found after it (Intel
/// SDM Vol. 1 §11.5.2).
fn simd_exception(cpu: &mut Cpu, mut raised: u32) -> Fault {
    let mxcsr = cpu.mxcsr();
    if raised & !(mxcsr >> 7) & 7 != 0 {
        raised &= 7;
    }
    cpu.set_mxcsr(mxcsr | raised & 0x3f);
    if cpu.mode & mode::OSXMMEXCPT != 0 {
        Fault::simple(vector::XM)
    } else {
        Fault::ud()
    }
}

/// The address of the word that a bit string instruction works on.
fn bit_string_address(cpu: &Cpu, insn: &Instruction, m: &Memory) -> Result<u64, Fault> {
    let (segment, offset) = cpu.effective_address(insn);
    let register = insn.op1_register();
    let bytes = register.size() as u32;
    let value = cpu.gpr(register);
    let unused = 64 - bytes * 8;
    let bit = (value << unused) as i64 >> unused;
    let word = bit >> (bytes * 8).trailing_zeros();
    let offset = offset.wrapping_add((word as u64).wrapping_mul(u64::from(bytes)));
    cpu.linear(
        segment,
        offset & address_mask(insn),
        m.size.into(),
        m.access != Access::Read,
    )
}

/// DIV and IDIV: the host must not meet a quotient that does not fit.
fn divide(cpu: &mut Cpu, insn: &Instruction, op: &Op, signed: bool) -> Result<(), Fault> {
    let mut scratch = [0; 8];
    let (divisor, size) = match &op.memory {
        Some(m) => {
            let at = address(cpu, insn, m)?;
            let privilege = cpu.privilege();
            let size = m.size as usize;
            cpu.read_linear(at, &mut scratch[..size.min(8)], privilege)?;
            (u64::from_le_bytes(scratch), size)
        }
        None => (cpu.gpr(insn.op0_register()), insn.op0_register().size()),
    };
    let bits = size as u32 * 8;
    let (low, high) = if size == 1 {
        (cpu.regs[0] & 0xff, cpu.regs[0] >> 8 & 0xff)
    } else {
        let mask = !0 >> (64 - bits);
        (cpu.regs[0] & mask, cpu.regs[2] & mask)
    };
    let dividend = u128::from(high) << bits | u128::from(low);
    let fits = if signed {
        let extend = |v: u128, n: u32| (v << (128 - n)) as i128 >> (128 - n);
        let n = extend(dividend, 2 * bits);
        let d = extend(divisor.into(), bits);
        let limit = 1i128 << (bits - 1);
        n.checked_div(d)
            .is_some_and(|q| (-limit..limit).contains(&q))
    } else {
        dividend
            .checked_div(divisor.into())
            .is_some_and(|q| q >> bits == 0)
    };
    if !fits {
        return Err(Fault::simple(vector::DE));
    }
    // SAFETY: as in `call_and_store`; `scratch` holds the operand.
    unsafe { (op.thunk)(cpu, &op.args, scratch.as_mut_ptr()) };
    Ok(())
}

impl Cpu {
    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        let b = &self.fpu.0;
        u32::from_le_bytes([b[24], b[25], b[26], b[27]])
    }

    /// Sets MXCSR; reserved bits are dropped.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.fpu.0[24..28].copy_from_slice(&(value & MXCSR_MASK).to_le_bytes());
    }
}

/// The segment number and offset of a string-like operand at rDI.
pub(super) fn at_rdi(cpu: &Cpu, insn: &Instruction) -> (usize, u64) {
    let mask = match insn.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => !0,
    };
    (
        segment_number(insn.memory_segment()),
        cpu.regs[reg::RDI] & mask,
    )
}
