//! The block builder: bytes to micro-operations.

mod flow;
mod integer;
mod operand;
mod select;

use alloc::vec::Vec;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};

use crate::{
    cache::{Block, CodeCache},
    exec,
    fault::{Fault, vector},
    ops::{self, branch, generic},
    state::{Cpu, mode},
    sys,
    uop::{Handler, Uop},
    vector as native,
};

/// Most instructions in a block. Bounds the work of building one, the time
/// between interrupt polls, and the stack where tail calls are not made.
pub const MAX_INSTRUCTIONS: usize = 48;
/// Bytes of code looked at per block.
const WINDOW: usize = 256;
/// The longest instruction.
const MAX_LENGTH: usize = 15;

/// What is known of a micro-operation for the pass over flags, and for fusing.
#[derive(Clone, Copy, Default)]
struct Note {
    /// Every arithmetic flag is overwritten.
    kills_flags: bool,
    /// Arithmetic flags are read, or the block may be left here, so that they
    /// must be right.
    needs_flags: bool,
    /// The handler to use where nobody reads the flags.
    plain: Option<Handler>,
    /// What a following Jcc may be fused with.
    compare: Option<select::Compare>,
}

/// A block in the making.
struct Builder<'a> {
    cpu: &'a mut Cpu,
    cache: &'a mut CodeCache,
    mode: u32,
    /// Micro-operations so far, with what is known of them.
    uops: Vec<Uop>,
    notes: Vec<Note>,
    /// Instructions so far.
    count: usize,
    targets: [i64; 2],
}

/// Room that block building uses again and again.
#[derive(Default)]
pub(crate) struct Scratch {
    uops: Vec<Uop>,
    notes: Vec<Note>,
}

/// What follows an instruction that was lowered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    /// The next instruction belongs to the block.
    Continue,
    /// The micro-operation is a terminator.
    Ended,
}

/// Builds the block at linear `address`, guest physical `gpa`.
///
/// # Errors
/// The fault of fetching its first instruction.
pub(crate) fn build(
    cpu: &mut Cpu,
    cache: &mut CodeCache,
    address: u64,
    gpa: u64,
    mode: u32,
) -> Result<*const Block, Fault> {
    let offset = (gpa & 0xfff) as usize;
    let in_page = (4096 - offset).min(WINDOW);
    let mut window = [0u8; WINDOW + MAX_LENGTH];
    announce(cpu, gpa, in_page);
    read_code(cpu, gpa, &mut window[..in_page])?;
    let bits = bitness(mode);
    let Scratch {
        mut uops,
        mut notes,
    } = core::mem::take(&mut cache.scratch);
    uops.clear();
    notes.clear();
    let mut b = Builder {
        cpu,
        cache,
        mode,
        uops,
        notes,
        count: 0,
        targets: [0; 2],
    };
    let most = if mode & mode::STEP != 0 {
        1
    } else {
        MAX_INSTRUCTIONS
    };
    let mut second_page = None;
    let mut insn = Instruction::default();
    let mut at = 0;
    let mut ended = false;
    let mut decoder = decoder(bits, &window[..in_page], offset);
    while b.count < most {
        decoder.decode_out(&mut insn);
        let error = decoder.last_error();
        if error == DecoderError::NoMoreBytes && in_page - at < MAX_LENGTH {
            if b.count > 0 {
                break;
            }
            if offset + in_page == 4096 {
                // The first instruction reaches into the next page.
                let next = b.cpu.wrap_linear((address & !0xfff).wrapping_add(0x1000));
                let gpa2 = exec::fetch(b.cpu, b.cache, next)?;
                announce(b.cpu, gpa2 & !0xfff, MAX_LENGTH);
                let mut tail = [0; MAX_LENGTH];
                read_code(b.cpu, gpa2 & !0xfff, &mut tail)?;
                window[in_page..in_page + MAX_LENGTH].copy_from_slice(&tail);
                let all = &window[..in_page + MAX_LENGTH];
                let mut d = self::decoder(bits, all, offset);
                d.decode_out(&mut insn);
                second_page = Some(gpa2 >> 12);
                if d.last_error() != DecoderError::None {
                    let bytes = &window[..in_page + MAX_LENGTH];
                    b.invalid(bytes, bits, offset);
                    ended = true;
                } else {
                    ended = b.lower(&insn, offset) == After::Ended;
                    at = insn.len();
                }
                break;
            }
        }
        if error != DecoderError::None {
            if b.count == 0 {
                b.invalid(&window[at..in_page], bits, offset + at);
                ended = true;
            }
            break;
        }
        let start = offset + at;
        at += insn.len();
        if b.lower(&insn, start) == After::Ended {
            ended = true;
            break;
        }
    }
    if !ended {
        b.finish(offset + at);
    }
    b.settle_flags();
    let mut block = Block::new(gpa, mode);
    block.targets = b.targets;
    block.count = b.count as u16;
    block.len = at.max(1) as u16;
    block.second_page = second_page;
    let (count, mut uops, notes) = (b.count, b.uops, b.notes);
    for u in &mut uops {
        // Lowering counts instructions up; handlers want those still to come.
        u.left = (count as u8).saturating_sub(u.left);
    }
    let built = cache.insert(block, &uops);
    cache.scratch = Scratch { uops, notes };
    Ok(built)
}

