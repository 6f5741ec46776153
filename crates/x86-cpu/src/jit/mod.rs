//! The native tier: guest blocks as host code.
//!
//! Guest and host are the same architecture, so most instructions are copied,
//! with their registers renamed where the engine needs one (`registers`) and
//! their memory operand replaced by a host address that an inlined TLB check
//! gives. The guest's arithmetic flags are the host's; where something clobbers
//! them that somebody may still look at, they are put away. The scheme:
//!
//! - What is translated is a [`Block`] of the other tier, once it has run often
//!   enough. Both have the same keys, links, TLB and invalidation: a block that
//!   is forgotten takes its code with it. Code names no linear address, so that
//!   all mappings of a page share it.
//! - `shape` is an allow-list of encodings. Whatever is not on it, and
//!   whatever misses the TLB, is one micro-operation of the other tier, called
//!   through a gate that stores all registers. So device registers, faults,
//!   page-crossing operands and stores to code are exact without code of their
//!   own, and no instruction is copied only because the host has it.
//! - Branches within a page go straight to the code of their target; others look
//!   it up in a cache (`jumps`) whose entries hold as long as nothing changed
//!   that could make the address mean other code.
//! - Whoever wants the vCPU's attention sets a bit that loops within a page
//!   check where they close, and everything else where it leaves the page.
//!
//! Flags that no instruction can see any more may be stale in the image that an
//! exception pushes, unless [`Settings::strict_flags`] is set.
//!
//! Left to the interpreter: everything but 64-bit code, single steps and debug
//! registers, alignment checks, instructions that cross a page.

mod code;
mod emit;
mod flow;
mod jumps;
mod memory;
mod plan;
mod raw;
mod registers;
mod shape;
mod stubs;
#[cfg(test)]
mod tests;
mod vector;

use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

pub use self::memory::CodeMemory;
use self::{
    code::{Flags, Translator},
    emit::Emitter,
    jumps::{Entry, Jumps, stamp},
    memory::Placed,
    plan::{Item, Plan},
    stubs::Stubs,
};
use crate::{
    cache::{Block, CodeCache},
    fault::Fault,
    state::{Cpu, mode},
    uop::{Next, Uop},
};

/// The part of a vCPU that translated code uses and nobody else.
#[derive(Debug)]
#[repr(C)]
pub struct Frame {
    /// The request word.
    request: *const AtomicU32,
    /// Jump cache entries with this stamp hold.
    stamp: u64,
    jumps: *const Entry,
    /// [`interpret`].
    interpret: unsafe extern "sysv64" fn(*mut Cpu, *const Uop) -> u32,
    /// Where an indirect call goes.
    target: *const u8,
    /// The block that was left by [`Next::FALL`] or [`Next::TAKEN`], or is not for
    /// translated code now ([`INTERPRET`]).
    block: *const Block,
    /// The host's unit has the guest's MXCSR, which masks all exceptions.
    mxcsr_live: u32,
    /// The engine's own MXCSR.
    mxcsr_host: u32,
}

/// What translated code gives besides the codes of [`Next`]: [`Frame::block`] is to
/// be interpreted. Nothing of it has run.
const INTERPRET: u32 = 16;

impl Frame {
    /// Before the first run.
    pub(crate) const fn new() -> Self {
        Self {
            request: core::ptr::null(),
            stamp: 0,
            jumps: core::ptr::null(),
            interpret,
            target: core::ptr::null(),
            block: core::ptr::null(),
            mxcsr_live: 0,
            mxcsr_host: 0x1f80,
        }
    }
}

/// How the native tier works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// A block is translated when it has been entered this often.
    pub hot: u16,
    /// Flags are right in the image that any exception pushes, also those that
    /// no instruction can see any more. Slower.
    pub strict_flags: bool,
}

impl Default for Settings {
    fn default() -> Self {
        // Translating costs about what interpreting a block fifty times does.
        Self {
            hot: 48,
            strict_flags: false,
        }
    }
}

/// A block's translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Native {
    /// Its code, which takes the flags from [`Cpu::cc`]; null if there is none.
    code: *const u8,
    /// Its code for who has the flags in the host's.
    with_flags: *const u8,
    /// Positions of the displacements of the jumps to the successors, or 0.
    links: [u32; 2],
    links_saved: [bool; 2],
    /// How often the block was entered without translation; at [`Self::NEVER`] it
    /// is not to be translated.
    entered: u16,
}

impl Native {
    const NEVER: u16 = u16::MAX;

