//! The emitter against the decoder.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::emit::{Emitter, Mem, Opcode, Rm};

const REGISTERS: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

fn decode(e: &Emitter) -> Instruction {
    let mut d = Decoder::with_ip(64, &e.code, 0x1000, DecoderOptions::NONE);
    let insn = d.decode();
    assert!(
        !insn.is_invalid() && insn.len() == e.code.len(),
        "{:02x?}",
        e.code
    );
    insn
}

#[test]
fn memory_operands_are_what_was_asked_for() {
    let mut e = Emitter::default();
    for base in (0..16).map(Some).chain([None]) {
        for index in (0..16).filter(|&r| r != 4).map(Some).chain([None]) {
            for disp in [0, 1, -1, 127, -128, 128, -129, i32::MAX, i32::MIN] {
                for scale in 0..4 {
                    let m = Mem {
                        base,
                        index: index.map(|r| (r, scale)),
                        disp,
                    };
                    e.start(0x1000);
                    e.modrm(Opcode::wide(&[0x8b]), 9, Rm::Mem(m));
                    let i = decode(&e);
                    assert_eq!(i.code(), Code::Mov_r64_rm64);
                    assert_eq!(i.op0_register(), Register::R9);
                    let name =
                        |r: Option<u8>| r.map_or(Register::None, |r| REGISTERS[usize::from(r)]);
                    assert_eq!(i.memory_base(), name(base), "{m:?}");
                    assert_eq!(i.memory_index(), name(index), "{m:?}");
                    assert_eq!(i.memory_displacement64() as i32, disp, "{m:?}");
                    if index.is_some() {
                        assert_eq!(i.memory_index_scale(), 1 << scale);
                    }
                }
            }
        }
    }
}

#[test]
fn registers_are_what_was_asked_for() {
    let mut e = Emitter::default();
    for a in 0..16 {
        for b in 0..16 {
            e.start(0);
            e.modrm(Opcode::wide(&[0x0f, 0xaf]), a, Rm::Reg(b));
            let i = decode(&e);
            assert_eq!(i.code(), Code::Imul_r64_rm64);
            assert_eq!(i.op0_register(), REGISTERS[usize::from(a)]);
            assert_eq!(i.op1_register(), REGISTERS[usize::from(b)]);
        }
        e.start(0);
        e.constant(a, 0x1122_3344_5566_7788);
        let i = decode(&e);
        assert_eq!(
            (i.op0_register(), i.immediate64()),
            (REGISTERS[usize::from(a)], 0x1122_3344_5566_7788)
        );
        e.start(0);
        e.constant32(a, 0x1122_3344);
        let i = decode(&e);
        assert_eq!(i.op0_register().full_register(), REGISTERS[usize::from(a)]);
        assert_eq!(i.immediate32(), 0x1122_3344);
        for imm in [5, -5, 0x12345] {
            e.start(0);
            e.arithmetic(true, 7, Rm::Reg(a), imm);
            let i = decode(&e);
            assert_eq!(i.mnemonic(), iced_x86::Mnemonic::Cmp);
            assert_eq!(i.op0_register(), REGISTERS[usize::from(a)]);
            assert_eq!(i.immediate(1) as i64, i64::from(imm));
        }
    }
    e.start(0);
    let op = Opcode {
        lock: true,
        prefix: Some(0x66),
        rex: true,
        ..Opcode::narrow(&[0x01])
    };
    e.modrm(op, 1, super::emit::mem(5, 0));
    let i = decode(&e);
    assert!(i.has_lock_prefix() && i.code() == Code::Add_rm16_r16);
    assert_eq!(i.op0_kind(), OpKind::Memory);
}

#[test]
fn jumps_go_where_they_are_aimed() {
    let mut e = Emitter::default();
    e.start(0x1000);
    let j = e.jump();
    e.aim(j, 0x800);
    assert_eq!(decode(&e).near_branch_target(), 0x800);
    e.start(0x1000);
    let j = e.branch(4);
    e.bind(j);
    let i = decode(&e);
    assert_eq!(
        (i.code(), i.near_branch_target()),
        (Code::Je_rel32_64, 0x1006)
    );
    assert_eq!(e.site(j), 0x1002);
}
