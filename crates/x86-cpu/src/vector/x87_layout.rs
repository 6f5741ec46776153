//! FNSTENV, FLDENV, FNSAVE, FRSTOR: the x87 environment in its four layouts, by
//! operand size and mode (Intel SDM Vol. 1 §8.1.10).
//!
//! CPUID announces that FCS and FDS are deprecated: they are stored as zero.

use iced_x86::Instruction;

use super::x87::{self, ES, FCW, FDP, FIP, FOP, FSW, FTW, quad, set_quad, set_word, word};
use crate::{
    fault::Fault,
    state::{Cpu, FpuImage},
};

/// The bits of MXCSR that may be set.
pub const MXCSR_MASK: u32 = 0xffff;

const REGISTERS: usize = 32;

#[derive(Clone, Copy)]
struct Layout {
    /// 32-bit fields rather than 16-bit ones.
    wide: bool,
    /// Real or virtual-8086 mode: pointers are linear addresses.
    real: bool,
}

impl Layout {
    fn of(cpu: &Cpu, insn: &Instruction) -> Self {
        Self {
            wide: matches!(insn.memory_size().size(), 28 | 108),
            real: !cpu.is_protected() || cpu.is_v86(),
        }
    }

    fn len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// The tag word in its full form, two bits per physical register: valid, zero,
/// special, empty.
fn full_tags(image: &FpuImage) -> u16 {
    let top = word(image, FSW) >> 11 & 7;
    let mut tags = 0;
    for physical in 0..8u16 {
        let at = REGISTERS + 16 * usize::from(physical.wrapping_sub(top) & 7);
        let mantissa = quad(image, at);
        let exponent = word(image, at + 8) & 0x7fff;
        let tag = if image.0[FTW] >> physical & 1 == 0 {
            3
        } else if exponent == 0 && mantissa == 0 {
            1
        } else if exponent == 0 || exponent == 0x7fff || mantissa >> 63 == 0 {
            2
        } else {
            0
        };
        tags |= tag << (2 * physical);
    }
    tags
}

fn abridged_tags(tags: u16) -> u8 {
    (0..8).fold(0, |a, i| a | u8::from(tags >> (2 * i) & 3 != 3) << i)
}

/// The environment's seven fields.
fn environment(image: &FpuImage, layout: Layout) -> [u32; 7] {
    let (fip, fdp) = (quad(image, FIP) as u32, quad(image, FDP) as u32);
    let fop = u32::from(word(image, FOP) & 0x7ff);
    let mut e = [
        word(image, FCW).into(),
        word(image, FSW).into(),
        full_tags(image).into(),
        fip,
        0,
        fdp,
        0,
    ];
    match (layout.wide, layout.real) {
        (true, false) => e[4] = fop << 16,
        (true, true) => {
            e[3] = fip & 0xffff | 0xffff_0000;
            e[4] = (fip >> 16) << 12 | fop;
            e[5] = fdp & 0xffff | 0xffff_0000;
            e[6] = (fdp >> 16) << 12;
        }
        (false, false) => {}
        (false, true) => {
            e[4] = (fip >> 16 & 0xf) << 12 | fop;
            e[6] = (fdp >> 16 & 0xf) << 12;
        }
    }
    if layout.wide {
        for word in &mut e[..3] {
            *word |= 0xffff_0000;
        }
        if !layout.real {
            e[6] |= 0xffff_0000;
        }
    }
    e
}

fn encode(image: &FpuImage, layout: Layout, out: &mut [u8]) {
    let size = layout.len() / 7;
    for (f, b) in environment(image, layout)
        .into_iter()
        .zip(out.chunks_mut(size))
    {
        b.copy_from_slice(&f.to_le_bytes()[..size]);
    }
}

fn decode(image: &mut FpuImage, layout: Layout, bytes: &[u8]) {
    let size = layout.len() / 7;
    let mut e = [0u32; 7];
    for (f, b) in e.iter_mut().zip(bytes.chunks(size)) {
        let mut v = [0; 4];
        v[..size].copy_from_slice(b);
        *f = u32::from_le_bytes(v);
    }
    let (fip, fdp, fop) = match (layout.wide, layout.real) {
        (true, false) => (e[3], e[5], e[4] >> 16),
        (true, true) => (
            e[3] & 0xffff | (e[4] >> 12) << 16,
            e[5] & 0xffff | (e[6] >> 12) << 16,
            e[4],
        ),
        (false, false) => (e[3], e[5], 0),
        (false, true) => (
            e[3] | (e[4] >> 12 & 0xf) << 16,
            e[5] | (e[6] >> 12 & 0xf) << 16,
            e[4],
        ),
    };
    set_word(image, FCW, e[0] as u16);
    set_word(image, FSW, e[1] as u16);
    image.0[FTW] = abridged_tags(e[2] as u16);
    set_word(image, FOP, (fop & 0x7ff) as u16);
    set_quad(image, FIP, fip.into());
    set_quad(image, FDP, fdp.into());
}

/// Makes FSW.ES and FSW.B follow from the flags and masks.
fn update_summary(image: &mut FpuImage) {
    let (cw, sw) = (word(image, FCW), word(image, FSW));
    let pending = sw & !cw & 0x3f != 0;
    let summary = ES | 0x8000;
    set_word(
        image,
        FSW,
        if pending { sw | summary } else { sw & !summary },
    );
}

/// FNSTENV: stores the environment, then masks all exceptions.
pub(super) fn store_environment(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let layout = Layout::of(cpu, insn);
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..layout.len()];
    encode(&cpu.fpu, layout, bytes);
    let at = cpu.operand_address(insn, bytes.len() as u64, true)?;
    let privilege = cpu.privilege();
    cpu.write_linear(at, bytes, privilege)?;
    let cw = word(&cpu.fpu, FCW) | 0x3f;
    set_word(&mut cpu.fpu, FCW, cw);
    update_summary(&mut cpu.fpu);
    Ok(())
}

