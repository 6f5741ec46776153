//! String instructions, with and without REP.
//!
//! A REP instruction works page piece by page piece with the host's own string
//! instructions where both sides hit the TLB, and element by element elsewhere
//! (device registers, page-crossing elements, DF set). Registers are up to date
//! after every piece, so a fault or an interrupt finds the instruction
//! restartable. One visit does a bounded amount of work.

use core::{arch::asm, sync::atomic::Ordering};

use super::access::{fault, resume, rip_of};
use crate::{
    fault::Fault,
    flags,
    mem::fast::{Word, probe_read, probe_write},
    ops::alu::{Binary, Cmp},
    state::{Cpu, reg, seg},
    sys,
    uop::{Next, Uop},
};

/// What [`string`] does: `aux` bits 0 to 3.
#[allow(missing_docs, reason = "named for the instruction")]
pub mod kind {
    pub const MOVS: u16 = 0;
    pub const STOS: u16 = 1;
    pub const LODS: u16 = 2;
    pub const SCAS: u16 = 3;
    pub const CMPS: u16 = 4;
    pub const INS: u16 = 5;
    pub const OUTS: u16 = 6;
}

/// `aux` bits 8 to 9: repetition.
pub mod repeat {
    /// No prefix.
    pub const NONE: u16 = 0;
    /// REP or REPE.
    pub const WHILE_EQUAL: u16 = 1;
    /// REPNE.
    pub const WHILE_NOT_EQUAL: u16 = 2;
}

/// Elements done per visit at most, where each costs a device access or a
/// translation.
const SLOW_ELEMENTS: u32 = 4096;
/// Pieces done per visit at most.
const PIECES: u32 = 64;

struct Operation {
    kind: u16,
    size: u64,
    repeat: u16,
    /// Mask of the address width.
    mask: u64,
    source: usize,
    back: bool,
}

impl Operation {
    unsafe fn new(cpu: &Cpu, u: *const Uop) -> Self {
        // SAFETY: the handler contract.
        let (aux, s) = unsafe { ((*u).aux, (*u).seg) };
        Self {
            kind: aux & 15,
            size: 1 << (aux >> 4 & 3),
            repeat: aux >> 8 & 3,
            mask: !0 >> (64 - (8u32 << (s >> 4 & 3))),
            source: (s & 7) as usize,
            back: cpu.rflags_system & flags::DF != 0,
        }
    }

