//! Which results of a case have to be the same.

use std::fmt::Write;

use caisson_x86_cpu::{cpuid, vector::SoftOp};
use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::{
    RIP,
    cases::Case,
    native::{State, Trap},
    soft::ARENA,
};

/// Parts of the results that cannot be compared.
struct Ignore {
    gpr: Option<usize>,
    flags: bool,
    memory: [std::ops::Range<u64>; 2],
    mxcsr: u32,
    /// Registers of a gather that faulted: bytes beyond the elements.
    gather: Option<usize>,
    x87: bool,
    pointers: bool,
    /// Where in the page the fault is.
    address: u64,
}

fn ignore(case: &Case, trap: Option<Trap>) -> Ignore {
    use Mnemonic as M;
    let mut i = Ignore {
        gpr: None,
        flags: false,
        memory: [0..0, 0..0],
        mxcsr: 0,
        gather: None,
        x87: false,
        pointers: false,
        address: 0,
    };
    let page_fault = trap.is_some_and(|t| matches!(t.vector, 12..=14));
    let at = |r: std::ops::Range<u64>| case.target + r.start..case.target + r.end;
    match case.insn.mnemonic() {
        M::Rdrand | M::Rdseed => {
            i.gpr = Some(case.insn.op0_register().number());
            i.flags = true;
        }
        // Instruction and data pointers differ: the instruction runs elsewhere.
        M::Fnstenv | M::Fnsave => {
            i.address = 0xfff;
            let wide = matches!(case.insn.memory_size().size(), 28 | 108);
            i.memory[0] = at(if wide { 12..28 } else { 6..14 });
        }
        M::Fxsave
        | M::Fxsave64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64 => {
            // MXCSR_MASK tells of the processor: AMD's have a mode for misaligned operands.
            i.memory = [at(6..24), at(28..32)];
            i.address = 0xfff;
        }
        M::Fldenv | M::Frstor | M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => {
            i.pointers = true;
            i.address = 0xfff;
        }
        M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovpd
        | M::Vmaskmovps
        | M::Vpmaskmovd
        | M::Vpmaskmovq => i.address = 0xfff,
        // What of it lands before the store faults is the model's.
        M::Fbstp | M::Fstp if page_fault => i.memory[0] = at(0..10),
        // Flags are raised before the store faults.
        M::Vcvtps2ph if page_fault => i.mxcsr = 0x3f,
        _ => {}
    }
    if page_fault && SoftOp::of(case.insn.code()) == Some(SoftOp::Gather) {
        // How far it came, and what it made of the mask on its way, is the model's.
        i.gather = Some(match case.insn.op0_register().is_ymm() {
            _ if is_amd() => 0,
            true => 32,
            false => 8,
        });
    }
    // Whether the unit enters MMX mode before a store faults is the model's.
    i.x87 = page_fault && (0..case.insn.op_count()).any(|n| case.insn.op_register(n).is_mm());
    let unmasked = !(case.input.mxcsr() >> 7);
    if trap.is_some_and(|t| t.vector == 19) {
        // Whether an unmasked overflow or underflow is also inexact.
        if unmasked & 0x18 != 0 {
            i.mxcsr = 0x20;
        }
        // Which steps of a dot product come before the one that raises.
        if matches!(
            case.insn.mnemonic(),
            M::Dpps | M::Dppd | M::Vdpps | M::Vdppd
        ) {
            i.mxcsr = 0x3f;
        }
    }
    i
}

