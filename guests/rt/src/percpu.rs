//! Each processor's descriptor table, task state segment and world-switch state.

use crate::context::Context;
use crate::cpu::{self, TablePointer};
use core::cell::UnsafeCell;
use core::ptr;

/// Processors that a guest can start.
pub const MAX_CPUS: usize = 8;
/// Descriptors of each processor's GDT.
pub const GDT_LEN: usize = 96;

/// Segment selectors of the runtime's GDT.
pub mod sel {
    /// 64-bit code, ring 0.
    pub const CODE64: u16 = 0x08;
    /// Flat data, ring 0.
    pub const DATA: u16 = 0x10;
    /// Flat 32-bit code, ring 3.
    pub const USER_CODE32: u16 = 0x18 | 3;
    /// Flat data, ring 3.
    pub const USER_DATA: u16 = 0x20 | 3;
    /// 64-bit code, ring 3.
    pub const USER_CODE64: u16 = 0x28 | 3;
    /// Flat 32-bit code, ring 0.
    pub const CODE32: u16 = 0x30;
    /// 16-bit code, ring 0, base 0, limit 64 KiB.
    pub const CODE16: u16 = 0x38;
    /// 64-bit task state segment (two slots).
    pub const TSS: u16 = 0x40;
    /// 16-bit code, ring 3, base 0, limit 64 KiB.
    pub const USER_CODE16: u16 = 0x50 | 3;
    /// First slot that tests may use.
    pub const FREE: u16 = 0x60;
}

/// Bytes of the I/O permission bitmap with its closing byte.
pub const IO_BITMAP: usize = 8192 + 1;

/// 64-bit task state segment with I/O permission bitmap.
#[repr(C, packed(4))]
pub struct Tss {
    reserved0: u32,
    /// Stack pointers of rings 0 to 2.
    pub rsp: [u64; 3],
    reserved1: u64,
    /// Interrupt stacks 1 to 7.
    pub ist: [u64; 7],
    reserved2: u64,
    reserved3: u16,
    /// Offset of the I/O permission bitmap.
    pub io_base: u16,
    /// Permission bitmap: a set bit denies.
    pub io_bitmap: [u8; IO_BITMAP],
}

/// Limit of a TSS without bitmap.
pub const TSS_LIMIT: u32 = 103;
/// Limit of a TSS with its whole bitmap.
pub const TSS_LIMIT_IO: u32 = 104 + IO_BITMAP as u32 - 1;

/// State of one processor. `this` stands directly before the GDT, where the
/// interrupt stubs find it with SGDT.
#[repr(C, align(64))]
pub struct PerCpu {
    this: *mut PerCpu,
    /// Descriptors.
    pub gdt: [u64; GDT_LEN],
    pub(crate) context: *mut Context,
    pub(crate) host_rsp: u64,
    pub(crate) host_cr0: u64,
    pub(crate) host_cr3: u64,
    pub(crate) host_cr4: u64,
    /// Index from 0, the boot processor.
    pub index: usize,
    /// Task state segment.
    pub tss: Tss,
}

const IST_SIZE: usize = 16 * 1024;
const STACKS: usize = 4;

#[repr(C, align(64))]
struct Stacks([[u8; IST_SIZE]; STACKS]);

struct Global<T>(UnsafeCell<T>);
// SAFETY: each processor touches its own element only, or the guest
// coordinates the access itself.
unsafe impl<T> Sync for Global<T> {}

static CPUS: Global<[PerCpu; MAX_CPUS]> =
    // SAFETY: all-zero is valid for integers and null pointers.
    Global(UnsafeCell::new(unsafe { core::mem::zeroed() }));
static STACK_POOL: Global<[Stacks; MAX_CPUS]> = Global(UnsafeCell::new(
    [const { Stacks([[0; IST_SIZE]; STACKS]) }; MAX_CPUS],
));

/// The state of processor `index`.
#[allow(clippy::mut_from_ref)]
pub fn cpu(index: usize) -> &'static mut PerCpu {
    assert!(index < MAX_CPUS);
    // SAFETY: in bounds; guests are written so that no two processors hold
    // the same element, and the stubs' writes happen inside `enter` only.
    unsafe { &mut *(CPUS.0.get() as *mut PerCpu).add(index) }
}

/// The state of the running processor.
pub fn this() -> &'static mut PerCpu {
    let base = cpu::sgdt().base;
    // SAFETY: GDTR was loaded by `init`, so `this` stands before its base.
    unsafe { &mut **((base - 8) as *const *mut PerCpu) }
}

