//! System instructions, event delivery, reset: everything but vectors, hot
//! integer operations, strings and port I/O.
//!
//! [`exec`] runs one instruction; [`handles`] says which. The vCPU's RIP is the
//! instruction's own; on [`Flow::Jump`] it has been set, otherwise the caller
//! advances it. A fault leaves the architectural state as it was, so that the
//! instruction can be restarted; the exception is a fault in the middle of a
//! task switch, which belongs to the new task and leaves RIP there. Whether the
//! guest's CPUID offers an instruction, and whether a LOCK prefix is allowed,
//! has been decided before.
//!
//! What is not offered raises #UD by not being listed: VMX, SVM, SGX, SMM's
//! RSM, MONITOR/MWAIT, shadow stacks (ENDBR is a NOP), VME and PVI.

mod control;
pub mod debug;
mod delivery;
mod descriptor;
mod far;
mod flags_ops;
mod gate;
mod io;
mod iret;
mod legacy;
mod misc;
pub mod msr;
mod reset;
mod segment;
mod software_int;
mod stack;
mod syscall;
mod table;
mod task;

#[cfg(test)]
mod tests;

pub use delivery::{deliver_exception, deliver_interrupt, deliver_nmi};
pub use io::check_io;
pub use reset::{reset, start_up};

use iced_x86::{Code, Instruction, Mnemonic};

use crate::{fault::Fault, flow::Flow, state::Cpu};

/// Executes one instruction; see the module for the contract.
pub type Handler = fn(&mut Cpu, &Instruction) -> Result<Flow, Fault>;

/// The handler for `code`, if this module executes it.
pub fn handler(code: Code) -> Option<Handler> {
    use Mnemonic as M;
    let by_code: Option<Handler> = match code {
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            Some(segment::mov_from)
        }
        Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
            Some(segment::mov_to)
        }
        Code::Mov_r32_cr | Code::Mov_r64_cr | Code::Mov_cr_r32 | Code::Mov_cr_r64 => {
            Some(control::mov_cr)
        }
        Code::Mov_r32_dr | Code::Mov_r64_dr | Code::Mov_dr_r32 | Code::Mov_dr_r64 => {
            Some(control::mov_dr)
        }
        Code::Pushw_ES
        | Code::Pushd_ES
        | Code::Pushw_CS
        | Code::Pushd_CS
        | Code::Pushw_SS
        | Code::Pushd_SS
        | Code::Pushw_DS
        | Code::Pushd_DS
        | Code::Pushw_FS
        | Code::Pushd_FS
        | Code::Pushq_FS
        | Code::Pushw_GS
        | Code::Pushd_GS
        | Code::Pushq_GS => Some(segment::push),
        Code::Popw_ES
        | Code::Popd_ES
        | Code::Popw_SS
        | Code::Popd_SS
        | Code::Popw_DS
        | Code::Popd_DS
        | Code::Popw_FS
        | Code::Popd_FS
        | Code::Popq_FS
        | Code::Popw_GS
        | Code::Popd_GS
        | Code::Popq_GS => Some(segment::pop),
        Code::Jmp_ptr1616
        | Code::Jmp_ptr1632
        | Code::Jmp_m1616
        | Code::Jmp_m1632
        | Code::Jmp_m1664 => Some(far::jump),
        Code::Call_ptr1616
        | Code::Call_ptr1632
        | Code::Call_m1616
        | Code::Call_m1632
        | Code::Call_m1664 => Some(far::call),
        _ => None,
    };
    if by_code.is_some() {
        return by_code;
    }
    Some(match code.mnemonic() {
        M::Retf => far::ret,
        M::Iret | M::Iretd | M::Iretq => iret::iret,
        M::Int => software_int::int,
        M::Int1 => software_int::int1,
        M::Int3 => software_int::int3,
        M::Into => software_int::into,
        M::Bound => software_int::bound,
        M::Ud0 | M::Ud1 | M::Ud2 => software_int::undefined,
        M::Syscall => syscall::syscall,
        M::Sysret | M::Sysretq => syscall::sysret,
        M::Sysenter => syscall::sysenter,
        M::Sysexit | M::Sysexitq => syscall::sysexit,
        M::Clts => control::clts,
        M::Lmsw => control::lmsw,
        M::Smsw => control::smsw,
        M::Lgdt => table::lgdt,
        M::Lidt => table::lidt,
        M::Sgdt => table::sgdt,
        M::Sidt => table::sidt,
        M::Lldt => table::lldt,
        M::Sldt => table::sldt,
        M::Ltr => table::ltr,
        M::Str => table::str,
        M::Lar => table::lar,
        M::Lsl => table::lsl,
        M::Verr => table::verr,
        M::Verw => table::verw,
        M::Arpl => table::arpl,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => segment::load_far_pointer,
        M::Rdfsbase | M::Rdgsbase => segment::read_base,
        M::Wrfsbase | M::Wrgsbase => segment::write_base,
        M::Swapgs => segment::swapgs,
        M::Rdmsr => msr::rdmsr,
        M::Wrmsr => msr::wrmsr,
        M::Rdtsc => misc::rdtsc,
        M::Rdtscp => misc::rdtscp,
        M::Rdpid => misc::rdpid,
        M::Rdpmc => misc::rdpmc,
        M::Cpuid => misc::cpuid,
        M::Invlpg => misc::invlpg,
        M::Invpcid => misc::invpcid,
        M::Invd | M::Wbinvd | M::Wbnoinvd => misc::cache,
        M::Clflush | M::Clflushopt | M::Clwb => misc::cache_line,
        M::Hlt => misc::hlt,
        M::Pause => misc::pause,
        M::Nop
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch => misc::nop,
        M::Lfence | M::Mfence | M::Sfence => misc::memory_fence,
        M::Serialize => misc::serialize,
        M::Cli => flags_ops::cli,
        M::Sti => flags_ops::sti,
        M::Pushf | M::Pushfd | M::Pushfq => flags_ops::pushf,
        M::Popf | M::Popfd | M::Popfq => flags_ops::popf,
        M::Lahf => flags_ops::lahf,
        M::Sahf => flags_ops::sahf,
        M::Clc => flags_ops::clc,
        M::Stc => flags_ops::stc,
        M::Cmc => flags_ops::cmc,
        M::Cld => flags_ops::cld,
        M::Std => flags_ops::std,
        M::Clac => flags_ops::clac,
        M::Stac => flags_ops::stac,
        M::Aaa => legacy::aaa,
        M::Aas => legacy::aas,
        M::Aam => legacy::aam,
        M::Aad => legacy::aad,
        M::Daa => legacy::daa,
        M::Das => legacy::das,
        M::Salc => legacy::salc,
        M::Xlatb => legacy::xlat,
        M::Pusha | M::Pushad => legacy::pusha,
        M::Popa | M::Popad => legacy::popa,
        M::Enter => legacy::enter,
        M::Leave => legacy::leave,
        _ => return None,
    })
}

/// Whether [`exec`] executes `code`.
pub fn handles(code: Code) -> bool {
    handler(code).is_some()
}

/// Executes `insn`; #UD if this module does not know it.
///
/// # Errors
/// What the instruction raises; see the module.
pub fn exec(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    match handler(insn.code()) {
        Some(h) => h(cpu, insn),
        None => Err(Fault::ud()),
    }
}
