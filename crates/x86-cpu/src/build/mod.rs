//! The block builder: bytes to micro-operations.

mod flow;
mod integer;
mod memo;
mod note;
mod operand;
mod select;

pub(crate) use memo::Memo;
pub(crate) use note::Note;

use alloc::vec::Vec;
use core::mem::MaybeUninit;

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, IcedError, Instruction};

use crate::{
    cache::{Block, CodeCache},
    exec,
    fault::{Fault, vector},
    ops::{self, branch, generic},
    state::{Cpu, mode},
    sys,
    uop::Uop,
    vector as native,
};

/// Most instructions in a block. Bounds the work of building one, the time
/// between interrupt polls, and the stack where tail calls are not made.
pub const MAX_INSTRUCTIONS: usize = 48;
/// Bytes of code looked at per block.
pub(crate) const WINDOW: usize = 256;
/// The longest instruction.
const MAX_LENGTH: usize = 15;

/// A block in the making.
struct Builder<'a> {
    cpu: &'a mut Cpu,
    cache: &'a mut CodeCache,
    mode: u32,
    /// What is known of the micro-operations so far.
    notes: Vec<Note>,
    /// Instructions so far.
    count: usize,
    targets: [i64; 2],
}

/// Room for the micro-operations of a block: one for each instruction, and a
/// terminator. They are written where they stay: filled in by small stores, they
/// would be slow to copy by wide loads right after.
pub(crate) type Uops = [MaybeUninit<Uop>; MAX_INSTRUCTIONS + 1];

/// What follows an instruction that was lowered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum After {
    /// The next instruction belongs to the block.
    Continue,
    /// So it does, and the micro-operation depends on the instruction and the mode
    /// only.
    ContinuePlain,
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
    let mut window = [const { MaybeUninit::uninit() }; WINDOW];
    announce(cpu, gpa, in_page);
    let window = read_code(cpu, gpa, &mut window[..in_page])?;
    let bits = bitness(mode);
    // SAFETY: the room is this block's until `insert`, and needs no initialisation.
    let uops = unsafe { &mut *cache.reserve(cpu.env()) };
    let mut notes = core::mem::take(&mut cache.notes);
    notes.clear();
    let mut b = Builder {
        cpu,
        cache,
        mode,
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
    let mut decoder = decoder(bits, window, offset);
    let Ok(decoder) = &mut decoder else {
        return Err(Fault::Internal("the decoder knows 16, 32 and 64 bits"));
    };
    // Where the decoder stands.
    let mut decoded = 0;
    while b.count < most {
        if b.recall(uops, &window[at..], offset + at) {
            at += usize::from(b.last_uop(uops).len);
            continue;
        }
        if decoded != at {
            let stands = decoder.set_position(at);
            debug_assert!(stands.is_ok(), "inside the window");
            decoder.set_ip((offset + at) as u64);
        }
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
                let mut tail = [const { MaybeUninit::uninit() }; MAX_LENGTH];
                let tail = read_code(b.cpu, gpa2 & !0xfff, &mut tail)?;
                let all = [window, tail].concat();
                let mut d = Decoder::with_ip(bits, &all, offset as u64, DecoderOptions::NONE);
                d.decode_out(&mut insn);
                second_page = Some(gpa2 >> 12);
                if d.last_error() != DecoderError::None {
                    b.invalid(uops, &all, bits, offset);
                    ended = true;
                } else {
                    ended = b.lower(uops, &insn, offset) == After::Ended;
                    at = insn.len();
                }
                break;
            }
        }
        if error != DecoderError::None {
            if b.count == 0 {
                b.invalid(uops, &window[at..], bits, offset + at);
                ended = true;
            }
            break;
        }
        let start = at;
        at += insn.len();
        decoded = at;
        match b.lower(uops, &insn, offset + start) {
            After::Continue => {}
            After::ContinuePlain => b.remember(uops, &window[start..]),
            After::Ended => {
                ended = true;
                break;
            }
        }
    }
    if !ended {
        b.finish(uops, offset + at);
    }
    b.settle(uops);
    let mut block = Block::new(gpa, mode, second_page);
    block.targets = b.targets;
    block.count = b.count as u16;
    block.len = at.max(1) as u16;
    let notes = b.notes;
    let built = cache.insert(block, notes.len());
    cache.notes = notes;
    Ok(built)
}

fn bitness(mode: u32) -> u32 {
    if mode & mode::CODE64 != 0 {
        64
    } else if mode & mode::CODE32 != 0 {
        32
    } else {
        16
    }
}

/// A decoder, to be used where it is: it is large.
fn decoder(bits: u32, data: &[u8], offset: usize) -> Result<Decoder<'_>, IcedError> {
    Decoder::try_with_ip(bits, data, offset as u64, DecoderOptions::NONE)
}

