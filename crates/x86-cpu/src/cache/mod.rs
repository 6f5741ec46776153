//! Decoded code of one vCPU: blocks of micro-operations, found by guest
//! physical address and mode, so that every linear mapping of a page shares
//! them.

mod arena;

use alloc::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use iced_x86::Instruction;

use crate::{
    build::{Memo, Note, Uops},
    env::Env,
    jit::{self, CodeMemory, Jit, Native as NativeCode},
    ops::native::Native,
    state::Cpu,
    uop::Uop,
};

use arena::Arena;

/// A run of instructions with one entry, inside one page. Its micro-operations,
/// the last of which is a terminator, follow it in memory.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(32))]
pub struct Block {
    /// Successors in the same page, or null: not taken, taken.
    pub links: [*const Block; 2],
    /// Where the successors start, relative to [`crate::state::reg::PAGE_RIP`].
    pub targets: [i64; 2],
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Mode key.
    pub mode: u32,
    /// Number of instructions.
    pub count: u16,
    /// Length of the code in bytes.
    pub len: u16,
    /// The first instruction reaches into this other guest page, unless it is
    /// [`NO_PAGE`].
    second_page: u64,
    /// Next block of the page with the same hash, or null.
    next: *const Block,
    /// Its translation.
    pub(crate) native: NativeCode,
}

/// No page has this number.
const NO_PAGE: u64 = u64::MAX;
const NOTHING_RECENT: (u64, *mut [*const Block; HEADS]) = (NO_PAGE, core::ptr::null_mut());

/// Blocks of one guest physical page.
struct Page {
    /// The first block of each hash, among the operands.
    heads: *mut [*const Block; HEADS],
    /// Pages whose last instruction reaches into this one.
    straddlers: Vec<u64>,
}

const HEADS: usize = 64;

/// An entry of the jump cache: linear address of an instruction to its block.
#[derive(Clone, Copy)]
struct Jump {
    address: u64,
    generation: u64,
    mode: u32,
    block: *const Block,
}

/// An entry of the fetch TLB.
#[derive(Clone, Copy)]
struct Fetch {
    page: u64,
    generation: u64,
    user: bool,
    gpa: u64,
}

const JUMPS: usize = 8192;
const FETCHES: usize = 512;

/// The code cache of one vCPU.
pub struct CodeCache {
    pages: BTreeMap<u64, Page>,
    /// The page looked at last, as most blocks lead to others of their page:
    /// its number and [`Page::heads`].
    recent: (u64, *mut [*const Block; HEADS]),
    jumps: Box<[Jump]>,
    fetches: Box<[Fetch]>,
    /// Blocks, each with its micro-operations.
    blocks: Arena,
    /// What micro-operations point at.
    operands: Arena,
    /// The block builder's.
    pub(crate) notes: Vec<Note>,
    /// The block builder's.
    pub(crate) memo: Memo,
    /// The native tier, if there is one.
    pub(crate) jit: Option<Box<Jit>>,
    /// Bytes kept before everything is thrown away.
    limit: usize,
    /// Counters.
    pub stats: CacheStats,
}

// SAFETY: all pointers lead into memory that the cache itself owns.
unsafe impl Send for CodeCache {}

/// Counters of a [`CodeCache`].
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "named for what they count")]
pub struct CacheStats {
    pub blocks_built: u64,
    pub instructions_decoded: u64,
    pub instructions_recalled: u64,
    pub lookups: u64,
    pub invalidations: u64,
    pub flushes: u64,
    pub blocks_translated: u64,
    pub native_flushes: u64,
    /// Look-ups that the jump cache answered.
    pub jump_hits: u64,
    /// Branches that lead to their target's block from then on.
    pub links: u64,
    /// How often translated code was left: by its successors 0 and 1, to look up
    /// code, by a fault, by HLT, and because of an unmasked SIMD exception.
    pub native_left: [u64; 6],
}

impl CodeCache {
    /// An empty cache that keeps about `limit` bytes of decoded code.
    pub fn new(limit: usize) -> Self {
        let jump = Jump {
            address: 0,
            generation: u64::MAX,
            mode: 0,
            block: core::ptr::null(),
        };
        let fetch = Fetch {
            page: 0,
            generation: u64::MAX,
            user: false,
            gpa: 0,
        };
        Self {
            pages: BTreeMap::new(),
            recent: NOTHING_RECENT,
            jumps: vec![jump; JUMPS].into(),
            fetches: vec![fetch; FETCHES].into(),
            blocks: Arena::new(),
            operands: Arena::new(),
            notes: Vec::new(),
            memo: Memo::new(),
            jit: None,
            limit,
            stats: CacheStats::default(),
        }
    }

