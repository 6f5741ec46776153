//! What DPPS and DPPD compute on the way to their result: their products and
//! partial sums can be tiny where the result is not, or is not stored at all.

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::run::is_denormal;
use crate::state::{Cpu, VecReg};

/// Whether `insn` is a dot product.
pub(super) fn is_dot_product(insn: &Instruction) -> bool {
    use Mnemonic::{Dppd, Dpps, Vdppd, Vdpps};
    matches!(insn.mnemonic(), Dppd | Dpps | Vdppd | Vdpps)
}

/// Whether a product or partial sum of a dot product is tiny: what raises an
/// unmasked underflow exception even where nothing is lost (Intel SDM Vol. 1
/// §11.5.2.5, Vol. 2A DPPS).
///
/// `mxcsr` gives rounding and denormals-are-zero; it masks every exception and
/// does not flush to zero. To be called before the instruction writes its
/// destination.
///
/// # Safety
/// `p` is valid for reads of the memory operand, if there is one; the host has
/// the instruction.
pub(super) unsafe fn has_tiny_step(
    cpu: &Cpu,
    insn: &Instruction,
    p: *const u8,
    mxcsr: u32,
) -> bool {
    let vex = insn.op_count() == 4;
    let (first, second) = if vex { (1, 2) } else { (0, 1) };
    let width = insn.op_register(0).size().min(32);
    let register = |operand| cpu.vec[insn.op_register(operand).number() % 32];
    let a = register(first);
    let mut b = VecReg([0; 64]);
    if insn.op_kind(second) == OpKind::Memory {
        // SAFETY: the caller vouches for `p`, and the operand is `width` bytes.
        unsafe { core::ptr::copy_nonoverlapping(p, b.0.as_mut_ptr(), width) };
    } else {
        b = register(second);
    }
    let double = matches!(insn.mnemonic(), Mnemonic::Dppd | Mnemonic::Vdppd);
    let size = if double { 8 } else { 4 };
    // Imm8[7:4] says which products are made; the others are zero.
    let mut chosen = [0u8; 16];
    for (n, lane) in chosen.chunks_exact_mut(size).enumerate() {
        if insn.immediate8() >> (4 + n) & 1 != 0 {
            lane.fill(!0);
        }
    }
    (0..width).step_by(16).any(|at| {
        let mut steps = [[0u8; 16]; 3];
        let (a, b) = (&a.0[at..at + 16], &b.0[at..at + 16]);
        macro_rules! multiply_and_add {
            ($type:literal) => {
                // SAFETY: sixteen bytes at each pointer, 48 at `steps`; a host with DPPS
                // (SSE4.1) has HADDPS (SSE3). MXCSR is put back to what Rust code
                // expects: all exceptions masked, rounding to nearest.
                unsafe {
                    asm!(
                        "ldmxcsr [{mxcsr}]",
                        "movups {x}, [{a}]", "movups {y}, [{b}]", "movups {m}, [{chosen}]",
                        concat!("mul", $type, " {x}, {y}"), "andps {x}, {m}",
                        "movups [{steps}], {x}",
                        concat!("hadd", $type, " {x}, {x}"), "movups [{steps} + 16], {x}",
                        concat!("hadd", $type, " {x}, {x}"), "movups [{steps} + 32], {x}",
                        "ldmxcsr [{default}]",
                        mxcsr = in(reg) &mxcsr, default = in(reg) &0x1f80u32,
                        a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(),
                        chosen = in(reg) chosen.as_ptr(), steps = in(reg) steps.as_mut_ptr(),
                        x = out(xmm_reg) _, y = out(xmm_reg) _, m = out(xmm_reg) _,
                        options(nostack),
                    )
                }
            };
        }
        // Of two doubles there is one sum; its double, the last step, is tiny only if it is.
        if double {
            multiply_and_add!("pd");
        } else {
            multiply_and_add!("ps");
        }
        steps.as_flattened().chunks_exact(size).any(is_denormal)
    })
}
