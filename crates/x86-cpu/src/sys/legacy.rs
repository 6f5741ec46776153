//! Instructions that 64-bit code lacks or hardly uses: decimal adjustment,
//! PUSHA, POPA, ENTER, LEAVE, XLAT, SALC (Intel SDM Vol. 2).

use iced_x86::{Code, Instruction};

use super::stack::Stack;
use crate::{
    fault::{Fault, vector},
    flags::{self, packed},
    flow::Flow,
    mem::ea::{address_mask, segment_number},
    state::{Cpu, reg, seg},
};

/// Sets SF, ZF, PF from `al`, AF and CF as given, and clears OF.
fn set_flags(cpu: &mut Cpu, al: u8, auxiliary: bool, carry: bool) {
    let parity = al.count_ones().is_multiple_of(2);
    let rflags = u64::from(carry)
        | u64::from(parity) << 2
        | u64::from(auxiliary) << 4
        | u64::from(al == 0) << 6
        | u64::from(al & 0x80);
    cpu.cc = flags::from_rflags(rflags);
}

fn set_ax(cpu: &mut Cpu, ax: u16) {
    cpu.regs[reg::RAX] = cpu.regs[reg::RAX] & !0xffff | u64::from(ax);
}

/// AAA (`add`) and AAS.
fn ascii_adjust(cpu: &mut Cpu, add: bool) -> Result<Flow, Fault> {
    let ax = cpu.regs[reg::RAX] as u16;
    let adjust = ax & 0xf > 9 || cpu.cc & packed::AF != 0;
    let mut new = ax;
    if adjust {
        new = if add {
            ax.wrapping_add(0x106)
        } else {
            ax.wrapping_sub(0x106)
        };
    }
    new &= 0xff0f;
    set_ax(cpu, new);
    set_flags(cpu, new as u8, adjust, adjust);
    Ok(Flow::Next)
}

pub(super) fn aaa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    ascii_adjust(cpu, true)
}

pub(super) fn aas(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    ascii_adjust(cpu, false)
}

pub(super) fn aam(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let base = insn.immediate8();
    if base == 0 {
        return Err(Fault::simple(vector::DE));
    }
    let al = cpu.regs[reg::RAX] as u8;
    set_ax(cpu, u16::from(al / base) << 8 | u16::from(al % base));
    set_flags(cpu, al % base, false, false);
    Ok(Flow::Next)
}

pub(super) fn aad(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let [al, ah, ..] = cpu.regs[reg::RAX].to_le_bytes();
    let al = al.wrapping_add(ah.wrapping_mul(insn.immediate8()));
    set_ax(cpu, u16::from(al));
    set_flags(cpu, al, false, false);
    Ok(Flow::Next)
}

/// DAA (`add`) and DAS.
fn decimal_adjust(cpu: &mut Cpu, add: bool) -> Result<Flow, Fault> {
    let old = cpu.regs[reg::RAX] as u8;
    let old_carry = cpu.cc & packed::CF != 0;
    let low = old & 0xf > 9 || cpu.cc & packed::AF != 0;
    let high = old > 0x99 || old_carry;
    let mut al = old;
    let mut carry = high;
    let change = |al: u8, by: u8| {
        if add {
            al.overflowing_add(by)
        } else {
            al.overflowing_sub(by)
        }
    };
    if low {
        let (v, wrapped) = change(al, 6);
        al = v;
        // DAS alone lets the low digit's borrow through.
        carry |= wrapped && !add;
    }
    if high {
        al = change(al, 0x60).0;
    }
    cpu.regs[reg::RAX] = cpu.regs[reg::RAX] & !0xff | u64::from(al);
    set_flags(cpu, al, low, carry);
    Ok(Flow::Next)
}

pub(super) fn daa(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    decimal_adjust(cpu, true)
}

pub(super) fn das(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    decimal_adjust(cpu, false)
}

pub(super) fn salc(cpu: &mut Cpu, _: &Instruction) -> Result<Flow, Fault> {
    let al = if cpu.cc & packed::CF != 0 { 0xff } else { 0 };
    cpu.regs[reg::RAX] = cpu.regs[reg::RAX] & !0xff | al;
    Ok(Flow::Next)
}

pub(super) fn xlat(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let al = cpu.regs[reg::RAX] & 0xff;
    let offset = cpu.regs[reg::RBX].wrapping_add(al) & address_mask(insn);
    let segment = segment_number(insn.memory_segment());
    let at = cpu.linear(segment, offset, 1, false)?;
    let privilege = cpu.privilege();
    let value = cpu.read_uint(at, 1, privilege)?;
    cpu.regs[reg::RAX] = cpu.regs[reg::RAX] & !0xff | value;
    Ok(Flow::Next)
}

pub(super) fn pusha(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = if insn.code() == Code::Pushaw { 2 } else { 4 };
    let mut stack = Stack::current(cpu, 0);
    for i in 0..8 {
        let value = cpu.regs[i];
        stack.push(cpu, value, size)?;
    }
    cpu.set_stack_pointer(stack.sp);
    Ok(Flow::Next)
}

pub(super) fn popa(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = if insn.code() == Code::Popaw { 2 } else { 4 };
    let mut values = [0; 8];
    for (i, v) in values.iter_mut().enumerate() {
        *v = cpu.peek(i as u64 * size, size)?;
    }
    for (i, v) in values.into_iter().rev().enumerate() {
        if i == reg::RSP {
            continue;
        }
        set_sized(cpu, i, v, size);
    }
    cpu.set_stack_pointer(cpu.regs[reg::RSP].wrapping_add(8 * size));
    Ok(Flow::Next)
}

/// Sets register `index` as an instruction of operand size `size` does.
fn set_sized(cpu: &mut Cpu, index: usize, value: u64, size: u64) {
    let slot = &mut cpu.regs[index];
    *slot = match size {
        2 => *slot & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
}

pub(super) fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = match insn.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let allocate = u64::from(insn.immediate16());
    let level = insn.immediate8_2nd() & 0x1f;
    let mask = cpu.stack_mask();
    let privilege = cpu.privilege();
    let mut stack = Stack::current(cpu, 0);
    let mut rbp = cpu.regs[reg::RBP];
    stack.push(cpu, rbp, size)?;
    let frame = stack.sp;
    for _ in 1..level {
        rbp = rbp.wrapping_sub(size) & mask;
        let at = cpu.linear(seg::SS, rbp, size, false)?;
        let value = cpu.read_uint(at, size as usize, privilege)?;
        stack.push(cpu, value, size)?;
    }
    if level > 0 {
        stack.push(cpu, frame, size)?;
    }
    let sp = stack.sp.wrapping_sub(allocate) & mask;
    // The new top of the stack must be writable, though nothing is written.
    let at = cpu.linear(seg::SS, sp, size, true)?;
    cpu.probe_write_linear(at, size as usize, privilege)?;
    set_sized(cpu, reg::RBP, frame, size);
    cpu.set_stack_pointer(sp);
    Ok(Flow::Next)
}

pub(super) fn leave(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Fault> {
    let size = match insn.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let sp = cpu.regs[reg::RBP] & cpu.stack_mask();
    let at = cpu.linear(seg::SS, sp, size, false)?;
    let privilege = cpu.privilege();
    let value = cpu.read_uint(at, size as usize, privilege)?;
    cpu.set_stack_pointer(sp.wrapping_add(size));
    set_sized(cpu, reg::RBP, value, size);
    Ok(Flow::Next)
}
