//! Native thunks: a guest instruction's verbatim execution on the host's units.
//!
//! A thunk loads the operands of one canonical instruction from the [`Cpu`],
//! executes it, and stores the results. Register numbers are not part of it:
//! they come at run time as byte offsets in [`Args`], so that there are only as
//! many thunks as there are `Code`s times 8-bit immediates. The instruction is
//! re-encoded with operands of our choice: vector operand *i* in XMM*i+1*,
//! general registers in R9 to R11, memory at `[r8]`. Registers that an
//! instruction names implicitly (RAX, RCX, RDX, RBX, XMM0) keep their names.
//! Generation refuses whatever would touch any other register or address.

use alloc::vec::Vec;
use core::mem::offset_of;

use iced_x86::{
    Code, Encoder, IcedError, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic,
    OpAccess, OpCodeOperandKind, OpKind, Register, RflagsBits,
};

use super::class::{Class, CodeInfo};
use crate::state::Cpu;

/// A thunk: vCPU, operands, host address of the memory operand (ignored if the
/// instruction has none). Zero means done. Otherwise nothing was changed: SIMD
/// exception flags that the guest has unmasked were raised, or [`SLOW`].
pub type ThunkFn = unsafe extern "sysv64" fn(*mut Cpu, *const Args, *mut u8) -> u32;

/// A thunk's answer that it cannot do this case (underflow is unmasked).
pub const SLOW: u32 = 0x100;

/// Byte offsets in [`Cpu`] of the instruction's register operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Args {
    /// One per operand, unused for memory and immediates.
    pub op: [u32; 5],
}

const MXCSR: usize = offset_of!(Cpu, fpu) + 24;
const CPU: Register = Register::RDI;
const ARGS: Register = Register::RSI;
const MEMORY: Register = Register::R8;
const GPRS: [Register; 3] = [Register::R9, Register::R10, Register::R11];

/// What tells one thunk from another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(insn: &Instruction) -> Self {
        let mut memory = 0;
        let mut immediate = 0;
        let mut stack = 0;
        for i in 0..insn.op_count() {
            match insn.op_kind(i) {
                OpKind::Memory => memory = 1,
                OpKind::Register => {
                    let r = insn.op_register(i);
                    if r.is_st() {
                        stack = stack << 4 | 8 | (r as u64 - Register::ST0 as u64);
                    }
                }
                _ => immediate = u64::from(insn.immediate8()),
            }
        }
        Self(
            insn.code() as u64
                | immediate << 16
                | memory << 24
                | u64::from(insn.has_lock_prefix()) << 25
                | stack << 32,
        )
    }
}

/// Whether operand kind `k` is a register that the encoding fixes.
fn is_fixed(k: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(
        k,
        K::al | K::cl | K::ax | K::dx | K::eax | K::rax | K::st0 | K::sti_opcode
    )
}

/// The register of the same class as `r` with number `n`.
fn renumber(r: Register, n: usize) -> Option<Register> {
    let base = if r.is_xmm() {
        Register::XMM0
    } else if r.is_ymm() {
        Register::YMM0
    } else if r.is_mm() {
        Register::MM0
    } else {
        return None;
    };
    Some(base + n as u32)
}

struct Code64 {
    encoder: Encoder,
}

impl Code64 {
    fn put(&mut self, insn: Result<Instruction, IcedError>) -> Option<()> {
        let insn = insn.ok()?;
        self.encoder.encode(&insn, 0).ok()?;
        Some(())
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.encoder.write_u8(b);
        }
    }

    fn load(&mut self, code: Code, r: Register, base: Register, at: usize) -> Option<()> {
        self.put(Instruction::with2(
            code,
            r,
            MemoryOperand::with_base_displ(base, at as i64),
        ))
    }

    fn store(&mut self, code: Code, base: Register, at: usize, r: Register) -> Option<()> {
        self.put(Instruction::with2(
            code,
            MemoryOperand::with_base_displ(base, at as i64),
            r,
        ))
    }

    fn one(&mut self, code: Code, base: Register, at: i64) -> Option<()> {
        self.put(Instruction::with1(
            code,
            MemoryOperand::with_base_displ(base, at),
        ))
    }

    fn finish(&mut self) -> Vec<u8> {
        self.encoder.take_buffer()
    }
}