/// FLDENV.
pub(super) fn load_environment(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let layout = Layout::of(cpu, insn);
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..layout.len()];
    let at = cpu.operand_address(insn, bytes.len() as u64, false)?;
    let privilege = cpu.privilege();
    cpu.read_linear(at, bytes, privilege)?;
    // Registers keep their physical places while TOP changes.
    let old = word(&cpu.fpu, FSW) >> 11 & 7;
    decode(&mut cpu.fpu, layout, bytes);
    let new = word(&cpu.fpu, FSW) >> 11 & 7;
    let shift = usize::from(new.wrapping_sub(old) & 7);
    cpu.fpu.0[REGISTERS..REGISTERS + 128].rotate_left(16 * shift);
    update_summary(&mut cpu.fpu);
    x87::normalize(cpu);
    Ok(())
}

/// FNSAVE: stores environment and registers, then initialises the unit.
pub(super) fn save(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let layout = Layout::of(cpu, insn);
    let n = layout.len();
    let mut bytes = [0; 108];
    encode(&cpu.fpu, layout, &mut bytes[..n]);
    for i in 0..8 {
        let at = REGISTERS + 16 * i;
        bytes[n + 10 * i..][..10].copy_from_slice(&cpu.fpu.0[at..at + 10]);
    }
    let bytes = &bytes[..n + 80];
    let at = cpu.operand_address(insn, bytes.len() as u64, true)?;
    let privilege = cpu.privilege();
    cpu.probe_write_linear(at, bytes.len(), privilege)?;
    cpu.write_linear(at, bytes, privilege)?;
    initialize(&mut cpu.fpu);
    Ok(())
}

/// FRSTOR.
pub(super) fn restore(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let layout = Layout::of(cpu, insn);
    let n = layout.len();
    let mut bytes = [0; 108];
    let bytes = &mut bytes[..n + 80];
    let at = cpu.operand_address(insn, bytes.len() as u64, false)?;
    let privilege = cpu.privilege();
    cpu.read_linear(at, bytes, privilege)?;
    decode(&mut cpu.fpu, layout, &bytes[..n]);
    for i in 0..8 {
        let at = REGISTERS + 16 * i;
        cpu.fpu.0[at..at + 10].copy_from_slice(&bytes[n + 10 * i..][..10]);
    }
    update_summary(&mut cpu.fpu);
    x87::normalize(cpu);
    Ok(())
}

/// What FNINIT leaves; the data registers keep their bits but not their tags.
pub(super) fn initialize(image: &mut FpuImage) {
    // The registers keep their physical places while TOP becomes zero.
    let top = usize::from(word(image, FSW) >> 11 & 7);
    image.0[REGISTERS..REGISTERS + 128].rotate_right(16 * top);
    set_word(image, FCW, 0x37f);
    set_word(image, FSW, 0);
    image.0[FTW] = 0;
    image.0[5] = 0;
    set_word(image, FOP, 0);
    set_quad(image, FIP, 0);
    set_quad(image, FDP, 0);
}