const EMPTY: Uop = Uop {
    handler: branch::fall,
    imm: 0,
    disp: 0,
    off: 0,
    aux: 0,
    len: 0,
    left: 0,
    dst: 0,
    src: 0,
    base: 0,
    index: 0,
    scale: 0,
    seg: 0,
};

fn bitness(mode: u32) -> u32 {
    if mode & mode::CODE64 != 0 {
        64
    } else if mode & mode::CODE32 != 0 {
        32
    } else {
        16
    }
}

fn decoder(bits: u32, data: &[u8], offset: usize) -> Decoder<'_> {
    Decoder::with_ip(bits, data, offset as u64, DecoderOptions::NONE)
}

/// Tells the engine which 64-byte granules are about to be decoded.
fn announce(cpu: &mut Cpu, gpa: u64, len: usize) {
    let first = gpa >> 6 & 63;
    let last = ((gpa & 0xfff) + len as u64 - 1).min(4095) >> 6;
    let granules = (!0 << first) & (!0 >> (63 - last));
    if cpu.env().code_page(gpa >> 12, granules) {
        cpu.tlbs.drop_write_tags(gpa >> 12);
    }
}

/// Copies code from guest memory. Code outside of memory reads as ones, like
/// any unclaimed address.
fn read_code(cpu: &mut Cpu, gpa: u64, out: &mut [u8]) -> Result<(), Fault> {
    let Some(page) = cpu.env().host_page(gpa >> 12) else {
        for (i, chunk) in out.chunks_mut(8).enumerate() {
            cpu.device_read(false, gpa + 8 * i as u64, chunk)?;
        }
        return Ok(());
    };
    let offset = (gpa & 0xfff) as usize;
    debug_assert!(offset + out.len() <= 4096);
    // SAFETY: a host page is 4096 bytes, and the range stays inside it.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") out.len() => _, inout("rdi") out.as_mut_ptr() => _,
            inout("rsi") page.host.add(offset) => _, options(nostack, preserves_flags));
    }
    Ok(())
}

