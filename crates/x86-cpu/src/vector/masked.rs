//! Masked moves: only the selected elements touch memory, and only they fault.

use iced_x86::{Instruction, Mnemonic};

use super::run::at_rdi;
use crate::{fault::Fault, state::Cpu};

/// Size of the elements that the mask selects.
fn element_size(insn: &Instruction) -> usize {
    match insn.mnemonic() {
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => 8,
        _ => 4,
    }
}

/// Whether element `i` of `size` bytes has its highest bit set.
fn selected(mask: &[u8], i: usize, size: usize) -> bool {
    mask[(i + 1) * size - 1] & 0x80 != 0
}

/// The linear addresses of the operand's `count` elements that `mask` selects.
fn addresses(
    cpu: &Cpu,
    insn: &Instruction,
    mask: &[u8],
    size: usize,
    write: bool,
) -> Result<[Option<u64>; 8], Fault> {
    let (segment, offset) = cpu.effective_address(insn);
    let wrap = crate::mem::address_mask(insn);
    let mut at = [None; 8];
    for (i, a) in at.iter_mut().enumerate().take(mask.len() / size) {
        if selected(mask, i, size) {
            let offset = offset.wrapping_add((i * size) as u64) & wrap;
            *a = Some(cpu.linear(segment, offset, size as u64, write)?);
        }
    }
    Ok(at)
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q from memory.
pub(super) fn load(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let size = element_size(insn);
    let width = insn.op0_register().size();
    let mask = cpu.vec[insn.op1_register().number()];
    let at = addresses(cpu, insn, &mask.0[..width], size, false)?;
    let privilege = cpu.privilege();
    let mut out = [0; 64];
    for (i, a) in at.into_iter().enumerate() {
        if let Some(a) = a {
            cpu.read_linear(a, &mut out[i * size..][..size], privilege)?;
        }
    }
    cpu.vec[insn.op0_register().number()].0 = out;
    Ok(())
}

/// VMASKMOVPS/PD and VPMASKMOVD/Q to memory.
pub(super) fn store(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let size = element_size(insn);
    let width = insn.op2_register().size();
    let mask = cpu.vec[insn.op1_register().number()];
    let data = cpu.vec[insn.op2_register().number()];
    let at = addresses(cpu, insn, &mask.0[..width], size, true)?;
    let privilege = cpu.privilege();
    for a in at.into_iter().flatten() {
        cpu.probe_write_linear(a, size, privilege)?;
    }
    for (i, a) in at.into_iter().enumerate() {
        if let Some(a) = a {
            cpu.write_linear(a, &data.0[i * size..][..size], privilege)?;
        }
    }
    Ok(())
}

/// MASKMOVQ, MASKMOVDQU and VMASKMOVDQU: bytes at rDI.
pub(super) fn maskmov(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let (segment, offset) = at_rdi(cpu, insn);
    let register = |cpu: &Cpu, i| {
        let r = insn.op_register(i);
        let mut b = [0; 16];
        if r.is_mm() {
            b[..8].copy_from_slice(&super::mmx::read(cpu, r.number()));
        } else {
            b.copy_from_slice(&cpu.vec[r.number()].0[..16]);
        }
        b
    };
    let width = if insn.op1_register().is_mm() { 8 } else { 16 };
    let data = register(cpu, 1);
    let mask = register(cpu, 2);
    let at = cpu.linear(segment, offset, width as u64, true)?;
    let privilege = cpu.privilege();
    let byte = |i: usize| at.wrapping_add(i as u64);
    for i in (0..width).filter(|&i| selected(&mask, i, 1)) {
        let a = cpu.wrap_linear(byte(i));
        cpu.probe_write_linear(a, 1, privilege)?;
    }
    let mut i = 0;
    while i < width {
        if !selected(&mask, i, 1) {
            i += 1;
            continue;
        }
        let n = (i..width).take_while(|&j| selected(&mask, j, 1)).count();
        let a = cpu.wrap_linear(byte(i));
        cpu.write_linear(a, &data[i..i + n], privilege)?;
        i += n;
    }
    Ok(())
}
