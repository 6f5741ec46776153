//! Code that all translated blocks share: the way in, the ways out, and the
//! gate through which one instruction is interpreted.

use super::{
    emit::{Emitter, Opcode, Rm, cpu, mem},
    registers::{BIAS, CPU, RESIDENT, SP, T0, T1, at, host},
};
use crate::build::MAX_INSTRUCTIONS;

/// Positions of the shared code.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stubs {
    /// `extern "sysv64" fn(*mut Cpu, code) -> u32`: runs translated code, gives a
    /// code of [`Next`](crate::uop::Next). Flags are loaded by the code.
    pub(super) enter: usize,
    /// Called with a micro-operation's address in [`T0`]: runs it on the vCPU,
    /// then goes on, or leaves if it did not just complete. Flags before it are
    /// in [`Cpu::cc`](crate::state::Cpu::cc), or dead.
    pub(super) gate: usize,
    /// As `gate`; flags before it are the host's.
    pub(super) gate_flags: usize,
    /// Leaves with the code in [`T0`]; flags are in `cc`.
    pub(super) exit: usize,
    /// Leaves with the code in [`T0`]; flags are the host's.
    pub(super) exit_flags: usize,
    /// Called where the host's unit has not the guest's MXCSR: loads it and
    /// returns, or leaves with [`INTERPRET`] if an exception is unmasked. Flags are in
    /// `cc`, or dead.
    pub(super) load_mxcsr: usize,
    /// Numbers from 0 up, 16 bytes each, to add to the count of instructions.
    pub(super) counts: usize,
    /// Where blocks can go.
    pub(super) end: usize,
}

/// Callee-saved registers of the calling convention.
const SAVED: [u8; 6] = [host::RBX, host::RBP, host::R12, host::R13, host::R14, CPU];

/// Puts the shared code at position 0.
pub(super) fn emit(e: &mut Emitter) -> Stubs {
    let mut s = Stubs::default();
    e.start(0);
    for n in 0..=MAX_INSTRUCTIONS as u64 {
        e.bytes(&n.to_le_bytes());
        e.bytes(&[0; 8]);
    }

    s.enter = e.position();
    for r in SAVED {
        push(e, r);
    }
    // Aligns the stack: it was 8 off, plus six registers.
    adjust_stack(e, -8);
    e.offset(CPU, host::RDI, BIAS);
    e.load(T1, Rm::Reg(host::RSI));
    clear_count(e);
    for (guest, place) in RESIDENT {
        e.load(place, cpu(at::register(guest)));
    }
    // jmp r11
    e.modrm(Opcode::narrow(&[0xff]), 4, Rm::Reg(T1));

    s.gate_flags = e.position();
    e.store(cpu(at::register(0)), host::RAX);
    e.flags_to_memory();
    let common = e.jump();
    s.gate = e.position();
    e.store(cpu(at::register(0)), host::RAX);
    e.bind(common);
    store_registers(e);
    put_mxcsr(e);
    e.offset(host::RDI, CPU, -BIAS);
    e.load(host::RSI, Rm::Reg(T0));
    // The return address took 8 bytes of an aligned stack.
    adjust_stack(e, -8);
    e.modrm(Opcode::narrow(&[0xff]), 2, cpu(at::INTERPRET));
    adjust_stack(e, 8);
    // test eax, eax
    e.bytes(&[0x85, 0xc0]);
    let leave = e.branch(5);
    // What was called may have unmasked an exception.
    e.arithmetic(false, 7, cpu(at::MXCSR_LIVE), 0);
    let no_float = e.branch(4);
    let refused = unless_masked(e);
    e.modrm(LDMXCSR, 2, cpu(at::MXCSR));
    let loaded = e.jump();
    e.bind(refused);
    set_mxcsr_live(e, 0);
    e.bind(no_float);
    e.bind(loaded);
    clear_count(e);
    for (guest, place) in RESIDENT.into_iter().filter(|(guest, _)| *guest != 0) {
        e.load(place, cpu(at::register(guest)));
    }
    e.flags_from_memory();
    e.load(host::RAX, cpu(at::register(0)));
    e.bytes(&[0xc3]);

    s.exit_flags = e.position();
    e.store(cpu(at::register(0)), host::RAX);
    e.flags_to_memory();
    let common = e.jump();
    s.exit = e.position();
    e.store(cpu(at::register(0)), host::RAX);
    e.bind(common);
    store_registers(e);
    put_mxcsr(e);
    e.load32(host::RAX, Rm::Reg(T0));
    let epilogue = e.jump();
    e.bind(leave);
    // The gate's return address.
    adjust_stack(e, 8);
    e.bind(epilogue);
    set_mxcsr_live(e, 0);
    adjust_stack(e, 8);
    for r in SAVED.into_iter().rev() {
        pop(e, r);
    }
    e.bytes(&[0xc3]);

    s.load_mxcsr = e.position();
    let refused = unless_masked(e);
    e.modrm(LDMXCSR, 2, cpu(at::MXCSR));
    set_mxcsr_live(e, 1);
    e.bytes(&[0xc3]);
    e.bind(refused);
    // The return address.
    adjust_stack(e, 8);
    e.constant32(T0, super::INTERPRET);
    e.jump_to(s.exit);
    s.end = e.position();
    s
}