impl Builder<'_> {
    fn is64(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// Every access must be checked one by one.
    fn careful(&self) -> bool {
        self.mode & (mode::STEP | mode::ALIGN) != 0
    }

    /// Appends a micro-operation of the present instruction.
    fn push(&mut self, u: Uop, note: Note) {
        self.uops.push(Uop {
            left: self.count as u8,
            ..u
        });
        self.notes.push(note);
    }

    /// A micro-operation for `insn` at page offset `start` with nothing in it yet.
    fn blank(insn: &Instruction, start: usize) -> Uop {
        Uop {
            off: start as u16,
            len: insn.len() as u8,
            ..EMPTY
        }
    }

    fn lower(&mut self, insn: &Instruction, start: usize) -> After {
        self.count += 1;
        let mut u = Self::blank(insn, start);
        let permitted = self.cpu.vector.permits(insn.code());
        if permitted && let Some(after) = self.lower_flow(insn, &mut u) {
            return after;
        }
        if permitted && let Some(note) = self.lower_integer(insn, &mut u) {
            self.push(u, note);
            return After::Continue;
        }
        if permitted && sys::handles(insn.code()) {
            u.imm = self.cache.keep_instruction(insn);
            u.handler = generic::system;
            self.push(
                u,
                Note {
                    needs_flags: true,
                    ..Note::default()
                },
            );
            if insn.flow_control() == FlowControl::Next {
                return After::Continue;
            }
            self.finish(start + insn.len());
            return After::Ended;
        }
        match native::plan(self.cpu, insn) {
            native::Plan::Run(op) => self.lower_native(insn, op, u),
            native::Plan::Fault(Fault::Exception(e)) => self.raise(u, e.vector, e.error.is_some()),
            native::Plan::Fault(_) | native::Plan::NotMine => self.raise(u, vector::UD, false),
        }
    }

    fn lower_native(&mut self, insn: &Instruction, op: native::Op, mut u: Uop) -> After {
        u.handler = match op.memory {
            _ if !op.direct || self.careful() => ops::native::slow,
            None => ops::native::registers,
            Some(m) if m.locked => ops::native::slow,
            Some(_) => match self.memory(insn, &mut u) {
                Some(p) if !p.slow => match p.form {
                    0 => ops::native::memory::<0>,
                    1 => ops::native::memory::<1>,
                    _ => ops::native::memory::<2>,
                },
                _ => ops::native::slow,
            },
        };
        u.imm = self
            .cache
            .keep_native(ops::native::Native { insn: *insn, op });
        self.push(
            u,
            Note {
                needs_flags: true,
                ..Note::default()
            },
        );
        After::Continue
    }

    /// A micro-operation that raises an exception without error code, or with
    /// error code 0.
    fn raise(&mut self, mut u: Uop, vector: u8, with_error: bool) -> After {
        u.handler = generic::raise;
        u.aux = u16::from(vector);
        u.imm = u64::from(with_error);
        self.push(
            u,
            Note {
                needs_flags: true,
                ..Note::default()
            },
        );
        After::Ended
    }

    /// Bytes that decode to nothing: #UD, or #GP for an instruction that is too
    /// long.
    fn invalid(&mut self, bytes: &[u8], bits: u32, start: usize) {
        self.count += 1;
        let too_long = is_too_long(bytes, bits);
        let u = Uop {
            off: start as u16,
            len: 1,
            ..EMPTY
        };
        let v = if too_long { vector::GP } else { vector::UD };
        self.raise(u, v, too_long);
    }

    /// Ends a block that goes on at page offset `next`.
    fn finish(&mut self, next: usize) {
        self.targets[0] = next as i64;
        let handler = if self.is64() {
            branch::fall
        } else {
            generic::end
        };
        let u = Uop {
            handler,
            off: next as u16,
            ..EMPTY
        };
        let handler_needs = Note {
            needs_flags: true,
            ..Note::default()
        };
        self.push(u, handler_needs);
    }

    /// Where flags are overwritten before anybody can see them, takes handlers
    /// that do not compute them.
    fn settle_flags(&mut self) {
        let mut live = true;
        for (u, note) in self.uops.iter_mut().zip(&self.notes).rev() {
            if !live && let Some(plain) = note.plain {
                u.handler = plain;
            }
            if note.kills_flags {
                live = false;
            }
            if note.needs_flags {
                live = true;
            }
        }
    }
}

/// Whether `bytes` are an instruction that would be valid if it had fewer
/// redundant prefixes, and is longer than 15 bytes.
fn is_too_long(bytes: &[u8], bits: u32) -> bool {
    let prefix = |b: u8| {
        matches!(
            b,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
        ) || bits == 64 && b & 0xf0 == 0x40
    };
    let prefixes = bytes.iter().take_while(|&&b| prefix(b)).count();
    if prefixes >= MAX_LENGTH {
        return true;
    }
    for drop in 1..=prefixes {
        let mut d = decoder(bits, &bytes[drop..], 0);
        let insn = d.decode();
        if d.last_error() == DecoderError::None {
            return insn.len() + drop > MAX_LENGTH;
        }
    }
    false
}

/// Whether the builder has handlers of its own for `insn`, a plain integer instruction.
pub fn handles_integer(insn: &Instruction) -> bool {
    integer::handles(insn)
}

/// Whether the builder knows an encoding on `cpu`; anything else raises #UD.
pub fn accepts(cpu: &Cpu, insn: &Instruction) -> bool {
    let code = insn.code();
    let own = integer::handles(insn) || flow::handles(insn) || sys::handles(code);
    code != Code::INVALID && (own && cpu.vector.permits(code) || cpu.vector.executes(code))
}