    fn advance(&self, cpu: &mut Cpu, r: usize, bytes: u64) {
        let delta = if self.back {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        self.put(cpu, r, cpu.regs[r].wrapping_add(delta));
    }

    fn put(&self, cpu: &mut Cpu, r: usize, v: u64) {
        cpu.regs[r] = match self.mask {
            0xffff => cpu.regs[r] & !0xffff | v & 0xffff,
            mask => v & mask,
        };
    }

    fn count(&self, cpu: &Cpu) -> u64 {
        if self.repeat == repeat::NONE {
            1
        } else {
            cpu.regs[reg::RCX] & self.mask
        }
    }

    fn consume(&self, cpu: &mut Cpu, n: u64) {
        if self.repeat != repeat::NONE {
            self.put(cpu, reg::RCX, cpu.regs[reg::RCX].wrapping_sub(n));
        }
    }

    fn uses(&self) -> (bool, bool) {
        let source = matches!(self.kind, kind::MOVS | kind::LODS | kind::CMPS | kind::OUTS);
        let destination = !matches!(self.kind, kind::LODS | kind::OUTS);
        (source, destination)
    }
}

/// Any string instruction.
pub unsafe extern "sysv64" fn string(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: the handler contract.
    unsafe {
        let op = Operation::new(&*cpu, u);
        match run(&mut *cpu, &op) {
            Ok(true) => resume(cpu, u),
            Ok(false) => {
                // Not finished: come back to the same instruction.
                (*cpu).rip = rip_of(cpu, u);
                (*cpu).retired = (*cpu).retired.wrapping_sub(u64::from((*u).left) + 1);
                Next::LOOKUP
            }
            Err(f) => fault(cpu, u, f),
        }
    }
}

/// `Ok(true)` when the instruction is complete.
fn run(cpu: &mut Cpu, op: &Operation) -> Result<bool, Fault> {
    if op.count(cpu) == 0 {
        cpu.replay.begin_instruction();
        return Ok(true);
    }
    let mut elements = SLOW_ELEMENTS;
    for _ in 0..PIECES {
        if let Some(ended) = piece(cpu, op) {
            if ended {
                return Ok(true);
            }
        } else {
            cpu.replay.begin_instruction();
            if element(cpu, op)? {
                return Ok(true);
            }
            elements -= 1;
            if elements == 0 {
                return Ok(false);
            }
        }
        // A step is one iteration (Intel SDM Vol. 3 §18.3.1.4).
        let stepping = cpu.mode & crate::state::mode::STEP != 0;
        if stepping || cpu.break_block || cpu.request.load(Ordering::Relaxed) != 0 {
            return Ok(false);
        }
    }
    Ok(false)
}

/// Does as many elements as lie in one page on each side, if both hit the TLB.
/// `None`: do one element the slow way. `Some(true)`: the instruction is done.
fn piece(cpu: &mut Cpu, op: &Operation) -> Option<bool> {
    let simple = matches!(op.kind, kind::MOVS | kind::STOS | kind::SCAS | kind::CMPS);
    // Offsets that wrap within a piece, breakpoints and alignment checks are the
    // slow path's business.
    let plain_mode =
        cpu.is_64bit() && cpu.mode & (crate::state::mode::ALIGN | crate::state::mode::STEP) == 0;
    if !simple || op.back || !plain_mode || op.mask != !0 {
        return None;
    }
    let (source, destination) = op.uses();
    let mut n = op.count(cpu);
    let (mut s, mut d) = (core::ptr::null_mut(), core::ptr::null_mut());
    if source {
        let at = cpu.regs[reg::RSI].wrapping_add(cpu.regs[reg::SEG_BASE + op.source]);
        // SAFETY: `cpu` is live.
        s = unsafe { probe_read(cpu, at, op.size) }?;
        n = n.min((4096 - (at & 0xfff)) / op.size);
    }
    if destination {
        let at = cpu.regs[reg::RDI];
        let write = matches!(op.kind, kind::MOVS | kind::STOS);
        // SAFETY: `cpu` is live.
        d = unsafe {
            if write {
                probe_write(cpu, at, op.size)
            } else {
                probe_read(cpu, at, op.size)
            }
        }?;
        n = n.min((4096 - (at & 0xfff)) / op.size);
    }
    let (done, stop) = match op.kind {
        kind::MOVS => {
            // SAFETY: `n` elements are inside one page on both sides.
            unsafe { host_movs(d, s, n, op.size) };
            (n, false)
        }
        kind::STOS => {
            // SAFETY: `n` elements are inside one page.
            unsafe { host_stos(d, cpu.regs[reg::RAX], n, op.size) };
            (n, false)
        }
        // SAFETY: `n` elements are inside one page on each side used.
        _ => unsafe { compare_run(cpu, op, s, d, n) },
    };
    if source {
        op.advance(cpu, reg::RSI, done * op.size);
    }
    if destination {
        op.advance(cpu, reg::RDI, done * op.size);
    }
    op.consume(cpu, done);
    Some(stop || op.repeat == repeat::NONE || op.count(cpu) == 0)
}

unsafe fn host_movs(d: *mut u8, s: *const u8, n: u64, size: u64) {
    // SAFETY: the caller vouches for both ranges; DF is clear in the host.
    unsafe {
        match size {
            1 => {
                asm!("rep movsb", inout("rcx") n => _, inout("rdi") d => _, inout("rsi") s => _, options(nostack, preserves_flags))
            }
            2 => {
                asm!("rep movsw", inout("rcx") n => _, inout("rdi") d => _, inout("rsi") s => _, options(nostack, preserves_flags))
            }
            4 => {
                asm!("rep movsd", inout("rcx") n => _, inout("rdi") d => _, inout("rsi") s => _, options(nostack, preserves_flags))
            }
            _ => {
                asm!("rep movsq", inout("rcx") n => _, inout("rdi") d => _, inout("rsi") s => _, options(nostack, preserves_flags))
            }
        }
    }
}

unsafe fn host_stos(d: *mut u8, a: u64, n: u64, size: u64) {
    // SAFETY: the caller vouches for the range; DF is clear in the host.
    unsafe {
        match size {
            1 => {
                asm!("rep stosb", inout("rcx") n => _, inout("rdi") d => _, in("rax") a, options(nostack, preserves_flags))
            }
            2 => {
                asm!("rep stosw", inout("rcx") n => _, inout("rdi") d => _, in("rax") a, options(nostack, preserves_flags))
            }
            4 => {
                asm!("rep stosd", inout("rcx") n => _, inout("rdi") d => _, in("rax") a, options(nostack, preserves_flags))
            }
            _ => {
                asm!("rep stosq", inout("rcx") n => _, inout("rdi") d => _, in("rax") a, options(nostack, preserves_flags))
            }
        }
    }
}

/// SCAS and CMPS over host memory; returns elements done and whether the
/// comparison ended the instruction.
unsafe fn compare_run(
    cpu: &mut Cpu,
    op: &Operation,
    s: *const u8,
    d: *const u8,
    n: u64,
) -> (u64, bool) {
    // SAFETY: the caller vouches for `n` elements on each side used.
    unsafe {
        match op.size {
            1 => compare_words::<u8>(cpu, op, s, d, n),
            2 => compare_words::<u16>(cpu, op, s, d, n),
            4 => compare_words::<u32>(cpu, op, s, d, n),
            _ => compare_words::<u64>(cpu, op, s, d, n),
        }
    }
}

unsafe fn compare_words<W: Word>(
    cpu: &mut Cpu,
    op: &Operation,
    s: *const u8,
    d: *const u8,
    n: u64,
) -> (u64, bool) {
    let a = W::narrow(cpu.regs[reg::RAX]).wide();
    let mut i = 0;
    while i < n {
        let at = (i * W::SIZE) as usize;
        // SAFETY: the caller vouches for element `i`.
        let (x, y) = unsafe {
            let y = W::load(d.add(at)).wide();
            (
                if op.kind == kind::CMPS {
                    W::load(s.add(at)).wide()
                } else {
                    a
                },
                y,
            )
        };
        i += 1;
        let ends = match op.repeat {
            repeat::WHILE_EQUAL => x != y,
            repeat::WHILE_NOT_EQUAL => x == y,
            _ => true,
        };
        if ends || i == n {
            cpu.cc = Cmp::apply::<W>(x, y, 0).1;
            return (i, ends);
        }
    }
    (i, false)
}

/// One element through the slow path. `true` when the instruction is done.
fn element(cpu: &mut Cpu, op: &Operation) -> Result<bool, Fault> {
    let (si, di) = (cpu.regs[reg::RSI] & op.mask, cpu.regs[reg::RDI] & op.mask);
    let size = op.size as usize;
    let privilege = cpu.privilege();
    let (source, destination) = op.uses();
    let port = cpu.regs[reg::RDX] as u16;
    if matches!(op.kind, kind::INS | kind::OUTS) {
        sys::check_io(cpu, port, op.size)?;
        sys::debug::match_port(cpu, port, op.size);
    }
    let mut value = cpu.regs[reg::RAX];
    if source {
        let at = cpu.linear(op.source, si, op.size, false)?;
        value = cpu.read_uint(at, size, privilege)?;
    }
    let mut compared = None;
    match op.kind {
        kind::SCAS | kind::CMPS => {
            let at = cpu.linear(seg::ES, di, op.size, false)?;
            compared = Some(cpu.read_uint(at, size, privilege)?);
        }
        kind::MOVS | kind::STOS => {
            let at = cpu.linear(seg::ES, di, op.size, true)?;
            cpu.write_uint(at, size, value, privilege)?;
        }
        kind::INS => {
            let at = cpu.linear(seg::ES, di, op.size, true)?;
            // The store must be possible before the port is read: a port read
            // cannot be taken back.
            cpu.probe_write_linear(at, size, privilege)?;
            let mut b = [0; 8];
            cpu.device_read(true, u64::from(port), &mut b[..size])?;
            cpu.write_uint(at, size, u64::from_le_bytes(b), privilege)?;
        }
        kind::OUTS => {
            let b = value.to_le_bytes();
            cpu.device_write(true, u64::from(port), &b[..size])?;
        }
        _ => match size {
            1 => cpu.regs[0] = cpu.regs[0] & !0xff | value,
            2 => cpu.regs[0] = cpu.regs[0] & !0xffff | value,
            _ => cpu.regs[0] = value,
        },
    }
    let mut stop = op.repeat == repeat::NONE;
    if let Some(y) = compared {
        cpu.cc = match size {
            1 => Cmp::apply::<u8>(value, y, 0).1,
            2 => Cmp::apply::<u16>(value, y, 0).1,
            4 => Cmp::apply::<u32>(value, y, 0).1,
            _ => Cmp::apply::<u64>(value, y, 0).1,
        };
        let unused_bits = 64 - 8 * size as u32;
        let equal = value << unused_bits == y << unused_bits;
        stop |= match op.repeat {
            repeat::WHILE_EQUAL => !equal,
            repeat::WHILE_NOT_EQUAL => equal,
            _ => true,
        };
    }
    if source {
        op.advance(cpu, reg::RSI, op.size);
    }
    if destination {
        op.advance(cpu, reg::RDI, op.size);
    }
    op.consume(cpu, 1);
    Ok(stop || op.count(cpu) == 0)
}