/// Tells the engine which 64-byte granules are about to be decoded.
pub(crate) fn announce(cpu: &mut Cpu, gpa: u64, len: usize) {
    let first = gpa >> 6 & 63;
    let last = ((gpa & 0xfff) + len as u64 - 1).min(4095) >> 6;
    let granules = (!0 << first) & (!0 >> (63 - last));
    if cpu.env().code_page(gpa >> 12, granules) {
        cpu.tlbs.drop_write_tags(gpa >> 12);
    }
}

/// Copies code from guest memory. Code outside of memory reads as ones, like
/// any unclaimed address.
pub(crate) fn read_code<'a>(
    cpu: &mut Cpu,
    gpa: u64,
    out: &'a mut [MaybeUninit<u8>],
) -> Result<&'a [u8], Fault> {
    let offset = (gpa & 0xfff) as usize;
    debug_assert!(offset + out.len() <= 4096);
    let Some(page) = cpu.env().host_page(gpa >> 12) else {
        out.fill(MaybeUninit::new(0));
        // SAFETY: just filled.
        let out = unsafe { out.assume_init_mut() };
        for (i, chunk) in out.chunks_mut(8).enumerate() {
            cpu.device_read(false, gpa + 8 * i as u64, chunk)?;
        }
        return Ok(out);
    };
    let (chunks, tail) = out.as_chunks_mut::<16>();
    let tail_at = chunks.len() * 16;
    // SAFETY: a host page is 4096 bytes, and the range stays inside it. Other
    // vCPUs may store there meanwhile, hence the assembly. Every byte of `out`
    // is written.
    unsafe {
        let from = page.host.add(offset);
        for (i, chunk) in chunks.iter_mut().enumerate() {
            core::arch::asm!("movdqu {x}, [{from}]", "movdqu [{to}], {x}",
                x = out(xmm_reg) _, from = in(reg) from.add(16 * i), to = in(reg) chunk.as_mut_ptr(),
                options(nostack, preserves_flags));
        }
        for (i, byte) in tail.iter_mut().enumerate() {
            byte.write(from.add(tail_at + i).read_volatile());
        }
        Ok(out.assume_init_ref())
    }
}