struct Operand {
    index: usize,
    host: Register,
    guest: Register,
    access: OpAccess,
}

impl Operand {
    fn written(&self) -> bool {
        !matches!(
            self.access,
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        )
    }
}

/// An explicit register operand: its number, the register there, the one in its place.
type Renamed = (usize, Register, Register);

/// The canonical form of `insn`, and its explicit register operands.
fn canonical(insn: &Instruction) -> Option<(Instruction, Vec<Renamed>)> {
    let mut c = *insn;
    let kinds = insn.op_code().op_kinds();
    let mut registers = Vec::new();
    let mut gprs = GPRS.iter();
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let guest = insn.op_register(i);
                if is_fixed(*kinds.get(i as usize)?) {
                    continue;
                }
                let host = if guest.is_gpr() {
                    let r = *gprs.next()?;
                    match guest.size() {
                        1 => Register::R8L + (r as u32 - Register::R8 as u32),
                        2 => Register::R8W + (r as u32 - Register::R8 as u32),
                        4 => Register::R8D + (r as u32 - Register::R8 as u32),
                        _ => r,
                    }
                } else {
                    renumber(guest, i as usize + 1)?
                };
                c.set_op_register(i, host);
                registers.push((i as usize, host, guest));
            }
            OpKind::Memory => {
                c.set_memory_base(MEMORY);
                c.set_memory_index(Register::None);
                c.set_memory_index_scale(1);
                c.set_memory_displacement64(0);
                c.set_memory_displ_size(0);
                c.set_segment_prefix(Register::None);
            }
            k if is_immediate(k) => {}
            _ => return None,
        }
    }
    c.set_has_rep_prefix(false);
    c.set_has_repne_prefix(false);
    c.set_has_xacquire_prefix(false);
    c.set_has_xrelease_prefix(false);
    c.set_code_size(iced_x86::CodeSize::Code64);
    Some((c, registers))
}

fn is_immediate(k: OpKind) -> bool {
    matches!(
        k,
        OpKind::Immediate8
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
    )
}

