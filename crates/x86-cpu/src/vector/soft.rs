//! Instructions done by this module's own code, and the rules of each kind.

use iced_x86::{Code, Instruction, Mnemonic};

use super::{gather, masked, mmx, x87, x87_layout, xsave};
use crate::{fault::Fault, flow::Flow, ops::misc::full_fence, state::Cpu};

/// An instruction that is not run verbatim.
#[allow(missing_docs, reason = "instruction names")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SoftOp {
    Nop,
    Fence,
    CacheLine,
    Ldmxcsr,
    Stmxcsr,
    Vldmxcsr,
    Vstmxcsr,
    Vzeroall,
    Vzeroupper,
    Maskmovq,
    Maskmovdqu,
    Vmaskmovdqu,
    VmaskLoad,
    VmaskStore,
    Gather,
    Emms,
    Wait,
    Fnstenv,
    Fldenv,
    Fnsave,
    Frstor,
    Fxsave,
    Fxrstor,
    Xsave,
    Xsaveopt,
    Xsavec,
    Xsaves,
    Xrstor,
    Xrstors,
    Xgetbv,
    Xsetbv,
}

/// When an instruction is refused with #UD or #NM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Rule {
    None,
    Sse,
    Vex,
    VexGpr,
    Mmx,
    X87,
    /// WAIT: #NM only if CR0.MP and CR0.TS.
    Wait,
    /// The XSAVE family.
    Xsave,
    /// XGETBV and XSETBV.
    Xcr,
}

impl SoftOp {
    /// The operation that executes `code`, if it is one of these.
    pub fn of(code: Code) -> Option<Self> {
        use Mnemonic as M;
        let op = code.op_code();
        if matches!(
            op.encoding(),
            iced_x86::EncodingKind::EVEX | iced_x86::EncodingKind::MVEX
        ) {
            return None;
        }
        Some(match code.mnemonic() {
            // Hints of features that the guest does not have are no-operations
            // in the same encoding space.
            M::Nop
            | M::Reservednop
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Cldemote
            | M::Prefetch
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Fneni
            | M::Fndisi
            | M::Fnsetpm => Self::Nop,
            M::Lfence | M::Mfence | M::Sfence | M::Serialize => Self::Fence,
            M::Clflush | M::Clflushopt | M::Clwb => Self::CacheLine,
            M::Ldmxcsr => Self::Ldmxcsr,
            M::Stmxcsr => Self::Stmxcsr,
            M::Vldmxcsr => Self::Vldmxcsr,
            M::Vstmxcsr => Self::Vstmxcsr,
            M::Vzeroall => Self::Vzeroall,
            M::Vzeroupper => Self::Vzeroupper,
            M::Maskmovq => Self::Maskmovq,
            M::Maskmovdqu => Self::Maskmovdqu,
            M::Vmaskmovdqu => Self::Vmaskmovdqu,
            M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
                if op.op0_kind() == iced_x86::OpCodeOperandKind::mem {
                    Self::VmaskStore
                } else {
                    Self::VmaskLoad
                }
            }
            M::Vgatherdpd
            | M::Vgatherdps
            | M::Vgatherqpd
            | M::Vgatherqps
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq => Self::Gather,
            M::Emms => Self::Emms,
            M::Wait => Self::Wait,
            M::Fnstenv => Self::Fnstenv,
            M::Fldenv => Self::Fldenv,
            M::Fnsave => Self::Fnsave,
            M::Frstor => Self::Frstor,
            M::Fxsave | M::Fxsave64 => Self::Fxsave,
            M::Fxrstor | M::Fxrstor64 => Self::Fxrstor,
            M::Xsave | M::Xsave64 => Self::Xsave,
            M::Xsaveopt | M::Xsaveopt64 => Self::Xsaveopt,
            M::Xsavec | M::Xsavec64 => Self::Xsavec,
            M::Xsaves | M::Xsaves64 => Self::Xsaves,
            M::Xrstor | M::Xrstor64 => Self::Xrstor,
            M::Xrstors | M::Xrstors64 => Self::Xrstors,
            M::Xgetbv => Self::Xgetbv,
            M::Xsetbv => Self::Xsetbv,
            _ => return None,
        })
    }

    pub(super) fn rule(self) -> Rule {
        match self {
            Self::Nop | Self::Fence | Self::CacheLine => Rule::None,
            Self::Ldmxcsr | Self::Stmxcsr | Self::Maskmovdqu => Rule::Sse,
            Self::Vldmxcsr
            | Self::Vstmxcsr
            | Self::Vzeroall
            | Self::Vzeroupper
            | Self::Vmaskmovdqu
            | Self::VmaskLoad
            | Self::VmaskStore
            | Self::Gather => Rule::Vex,
            Self::Maskmovq | Self::Emms => Rule::Mmx,
            Self::Wait => Rule::Wait,
            Self::Fnstenv
            | Self::Fldenv
            | Self::Fnsave
            | Self::Frstor
            | Self::Fxsave
            | Self::Fxrstor => Rule::X87,
            Self::Xsave
            | Self::Xsaveopt
            | Self::Xsavec
            | Self::Xsaves
            | Self::Xrstor
            | Self::Xrstors => Rule::Xsave,
            Self::Xgetbv | Self::Xsetbv => Rule::Xcr,
        }
    }
}

