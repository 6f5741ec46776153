//! The most frequent vector moves, without a thunk: same signature, same rules.

use core::arch::asm;

use iced_x86::{Code, Instruction, OpKind};

use super::thunk::{Args, ThunkFn};
use crate::state::Cpu;

/// The function that executes `insn`, if it is one of these.
pub(super) fn direct(insn: &Instruction) -> Option<ThunkFn> {
    use Code::*;
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let same = !memory && insn.op_count() == 2 && insn.op0_register() == insn.op1_register();
    Some(match (insn.code(), memory) {
        (
            Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movaps_xmm_xmmm128
            | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128,
            true,
        ) => load128,
        (
            Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm | Movaps_xmmm128_xmm
            | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm,
            true,
        ) => store128::<1>,
        (
            Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movaps_xmm_xmmm128
            | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movups_xmmm128_xmm | Movupd_xmmm128_xmm
            | Movdqu_xmmm128_xmm | Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm,
            false,
        ) => copy128,
        (
            VEX_Vmovups_xmm_xmmm128
            | VEX_Vmovupd_xmm_xmmm128
            | VEX_Vmovdqu_xmm_xmmm128
            | VEX_Vmovaps_xmm_xmmm128
            | VEX_Vmovapd_xmm_xmmm128
            | VEX_Vmovdqa_xmm_xmmm128,
            true,
        ) => vload128,
        (
            VEX_Vmovups_xmmm128_xmm
            | VEX_Vmovupd_xmmm128_xmm
            | VEX_Vmovdqu_xmmm128_xmm
            | VEX_Vmovaps_xmmm128_xmm
            | VEX_Vmovapd_xmmm128_xmm
            | VEX_Vmovdqa_xmmm128_xmm,
            true,
        ) => store128::<1>,
        (
            VEX_Vmovups_ymm_ymmm256
            | VEX_Vmovupd_ymm_ymmm256
            | VEX_Vmovdqu_ymm_ymmm256
            | VEX_Vmovaps_ymm_ymmm256
            | VEX_Vmovapd_ymm_ymmm256
            | VEX_Vmovdqa_ymm_ymmm256,
            true,
        ) => vload256,
        (
            VEX_Vmovups_ymmm256_ymm
            | VEX_Vmovupd_ymmm256_ymm
            | VEX_Vmovdqu_ymmm256_ymm
            | VEX_Vmovaps_ymmm256_ymm
            | VEX_Vmovapd_ymmm256_ymm
            | VEX_Vmovdqa_ymmm256_ymm,
            true,
        ) => vstore256,
        (Movq_xmm_xmmm64 | Movsd_xmm_xmmm64, true) => load64,
        (Movd_xmm_rm32 | Movss_xmm_xmmm32, true) => load32,
        (Movq_xmmm64_xmm | Movsd_xmmm64_xmm | Movlpd_m64_xmm | Movlps_m64_xmm, true) => store64,
        (Movd_rm32_xmm | Movss_xmmm32_xmm, true) => store32,
        (Pxor_xmm_xmmm128 | Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128, false) if same => zero128,
        _ => return None,
    })
}

/// The vector register (or its part) at operand `i`.
///
/// # Safety
/// `cpu` and `args` must be live.
#[inline(always)]
unsafe fn operand<T>(cpu: *mut Cpu, args: *const Args, i: usize) -> *mut T {
    // SAFETY: offsets are those of registers inside `Cpu`.
    unsafe { cpu.cast::<u8>().add((*args).op[i] as usize).cast() }
}

/// Stands where no thunk is wanted; never called for effect.
pub(super) unsafe extern "sysv64" fn nothing(_: *mut Cpu, _: *const Args, _: *mut u8) -> u32 {
    0
}

// SAFETY, for all that follow: the caller of a thunk vouches for `cpu`, `args`
// and, if the instruction has a memory operand, for `memory`. Guest memory is
// touched by one instruction of the operand's size, as the guest's own would.

macro_rules! mover {
    ($(#[$doc:meta])* $name:ident, $cpu:ident, $args:ident, $memory:ident, $body:expr) => {
        $(#[$doc])*
        unsafe extern "sysv64" fn $name($cpu: *mut Cpu, $args: *const Args, $memory: *mut u8) -> u32 {
            // SAFETY: see above.
            unsafe { $body };
            0
        }
    };
}

mover!(load128, cpu, args, memory, {
    asm!("movups {t}, [{m}]", "movaps [{d}], {t}", t = out(xmm_reg) _, m = in(reg) memory,
        d = in(reg) operand::<u8>(cpu, args, 0), options(nostack, preserves_flags))
});
unsafe extern "sysv64" fn store128<const SOURCE: usize>(
    cpu: *mut Cpu,
    args: *const Args,
    memory: *mut u8,
) -> u32 {
    // SAFETY: see above.
    unsafe {
        asm!("movaps {t}, [{s}]", "movups [{m}], {t}", t = out(xmm_reg) _, m = in(reg) memory,
            s = in(reg) operand::<u8>(cpu, args, SOURCE), options(nostack, preserves_flags));
    }
    0
}
mover!(copy128, cpu, args, _memory, {
    let v = *operand::<u128>(cpu, args, 1);
    *operand::<u128>(cpu, args, 0) = v;
});
mover!(vload128, cpu, args, memory, {
    let d = operand::<u8>(cpu, args, 0);
    asm!("movups {t}, [{m}]", "movaps [{d}], {t}", "xorps {t}, {t}", "movaps [{d} + 16], {t}",
        t = out(xmm_reg) _, m = in(reg) memory, d = in(reg) d, options(nostack, preserves_flags))
});
mover!(vload256, cpu, args, memory, {
    asm!("vmovups ymm0, [{m}]", "vmovaps [{d}], ymm0", "vzeroupper", m = in(reg) memory,
        d = in(reg) operand::<u8>(cpu, args, 0), clobber_abi("sysv64"), options(nostack))
});
mover!(vstore256, cpu, args, memory, {
    asm!("vmovaps ymm0, [{s}]", "vmovups [{m}], ymm0", "vzeroupper", m = in(reg) memory,
        s = in(reg) operand::<u8>(cpu, args, 1), clobber_abi("sysv64"), options(nostack))
});
mover!(load64, cpu, args, memory, {
    let v: u64;
    asm!("mov {v}, [{m}]", v = out(reg) v, m = in(reg) memory,
        options(nostack, preserves_flags, readonly));
    *operand::<u128>(cpu, args, 0) = v.into();
});
mover!(load32, cpu, args, memory, {
    let v: u64;
    asm!("mov {v:e}, [{m}]", v = out(reg) v, m = in(reg) memory,
        options(nostack, preserves_flags, readonly));
    *operand::<u128>(cpu, args, 0) = v.into();
});
mover!(store64, cpu, args, memory, {
    asm!("mov [{m}], {v}", v = in(reg) *operand::<u64>(cpu, args, 1), m = in(reg) memory,
        options(nostack, preserves_flags))
});
mover!(store32, cpu, args, memory, {
    asm!("mov [{m}], {v:e}", v = in(reg) *operand::<u32>(cpu, args, 1), m = in(reg) memory,
        options(nostack, preserves_flags))
});
mover!(zero128, cpu, args, _memory, {
    *operand::<u128>(cpu, args, 0) = 0;
});