/// Generates the thunk of `insn`, or `None` if it is none that can run verbatim.
pub(super) fn generate(
    insn: &Instruction,
    info: &CodeInfo,
    factory: &mut InstructionInfoFactory,
) -> Option<Vec<u8>> {
    let (native, registers) = canonical(insn)?;
    let used = factory.info(&native);
    let operands: Vec<Operand> = registers
        .iter()
        .map(|&(index, host, guest)| Operand {
            index,
            host,
            guest,
            access: used.op_access(index as u32),
        })
        .collect();
    // RAX, RCX, RDX, RBX: (read or written, written).
    let mut implicit = [(false, false); 4];
    let mut xmm0 = (false, false);
    for r in used.used_registers() {
        let full = r.register().full_register();
        let write = !matches!(r.access(), OpAccess::Read | OpAccess::CondRead);
        if operands.iter().any(|o| o.host.full_register() == full) || full == MEMORY {
            continue;
        }
        let slot = match full {
            Register::RAX => &mut implicit[0],
            Register::RCX => &mut implicit[1],
            Register::RDX => &mut implicit[2],
            Register::RBX => &mut implicit[3],
            Register::ZMM0 => &mut xmm0,
            _ if r.register().is_st() || r.register().is_mm() => continue,
            _ if info.class == Class::X87 => continue,
            _ => return None,
        };
        slot.0 = true;
        slot.1 |= write;
    }
    for m in used.used_memory() {
        if m.base() != MEMORY || m.index() != Register::None || m.displacement() != 0 {
            return None;
        }
    }
    let arithmetic = RflagsBits::OF
        | RflagsBits::SF
        | RflagsBits::ZF
        | RflagsBits::AF
        | RflagsBits::CF
        | RflagsBits::PF;
    let flags_out = native.rflags_modified() & arithmetic != 0;
    let plain = matches!(info.class, Class::Gpr | Class::VexGpr);
    let flags_in = native.rflags_read() & arithmetic != 0 || plain && flags_out;

    let mut a = Code64 {
        encoder: Encoder::try_new(64).ok()?,
    };
    if info.float {
        float_begin(&mut a)?;
    }
    let wide = info.class == Class::Vex;
    let mmx = operands.iter().any(|o| o.host.is_mm());
    for o in &operands {
        a.load(Code::Mov_r32_rm32, Register::EAX, ARGS, o.index * 4)?;
        let at = MemoryOperand::with_base_index(CPU, Register::RAX);
        let (code, host) = if o.host.is_gpr() {
            (Code::Mov_r64_rm64, o.host.full_register())
        } else if o.host.is_mm() {
            (Code::Movq_mm_mmm64, o.host)
        } else if wide {
            if o.access == OpAccess::Write {
                continue;
            }
            (Code::VEX_Vmovups_ymm_ymmm256, ymm(o.host))
        } else {
            (Code::Movups_xmm_xmmm128, o.host)
        };
        a.put(Instruction::with2(code, host, at))?;
    }
    if xmm0.0 {
        let at = offset_of!(Cpu, vec);
        if wide {
            a.load(Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0, CPU, at)?;
        } else {
            a.load(Code::Movups_xmm_xmmm128, Register::XMM0, CPU, at)?;
        }
    }
    a.put(Instruction::with2(
        Code::Mov_r64_rm64,
        MEMORY,
        Register::RDX,
    ))?;
    if is_bit_string(&native) {
        // The bit number selects the word too; the address has been adjusted.
        let bits = native.op1_register().size() as u32 * 8;
        a.put(Instruction::with2(
            Code::And_rm32_imm8,
            Register::R9D,
            bits - 1,
        ))?;
    }
    if info.class == Class::X87 {
        a.one(Code::Fxrstor64_m512byte, CPU, offset_of!(Cpu, fpu) as i64)?;
    }
    if flags_in {
        a.load(
            Code::Movzx_r32_rm16,
            Register::EAX,
            CPU,
            offset_of!(Cpu, cc),
        )?;
        // add al, 127; sahf
        a.bytes(&[0x04, 0x7f, 0x9e]);
    }
    const IMPLICIT: [(Register, usize); 4] = [
        (Register::RAX, 0),
        (Register::RCX, 8),
        (Register::RDX, 16),
        (Register::RBX, 24),
    ];
    if implicit[3].0 {
        if operands
            .iter()
            .any(|o| o.host.full_register() == Register::R11)
        {
            return None;
        }
        a.put(Instruction::with2(
            Code::Mov_r64_rm64,
            Register::R11,
            Register::RBX,
        ))?;
    }
    for (i, &(r, at)) in IMPLICIT.iter().enumerate() {
        if implicit[i].0 {
            a.load(Code::Mov_r64_rm64, r, CPU, at)?;
        }
    }

    a.put(Ok(native))?;

    if info.float {
        if flags_out {
            // lahf; seto al; movzx r11d, ax
            a.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x44, 0x0f, 0xb7, 0xd8]);
        }
        float_end(&mut a, wide)?;
    }
    for (i, &(r, at)) in IMPLICIT.iter().enumerate() {
        if implicit[i].1 {
            a.store(Code::Mov_rm64_r64, CPU, at, r)?;
        }
    }
    if implicit[3].0 {
        a.put(Instruction::with2(
            Code::Mov_r64_rm64,
            Register::RBX,
            Register::R11,
        ))?;
    }
    if xmm0.1 {
        let at = offset_of!(Cpu, vec);
        if wide {
            a.store(Code::VEX_Vmovups_ymmm256_ymm, CPU, at, Register::YMM0)?;
        } else {
            a.store(Code::Movups_xmmm128_xmm, CPU, at, Register::XMM0)?;
        }
    }
    // In reverse: where an instruction writes one register twice, its first operand stays.
    for o in operands.iter().rev().filter(|o| o.written()) {
        a.load(Code::Mov_r32_rm32, Register::R8D, ARGS, o.index * 4)?;
        let at = MemoryOperand::with_base_index(CPU, Register::R8);
        let (code, host) = if o.host.is_gpr() {
            match o.guest.size() {
                1 => (Code::Mov_rm8_r8, o.host),
                2 => (Code::Mov_rm16_r16, o.host),
                _ => (Code::Mov_rm64_r64, o.host.full_register()),
            }
        } else if o.host.is_mm() {
            (Code::Movq_mmm64_mm, o.host)
        } else if wide {
            (Code::VEX_Vmovups_ymmm256_ymm, ymm(o.host))
        } else {
            (Code::Movups_xmmm128_xmm, o.host)
        };
        a.put(Instruction::with2(code, at, host))?;
    }
    if flags_out {
        if info.float {
            a.store(Code::Mov_rm64_r64, CPU, offset_of!(Cpu, cc), Register::R11)?;
        } else {
            // lahf; seto al; movzx eax, ax
            a.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x0f, 0xb7, 0xc0]);
            a.store(Code::Mov_rm64_r64, CPU, offset_of!(Cpu, cc), Register::RAX)?;
        }
    }
    if info.class == Class::X87 {
        a.one(Code::Fxsave64_m512byte, CPU, offset_of!(Cpu, fpu) as i64)?;
        a.put(Ok(Instruction::with(Code::Fninit)))?;
        default_mxcsr(&mut a)?;
    }
    if wide {
        a.put(Ok(Instruction::with(Code::VEX_Vzeroupper)))?;
    }
    if mmx {
        a.put(Ok(Instruction::with(Code::Emms)))?;
    }
    // xor eax, eax; ret
    a.bytes(&[0x31, 0xc0, 0xc3]);
    Some(a.finish())
}

