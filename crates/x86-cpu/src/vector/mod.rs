//! Vector, x87, MMX and the long tail of integer instructions.
//!
//! Guest and host are the same architecture, so an instruction is executed by
//! the host itself, verbatim, on registers loaded from the [`Cpu`]: see
//! `thunk`. What depends on processor modes, on several memory accesses or on
//! memory layouts (masked moves, gathers, FXSAVE, XSAVE, FNSTENV…) is done by
//! this module's own code.
//!
//! `class` is the allow-list: a `Code` that is not named there, or whose CPUID
//! feature the guest does not have, is not executed, whatever the host can do.
//!
//! Left out, by the same list: AVX-512, TSX, CET, PKU, AMX, MPX, SSE4A, XOP,
//! FMA4, 3DNow!. Deviations: CR0.NE = 0 raises #MF like NE = 1 (no external
//! FERR# interrupt); when a SIMD overflow or underflow exception is unmasked
//! and raised, MXCSR.PE tells the masked result's inexactness, which may differ
//! from that of the result with unbounded exponent; and the dot products report
//! all flags of all their steps even if the first one raises an exception.

mod class;
mod dot;
mod float;
mod gather;
mod masked;
mod mmx;
mod moves;
mod run;
mod soft;
mod thunk;
mod x87;
mod x87_layout;
mod xsave;

use alloc::collections::BTreeMap;
use core::mem::offset_of;

use iced_x86::{Code, Instruction, InstructionInfoFactory, OpAccess, OpKind};

use self::class::{Class, CodeInfo, Table};
pub use self::{
    run::run,
    soft::SoftOp,
    thunk::{Args, SLOW, ThunkFn},
    x87_layout::MXCSR_MASK,
    xsave::{in_use, state_area, valid_xcr0},
};
use crate::{
    cpuid::Features,
    fault::Fault,
    flow::Flow,
    mem::gpr_offset,
    state::{Cpu, mode},
};

/// How a memory operand is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read only.
    Read,
    /// Written only.
    Write,
    /// Read, then written or left alone.
    ReadWrite,
}

/// An instruction's memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// Size in bytes, 1 to 64.
    pub size: u8,
    /// How it is accessed.
    pub access: Access,
    /// #GP(0) if the linear address has one of these bits.
    pub align_mask: u8,
    /// The access is atomic.
    pub locked: bool,
}

/// An instruction ready to run.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    kind: Kind,
    /// Runs it, if `direct`.
    pub thunk: ThunkFn,
    /// Its register operands.
    pub args: Args,
    /// Its memory operand.
    pub memory: Option<Memory>,
    /// Whether a caller may do without [`run`]: compute the effective address,
    /// check alignment, get a host pointer to the operand, call `thunk`. If the
    /// thunk returns zero the instruction is done (a begun write must be ended);
    /// otherwise nothing was changed, and [`run`] completes it or says which
    /// exception it raises.
    pub direct: bool,
}

impl Op {
    /// Whether it looks at MXCSR.
    pub(crate) fn is_float(&self) -> bool {
        matches!(self.kind, Kind::Native { float: true, .. })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Native { float: bool, mmx: bool },
    Divide { signed: bool },
    BitString,
    X87,
    Soft(SoftOp),
}

/// What becomes of an instruction.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// Not executed by this module.
    NotMine,
    /// Faults under the mode in force.
    Fault(Fault),
    /// Is executed.
    Run(Op),
}

/// The part of a vCPU that executes instructions on the host's units: what may
/// be executed, and the thunks made so far.
#[derive(Debug)]
pub struct Unit {
    features: Features,
    table: Table,
    thunks: BTreeMap<thunk::Key, ThunkFn>,
    factory: InstructionInfoFactory,
}

impl Unit {
    /// A unit for a guest with `features`.
    pub fn new(features: Features) -> Self {
        Self {
            features,
            table: class::table(&features),
            thunks: BTreeMap::new(),
            factory: InstructionInfoFactory::new(),
        }
    }

    /// What the guest may use.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Whether CPUID lets the guest use instructions of this `Code`, whoever
    /// executes them.
    pub fn permits(&self, code: Code) -> bool {
        self.table[code as usize].permitted
    }

    /// Whether instructions of this `Code` are executed here, in some mode.
    pub fn executes(&self, code: Code) -> bool {
        self.info(code).class != Class::None
    }

    fn info(&self, code: Code) -> CodeInfo {
        self.table[code as usize]
    }

    /// The number of thunks made so far.
    pub fn thunk_count(&self) -> usize {
        self.thunks.len()
    }
}

impl Default for Unit {
    fn default() -> Self {
        Self::new(crate::cpuid::host_features())
    }
}

/// Whether instructions of `class` fault under mode `m`, and how.
fn refused(class: Class, m: u32) -> Option<Fault> {
    let has = |bit: u32| m & bit != 0;
    let virtual_or_real = !has(mode::PROTECTED) || has(mode::V86);
    let rule = match class {
        Class::Soft(s) => s.rule(),
        Class::Sse => soft::Rule::Sse,
        Class::Vex => soft::Rule::Vex,
        Class::VexGpr => soft::Rule::VexGpr,
        Class::Mmx => soft::Rule::Mmx,
        Class::X87 => soft::Rule::X87,
        Class::Gpr | Class::None => soft::Rule::None,
    };
    let (ud, nm) = match rule {
        soft::Rule::None => (false, false),
        soft::Rule::Sse => (has(mode::EM) || !has(mode::OSFXSR), has(mode::TS)),
        soft::Rule::Vex => (
            virtual_or_real || !has(mode::OSXSAVE) || !has(mode::AVX),
            has(mode::TS),
        ),
        soft::Rule::VexGpr => (virtual_or_real, false),
        soft::Rule::Mmx => (has(mode::EM), has(mode::TS)),
        soft::Rule::X87 => (false, has(mode::EM) || has(mode::TS)),
        soft::Rule::Wait => (false, has(mode::MP) && has(mode::TS)),
        soft::Rule::Xsave => (!has(mode::OSXSAVE), has(mode::TS)),
        soft::Rule::Xcr => (!has(mode::OSXSAVE), false),
    };
    if ud {
        Some(Fault::ud())
    } else if nm {
        Some(Fault::nm())
    } else {
        None
    }
}