pub(super) fn run(cpu: &mut Cpu, insn: &Instruction, op: SoftOp) -> Result<Flow, Fault> {
    match op {
        SoftOp::Nop => {}
        SoftOp::Fence => full_fence(),
        SoftOp::CacheLine => {
            // Faults like a load of the byte; memory needs nothing.
            let at = cpu.operand_address(insn, 1, false)?;
            let privilege = cpu.privilege();
            cpu.translate_data(at, false, privilege)?;
        }
        SoftOp::Ldmxcsr | SoftOp::Vldmxcsr => {
            let at = cpu.operand_address(insn, 4, false)?;
            let privilege = cpu.privilege();
            let v = cpu.read_uint(at, 4, privilege)? as u32;
            if v & !x87_layout::MXCSR_MASK != 0 {
                return Err(Fault::gp(0));
            }
            cpu.set_mxcsr(v);
        }
        SoftOp::Stmxcsr | SoftOp::Vstmxcsr => {
            let at = cpu.operand_address(insn, 4, true)?;
            let privilege = cpu.privilege();
            cpu.write_uint(at, 4, cpu.mxcsr().into(), privilege)?;
        }
        SoftOp::Vzeroall | SoftOp::Vzeroupper => {
            let keep = if op == SoftOp::Vzeroall { 0 } else { 16 };
            let count = if cpu.is_64bit() { 16 } else { 8 };
            for v in &mut cpu.vec[..count] {
                v.0[keep..].fill(0);
            }
        }
        SoftOp::Maskmovq => {
            x87::check_pending(cpu)?;
            masked::maskmov(cpu, insn)?;
            mmx::enter(cpu);
        }
        SoftOp::Maskmovdqu | SoftOp::Vmaskmovdqu => masked::maskmov(cpu, insn)?,
        SoftOp::VmaskLoad => masked::load(cpu, insn)?,
        SoftOp::VmaskStore => masked::store(cpu, insn)?,
        SoftOp::Gather => gather::gather(cpu, insn)?,
        SoftOp::Emms => {
            x87::check_pending(cpu)?;
            mmx::leave(cpu);
        }
        SoftOp::Wait => x87::check_pending(cpu)?,
        SoftOp::Fnstenv => x87_layout::store_environment(cpu, insn)?,
        SoftOp::Fldenv => {
            x87::check_pending(cpu)?;
            x87_layout::load_environment(cpu, insn)?;
        }
        SoftOp::Fnsave => x87_layout::save(cpu, insn)?,
        SoftOp::Frstor => {
            x87::check_pending(cpu)?;
            x87_layout::restore(cpu, insn)?;
        }
        SoftOp::Fxsave => xsave::fxsave(cpu, insn)?,
        SoftOp::Fxrstor => xsave::fxrstor(cpu, insn)?,
        SoftOp::Xsave | SoftOp::Xsaveopt | SoftOp::Xsavec | SoftOp::Xsaves => {
            xsave::xsave(cpu, insn, op)?;
        }
        SoftOp::Xrstor | SoftOp::Xrstors => xsave::xrstor(cpu, insn, op)?,
        SoftOp::Xgetbv => xsave::xgetbv(cpu)?,
        SoftOp::Xsetbv => {
            xsave::xsetbv(cpu)?;
            return Ok(Flow::EndBlock);
        }
    }
    Ok(Flow::Next)
}
