//! Random cases of one `Code`: operands, registers, memory.

use caisson_x86_cpu::mem::gpr_offset;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use crate::{
    native::State,
    rng::Rng,
    soft::{ARENA, ARENA_LEN},
};

/// One instruction with everything that it starts from.
pub(crate) struct Case {
    pub(crate) insn: Instruction,
    pub(crate) bytes: Vec<u8>,
    pub(crate) input: State,
    /// Where the memory operand is meant to be.
    pub(crate) target: u64,
}

fn gpr(rng: &mut Rng, size: usize) -> Register {
    let n = rng.below(16) as u32;
    match size {
        1 if (4..8).contains(&n) && rng.one_in(2) => Register::AH + (n - 4),
        1 if n < 4 => Register::AL + n,
        1 => Register::SPL + (n - 4),
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

struct Maker<'a> {
    rng: &'a mut Rng,
    insn: Instruction,
    memory: bool,
}

impl Maker<'_> {
    fn register(&mut self, i: u32, r: Register) {
        self.insn.set_op_kind(i, OpKind::Register);
        self.insn.set_op_register(i, r);
    }

    fn register_or_memory(&mut self, i: u32, r: Register) {
        if self.rng.below(5) < 3 {
            self.memory(i, None);
        } else {
            self.register(i, r);
        }
    }

    fn memory(&mut self, i: u32, vector_index: Option<Register>) {
        let rng = &mut *self.rng;
        self.memory = true;
        self.insn.set_op_kind(i, OpKind::Memory);
        let no_base = vector_index.is_none() && rng.one_in(12);
        let narrow = rng.one_in(8);
        let base = if no_base {
            Register::None
        } else {
            gpr(rng, if narrow { 4 } else { 8 })
        };
        self.insn.set_memory_base(base);
        let index = match vector_index {
            Some(r) => r,
            None if no_base || rng.one_in(2) => Register::None,
            None => {
                let r = gpr(rng, base.size());
                if r == base || matches!(r, Register::RSP | Register::ESP) {
                    Register::None
                } else {
                    r
                }
            }
        };
        self.insn.set_memory_index(index);
        if index != Register::None {
            self.insn.set_memory_index_scale(1 << rng.below(4));
        }
        if no_base {
            self.insn.set_memory_displ_size(8);
            let d = ARENA + 64 * self.rng.below(ARENA_LEN / 64 - 16) as u64;
            self.set_displacement(d as i64);
            return;
        }
        let wide = if base.size() == 4 { 4 } else { 8 };
        match rng.below(3) {
            0 => self.insn.set_memory_displ_size(0),
            1 => {
                self.insn.set_memory_displ_size(1);
                let d = self.rng_i8();
                self.set_displacement(d.into());
            }
            _ => {
                self.insn.set_memory_displ_size(wide);
                let d = self.rng.next() as i32 >> 4;
                self.set_displacement(d.into());
            }
        }
    }

    fn rng_i8(&mut self) -> i8 {
        self.rng.next() as i8
    }

    fn set_displacement(&mut self, d: i64) {
        self.insn.set_memory_displacement64(d as u64);
    }

    fn operand(&mut self, i: u32, kind: OpCodeOperandKind) -> Option<()> {
        use OpCodeOperandKind as K;
        let n = self.rng.below(16) as u32;
        let r = |base: Register| base + n;
        let mm = Register::MM0 + n % 8;
        match kind {
            K::mem => self.memory(i, None),
            K::mem_vsib32x | K::mem_vsib64x => self.memory(i, Some(r(Register::XMM0))),
            K::mem_vsib32y | K::mem_vsib64y => self.memory(i, Some(r(Register::YMM0))),
            K::r8_or_mem => {
                let g = gpr(self.rng, 1);
                self.register_or_memory(i, g);
            }
            K::r16_or_mem => self.register_or_memory(i, r(Register::AX)),
            K::r32_or_mem => self.register_or_memory(i, r(Register::EAX)),
            K::r64_or_mem => self.register_or_memory(i, r(Register::RAX)),
            K::mm_or_mem => self.register_or_memory(i, mm),
            K::xmm_or_mem => self.register_or_memory(i, r(Register::XMM0)),
            K::ymm_or_mem => self.register_or_memory(i, r(Register::YMM0)),
            K::r8_reg | K::r8_opcode => {
                let g = gpr(self.rng, 1);
                self.register(i, g);
            }
            K::r16_reg | K::r16_rm | K::r16_opcode => self.register(i, r(Register::AX)),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                self.register(i, r(Register::EAX));
            }
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                self.register(i, r(Register::RAX));
            }
            K::mm_reg | K::mm_rm => self.register(i, mm),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                self.register(i, r(Register::XMM0));
            }
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                self.register(i, r(Register::YMM0));
            }
            K::al => self.register(i, Register::AL),
            K::cl => self.register(i, Register::CL),
            K::ax => self.register(i, Register::AX),
            K::dx => self.register(i, Register::DX),
            K::eax => self.register(i, Register::EAX),
            K::rax => self.register(i, Register::RAX),
            K::st0 => self.register(i, Register::ST0),
            K::sti_opcode => self.register(i, Register::ST0 + n % 8),
            K::seg_rDI => {
                self.memory = true;
                self.insn.set_op_kind(i, OpKind::MemorySegRDI);
            }
            K::imm8_const_1 => {
                self.insn.set_op_kind(i, OpKind::Immediate8);
                self.insn.set_immediate8(1);
            }
            K::imm8 => {
                self.insn.set_op_kind(i, OpKind::Immediate8);
                self.insn.set_immediate8(self.rng.next() as u8);
            }
            K::imm8sex16 | K::imm8sex32 | K::imm8sex64 => {
                let v = self.rng_i8();
                match kind {
                    K::imm8sex16 => {
                        self.insn.set_op_kind(i, OpKind::Immediate8to16);
                        self.insn.set_immediate8to16(v.into());
                    }
                    K::imm8sex32 => {
                        self.insn.set_op_kind(i, OpKind::Immediate8to32);
                        self.insn.set_immediate8to32(v.into());
                    }
                    _ => {
                        self.insn.set_op_kind(i, OpKind::Immediate8to64);
                        self.insn.set_immediate8to64(v.into());
                    }
                }
            }
            K::imm16 => {
                self.insn.set_op_kind(i, OpKind::Immediate16);
                self.insn.set_immediate16(self.rng.integer() as u16);
            }
            K::imm32 => {
                self.insn.set_op_kind(i, OpKind::Immediate32);
                self.insn.set_immediate32(self.rng.integer() as u32);
            }
            K::imm32sex64 => {
                self.insn.set_op_kind(i, OpKind::Immediate32to64);
                self.insn
                    .set_immediate32to64((self.rng.integer() as i32).into());
            }
            K::imm64 => {
                self.insn.set_op_kind(i, OpKind::Immediate64);
                self.insn.set_immediate64(self.rng.integer());
            }
            _ => return None,
        }
        Some(())
    }
}