/// Top of one of processor `index`'s stacks: 0 is RSP0, 1 to 3 the ISTs.
pub fn stack_top(index: usize, which: usize) -> u64 {
    assert!(index < MAX_CPUS && which < STACKS);
    STACK_POOL.0.get() as u64
        + (index * size_of::<Stacks>()) as u64
        + ((which + 1) * IST_SIZE) as u64
}

/// A segment descriptor from base, limit, access byte and flags nibble.
pub const fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (base, limit) = (base as u64, limit as u64);
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | (access as u64) << 40
        | (limit >> 16 & 0xF) << 48
        | (flags as u64 & 0xF) << 52
        | (base >> 24) << 56
}

/// The two halves of a 64-bit system descriptor (TSS, LDT).
pub const fn system_descriptor(base: u64, limit: u32, access: u8) -> [u64; 2] {
    [descriptor(base as u32, limit, access, 0), base >> 32]
}

/// The two halves of a 64-bit call gate.
pub const fn call_gate64(selector: u16, offset: u64, access: u8) -> [u64; 2] {
    [
        (offset & 0xFFFF)
            | (selector as u64) << 16
            | (access as u64) << 40
            | (offset >> 16 & 0xFFFF) << 48,
        offset >> 32,
    ]
}

impl PerCpu {
    /// Writes one descriptor.
    pub fn set_gdt(&mut self, selector: u16, value: u64) {
        // SAFETY: in bounds by the assertion of the index; volatile because
        // the processor reads and writes the table.
        unsafe { ptr::write_volatile(&mut self.gdt[usize::from(selector >> 3)], value) };
    }

    /// Writes a descriptor of two slots.
    pub fn set_gdt2(&mut self, selector: u16, value: [u64; 2]) {
        self.set_gdt(selector, value[0]);
        self.set_gdt(selector + 8, value[1]);
    }

    /// Reads one descriptor, with the accessed and busy bits of the processor.
    pub fn gdt(&self, selector: u16) -> u64 {
        // SAFETY: as in `set_gdt`.
        unsafe { ptr::read_volatile(&self.gdt[usize::from(selector >> 3)]) }
    }

    /// Linear address of the TSS.
    pub fn tss_base(&self) -> u64 {
        &raw const self.tss as u64
    }

    /// Loads the task register with a TSS of the given limit.
    pub fn load_tss(&mut self, limit: u32) {
        let base = self.tss_base();
        self.set_gdt2(sel::TSS, system_descriptor(base, limit, 0x89));
        cpu::ltr(sel::TSS);
    }

    /// Reloads GDTR with this processor's table.
    pub fn load_gdt(&self) {
        cpu::lgdt(TablePointer {
            limit: (GDT_LEN * 8 - 1) as u16,
            base: &raw const self.gdt as u64,
        });
    }
}

/// Sets up the running processor as number `index`.
pub(crate) fn init(index: usize) {
    let pc = cpu(index);
    pc.this = pc;
    pc.index = index;
    pc.gdt = [0; GDT_LEN];
    for (selector, value) in [
        (sel::CODE64, descriptor(0, 0xF_FFFF, 0x9B, 0xA)),
        (sel::DATA, descriptor(0, 0xF_FFFF, 0x93, 0xC)),
        (sel::USER_CODE32, descriptor(0, 0xF_FFFF, 0xFB, 0xC)),
        (sel::USER_DATA, descriptor(0, 0xF_FFFF, 0xF3, 0xC)),
        (sel::USER_CODE64, descriptor(0, 0xF_FFFF, 0xFB, 0xA)),
        (sel::CODE32, descriptor(0, 0xF_FFFF, 0x9B, 0xC)),
        (sel::CODE16, descriptor(0, 0xFFFF, 0x9B, 0)),
        (sel::USER_CODE16, descriptor(0, 0xFFFF, 0xFB, 0)),
    ] {
        pc.set_gdt(selector, value);
    }
    pc.tss.rsp = [stack_top(index, 0); 3];
    pc.tss.ist = [0; 7];
    for ist in 0..3 {
        pc.tss.ist[ist] = stack_top(index, ist + 1);
    }
    pc.tss.io_base = (TSS_LIMIT + 1) as u16;
    pc.tss.io_bitmap = [0xFF; IO_BITMAP];
    pc.load_gdt();
    pc.load_tss(TSS_LIMIT);
    crate::interrupt::load();
    cpu::lldt(0);
}