    /// Has hot blocks translated from now on, into `memory`. `false`: that is too
    /// little.
    pub fn translate_into(&mut self, memory: CodeMemory, settings: jit::Settings) -> bool {
        self.jit = Jit::new(memory, settings).map(Box::new);
        self.jit.is_some()
    }

    /// Whether hot blocks are translated.
    pub fn translates(&self) -> bool {
        self.jit.is_some()
    }

    /// Bytes of translated code.
    pub fn native_memory(&self) -> usize {
        self.jit.as_ref().map_or(0, |j| j.used())
    }

    /// Throws everything away. No block may be running.
    pub fn flush(&mut self, cpu: &mut Cpu) {
        self.pages.clear();
        self.recent = NOTHING_RECENT;
        self.blocks.clear();
        self.operands.clear();
        self.memo.clear();
        if let Some(jit) = &mut self.jit {
            jit.clear();
        }
        cpu.generations.end();
        self.stats.flushes += 1;
    }

    /// Forgets the blocks of guest page `page`. No block may be running; their
    /// memory stays valid until the next flush.
    pub fn invalidate(&mut self, cpu: &mut Cpu, page: u64) {
        if let Some(p) = self.pages.remove(&page) {
            self.recent = NOTHING_RECENT;
            self.stats.invalidations += 1;
            cpu.generations.end();
            for s in p.straddlers {
                self.invalidate(cpu, s);
            }
        }
    }

    /// Bytes of host memory that the cache holds, about.
    pub fn memory(&self) -> usize {
        self.blocks.memory()
            + self.operands.memory()
            + self.pages.len() * (size_of::<Page>() + size_of::<u64>())
    }

    #[inline]
    pub(crate) fn jump(&self, address: u64, generation: u64, mode: u32) -> Option<*const Block> {
        let j = &self.jumps[Self::jump_slot(address)];
        (j.address == address && j.generation == generation && j.mode == mode).then_some(j.block)
    }

    #[inline]
    fn jump_slot(address: u64) -> usize {
        (address ^ address >> 13) as usize & (JUMPS - 1)
    }

    pub(crate) fn set_jump(
        &mut self,
        address: u64,
        generation: u64,
        mode: u32,
        block: *const Block,
    ) {
        self.jumps[Self::jump_slot(address)] = Jump {
            address,
            generation,
            mode,
            block,
        };
    }

    pub(crate) fn fetched(&self, address: u64, generation: u64, user: bool) -> Option<u64> {
        let f = &self.fetches[(address >> 12) as usize & (FETCHES - 1)];
        (f.page == address >> 12 && f.generation == generation && f.user == user)
            .then_some(f.gpa | address & 0xfff)
    }

    pub(crate) fn set_fetched(&mut self, address: u64, generation: u64, user: bool, gpa: u64) {
        self.fetches[(address >> 12) as usize & (FETCHES - 1)] = Fetch {
            page: address >> 12,
            generation,
            user,
            gpa: gpa & !0xfff,
        };
    }

    fn hash(gpa: u64, mode: u32) -> usize {
        (gpa ^ gpa >> 6 ^ u64::from(mode) >> 3) as usize & (HEADS - 1)
    }

    /// The block that starts at `gpa` under `mode`, if it was built.
    pub(crate) fn find(&mut self, gpa: u64, mode: u32) -> Option<*const Block> {
        self.stats.lookups += 1;
        let number = gpa >> 12;
        if self.recent.0 != number {
            self.recent = (number, self.pages.get(&number)?.heads);
        }
        // SAFETY: heads of a page of this cache, not yet flushed.
        let mut at = unsafe { (*self.recent.1)[Self::hash(gpa, mode)] };
        while !at.is_null() {
            // SAFETY: a block of this cache, not yet flushed.
            let b = unsafe { &*at };
            if b.gpa == gpa && b.mode == mode {
                return Some(at);
            }
            at = b.next;
        }
        None
    }

    /// Whether the cache should be flushed before the next block is built.
    pub(crate) fn full(&self) -> bool {
        self.blocks.taken() + self.operands.taken() >= self.limit
    }

    /// Room for the micro-operations of the next block, of which
    /// [`Self::insert`] keeps as many as it needs.
    pub(crate) fn reserve(&mut self, env: &mut dyn Env) -> *mut Uops {
        self.blocks.prepare(|at, len| env.populate(at, len));
        let at = self
            .blocks
            .reserve::<Uop>(HEADER + size_of::<Uops>() / size_of::<Uop>());
        at.wrapping_add(HEADER).cast()
    }