impl Builder<'_> {
    fn is64(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// Every access must be checked one by one.
    fn careful(&self) -> bool {
        self.mode & (mode::STEP | mode::ALIGN) != 0
    }

    /// The next micro-operation, for the instruction of `len` bytes at page
    /// offset `start`, and the one before it.
    fn next<'a>(
        &self,
        uops: &'a mut Uops,
        start: usize,
        len: usize,
    ) -> (&'a mut Uop, Option<&'a mut Uop>) {
        let (before, rest) = uops.split_at_mut(self.notes.len());
        let at = rest[0].as_mut_ptr();
        // SAFETY: zero is a value of every field but the handler, which is
        // written before anybody looks.
        let u = unsafe {
            at.write_bytes(0, 1);
            (&raw mut (*at).handler).write(branch::fall);
            &mut *at
        };
        u.off = start as u16;
        u.len = len as u8;
        u.left = self.count as u8;
        // SAFETY: each one before was written here.
        let previous = before.last_mut().map(|u| unsafe { u.assume_init_mut() });
        (u, previous)
    }

    /// The micro-operation that [`Self::next`] gave is complete.
    fn keep(&mut self, note: Note) {
        self.notes.push(note);
    }

    /// The micro-operation that was kept last.
    fn last_uop<'a>(&self, uops: &'a Uops) -> &'a Uop {
        // SAFETY: as many were written as there are notes, and there is one.
        unsafe { uops[self.notes.len() - 1].assume_init_ref() }
    }

    /// Lowers the instruction at the start of `code`, at page offset `start`, if it
    /// is one seen before.
    fn recall(&mut self, uops: &mut Uops, code: &[u8], start: usize) -> bool {
        if !self.is64() {
            return false;
        }
        let Some((uop, note)) = self.cache.memo.recall(code, self.mode) else {
            return false;
        };
        self.count += 1;
        self.cache.stats.instructions_recalled += 1;
        let u = uops[self.notes.len()].write(*uop);
        u.off = start as u16;
        u.left = self.count as u8;
        self.notes.push(note);
        true
    }

    /// What was lowered last was the instruction at the start of `code`.
    fn remember(&mut self, uops: &Uops, code: &[u8]) {
        if self.is64() {
            let uop = self.last_uop(uops);
            if let Some(&note) = self.notes.last() {
                self.cache.memo.keep(code, self.mode, uop, note);
            }
        }
    }

    fn lower(&mut self, uops: &mut Uops, insn: &Instruction, start: usize) -> After {
        self.count += 1;
        let (u, previous) = self.next(uops, start, insn.len());
        let permitted = self.cpu.vector.permits(insn.code());
        if permitted && let Some(after) = self.lower_flow(insn, u, previous) {
            return after;
        }
        if permitted && let Some(note) = self.lower_integer(insn, u) {
            self.keep(note);
            return After::ContinuePlain;
        }
        if permitted && sys::handles(insn.code()) {
            u.imm = self.cache.keep_instruction(insn);
            u.handler = generic::system;
            self.keep(Note::NEEDS);
            if insn.flow_control() == FlowControl::Next {
                return After::Continue;
            }
            self.finish(uops, start + insn.len());
            return After::Ended;
        }
        match native::plan(self.cpu, insn) {
            native::Plan::Run(op) => self.lower_native(insn, op, u),
            native::Plan::Fault(Fault::Exception(e)) => self.raise(u, e.vector, e.error.is_some()),
            native::Plan::Fault(_) | native::Plan::NotMine => self.raise(u, vector::UD, false),
        }
    }

    fn lower_native(&mut self, insn: &Instruction, op: native::Op, u: &mut Uop) -> After {
        u.handler = match op.memory {
            _ if !op.direct || self.careful() => ops::native::slow,
            None => ops::native::registers,
            Some(m) if m.locked => ops::native::slow,
            Some(_) => match self.memory(insn, u) {
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
        self.keep(Note::NEEDS);
        After::Continue
    }

    /// A micro-operation that raises an exception without error code, or with
    /// error code 0.
    fn raise(&mut self, u: &mut Uop, vector: u8, with_error: bool) -> After {
        u.handler = generic::raise;
        u.aux = u16::from(vector);
        u.imm = u64::from(with_error);
        self.keep(Note::NEEDS);
        After::Ended
    }

    /// Bytes that decode to nothing: #UD, or #GP for an instruction that is too
    /// long.
    fn invalid(&mut self, uops: &mut Uops, bytes: &[u8], bits: u32, start: usize) {
        self.count += 1;
        let too_long = is_too_long(bytes, bits);
        let (u, _) = self.next(uops, start, 1);
        let v = if too_long { vector::GP } else { vector::UD };
        self.raise(u, v, too_long);
    }

    /// Ends a block that goes on at page offset `next`.
    fn finish(&mut self, uops: &mut Uops, next: usize) {
        self.targets[0] = next as i64;
        let (u, _) = self.next(uops, next, 0);
        u.handler = if self.is64() {
            branch::fall
        } else {
            generic::end
        };
        self.keep(Note::NEEDS);
    }

    /// Where flags are overwritten before anybody can see them, takes handlers
    /// that do not compute them; counts the instructions still to come.
    fn settle(&self, uops: &mut Uops) {
        let mut live = true;
        // SAFETY: as many were written as there are notes.
        let uops = unsafe { uops[..self.notes.len()].assume_init_mut() };
        for (u, note) in uops.iter_mut().zip(&self.notes).rev() {
            if !live && let Some(plain) = note.plain() {
                u.handler = plain;
            }
            if note.kills_flags() {
                live = false;
            }
            if note.needs_flags() {
                live = true;
            }
            u.left = (self.count as u8).saturating_sub(u.left);
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
        let mut d = Decoder::new(bits, &bytes[drop..], DecoderOptions::NONE);
        let insn = d.decode();
        if d.last_error() == DecoderError::None {
            return insn.len() + drop > MAX_LENGTH;
        }
    }
    false
}

/// One instruction by itself, at page offset `start`, and a terminator behind it,
/// kept until the next flush: for translated code, which calls it. `left`
/// instructions of its block come after it.
pub(crate) fn single(
    cpu: &mut Cpu,
    cache: &mut CodeCache,
    insn: &Instruction,
    start: usize,
    mode: u32,
    left: usize,
) -> *const Uop {
    let mut uops = [const { MaybeUninit::uninit() }; MAX_INSTRUCTIONS + 1];
    let mut notes = core::mem::take(&mut cache.notes);
    notes.clear();
    let mut b = Builder {
        cpu,
        cache,
        mode,
        notes,
        count: 0,
        targets: [0; 2],
    };
    b.lower(&mut uops, insn, start);
    if b.notes.len() < 2 {
        b.finish(&mut uops, start + insn.len());
    }
    b.settle(&mut uops);
    let notes = b.notes;
    // SAFETY: both were written.
    let mut pair = unsafe { [uops[0].assume_init(), uops[1].assume_init()] };
    pair[0].left = left as u8;
    cache.notes = notes;
    cache.keep_uops(pair)
}

/// Whether the builder has handlers of its own for `insn`, a near branch.
pub(crate) fn handles_flow(insn: &Instruction) -> bool {
    flow::handles(insn)
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