/// What differs between the host's and the software's results, but for what no manual says; an error is the text.
pub(crate) fn compare(
    case: &Case,
    (native, trap, native_memory): (&State, Option<Trap>, &[u8]),
    (soft, fault, soft_memory): (&State, Option<Trap>, &[u8]),
) -> Result<(), String> {
    let skip = ignore(case, trap);
    let mut out = String::new();
    let page = |t: Trap| Trap {
        address: t.address & !skip.address,
        ..t
    };
    let maskmov = matches!(
        SoftOp::of(case.insn.code()),
        Some(SoftOp::Maskmovq | SoftOp::Maskmovdqu | SoftOp::Vmaskmovdqu)
    );
    if maskmov && trap.is_some_and(|t| t.vector == 14) && fault.is_none() {
        // Whether bytes that are not selected fault is the model's.
        return Ok(());
    }
    let raised_only = soft.fx[2] & 0x80 != 0 && fault.is_none();
    if stores_x87(&case.insn) && trap.is_some_and(|t| matches!(t.vector, 12..=14)) && raised_only {
        // Which of an absent page and an unmasked x87 exception comes first is the model's.
        return Ok(());
    }
    let misaligned = fault.is_some_and(|t| t.vector == 13);
    if is_amd()
        && misaligned
        && trap.is_none_or(|t| matches!(t.vector, 12 | 14))
        && is_sha(&case.insn)
    {
        // AMD's processors were seen to take misaligned operands.
        return Ok(());
    }
    // Hosts were seen to report #GP for such a store across into an absent page.
    // Which of a misaligned and a non-canonical address comes first is the model's.
    let either = matches!(
        case.insn.mnemonic(),
        Mnemonic::Vcvtps2ph
            | Mnemonic::Cmpxchg16b
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
    ) && trap.is_some()
        && fault.is_some()
        && trap.map(|t| t.vector) != fault.map(|t| t.vector);
    if !either && trap.map(page) != fault.map(page) {
        let gpr = case.input.gpr;
        let _ = writeln!(
            out,
            "  exception: host {trap:x?}, soft {fault:x?}; general registers {gpr:x?}"
        );
    }
    let restores = matches!(case.insn.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64);
    if restores && out.is_empty() && trap.is_some() {
        // How much is loaded before a part of the image is found bad is the model's.
        return Ok(());
    }
    for n in 0..16 {
        if skip.gpr != Some(n) && native.gpr[n] != soft.gpr[n] {
            let (i, a, b) = (case.input.gpr[n], native.gpr[n], soft.gpr[n]);
            let _ = writeln!(out, "  r{n}: {i:#x} -> host {a:#x}, soft {b:#x}");
        }
        let gathered = [0, 2]
            .iter()
            .any(|&i| case.insn.op_register(i).number() == n);
        let len = skip.gather.filter(|_| gathered).unwrap_or(32);
        if native.ymm[n][..len] != soft.ymm[n][..len] {
            let (i, a, b) = (case.input.ymm[n], native.ymm[n], soft.ymm[n]);
            let _ = writeln!(
                out,
                "  ymm{n}:\n   in   {i:02x?}\n   host {a:02x?}\n   soft {b:02x?}"
            );
        }
    }
    let flags = 0x8d5 & !undefined(&case.insn);
    if !skip.flags && (native.rflags ^ soft.rflags) & flags != 0 {
        let (i, a, b) = (
            case.input.rflags,
            native.rflags & flags,
            soft.rflags & flags,
        );
        let _ = writeln!(out, "  flags: {i:#x} -> host {a:#x}, soft {b:#x}");
    }
    if !either && (native.mxcsr() ^ soft.mxcsr()) & !skip.mxcsr != 0 {
        let (i, a, b) = (case.input.mxcsr(), native.mxcsr(), soft.mxcsr());
        let _ = writeln!(out, "  mxcsr: {i:#x} -> host {a:#x}, soft {b:#x}");
    }
    if !skip.x87 && native.fx[..5] != soft.fx[..5] {
        let (i, a, b) = (&case.input.fx[..5], &native.fx[..5], &soft.fx[..5]);
        let _ = writeln!(
            out,
            "  x87 control: {i:02x?} -> host {a:02x?}, soft {b:02x?}"
        );
    }
    for r in 0..8 {
        let range = 32 + 16 * r..42 + 16 * r;
        let (a, b) = (&native.fx[range.clone()], &soft.fx[range.clone()]);
        if !skip.x87 && a != b {
            let i = &case.input.fx[range];
            let _ = writeln!(out, "  st{r}: {i:02x?} -> host {a:02x?}, soft {b:02x?}");
        }
    }
    for (i, (a, b)) in native_memory.iter().zip(soft_memory).enumerate() {
        let at = ARENA + i as u64;
        if a != b && !skip.memory.iter().any(|r| r.contains(&at)) {
            let _ = writeln!(out, "  memory {at:#x}: host {a:02x}, soft {b:02x}");
        }
    }
    // No address of the engine shows in the x87 pointers.
    let fip = u64::from_le_bytes(soft.fx[8..16].try_into().unwrap());
    if !skip.pointers && fip != 0 && fip != RIP {
        let _ = writeln!(out, "  FIP is {fip:#x}");
    }
    if out.is_empty() { Ok(()) } else { Err(out) }
}

/// Whether the host's processor is AMD's.
fn is_amd() -> bool {
    cpuid::host(0, 0)[1] == u32::from_le_bytes(*b"Auth")
}

fn stores_x87(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        insn.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    )
}

fn is_sha(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&iced_x86::CpuidFeature::SHA)
}

/// RFLAGS bits that the manual leaves open after `insn`.
fn undefined(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let mut open = insn.rflags_undefined();
    // Also where the count is a multiple of the rotated bits.
    let through_carry = matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    if through_carry && insn.op1_kind() == OpKind::Immediate8 && insn.immediate8() & 0x1f > 1 {
        open |= B::OF;
    }
    [
        (B::OF, 11),
        (B::SF, 7),
        (B::ZF, 6),
        (B::AF, 4),
        (B::CF, 0),
        (B::PF, 2),
    ]
    .into_iter()
    .filter(|&(bit, _)| open & bit != 0)
    .fold(0, |mask, (_, at)| mask | 1 << at)
}
