//! Physical frames, page tables and the arena where tests run code.

use crate::context::Context;
use crate::cpu;
use crate::memory::{fill, read, write, write_bytes};
use core::sync::atomic::{AtomicU64, Ordering};

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Write-through.
pub const PWT: u64 = 1 << 3;
/// Cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Large page.
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execute.
pub const NX: u64 = 1 << 63;
/// Address bits of an entry.
pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// First frame handed out; guests run with at least 64 MiB.
const POOL_START: u64 = 16 << 20;
const POOL_END: u64 = 60 << 20;
static NEXT_FRAME: AtomicU64 = AtomicU64::new(POOL_START);

/// A zeroed 4 KiB frame, identity-mapped for ring 0.
pub fn frame() -> u64 {
    frames(1, 4096)
}

/// `count` contiguous zeroed frames with the given alignment in bytes.
pub fn frames(count: u64, align: u64) -> u64 {
    let mut start = 0;
    let _ = NEXT_FRAME.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |next| {
        start = next.next_multiple_of(align);
        Some(start + count * 4096)
    });
    assert!(start + count * 4096 <= POOL_END, "out of frames");
    fill(start, count * 4096, 0);
    start
}

/// A four-level address space. The first GiB (RAM) and the fourth (devices)
/// are mapped as at boot; the second, the third and all above are the test's.
#[derive(Clone, Copy)]
pub struct AddressSpace {
    /// Physical address of the top table.
    pub root: u64,
}

impl Default for AddressSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl AddressSpace {
    /// An address space with the runtime's mappings only.
    pub fn new() -> Self {
        let (root, pdpt) = (frame(), frame());
        let boot_pdpt = read::<u64>(boot_root()) & ADDRESS;
        write(root, pdpt | P | W | U);
        write(pdpt, read::<u64>(boot_pdpt));
        write(pdpt + 24, read::<u64>(boot_pdpt + 24));
        Self { root }
    }

    /// Address of the entry that maps `va` at `level` (1 = 4 KiB, 2 = 2 MiB,
    /// 3 = 1 GiB, 4 = the top table), making the tables above it.
    pub fn entry(&self, va: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = 4;
        loop {
            let slot = table + (va >> (12 + 9 * (at - 1)) & 511) * 8;
            if at == level {
                return slot;
            }
            let mut entry: u64 = read(slot);
            if entry & P == 0 {
                entry = frame() | P | W | U;
                write(slot, entry);
            }
            assert!(entry & PS == 0, "{va:#x} is inside a large page");
            table = entry & ADDRESS;
            at -= 1;
        }
    }

    /// Maps one page of `level` (1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB).
    pub fn map(&self, va: u64, pa: u64, level: u32, bits: u64) {
        let ps = if level > 1 { PS } else { 0 };
        write(self.entry(va, level), pa | bits | ps);
        cpu::invlpg(va);
    }

    /// Maps `count` 4 KiB pages.
    pub fn map_range(&self, va: u64, pa: u64, count: u64, bits: u64) {
        for i in 0..count {
            self.map(va + i * 4096, pa + i * 4096, 1, bits);
        }
    }

    /// Loads CR3.
    pub fn activate(&self) {
        cpu::set_cr3(self.root);
    }
}

/// CR3 as set up at boot.
pub fn boot_root() -> u64 {
    unsafe extern "C" {
        static boot_pml4: u8;
    }
    &raw const boot_pml4 as u64
}

/// Where the arena's code is, below 4 GiB so that compatibility mode reaches it.
pub const CODE: u64 = 0x4000_0000;
/// Where the arena's data is.
pub const DATA: u64 = 0x4010_0000;
/// Lowest address of the arena's stack.
pub const STACK: u64 = 0x4020_0000;
/// Initial stack pointer: the middle of the stack, 16-byte aligned.
pub const STACK_TOP: u64 = STACK + PAGES * 4096 / 2;
/// Pages of each of the three areas.
pub const PAGES: u64 = 4;

/// An address space with user-accessible code, data and stack pages in which
/// snippets run in any ring.
pub struct Arena {
    /// The address space, active since [`Self::new`].
    pub space: AddressSpace,
    /// Physical address of the code pages.
    pub code: u64,
    /// Physical address of the data pages.
    pub data: u64,
    /// Physical address of the stack pages.
    pub stack: u64,
}

impl Default for Arena {
    fn default() -> Self {
        Self::new()
    }
}

impl Arena {
    /// Builds the arena and activates its address space.
    pub fn new() -> Self {
        let space = AddressSpace::new();
        let [code, data, stack] = [(); 3].map(|()| frames(PAGES, 4096));
        space.map_range(CODE, code, PAGES, P | W | U);
        space.map_range(DATA, data, PAGES, P | W | U);
        space.map_range(STACK, stack, PAGES, P | W | U);
        space.activate();
        Self {
            space,
            code,
            data,
            stack,
        }
    }

    /// Puts code at [`CODE`] through the identity mapping.
    pub fn load(&self, bytes: &[u8]) {
        self.load_at(0, bytes);
    }

    /// Puts code at [`CODE`] + `offset`.
    pub fn load_at(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= PAGES * 4096);
        write_bytes(self.code + offset, bytes);
    }

    /// Loads code and gives a ring-0 context at it, with RDI = [`DATA`].
    pub fn kernel(&self, bytes: &[u8]) -> Context {
        self.load(bytes);
        Context {
            rdi: DATA,
            ..Context::kernel(CODE, STACK_TOP)
        }
    }

    /// Loads code and gives a ring-3 context at it, with RDI = [`DATA`].
    pub fn user(&self, bytes: &[u8]) -> Context {
        self.load(bytes);
        Context {
            rdi: DATA,
            ..Context::user(CODE, STACK_TOP)
        }
    }

    /// Loads 32-bit code and gives a compatibility-mode context at it.
    pub fn compat(&self, ring3: bool, bytes: &[u8]) -> Context {
        self.load(bytes);
        Context {
            rdi: DATA,
            ..Context::compat(ring3, CODE, STACK_TOP)
        }
    }
}
