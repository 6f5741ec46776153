//! x87 arithmetic: verbatim on the host's unit, with the guest's image loaded.
//!
//! A thunk restores the image with FXRSTOR64, executes the instruction and
//! saves it again. What is added here: pending exceptions, stores that do not
//! happen because of an unmasked exception, and the guest's own instruction and
//! data pointers, for the host's would show addresses of ours.

use iced_x86::{CodeSize, Encoder, Instruction, Mnemonic};

use super::{Access, Op, run::address};
use crate::{
    fault::{Fault, vector},
    mem::address_mask,
    state::{Cpu, FpuImage},
};

pub(super) const FCW: usize = 0;
pub(super) const FSW: usize = 2;
/// Abridged tag word: one bit per physical register, set if not empty.
pub(super) const FTW: usize = 4;
pub(super) const FOP: usize = 6;
pub(super) const FIP: usize = 8;
pub(super) const FDP: usize = 16;

/// FSW.ES: an unmasked exception is pending.
pub(super) const ES: u16 = 0x80;

pub(super) fn word(image: &FpuImage, at: usize) -> u16 {
    u16::from_le_bytes([image.0[at], image.0[at + 1]])
}

pub(super) fn set_word(image: &mut FpuImage, at: usize, v: u16) {
    image.0[at..at + 2].copy_from_slice(&v.to_le_bytes());
}

pub(super) fn quad(image: &FpuImage, at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&image.0[at..at + 8]);
    u64::from_le_bytes(b)
}

pub(super) fn set_quad(image: &mut FpuImage, at: usize, v: u64) {
    image.0[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// What every waiting instruction does first.
///
/// # Errors
/// #MF if an unmasked exception is pending.
pub(super) fn check_pending(cpu: &Cpu) -> Result<(), Fault> {
    if word(&cpu.fpu, FSW) & ES != 0 {
        Err(Fault::simple(vector::MF))
    } else {
        Ok(())
    }
}

/// Control instructions leave the pointers alone (Intel SDM Vol. 1 §8.1.8).
fn is_control(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fldcw | Fnstcw | Fnstsw | Fnclex | Fninit)
}

fn waits(m: Mnemonic) -> bool {
    use Mnemonic::*;
    !matches!(m, Fnstcw | Fnstsw | Fnclex | Fninit)
}

pub(super) fn run(cpu: &mut Cpu, insn: &Instruction, op: &Op) -> Result<(), Fault> {
    let m = insn.mnemonic();
    if waits(m) {
        check_pending(cpu)?;
    }
    let privilege = cpu.privilege();
    let mut scratch = [0u8; 16];
    if let Some(mem) = op.memory.filter(|m| m.access == Access::Read) {
        let at = address(cpu, insn, &mem)?;
        let bytes = &mut scratch[..(mem.size as usize).min(16)];
        cpu.read_linear(at, bytes, privilege)?;
    }
    let before = (cpu.fpu, cpu.regs, cpu.cc);
    // SAFETY: the thunk was prepared for this instruction; `scratch` holds its
    // memory operand. The image's MXCSR has no reserved bit (`set_mxcsr`,
    // `sanitize`), so FXRSTOR64 does not fault.
    unsafe {
        sanitize(&mut cpu.fpu);
        (op.thunk)(cpu, &op.args, scratch.as_mut_ptr());
    }
    let (fcw, fsw) = (word(&cpu.fpu, FCW), word(&cpu.fpu, FSW));
    if let Some(mem) = op.memory.filter(|m| m.access != Access::Read) {
        // Unmasked invalid, overflow and underflow exceptions suppress the
        // store and its faults; an unmasked precision exception comes after it.
        let suppressed = waits(m) && fsw & ES != 0 && fsw & !fcw & 0x19 != 0;
        if !suppressed {
            let bytes = &scratch[..(mem.size as usize).min(16)];
            let stored =
                address(cpu, insn, &mem).and_then(|at| cpu.write_linear(at, bytes, privilege));
            if let Err(f) = stored {
                (cpu.fpu, cpu.regs, cpu.cc) = before;
                return Err(f);
            }
        }
    }
    let pointers = if m == Mnemonic::Fninit {
        (0, 0, 0)
    } else if is_control(m) {
        (
            word(&before.0, FOP),
            quad(&before.0, FIP),
            quad(&before.0, FDP),
        )
    } else {
        let fop = if fsw & ES != 0 {
            opcode(insn).unwrap_or(word(&before.0, FOP))
        } else {
            word(&before.0, FOP)
        };
        let fdp = match op.memory {
            Some(_) => cpu.effective_address(insn).1 & address_mask(insn),
            None => quad(&before.0, FDP),
        };
        (fop, cpu.rip, fdp)
    };
    set_word(&mut cpu.fpu, FOP, pointers.0);
    set_quad(&mut cpu.fpu, FIP, pointers.1);
    set_quad(&mut cpu.fpu, FDP, pointers.2);
    Ok(())
}

/// Clears what would make FXRSTOR64 fault.
pub(super) fn sanitize(image: &mut FpuImage) {
    image.0[26] = 0;
    image.0[27] = 0;
}

/// The 11-bit opcode of an x87 instruction.
fn opcode(insn: &Instruction) -> Option<u16> {
    let bits = match insn.code_size() {
        CodeSize::Code16 => 16,
        CodeSize::Code32 => 32,
        _ => 64,
    };
    let mut e = Encoder::try_new(bits).ok()?;
    e.encode(insn, insn.ip()).ok()?;
    let bytes = e.take_buffer();
    let at = bytes.iter().position(|b| b & 0xf8 == 0xd8)?;
    Some(u16::from(bytes[at] & 7) << 8 | u16::from(*bytes.get(at + 1)?))
}

/// Puts the image into the form in which the unit itself holds and saves it.
pub(super) fn normalize(cpu: &mut Cpu) {
    let pointers = (
        word(&cpu.fpu, FOP),
        quad(&cpu.fpu, FIP),
        quad(&cpu.fpu, FDP),
    );
    sanitize(&mut cpu.fpu);
    let image = cpu.fpu.0.as_mut_ptr();
    let default = 0x1f80u32;
    // SAFETY: the image is 512 bytes, 64-byte aligned, without reserved MXCSR
    // bits; FNINIT and LDMXCSR leave the unit as compiled code expects it.
    unsafe {
        core::arch::asm!(
            "fxrstor64 [{image}]", "fxsave64 [{image}]", "fninit", "ldmxcsr [{default}]",
            image = in(reg) image, default = in(reg) &raw const default,
            clobber_abi("sysv64"), options(nostack));
    }
    set_word(&mut cpu.fpu, FOP, pointers.0 & 0x7ff);
    set_quad(&mut cpu.fpu, FIP, pointers.1);
    set_quad(&mut cpu.fpu, FDP, pointers.2);
}