fn ymm(r: Register) -> Register {
    if r.is_xmm() {
        Register::YMM0 + (r as u32 - Register::XMM0 as u32)
    } else {
        r
    }
}

/// BT and its kin with a register bit number address memory beyond the operand.
pub(super) fn is_bit_string(insn: &Instruction) -> bool {
    use Mnemonic::{Bt, Btc, Btr, Bts};
    matches!(insn.mnemonic(), Bt | Btc | Btr | Bts)
        && insn.op0_kind() == OpKind::Memory
        && insn.op1_kind() == OpKind::Register
}

/// Loads the guest's MXCSR with all exceptions masked and no flag raised.
fn float_begin(a: &mut Code64) -> Option<()> {
    a.load(Code::Mov_r32_rm32, Register::EAX, CPU, MXCSR)?;
    // test ah, 8; jnz +6; mov eax, SLOW; ret
    a.bytes(&[0xf6, 0xc4, 0x08, 0x75, 0x06, 0xb8]);
    a.bytes(&SLOW.to_le_bytes());
    a.bytes(&[0xc3]);
    // and eax, 0xffc0; or eax, 0x1f80; mov [rsp-8], eax
    a.bytes(&[0x25, 0xc0, 0xff, 0, 0, 0x0d, 0x80, 0x1f, 0, 0]);
    a.store(
        Code::Mov_rm32_r32,
        Register::RSP,
        0usize.wrapping_sub(8),
        Register::EAX,
    )?;
    a.one(Code::Ldmxcsr_m32, Register::RSP, -8)
}

/// Takes the raised flags, puts the host's MXCSR back, returns if the guest has
/// unmasked one of them, else adds them to the guest's.
fn float_end(a: &mut Code64, wide: bool) -> Option<()> {
    a.one(Code::Stmxcsr_m32, Register::RSP, -8)?;
    default_mxcsr(a)?;
    a.load(
        Code::Mov_r32_rm32,
        Register::EAX,
        Register::RSP,
        0usize.wrapping_sub(8),
    )?;
    // and eax, 0x3f
    a.bytes(&[0x83, 0xe0, 0x3f]);
    a.load(Code::Mov_r32_rm32, Register::ECX, CPU, MXCSR)?;
    // mov edx, ecx; shr edx, 7; not edx; test edx, eax; jz over the return
    a.bytes(&[0x89, 0xca, 0xc1, 0xea, 0x07, 0xf7, 0xd2, 0x85, 0xc2]);
    if wide {
        a.bytes(&[0x74, 0x04, 0xc5, 0xf8, 0x77, 0xc3]);
    } else {
        a.bytes(&[0x74, 0x01, 0xc3]);
    }
    // or ecx, eax
    a.bytes(&[0x09, 0xc1]);
    a.store(Code::Mov_rm32_r32, CPU, MXCSR, Register::ECX)
}

fn default_mxcsr(a: &mut Code64) -> Option<()> {
    // mov dword [rsp-16], 0x1f80
    a.bytes(&[0xc7, 0x44, 0x24, 0xf0, 0x80, 0x1f, 0, 0]);
    a.one(Code::Ldmxcsr_m32, Register::RSP, -16)
}