    /// Of a new block.
    pub(crate) const fn none() -> Self {
        Self {
            code: core::ptr::null(),
            with_flags: core::ptr::null(),
            links: [0; 2],
            links_saved: [false; 2],
            entered: 0,
        }
    }

    pub(crate) fn count(&mut self, entered: u16) {
        self.entered = entered;
    }

    pub(crate) fn is_some(&self) -> bool {
        !self.code.is_null()
    }
}

/// The native tier of one vCPU's [`CodeCache`].
#[derive(Debug)]
pub(crate) struct Jit {
    placed: Placed,
    stubs: Stubs,
    jumps: Jumps,
    emitter: Emitter,
    plan: Plan,
    settings: Settings,
}

type Enter = unsafe extern "sysv64" fn(*mut Cpu, *const u8) -> u32;

impl Jit {
    /// `None` if `memory` is too small to be of use.
    pub(crate) fn new(memory: CodeMemory, settings: Settings) -> Option<Self> {
        let mut placed = Placed::new(memory);
        let mut emitter = Emitter::default();
        let stubs = stubs::emit(&mut emitter);
        debug_assert_eq!(placed.next(), 0);
        placed.place(&emitter.code).then_some(Self {
            placed,
            stubs,
            jumps: Jumps::new(),
            emitter,
            plan: Plan::default(),
            settings,
        })
    }

    /// Takes back all code. Whoever calls this forgets the blocks, or
    /// their [`Native`]s.
    pub(crate) fn clear(&mut self) {
        self.jumps.clear();
        self.placed.truncate(self.stubs.end);
    }

    /// Bytes of code.
    pub(crate) fn used(&self) -> usize {
        self.placed.used()
    }

    /// Runs translated code.
    fn enter(&mut self, cpu: &mut Cpu, code: *const u8) -> u32 {
        cpu.native.request = alloc::sync::Arc::as_ptr(&cpu.request);
        cpu.native.jumps = self.jumps.address();
        cpu.native.stamp = stamp(cpu);
        let enter = self.placed.address(self.stubs.enter);
        // SAFETY: the stub is a function of this type; `code` is a block's, which
        // is there until the next `clear`.
        unsafe {
            let enter = core::mem::transmute::<*const u8, Enter>(enter);
            enter(cpu, code)
        }
    }

    /// Notes that `block` is what runs at the present RIP.
    pub(crate) fn note_jump(&mut self, cpu: &Cpu, native: &Native) {
        self.jumps.set(cpu.rip, stamp(cpu), native.code);
    }

    /// Lets `from`'s jump to successor `which` go to `to` directly.
    fn connect(&mut self, from: &mut Native, which: usize, to: &Native) {
        let site = from.links[which] as usize;
        if site == 0 || !from.is_some() || !to.is_some() {
            return;
        }
        let target = if from.links_saved[which] {
            to.code
        } else {
            to.with_flags
        };
        from.links[which] = 0;
        let target = self.placed.position(target);
        self.placed.aim(site, target);
    }

    /// Translates what is planned, `block`. `None` if there is no room.
    fn translate(&mut self, block: *const Block, targets: [i64; 2]) -> Option<Native> {
        let start = self.placed.next();
        self.emitter.start(start);
        let mut t = Translator {
            e: &mut self.emitter,
            stubs: &self.stubs,
            plan: &self.plan,
            block,
            targets,
            cold: Vec::new(),
            exits: Vec::new(),
            links: [0; 2],
            links_saved: [false; 2],
            flags: Flags::Host,
        };
        if t.live() != 0 {
            t.e.restore_flags(registers::T1);
        }
        let with_flags = t.e.position();
        if t.plan.items.iter().any(Item::is_float) {
            t.load_mxcsr();
        }
        stubs::count(t.e, t.stubs, t.plan.items.len());
        let mut open = true;
        for i in 0..t.plan.items.len() {
            open = t.instruction(i);
        }
        if open {
            t.edge(0, t.flags);
        }
        t.finish();
        let (links, links_saved) = (t.links, t.links_saved);
        if !self.placed.place(&self.emitter.code) {
            return None;
        }
        Some(Native {
            code: self.placed.address(start),
            with_flags: self.placed.address(with_flags),
            links,
            links_saved,
            entered: Native::NEVER,
        })
    }
}

/// Runs one micro-operation for translated code, which has stored all registers.
unsafe extern "sysv64" fn interpret(cpu: *mut Cpu, u: *const Uop) -> u32 {
    // SAFETY: translated code runs on behalf of `exec`, which keeps the contract
    // of handlers; the micro-operation and a terminator behind it were made
    // with the code that names it.
    unsafe {
        (*cpu).break_block = false;
        (*cpu).stats.interpreted += 1;
        let code = ((*u).handler)(cpu, u);
        (*cpu).native.stamp = stamp(&*cpu);
        code
    }
}