/// A random case of `code`, placed at `rip`; `None` if this draw has no encoding.
pub(crate) fn make(rng: &mut Rng, code: Code, rip: u64) -> Option<Case> {
    let op = code.op_code();
    let mut insn = Instruction::default();
    insn.set_code(code);
    let mut maker = Maker {
        rng,
        insn,
        memory: false,
    };
    for i in 0..op.op_count() {
        maker.operand(i, op.op_kind(i))?;
    }
    let (mut insn, memory) = (maker.insn, maker.memory);
    if op.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && rng.one_in(3) {
        insn.set_has_lock_prefix(true);
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&insn, rip).ok()?;
    let bytes = encoder.take_buffer();
    let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, rip, iced_x86::DecoderOptions::NONE);
    let insn = decoder.decode();
    if insn.code() != code || insn.len() != bytes.len() {
        return None;
    }
    let mut input = State::ZERO;
    for r in &mut input.gpr {
        *r = rng.integer();
    }
    for y in &mut input.ymm {
        rng.fill(y);
    }
    input.rflags = 2 | rng.next() & 0x8d5;
    x87_state(rng, &mut input.fx);
    let mut target = ARENA + 256;
    if format!("{:?}", insn.mnemonic()).starts_with('X') && insn.is_save_restore_instruction() {
        // The host enables more state components than the guest has.
        let used = |r: Register| {
            let n = gpr_offset(r.full_register());
            r != Register::None && matches!(n, Some(0 | 16))
        };
        if used(insn.memory_base()) || used(insn.memory_index()) {
            return None;
        }
        input.gpr[0] &= 7;
        input.gpr[2] = 0;
    }
    if memory {
        target = aim(rng, &insn, &mut input)?;
    }
    Some(Case {
        insn,
        bytes,
        input,
        target,
    })
}

fn set(input: &mut State, r: Register, value: u64) {
    if let Some(offset) = gpr_offset(r.full_register()) {
        input.gpr[offset / 8] = value;
    }
}

fn get(input: &State, r: Register) -> u64 {
    gpr_offset(r.full_register()).map_or(0, |o| input.gpr[o / 8])
}

