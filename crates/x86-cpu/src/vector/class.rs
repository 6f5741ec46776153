//! What each of iced's `Code`s is to this module: the allow-list.

use alloc::{sync::Arc, vec::Vec};

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

use super::{float, soft::SoftOp};
use crate::cpuid::Features;

/// Under which rules an instruction runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// Not executed here.
    None,
    /// Legacy SSE.
    Sse,
    /// VEX with vector operands.
    Vex,
    /// General registers, memory and flags only; legacy encoding.
    Gpr,
    /// General registers and memory only; VEX encoding.
    VexGpr,
    /// MMX registers, and no XMM register.
    Mmx,
    /// x87 arithmetic, run verbatim.
    X87,
    /// Done by this module's own code.
    Soft(SoftOp),
}

/// What is known of a `Code` before any operand is.
#[derive(Clone, Copy, Debug)]
pub(super) struct CodeInfo {
    pub(super) class: Class,
    /// Reads or writes MXCSR.
    pub(super) float: bool,
    /// #GP unless the memory operand is aligned to its size.
    pub(super) aligned: bool,
    /// CPUID lets the guest use it, whoever executes it.
    pub(super) permitted: bool,
}

/// The table over all `Code`s for one guest's features.
pub(super) type Table = Arc<[CodeInfo]>;

/// Builds the table.
pub(super) fn table(features: &Features) -> Table {
    Code::values()
        .map(|c| classify(c, features))
        .collect::<Vec<_>>()
        .into()
}

fn is_vector(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        k,
        K::xmm_reg
            | K::xmm_rm
            | K::xmm_or_mem
            | K::xmm_vvvv
            | K::xmm_is4
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_or_mem
            | K::ymm_vvvv
            | K::ymm_is4
    )
}

fn is_mmx(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(k, K::mm_reg | K::mm_rm | K::mm_or_mem)
}

/// Operands that can be carried over to a canonical instruction. Immediates
/// wider than a byte are not: they would make the number of thunks unbounded.
fn is_portable(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    is_vector(k)
        || is_mmx(k)
        || matches!(
            k,
            K::None
                | K::mem
                | K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::r8_reg
                | K::r8_opcode
                | K::r16_reg
                | K::r16_rm
                | K::r16_opcode
                | K::r32_reg
                | K::r32_rm
                | K::r32_opcode
                | K::r32_vvvv
                | K::r64_reg
                | K::r64_rm
                | K::r64_opcode
                | K::r64_vvvv
                | K::al
                | K::cl
                | K::ax
                | K::eax
                | K::rax
                | K::st0
                | K::sti_opcode
                | K::imm8
                | K::imm8_const_1
                | K::imm8sex16
                | K::imm8sex32
                | K::imm8sex64
        )
}

fn classify(code: Code, features: &Features) -> CodeInfo {
    let mut info = CodeInfo {
        class: Class::None,
        float: false,
        aligned: false,
        permitted: features.permits(code.cpuid_features()),
    };
    let op = code.op_code();
    let m = code.mnemonic();
    if !op.is_instruction() || op.fwait() {
        return info;
    }
    if let Some(soft) = SoftOp::of(code) {
        if soft == SoftOp::Nop || features.contains_all(code.cpuid_features()) {
            info.class = Class::Soft(soft);
        }
        return info;
    }
    if !features.contains_all(code.cpuid_features()) || !op.mode64() {
        return info;
    }
    let kinds = op.op_kinds();
    if !kinds.iter().all(|&k| is_portable(k)) {
        return info;
    }
    let vector = kinds.iter().any(|&k| is_vector(k));
    let mmx = kinds.iter().any(|&k| is_mmx(k));
    info.class = match op.encoding() {
        EncodingKind::VEX if vector => Class::Vex,
        EncodingKind::VEX if allowed_vex_gpr(m) => Class::VexGpr,
        EncodingKind::Legacy if vector => Class::Sse,
        EncodingKind::Legacy if mmx || m == Mnemonic::Emms => Class::Mmx,
        EncodingKind::Legacy if is_x87(code) => Class::X87,
        EncodingKind::Legacy if allowed_gpr(m) && has_one_size(code) => Class::Gpr,
        _ => Class::None,
    };
    if matches!(info.class, Class::Sse | Class::Vex) {
        info.float = float::uses_mxcsr(m);
        info.aligned = match info.class {
            Class::Sse => op.memory_size().size() == 16 && !unaligned_sse(m),
            _ => aligned_vex(m),
        };
    }
    if m == Mnemonic::Cmpxchg16b {
        info.aligned = true;
    }
    info
}

/// Whether each maker's processors access as many bytes. AMD's read four of MOVSXD's 16-bit operand,
/// where Intel's read two.
fn has_one_size(code: Code) -> bool {
    code != Code::Movsxd_r16_rm16
}

/// The legacy instructions with 16-byte operands that take any address (Intel
/// SDM Vol. 2 §2.4, exception types 4 with footnote, and 5).
fn unaligned_sse(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Movups
            | Movupd
            | Movdqu
            | Lddqu
            | Pcmpestri
            | Pcmpestri64
            | Pcmpestrm
            | Pcmpestrm64
            | Pcmpistri
            | Pcmpistrm
    )
}

/// The VEX instructions whose operands must be aligned (exception type 1).
fn aligned_vex(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa
    )
}

fn is_x87(code: Code) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    let f = code.cpuid_features();
    let m = alloc::format!("{:?}", code.mnemonic());
    m.starts_with('F') && f.iter().any(|f| matches!(f, FPU | FPU287 | FPU387))
}

fn allowed_vex_gpr(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Mulx | Pdep | Pext | Rorx | Sarx | Shlx | Shrx
    )
}

/// Integer instructions that touch nothing but their operands, RAX, RCX, RDX,
/// RBX and the arithmetic flags.
fn allowed_gpr(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Adc | Adcx
            | Add
            | Adox
            | And
            | Bsf
            | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Cbw
            | Cdq
            | Cdqe
            | Clc
            | Cmc
            | Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
            | Cmp
            | Cmpxchg
            | Cmpxchg16b
            | Cmpxchg8b
            | Cqo
            | Crc32
            | Cwd
            | Cwde
            | Dec
            | Div
            | Idiv
            | Imul
            | Inc
            | Lzcnt
            | Mov
            | Movbe
            | Movnti
            | Movsx
            | Movsxd
            | Movzx
            | Mul
            | Neg
            | Not
            | Or
            | Popcnt
            | Rcl
            | Rcr
            | Rdrand
            | Rdseed
            | Rol
            | Ror
            | Sal
            | Sar
            | Sbb
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Shl
            | Shld
            | Shr
            | Shrd
            | Stc
            | Sub
            | Test
            | Tzcnt
            | Xadd
            | Xchg
            | Xor
    )
}