/// Whether blocks of this mode are translated.
fn translates(m: u32) -> bool {
    m & mode::CODE64 != 0 && m & (mode::STEP | mode::ALIGN) == 0
}

/// Makes a translation of `block`, or sees that it is not asked for again. Other
/// vCPUs may have been waited for: requests come before what was translated.
pub(crate) fn translate(
    cpu: &mut Cpu,
    cache: &mut CodeCache,
    block: *const Block,
) -> Result<(), Fault> {
    let Some(mut jit) = cache.jit.take() else {
        return Ok(());
    };
    // SAFETY: the block is valid until the next flush, and nobody else holds a
    // reference to it.
    let b = unsafe { *block };
    let mut native = Native {
        entered: Native::NEVER,
        ..Native::none()
    };
    let planned = if translates(b.mode) && b.second_page().is_none() {
        let strict = jit.settings.strict_flags;
        jit.plan.make(cpu, cache, &b, strict)
    } else {
        Ok(false)
    };
    if planned == Ok(true) {
        if let Some(n) = jit.translate(block, b.targets) {
            native = n;
            cache.stats.blocks_translated += 1;
        } else {
            cache.forget_natives();
            jit.clear();
            cache.stats.native_flushes += 1;
            if let Some(n) = jit.translate(block, b.targets) {
                native = n;
            }
        }
    }
    cache.jit = Some(jit);
    cache.set_native(block, native);
    planned.map(|_| ())
}

/// Runs `block` on the tier that it has reached. Gives what a handler gives, and
/// the block that was left, to which it refers.
#[inline]
pub(crate) fn run(
    cpu: &mut Cpu,
    cache: &mut CodeCache,
    block: *const Block,
    interpreted: impl FnOnce(&mut Cpu, *const Block) -> u32,
) -> (*const Block, u32) {
    // SAFETY: the block is valid until the next flush.
    let native = unsafe { &(*block).native };
    if native.is_some() {
        let code = native.code;
        let (block, next) = enter(cpu, cache, code, block);
        if next == INTERPRET {
            return (block, interpreted(cpu, block));
        }
        return (block, next);
    }
    if native.entered != Native::NEVER {
        let entered = native.entered + 1;
        let hot = cache
            .jit
            .as_ref()
            .is_some_and(|j| entered >= j.settings.hot);
        if !hot {
            cache.count_entry(block, entered);
        } else {
            return promote(cpu, cache, block);
        }
    }
    (block, interpreted(cpu, block))
}

fn enter(
    cpu: &mut Cpu,
    cache: &mut CodeCache,
    code: *const u8,
    block: *const Block,
) -> (*const Block, u32) {
    let Some(jit) = &mut cache.jit else {
        cpu.fault = Some(Fault::Internal("translated code without a translator"));
        return (block, Next::FAULT);
    };
    cpu.native.block = block;
    let next = jit.enter(cpu, code);
    let left = &mut cache.stats.native_left;
    left[if next == INTERPRET {
        5
    } else {
        next.min(4) as usize
    }] += 1;
    (cpu.native.block, next)
}

/// Translates `block` instead of running it; the run loop then comes back to it.
#[cold]
fn promote(cpu: &mut Cpu, cache: &mut CodeCache, block: *const Block) -> (*const Block, u32) {
    // SAFETY: the block is valid until the next flush.
    let offset = unsafe { (*block).gpa & 0xfff };
    cpu.rip = cpu.regs[crate::state::reg::PAGE_RIP].wrapping_add(offset);
    match translate(cpu, cache, block) {
        Ok(()) => (block, Next::LOOKUP),
        Err(fault) => {
            cpu.fault = Some(fault);
            (block, Next::FAULT)
        }
    }
}

/// After `from` was left for its successor `which`, the block `to`: links their
/// translations.
#[inline]
pub(crate) fn connect(cache: &mut CodeCache, from: *const Block, which: usize, to: *const Block) {
    // SAFETY: both are valid until the next flush; they may be the same block, so
    // no reference to one lives while the other is looked at.
    let (mut f, t) = unsafe { ((*from).native, (*to).native) };
    if f.links[which] == 0 || !t.is_some() {
        return;
    }
    if let Some(jit) = &mut cache.jit {
        jit.connect(&mut f, which, &t);
        cache.set_native(from, f);
    }
}