/// Chooses an address and makes the memory operand's registers yield it.
fn aim(rng: &mut Rng, insn: &Instruction, input: &mut State) -> Option<u64> {
    let size = insn.memory_size().size().max(1) as u64;
    let end = ARENA + ARENA_LEN as u64;
    let room = ARENA_LEN as u64 - 1024;
    let mut target = match rng.below(40) {
        0 => end - rng.below(size as usize * 2) as u64,
        1 => ARENA - 1 - rng.below(size as usize) as u64,
        2 => ARENA + 4096 - rng.below(size as usize + 1) as u64,
        3..=8 => ARENA + 128 + rng.next() % room,
        _ => ARENA + 128 + (rng.next() % room) / 64 * 64,
    };
    let rdi = matches!(insn.op0_kind(), OpKind::MemorySegRDI);
    if rng.one_in(100) && (rdi || insn.memory_base().size() == 8) {
        target |= 1 << (48 + rng.below(15));
    }
    if rdi {
        input.gpr[7] = target;
        return Some(target);
    }
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let displacement = insn.memory_displacement64();
    if base == Register::None {
        return Some(displacement);
    }
    let mut value = target.wrapping_sub(displacement);
    if index.is_vector_register() {
        target = ARENA + ARENA_LEN as u64 / 2;
        value = target.wrapping_sub(displacement);
        let far = rng.one_in(10);
        let number = index.number();
        let wide = matches!(
            insn.mnemonic(),
            Mnemonic::Vgatherqps
                | Mnemonic::Vgatherqpd
                | Mnemonic::Vpgatherqd
                | Mnemonic::Vpgatherqq
        );
        let element = |rng: &mut Rng| {
            let span = if far { 1200 } else { 300 };
            rng.below(span) as i64 - span as i64 / 2
        };
        for i in 0..8 {
            let e = element(rng);
            if wide && i < 4 {
                input.ymm[number][8 * i..][..8].copy_from_slice(&e.to_le_bytes());
            } else if !wide {
                input.ymm[number][4 * i..][..4].copy_from_slice(&(e as i32).to_le_bytes());
            }
        }
    } else if index != Register::None {
        let i = get(input, index);
        value = value.wrapping_sub(i.wrapping_mul(insn.memory_index_scale().into()));
    }
    if base.size() == 4 {
        // The upper half of the registers does not count.
        value = value & 0xffff_ffff | rng.next() << 32;
    }
    set(input, base, value);
    if matches!(
        insn.mnemonic(),
        Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts
    ) && insn.op1_kind() == OpKind::Register
    {
        let r = insn.op1_register();
        let full = r.full_register();
        if full == base.full_register() || full == index.full_register() {
            return None;
        }
        let bit = rng.below(4000) as i64 - 1000;
        let keep = if r.size() == 8 {
            0
        } else {
            !0 << (8 * r.size())
        };
        let old = get(input, r);
        set(input, r, old & keep | bit as u64 & !keep);
    }
    Some(target)
}

/// x87 registers, tags, control and status; MXCSR.
fn x87_state(rng: &mut Rng, fx: &mut [u8; 512]) {
    let mut cw = 0x37f;
    if rng.one_in(2) {
        cw = cw & !0xf00 | rng.pick(&[0, 2, 3]) << 8 | (rng.next() as u16 & 3) << 10;
    }
    if rng.one_in(6) {
        cw &= !(rng.next() as u16 & 0x3f);
    }
    let mut sw = (rng.next() as u16 & 0x47) << 8 & 0x4700;
    sw |= (rng.next() as u16 & 7) << 11;
    if rng.one_in(8) {
        sw |= rng.next() as u16 & 0x7f;
    }
    if sw & !cw & 0x3f != 0 {
        if rng.one_in(3) {
            sw |= 0x8080;
        } else {
            sw &= !(!cw & 0x3f);
        }
    }
    fx[0..2].copy_from_slice(&cw.to_le_bytes());
    fx[2..4].copy_from_slice(&sw.to_le_bytes());
    fx[4] = match rng.below(6) {
        0 => 0,
        1 => rng.next() as u8,
        _ => 0xff,
    };
    for i in 0..8 {
        let (mantissa, exponent) = rng.float80();
        fx[32 + 16 * i..][..8].copy_from_slice(&mantissa.to_le_bytes());
        fx[40 + 16 * i..][..2].copy_from_slice(&exponent.to_le_bytes());
    }
    let mut mxcsr = 0x1f80u32;
    if rng.one_in(2) {
        mxcsr |= rng.next() as u32 & 0xe07f;
    }
    if rng.one_in(6) {
        mxcsr &= !(rng.next() as u32 & 0x1f80);
    }
    // A flag that is raised and unmasked does no harm by itself.
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    fx[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
}
