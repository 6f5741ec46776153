//! The vCPU as the engine holds it: one `repr(C)` struct whose hot part is
//! small, and whose layout is shared by the interpreting tier and the native
//! one.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::{
    env::Env,
    fault::Fault,
    flags,
    generation::Generations,
    tlb::{Tlb, TlbEntry},
};

/// General register numbers in encoding order; slots of [`Cpu::regs`].
#[allow(missing_docs, reason = "register names")]
pub mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    /// Always zero: stands in for an absent base or index.
    pub const ZERO: usize = 16;
    /// RIP of byte 0 of the current code page: RIP is this plus an offset.
    pub const PAGE_RIP: usize = 17;
    /// Effective segment bases, ES CS SS DS FS GS: zero for the first four in 64-bit mode.
    pub const SEG_BASE: usize = 18;
    /// Number of slots.
    pub const COUNT: usize = 24;
}

/// Segment register numbers in encoding order.
#[allow(missing_docs, reason = "register names")]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
    pub const LDTR: usize = 6;
    pub const TR: usize = 7;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Segment {
    /// Base address as loaded (64-bit mode ignores it for ES, CS, SS, DS).
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Descriptor bits 40..56: type 0..4, S 4, DPL 5..7, P 7, AVL 12, L 13, D/B 14, G 15.
    pub attributes: u16,
    /// Null or otherwise not to be used.
    pub unusable: bool,
}