/// LDMXCSR with digit 2, STMXCSR with digit 3.
const LDMXCSR: Opcode<'static> = Opcode::narrow(&[0x0f, 0xae]);

/// Takes the jump if one of the guest's SIMD exceptions is unmasked; uses [`T1`] and
/// the flags.
fn unless_masked(e: &mut Emitter) -> super::emit::Jump {
    const MASKS: i32 = 0x1f80;
    e.load32(T1, cpu(at::MXCSR));
    e.arithmetic(false, 4, Rm::Reg(T1), MASKS);
    e.arithmetic(false, 7, Rm::Reg(T1), MASKS);
    e.branch(5)
}

fn set_mxcsr_live(e: &mut Emitter, value: u32) {
    // mov dword [live], value
    e.modrm(Opcode::narrow(&[0xc7]), 0, cpu(at::MXCSR_LIVE));
    e.bytes(&value.to_le_bytes());
}

/// Gives the guest's MXCSR back to the vCPU if the host's unit has it, and the
/// host's to the engine; uses the flags.
fn put_mxcsr(e: &mut Emitter) {
    e.arithmetic(false, 7, cpu(at::MXCSR_LIVE), 0);
    let no_float = e.branch(4);
    e.modrm(LDMXCSR, 3, cpu(at::MXCSR));
    e.modrm(LDMXCSR, 2, cpu(at::MXCSR_HOST));
    e.bind(no_float);
}

/// Adds `n` to the count of retired instructions, which is in XMM15: so it
/// needs no flags and no memory.
pub(super) fn count(e: &mut Emitter, s: &Stubs, n: usize) {
    // paddq xmm15, [rip + …]
    e.bytes(&[0x66, 0x44, 0x0f, 0xd4, 0x3d]);
    let end = e.position() + 4;
    let distance = (s.counts + 16 * n).wrapping_sub(end) as u32;
    e.bytes(&distance.to_le_bytes());
}

fn clear_count(e: &mut Emitter) {
    // pxor xmm15, xmm15
    e.bytes(&[0x66, 0x45, 0x0f, 0xef, 0xff]);
}

/// Stores all registers but RAX and what was counted; keeps [`T0`].
fn store_registers(e: &mut Emitter) {
    for (guest, place) in RESIDENT.into_iter().filter(|(guest, _)| *guest != 0) {
        e.store(cpu(at::register(guest)), place);
    }
    // movq r11, xmm15
    e.bytes(&[0x66, 0x4d, 0x0f, 0x7e, 0xfb]);
    // add [retired], r11
    e.modrm(Opcode::wide(&[0x01]), T1, cpu(at::RETIRED));
}

fn push(e: &mut Emitter, r: u8) {
    if r > 7 {
        e.bytes(&[0x41]);
    }
    e.bytes(&[0x50 | r & 7]);
}

fn pop(e: &mut Emitter, r: u8) {
    if r > 7 {
        e.bytes(&[0x41]);
    }
    e.bytes(&[0x58 | r & 7]);
}

fn adjust_stack(e: &mut Emitter, by: i32) {
    e.offset(host::RSP, host::RSP, by);
}

/// Looks for translated code at the RIP in [`T0`], with flags free. `None` of
/// the jumps is taken if there is some and nobody wants the vCPU's attention: its
/// address is then in [`T1`].
pub(super) fn probe(e: &mut Emitter) -> [super::emit::Jump; 3] {
    use super::jumps::{BITS, ENTRY_BITS, entry};
    e.store(cpu(at::RIP), T0);
    e.load(T1, Rm::Reg(T0));
    // shr r11, 12
    e.bytes(&[0x49, 0xc1, 0xeb, 0x0c]);
    // xor r11d, r10d
    e.modrm(Opcode::narrow(&[0x33]), T1, Rm::Reg(T0));
    e.arithmetic(false, 4, Rm::Reg(T1), (1 << BITS) - 1);
    // shl r11d, …
    e.bytes(&[0x41, 0xc1, 0xe3, ENTRY_BITS]);
    // add r11, [jumps]
    e.modrm(Opcode::wide(&[0x03]), T1, cpu(at::JUMPS));
    // cmp r10, [r11 + rip]
    e.modrm(Opcode::wide(&[0x3b]), T0, mem(T1, entry::RIP));
    let other = e.branch(5);
    e.load(T0, cpu(at::STAMP));
    e.modrm(Opcode::wide(&[0x3b]), T0, mem(T1, entry::STAMP));
    let stale = e.branch(5);
    e.load(T0, cpu(at::REQUEST));
    e.arithmetic(false, 7, mem(T0, 0), 0);
    let wanted = e.branch(5);
    e.load(T1, mem(T1, entry::CODE));
    [other, stale, wanted]
}

/// Sets the page that RIP is in, by way of [`T0`].
pub(super) fn set_page(e: &mut Emitter) {
    e.load(T0, cpu(at::RIP));
    e.arithmetic(true, 4, Rm::Reg(T0), -4096);
    e.store(cpu(at::PAGE_RIP), T0);
}

const _: () = assert!(SP != T0 && SP != T1);