    /// Keeps a block whose `uops` first micro-operations are in the room that
    /// was reserved; what some of them point to is already kept.
    pub(crate) fn insert(&mut self, mut block: Block, uops: usize) -> *const Block {
        self.stats.blocks_built += 1;
        self.stats.instructions_decoded += u64::from(block.count);
        let (number, hash) = (block.gpa >> 12, Self::hash(block.gpa, block.mode));
        if self.recent.0 != number {
            self.recent = (number, self.page(number).heads);
        }
        let at = self.blocks.take::<Uop>(HEADER + uops).cast::<Block>();
        // SAFETY: heads of a page of this cache; room for the block, aligned for
        // it.
        unsafe {
            let head = &mut (*self.recent.1)[hash];
            block.next = *head;
            *head = at;
            at.write(block);
        }
        if block.second_page != NO_PAGE {
            self.page(block.second_page).straddlers.push(number);
        }
        at
    }

    fn page(&mut self, number: u64) -> &mut Page {
        let operands = &mut self.operands;
        self.pages.entry(number).or_insert_with(|| Page {
            heads: operands.keep([core::ptr::null(); HEADS]),
            straddlers: Vec::new(),
        })
    }

    /// Keeps a decoded instruction until the next flush.
    pub(crate) fn keep_instruction(&mut self, insn: &Instruction) -> u64 {
        self.operands.keep(*insn) as u64
    }

    /// Keeps micro-operations that belong to no block until the next flush.
    pub(crate) fn keep_uops(&mut self, uops: [Uop; 2]) -> *const Uop {
        self.operands.keep(uops).cast()
    }

    /// Sets the translation of `block`.
    pub(crate) fn set_native(&mut self, block: *const Block, native: NativeCode) {
        // SAFETY: a block of this cache, not yet flushed; nobody holds a reference
        // to it.
        unsafe { (*block.cast_mut()).native = native };
    }

    /// Notes that `block` was entered.
    #[inline]
    pub(crate) fn count_entry(&mut self, block: *const Block, entered: u16) {
        // SAFETY: as in `set_native`.
        unsafe { (*block.cast_mut()).native.count(entered) };
    }

    /// `block` is what runs at the present RIP: its translation, if there is one,
    /// is found from translated code from now on.
    #[inline]
    pub(crate) fn note_jump(&mut self, cpu: &Cpu, block: *const Block) {
        // SAFETY: as in `set_native`. Blocks that depend on a second page are never
        // translated.
        let native = unsafe { &(*block).native };
        if native.is_some()
            && let Some(jit) = &mut self.jit
        {
            jit.note_jump(cpu, native);
        }
    }

    /// Forgets all translations, but not the blocks.
    pub(crate) fn forget_natives(&mut self) {
        for page in self.pages.values() {
            // SAFETY: heads of a page of this cache, and their blocks.
            for &head in unsafe { &*page.heads } {
                let mut at = head;
                while !at.is_null() {
                    // SAFETY: a block of this cache, not yet flushed; nobody holds a
                    // reference to it.
                    unsafe {
                        (*at.cast_mut()).native = NativeCode::none();
                        at = (*at).next;
                    }
                }
            }
        }
    }

    /// Keeps a natively executed instruction until the next flush.
    pub(crate) fn keep_native(&mut self, native: Native) -> u64 {
        self.operands.keep(native) as u64
    }

    /// Links `from`'s successor `which` to `to` if both are in one page.
    pub(crate) fn link(&mut self, from: *const Block, which: usize, to: *const Block) {
        // SAFETY: both are blocks of this cache, not yet flushed; nobody holds a
        // reference to them.
        unsafe {
            let (f, t) = (from.cast_mut(), &*to);
            if (*f).gpa >> 12 == t.gpa >> 12 && (*f).mode == t.mode && t.second_page == NO_PAGE {
                (*f).links[which] = to;
                self.stats.links += 1;
            }
        }
    }
}

impl Block {
    pub(crate) fn new(gpa: u64, mode: u32, second_page: Option<u64>) -> Self {
        Self {
            links: [core::ptr::null(); 2],
            targets: [0; 2],
            gpa,
            mode,
            count: 0,
            len: 0,
            second_page: second_page.unwrap_or(NO_PAGE),
            next: core::ptr::null(),
            native: NativeCode::none(),
        }
    }

    /// The other guest page that the first instruction reaches into.
    pub(crate) fn second_page(&self) -> Option<u64> {
        (self.second_page != NO_PAGE).then_some(self.second_page)
    }

    /// The micro-operations of a block.
    #[inline(always)]
    pub(crate) fn uops(block: *const Block) -> *const Uop {
        block.wrapping_add(1).cast()
    }
}

/// Size of a block without its micro-operations, in those.
const HEADER: usize = size_of::<Block>() / size_of::<Uop>();
const _: () = assert!(HEADER * size_of::<Uop>() == size_of::<Block>());