impl Segment {
    /// The type field, bits 0 to 3.
    pub fn kind(&self) -> u16 {
        self.attributes & 0xf
    }
    /// S: a code or data segment, not a system one.
    pub fn is_code_or_data(&self) -> bool {
        self.attributes & 0x10 != 0
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// Present.
    pub fn present(&self) -> bool {
        self.attributes & 0x80 != 0
    }
    /// L: 64-bit code.
    pub fn long(&self) -> bool {
        self.attributes & 0x2000 != 0
    }
    /// Base 0, limit 4 GiB, writable, grows up.
    pub fn is_flat(&self) -> bool {
        self.base == 0 && self.limit == u32::MAX && !self.unusable && self.attributes & 0x9e == 0x92
    }
    /// D/B: 32-bit default.
    pub fn big(&self) -> bool {
        self.attributes & 0x4000 != 0
    }
    /// Whether `size` bytes at `offset` are within the limit; expand-down data
    /// segments exist only in protected mode.
    pub fn contains(&self, offset: u64, size: u64, protected: bool) -> bool {
        let last = offset + size.saturating_sub(1);
        if protected && self.attributes & 0x1c == 0x14 {
            let top = if self.big() { 0xffff_ffff } else { 0xffff };
            offset > u64::from(self.limit) && last <= top
        } else {
            last <= u64::from(self.limit)
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// CR0 bits.
#[allow(missing_docs, reason = "the manual's names")]
pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(missing_docs, reason = "the manual's names")]
pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits.
#[allow(missing_docs, reason = "the manual's names")]
pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Instructions held back after STI or a load of SS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Shadow {
    /// None.
    #[default]
    None,
    /// After STI: external interrupts wait for one instruction.
    Sti,
    /// After MOV SS or POP SS: interrupts, NMIs and debug traps wait for one instruction.
    MovSs,
}

/// Whether the vCPU executes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// HLT.
    Halted,
    /// After INIT; or never started.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Bits of [`Cpu::mode`], the part of a block's key that says under which
/// rules its bytes were decoded. Equal keys mean equal micro-operations.
#[allow(missing_docs, reason = "one comment a group")]
pub mod mode {
    // Code size: exactly one of the two, or neither for 16-bit code.
    pub const CODE32: u32 = 1;
    pub const CODE64: u32 = 1 << 1;
    /// Stack pointer is ESP (or RSP in 64-bit code) rather than SP.
    pub const STACK32: u32 = 1 << 2;
    /// CPL, two bits.
    pub const CPL_SHIFT: u32 = 3;
    pub const PROTECTED: u32 = 1 << 5;
    pub const V86: u32 = 1 << 6;
    pub const TS: u32 = 1 << 7;
    pub const EM: u32 = 1 << 8;
    pub const MP: u32 = 1 << 9;
    pub const OSFXSR: u32 = 1 << 10;
    pub const OSXSAVE: u32 = 1 << 11;
    /// XCR0 enables AVX state.
    pub const AVX: u32 = 1 << 12;
    pub const FSGSBASE: u32 = 1 << 13;
    /// Debug registers or TF make every instruction a block of its own.
    pub const STEP: u32 = 1 << 14;
    pub const OSXMMEXCPT: u32 = 1 << 15;
    /// EFER.LMA.
    pub const LONG: u32 = 1 << 16;
    /// Alignment checking is on (CR0.AM, EFLAGS.AC, CPL 3).
    pub const ALIGN: u32 = 1 << 17;
    /// ES, SS and DS are writable, based at 0 with a limit of 4 GiB.
    pub const FLAT: u32 = 1 << 18;
}

/// Bits of [`Cpu::request`].
pub mod request {
    /// Leave guest code: the engine has something to look at.
    pub const KICK: u32 = 1;
    /// Another vCPU wants everybody out of guest code.
    pub const EXCLUSIVE: u32 = 1 << 1;
    /// An interrupt, NMI, INIT, SIPI or timer may be deliverable.
    pub const EVENT: u32 = 1 << 2;
    /// Code invalidations are queued.
    pub const CODE: u32 = 1 << 3;
}

/// One 64-byte vector register, wide enough for ZMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct VecReg(pub [u8; 64]);

/// The x87 and MXCSR state in the FXSAVE64 layout (Intel SDM Vol. 1 §10.5.1).
/// Its XMM area is unused: vector registers live in [`Cpu::vec`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct FpuImage(pub [u8; 512]);

/// The architectural and engine state of one vCPU.
///
/// Handlers of micro-operations reach it through a raw pointer; everything else
/// through `&mut`.
#[repr(C, align(64))]
pub struct Cpu {
    /// Register file; micro-operations address it by byte offset. See [`reg`].
    pub regs: [u64; reg::COUNT],
    /// Arithmetic flags in the packed form of [`flags`]: bit 0 OF, bits 8..16
    /// the low byte of EFLAGS.
    pub cc: u64,
    /// The TLB array for the present privilege.
    pub tlb: *mut TlbEntry,
    /// What translated code keeps here.
    pub native: crate::jit::Frame,
    /// What other threads want ([`request`] bits).
    pub request: Arc<AtomicU32>,
    /// An interrupt or NMI waits for the guest to allow it.
    pub window_wanted: bool,
    /// See [`mode`].
    pub mode: u32,
    /// What was found through a linear address in an older generation must be
    /// looked up again.
    pub generations: Generations,
    /// Guest instructions retired.
    pub retired: u64,
    /// RIP while not inside a block, and whenever a handler returns anything but a link.
    pub rip: u64,
    /// RFLAGS without the arithmetic flags (CF PF AF ZF SF OF) and without bit 1.
    pub rflags_system: u64,
    /// Current privilege level.
    pub cpl: u8,
    /// See [`Shadow`].
    pub shadow: Shadow,
    /// Set by a slow memory access when the running block must not continue
    /// past the current instruction (its own code was written, or a request
    /// must be looked at).
    pub break_block: bool,
    /// See [`Activity`].
    pub activity: Activity,
    /// Why the last handler returned [`Next::FAULT`](crate::uop::Next::FAULT).
    pub fault: Option<Fault>,

    /// ES CS SS DS FS GS LDTR TR.
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: Table,
    /// IDTR.
    pub idtr: Table,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 2.
    pub cr2: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// The four PDPTEs of PAE paging, loaded with CR3.
    pub pdptes: [u64; 4],
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// MSRs that the core itself owns.
    pub msr: CoreMsrs,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// A debug exception to be raised after the current instruction: DR6 bits.
    pub pending_db: u64,
    /// The exception being delivered, for the double-fault rules.
    pub delivering: Option<u8>,
    /// What the single-step logic remembers of the instruction in progress.
    pub step: crate::sys::debug::Step,

    /// ZMM0 to ZMM31; legacy SSE uses the low 16 bytes of the first 16.
    pub vec: [VecReg; 32],
    /// x87, FXSAVE64 layout; MXCSR at byte 24.
    pub fpu: FpuImage,
    /// Where memory operands live that are not one piece of host memory.
    pub bounce: VecReg,
    /// Continuation of `bounce` for operands of the XSAVE family and REP chunks.
    pub access: crate::mem::PendingAccess,

    /// The TLB arrays.
    pub tlbs: Tlb,
    /// Accesses answered after a park, in the order in which the restarted
    /// instruction will make them.
    pub replay: crate::mem::Replay,
    /// Executes vector, x87 and less frequent integer instructions.
    pub vector: crate::vector::Unit,
    /// Counters.
    pub stats: Stats,
    /// Width of guest physical addresses, in bits (CPUID 8000_0008h).
    pub phys_bits: u8,
    /// The guest has pages of 1 GiB (CPUID 8000_0001h:EDX bit 26).
    pub gib_pages: bool,
    /// The vCPU's surroundings while it runs.
    pub env: Option<*mut dyn Env>,
}

// SAFETY: the raw pointers are the TLB array (owned by `tlbs`, host addresses
// of guest memory that the engine keeps mapped), `env`, which is only non-null
// while the owning thread runs the vCPU, and those of `native`, which are set
// before each use.
unsafe impl Send for Cpu {}

/// MSRs with meaning to the core.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs, reason = "the manual's names")]
pub struct CoreMsrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub xss: u64,
    pub misc_enable: u64,
}

/// Counters of the core.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "named for what they count")]
pub struct Stats {
    pub tlb_misses: u64,
    pub tlb_flushes: u64,
    pub walks: u64,
    pub mmio: u64,
    pub pio: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    /// Instructions that translated code had interpreted.
    pub interpreted: u64,
}

impl Cpu {
    /// Where the vCPU's surroundings are reached.
    ///
    /// # Panics
    /// When the vCPU is not being run: a fault of the engine, not of the guest.
    #[inline]
    pub fn env(&mut self) -> &mut dyn Env {
        let env = self.env.expect("vCPU used outside of a run");
        // SAFETY: the engine sets `env` from a live exclusive borrow for the
        // duration of a run, and clears it afterwards; the environment does not
        // reach back into this `Cpu` through anything but its arguments.
        unsafe { &mut *env }
    }

    /// RFLAGS as the guest sees it.
    pub fn rflags(&self) -> u64 {
        self.rflags_system | flags::to_rflags(self.cc) | 2
    }

    /// Sets all of RFLAGS; reserved bits are dropped. Call
    /// [`Self::update_mode`] after a change of VM, AC or TF.
    pub fn set_rflags(&mut self, value: u64) {
        self.cc = flags::from_rflags(value);
        self.rflags_system = value & flags::SYSTEM_MASK;
    }

    /// The generation of what is found through linear addresses now.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generations.number(self.cpl == 3)
    }

    /// 64-bit code is running (CS.L and EFER.LMA).
    pub fn is_64bit(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// EFER.LMA.
    pub fn is_long(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Protected mode, V86 included.
    pub fn is_protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Virtual-8086 mode.
    pub fn is_v86(&self) -> bool {
        self.rflags_system & flags::VM != 0
    }

    /// I/O privilege level.
    pub fn iopl(&self) -> u8 {
        (self.rflags_system >> 12 & 3) as u8
    }

    /// Interrupt flag.
    pub fn interrupts_enabled(&self) -> bool {
        self.rflags_system & flags::IF != 0
    }

    /// Recomputes what follows from control registers, segments and flags: the
    /// mode key, the TLB in force, the effective segment bases. To be called by
    /// whoever changes one of them. Does not flush anything.
    pub fn update_mode(&mut self) {
        let cs = self.segments[seg::CS];
        let long = self.is_long();
        let v86 = self.is_protected() && self.is_v86();
        let mut m = 0;
        let code64 = long && cs.long();
        if code64 {
            m |= mode::CODE64 | mode::STACK32;
        } else {
            if cs.big() && self.is_protected() && !v86 || cs.big() && !self.is_protected() {
                m |= mode::CODE32;
            }
            if self.segments[seg::SS].big() {
                m |= mode::STACK32;
            }
        }
        m |= u32::from(self.cpl) << mode::CPL_SHIFT;
        let mut set = |on: bool, bit: u32| {
            if on {
                m |= bit;
            }
        };
        set(self.is_protected(), mode::PROTECTED);
        set(v86, mode::V86);
        set(self.cr0 & cr0::TS != 0, mode::TS);
        set(self.cr0 & cr0::EM != 0, mode::EM);
        set(self.cr0 & cr0::MP != 0, mode::MP);
        set(self.cr4 & cr4::OSFXSR != 0, mode::OSFXSR);
        set(self.cr4 & cr4::OSXMMEXCPT != 0, mode::OSXMMEXCPT);
        set(self.cr4 & cr4::OSXSAVE != 0, mode::OSXSAVE);
        set(self.xcr0 & 6 == 6, mode::AVX);
        set(self.cr4 & cr4::FSGSBASE != 0, mode::FSGSBASE);
        set(
            self.rflags_system & flags::TF != 0 || self.dr7 & 0xff != 0 || self.pending_db != 0,
            mode::STEP,
        );
        set(long, mode::LONG);
        let ac = self.rflags_system & flags::AC != 0;
        set(ac && self.cr0 & cr0::AM != 0 && self.cpl == 3, mode::ALIGN);
        set(
            !code64
                && [seg::ES, seg::SS, seg::DS]
                    .iter()
                    .all(|&s| self.segments[s].is_flat()),
            mode::FLAT,
        );
        self.mode = m;
        for s in seg::ES..=seg::GS {
            let base = if code64 && s < seg::FS {
                0
            } else {
                self.segments[s].base
            };
            self.regs[reg::SEG_BASE + s] = base;
        }
        let index = if self.cpl == 3 {
            Tlb::USER
        } else if ac && self.cr4 & cr4::SMAP != 0 {
            Tlb::KERNEL_AC
        } else {
            Tlb::KERNEL
        };
        self.tlb = self.tlbs.array(index);
    }

    /// Asks the vCPU, from its own thread, to leave guest code after this block.
    pub fn request_self(&mut self, bits: u32) {
        self.request.fetch_or(bits, Ordering::Relaxed);
    }
}
