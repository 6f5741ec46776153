//! AVX2 gathers, element by element: a fault leaves the elements gathered so
//! far in the destination and their mask bits clear, so that the instruction
//! resumes where it stopped (Intel SDM Vol. 2 VPGATHERDD).

use iced_x86::{Instruction, Mnemonic, Register};

use crate::{
    fault::Fault,
    mem::segment_number,
    state::{Cpu, VecReg},
};

pub(super) fn gather(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    use Mnemonic::*;
    let (index_size, size) = match insn.mnemonic() {
        Vgatherdps | Vpgatherdd => (4, 4),
        Vgatherdpd | Vpgatherdq => (4, 8),
        Vgatherqps | Vpgatherqd => (8, 4),
        _ => (8, 8),
    };
    let destination = insn.op0_register().number();
    let mask = insn.op2_register().number();
    let index_register = insn.memory_index();
    let index = index_register.number();
    if destination == mask || destination == index || mask == index {
        return Err(Fault::ud());
    }
    let width = insn.op0_register().size().max(index_register.size());
    let count = width / index_size.max(size);
    let base = insn.memory_base();
    let wide = if base == Register::None {
        insn.memory_displ_size() == 8 || insn.memory_displ_size() != 4 && cpu.is_64bit()
    } else {
        base.size() == 8
    };
    let wrap = if wide { !0 } else { 0xffff_ffff };
    let start = cpu.gpr(base).wrapping_add(insn.memory_displacement64());
    let segment = segment_number(insn.memory_segment());
    let privilege = cpu.privilege();
    let indices = cpu.vec[index];
    // Each mask element becomes all ones or zeros before anything else.
    for i in 0..count {
        let e = &mut cpu.vec[mask].0[i * size..][..size];
        let on = e[size - 1] & 0x80 != 0;
        e.fill(if on { 0xff } else { 0 });
    }
    let register = insn.op0_register().size();
    cpu.vec[destination].0[register..].fill(0);
    cpu.vec[mask].0[register..].fill(0);
    for i in 0..count {
        if cpu.vec[mask].0[i * size] == 0 {
            continue;
        }
        let at = &indices.0[i * index_size..][..index_size];
        let n = if index_size == 4 {
            i64::from(i32::from_le_bytes([at[0], at[1], at[2], at[3]])) as u64
        } else {
            let mut b = [0; 8];
            b.copy_from_slice(at);
            u64::from_le_bytes(b)
        };
        let offset = start.wrapping_add(n.wrapping_mul(insn.memory_index_scale().into())) & wrap;
        let address = cpu.linear(segment, offset, size as u64, false)?;
        let mut element = [0; 8];
        cpu.read_linear(address, &mut element[..size], privilege)?;
        cpu.vec[destination].0[i * size..][..size].copy_from_slice(&element[..size]);
        cpu.vec[mask].0[i * size..][..size].fill(0);
    }
    cpu.vec[mask] = VecReg([0; 64]);
    cpu.vec[destination].0[count * size..].fill(0);
    Ok(())
}
