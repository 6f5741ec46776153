//! Decoded code of one vCPU: blocks of micro-operations, found by guest
//! physical address and mode, so that every linear mapping of a page shares
//! them.

use alloc::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use iced_x86::Instruction;

use crate::{build::Scratch, ops::native::Native, state::Cpu, uop::Uop};

/// A run of instructions with one entry, inside one page.
#[derive(Debug)]
#[repr(C)]
pub struct Block {
    /// Micro-operations; the last one is a terminator.
    pub uops: *const Uop,
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
    /// The first instruction reaches into this other guest page.
    pub second_page: Option<u64>,
    /// Next block of the page with the same hash.
    next: u32,
}

/// Blocks of one guest physical page.
#[allow(
    clippy::vec_box,
    reason = "blocks point at each other and must not move"
)]
struct Page {
    heads: Box<[u32; HEADS]>,
    blocks: Vec<Box<Block>>,
    /// Pages whose last instruction reaches into this one.
    straddlers: Vec<u64>,
}

const HEADS: usize = 64;
const NONE: u32 = u32::MAX;

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
const CHUNK: usize = 32 * 1024;

/// The code cache of one vCPU.
#[allow(
    clippy::vec_box,
    reason = "micro-operations point at them: they must not move"
)]
pub struct CodeCache {
    pages: BTreeMap<u64, Page>,
    jumps: Box<[Jump]>,
    fetches: Box<[Fetch]>,
    chunks: Vec<Vec<Uop>>,
    insns: Vec<Box<Instruction>>,
    natives: Vec<Box<Native>>,
    uops_used: usize,
    /// The block builder's.
    pub(crate) scratch: Scratch,
    /// Most micro-operations kept before everything is thrown away.
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
    pub lookups: u64,
    pub invalidations: u64,
    pub flushes: u64,
}

impl CodeCache {
    /// An empty cache that keeps at most `limit` micro-operations.
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
            jumps: vec![jump; JUMPS].into(),
            fetches: vec![fetch; FETCHES].into(),
            chunks: Vec::new(),
            insns: Vec::new(),
            natives: Vec::new(),
            uops_used: 0,
            scratch: Scratch::default(),
            limit,
            stats: CacheStats::default(),
        }
    }

    /// Throws everything away. No block may be running.
    pub fn flush(&mut self, cpu: &mut Cpu) {
        self.pages.clear();
        self.chunks.clear();
        self.insns.clear();
        self.natives.clear();
        self.uops_used = 0;
        cpu.code_generation += 1;
        self.stats.flushes += 1;
    }

    /// Forgets the blocks of guest page `page`. No block may be running; their
    /// memory stays valid until the next flush.
    pub fn invalidate(&mut self, cpu: &mut Cpu, page: u64) {
        if let Some(p) = self.pages.remove(&page) {
            self.stats.invalidations += 1;
            cpu.code_generation += 1;
            for s in p.straddlers {
                self.invalidate(cpu, s);
            }
        }
    }

    /// Bytes of host memory that the cache holds, about.
    pub fn memory(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<Uop>()
            + self.insns.len() * size_of::<Instruction>()
            + self.natives.len() * size_of::<Native>()
            + self
                .pages
                .values()
                .map(|p| p.blocks.len() * size_of::<Block>() + 512)
                .sum::<usize>()
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
        let page = self.pages.get(&(gpa >> 12))?;
        let mut i = page.heads[Self::hash(gpa, mode)];
        while i != NONE {
            let b = &page.blocks[i as usize];
            if b.gpa == gpa && b.mode == mode {
                return Some(&raw const **b);
            }
            i = b.next;
        }
        None
    }

    /// Whether the cache should be flushed before the next block is built.
    pub(crate) fn full(&self) -> bool {
        self.uops_used >= self.limit
    }

    /// Keeps a block: its micro-operations, and the instructions that some of
    /// them point to are already in [`Self::keep_instruction`].
    pub(crate) fn insert(&mut self, mut block: Block, uops: &[Uop]) -> *const Block {
        block.uops = self.keep_uops(uops);
        self.stats.blocks_built += 1;
        self.stats.instructions_decoded += u64::from(block.count);
        let (number, hash) = (block.gpa >> 12, Self::hash(block.gpa, block.mode));
        let second = block.second_page;
        let page = self.pages.entry(number).or_insert_with(Page::new);
        block.next = page.heads[hash];
        page.heads[hash] = page.blocks.len() as u32;
        page.blocks.push(Box::new(block));
        let b = &raw const **page.blocks.last().expect("just pushed");
        if let Some(second) = second {
            self.pages
                .entry(second)
                .or_insert_with(Page::new)
                .straddlers
                .push(number);
        }
        b
    }

    fn keep_uops(&mut self, uops: &[Uop]) -> *const Uop {
        let fits = self
            .chunks
            .last()
            .is_some_and(|c| c.len() + uops.len() <= CHUNK);
        if !fits {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        self.uops_used += uops.len();
        let chunk = self.chunks.last_mut().expect("there is one");
        let at = chunk.len();
        // Never grows past its capacity, so pointers into it stay valid.
        chunk.extend_from_slice(uops);
        chunk[at..].as_ptr()
    }

    /// Keeps a decoded instruction until the next flush.
    pub(crate) fn keep_instruction(&mut self, insn: &Instruction) -> u64 {
        self.insns.push(Box::new(*insn));
        &raw const **self.insns.last().expect("just pushed") as u64
    }

    /// Keeps a natively executed instruction until the next flush.
    pub(crate) fn keep_native(&mut self, native: Native) -> u64 {
        self.natives.push(Box::new(native));
        &raw const **self.natives.last().expect("just pushed") as u64
    }

    /// Links `from`'s successor `which` to `to` if both are in one page.
    pub(crate) fn link(&mut self, from: *const Block, which: usize, to: *const Block) {
        // SAFETY: both are blocks of this cache, not yet flushed; nobody holds a
        // reference to them.
        unsafe {
            let (f, t) = (from.cast_mut(), &*to);
            if (*f).gpa >> 12 == t.gpa >> 12 && (*f).mode == t.mode && t.second_page.is_none() {
                (*f).links[which] = to;
            }
        }
    }
}

impl Page {
    fn new() -> Self {
        Self {
            heads: Box::new([NONE; HEADS]),
            blocks: Vec::new(),
            straddlers: Vec::new(),
        }
    }
}

impl Block {
    pub(crate) fn new(gpa: u64, mode: u32) -> Self {
        Self {
            uops: core::ptr::null(),
            links: [core::ptr::null(); 2],
            targets: [0; 2],
            gpa,
            mode,
            count: 0,
            len: 0,
            second_page: None,
            next: NONE,
        }
    }
}