/// Decides how `insn` runs on `cpu` in its present mode. The answer holds for
/// every vCPU of the same guest in a mode of the same key.
pub fn plan(cpu: &mut Cpu, insn: &Instruction) -> Plan {
    let mut insn = *insn;
    let mut info = cpu.vector.info(insn.code());
    if info.class == Class::None {
        // Without the feature the prefix is ignored.
        if let Some(code) = without_prefix(insn.code()) {
            insn.set_code(code);
            info = cpu.vector.info(code);
        }
    }
    if info.class == Class::None {
        return Plan::NotMine;
    }
    if let Some(fault) = refused(info.class, cpu.mode) {
        return Plan::Fault(fault);
    }
    match prepare(cpu, &insn, info) {
        Ok(op) => Plan::Run(op),
        Err(f) => Plan::Fault(f),
    }
}

/// BSF and BSR for TZCNT and LZCNT.
fn without_prefix(code: Code) -> Option<Code> {
    Some(match code {
        Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
        Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
        Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
        Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
        Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
        Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
        _ => return None,
    })
}

fn prepare(cpu: &mut Cpu, insn: &Instruction, info: CodeInfo) -> Result<Op, Fault> {
    let mut op = Op {
        kind: Kind::Native {
            float: info.float,
            mmx: false,
        },
        thunk: moves::nothing,
        args: Args::default(),
        memory: None,
        direct: true,
    };
    if let Class::Soft(soft) = info.class {
        op.kind = Kind::Soft(soft);
        op.direct = false;
        return Ok(op);
    }
    let mut mmx = info.class == Class::Mmx;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let r = insn.op_register(i);
                mmx |= r.is_mm();
                op.args.op[i as usize] = if r.is_gpr() {
                    gpr_offset(r).unwrap_or(0) as u32
                } else if r.is_mm() {
                    (offset_of!(Cpu, fpu) + 32 + 16 * r.number()) as u32
                } else {
                    (offset_of!(Cpu, vec) + 64 * r.number()) as u32
                };
            }
            OpKind::Memory => {
                let size = insn.memory_size().size();
                let access = match cpu.vector.factory.info(insn).op_access(i) {
                    OpAccess::Write => Access::Write,
                    OpAccess::ReadWrite | OpAccess::ReadCondWrite | OpAccess::CondWrite => {
                        Access::ReadWrite
                    }
                    _ => Access::Read,
                };
                if !(1..=64).contains(&size) {
                    return Err(Fault::Internal("memory operand of unknown size"));
                }
                op.memory = Some(Memory {
                    size: size as u8,
                    access,
                    align_mask: if info.aligned { size as u8 - 1 } else { 0 },
                    locked: insn.has_lock_prefix() || insn.mnemonic() == iced_x86::Mnemonic::Xchg,
                });
            }
            _ => {}
        }
    }
    if let Some(f) = moves::direct(insn) {
        op.thunk = f;
        return Ok(op);
    }
    op.thunk = thunk_for(cpu, insn, &info)?;
    op.kind = match info.class {
        Class::X87 => Kind::X87,
        _ if thunk::is_bit_string(insn) => Kind::BitString,
        _ if insn.mnemonic() == iced_x86::Mnemonic::Div => Kind::Divide { signed: false },
        _ if insn.mnemonic() == iced_x86::Mnemonic::Idiv => Kind::Divide { signed: true },
        _ => Kind::Native {
            float: info.float,
            mmx,
        },
    };
    let store = op.memory.is_some_and(|m| m.access != Access::Read);
    op.direct = matches!(op.kind, Kind::Native { mmx: false, .. }) && !(info.float && store);
    Ok(op)
}

fn thunk_for(cpu: &mut Cpu, insn: &Instruction, info: &CodeInfo) -> Result<ThunkFn, Fault> {
    let key = thunk::Key::new(insn);
    if let Some(&f) = cpu.vector.thunks.get(&key) {
        return Ok(f);
    }
    let code = thunk::generate(insn, info, &mut cpu.vector.factory)
        .ok_or(Fault::Internal("an instruction has no canonical form"))?;
    let p = cpu
        .env()
        .place_thunk(&code)
        .ok_or(Fault::Internal("no room for native thunks"))?;
    // SAFETY: `place_thunk` gives the address of executable memory that holds
    // `code` for as long as the engine lives, and `code` is a function of this type.
    let f = unsafe { core::mem::transmute::<*const u8, ThunkFn>(p) };
    cpu.vector.thunks.insert(key, f);
    Ok(f)
}

/// Executes one instruction of this module. [`Cpu::rip`] must be its address.
///
/// # Errors
/// The exception that it raises; #UD for instructions that are not executed here.
pub fn exec(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    match plan(cpu, insn) {
        Plan::NotMine => Err(Fault::ud()),
        Plan::Fault(f) => Err(f),
        Plan::Run(op) => run(cpu, insn, &op),
    }
}
