//! Processor registers and instructions without a Rust name.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// Arithmetic and control bits of RFLAGS that tests name.
pub mod flags {
    /// Carry.
    pub const CF: u64 = 1;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Trap (single step).
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// I/O privilege level 3.
    pub const IOPL3: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// CPUID toggle.
    pub const ID: u64 = 1 << 21;
}

/// Control-register bits.
pub mod cr {
    /// CR0: protection enable.
    pub const PE: u64 = 1;
    /// CR0: monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// CR0: emulation.
    pub const EM: u64 = 1 << 2;
    /// CR0: task switched.
    pub const TS: u64 = 1 << 3;
    /// CR0: extension type, always one.
    pub const ET: u64 = 1 << 4;
    /// CR0: numeric error.
    pub const NE: u64 = 1 << 5;
    /// CR0: write protect.
    pub const WP: u64 = 1 << 16;
    /// CR0: alignment mask.
    pub const AM: u64 = 1 << 18;
    /// CR0: not write-through.
    pub const NW: u64 = 1 << 29;
    /// CR0: cache disable.
    pub const CD: u64 = 1 << 30;
    /// CR0: paging.
    pub const PG: u64 = 1 << 31;
    /// CR4: virtual-8086 extensions.
    pub const VME: u64 = 1;
    /// CR4: protected-mode virtual interrupts.
    pub const PVI: u64 = 1 << 1;
    /// CR4: time stamp disable.
    pub const TSD: u64 = 1 << 2;
    /// CR4: debugging extensions.
    pub const DE: u64 = 1 << 3;
    /// CR4: page size extensions.
    pub const PSE: u64 = 1 << 4;
    /// CR4: physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// CR4: global pages.
    pub const PGE: u64 = 1 << 7;
    /// CR4: performance counter enable.
    pub const PCE: u64 = 1 << 8;
    /// CR4: FXSAVE and SSE enabled.
    pub const OSFXSR: u64 = 1 << 9;
    /// CR4: SIMD exceptions as #XM.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// CR4: user-mode instruction prevention.
    pub const UMIP: u64 = 1 << 11;
    /// CR4: 57-bit linear addresses.
    pub const LA57: u64 = 1 << 12;
    /// CR4: VMX enable.
    pub const VMXE: u64 = 1 << 13;
    /// CR4: FSGSBASE instructions.
    pub const FSGSBASE: u64 = 1 << 16;
    /// CR4: process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// CR4: XSAVE enabled.
    pub const OSXSAVE: u64 = 1 << 18;
    /// CR4: supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// CR4: supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
    /// CR4: protection keys for user pages.
    pub const PKE: u64 = 1 << 22;
    /// CR4: control-flow enforcement.
    pub const CET: u64 = 1 << 23;
}

/// Model-specific registers.
pub mod msr {
    /// Time stamp counter.
    pub const TSC: u32 = 0x10;
    /// Local APIC base.
    pub const APIC_BASE: u32 = 0x1B;
    /// TSC adjustment.
    pub const TSC_ADJUST: u32 = 0x3B;
    /// SYSENTER code selector.
    pub const SYSENTER_CS: u32 = 0x174;
    /// SYSENTER stack pointer.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// SYSENTER entry.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// Debug control.
    pub const DEBUGCTL: u32 = 0x1D9;
    /// Page attribute table.
    pub const PAT: u32 = 0x277;
    /// TSC deadline.
    pub const TSC_DEADLINE: u32 = 0x6E0;
    /// First x2APIC register.
    pub const X2APIC: u32 = 0x800;
    /// Extended features.
    pub const EFER: u32 = 0xC000_0080;
    /// SYSCALL selectors and legacy target.
    pub const STAR: u32 = 0xC000_0081;
    /// SYSCALL target in 64-bit mode.
    pub const LSTAR: u32 = 0xC000_0082;
    /// SYSCALL target in compatibility mode (AMD).
    pub const CSTAR: u32 = 0xC000_0083;
    /// SYSCALL flag mask.
    pub const SFMASK: u32 = 0xC000_0084;
    /// FS base.
    pub const FS_BASE: u32 = 0xC000_0100;
    /// GS base.
    pub const GS_BASE: u32 = 0xC000_0101;
    /// GS base after SWAPGS.
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    /// Value that RDTSCP and RDPID return.
    pub const TSC_AUX: u32 = 0xC000_0103;
    /// EFER: SYSCALL enable.
    pub const EFER_SCE: u64 = 1;
    /// EFER: long mode enable.
    pub const EFER_LME: u64 = 1 << 8;
    /// EFER: long mode active.
    pub const EFER_LMA: u64 = 1 << 10;
    /// EFER: no-execute enable.
    pub const EFER_NXE: u64 = 1 << 11;
}

macro_rules! control_register {
    ($get:ident, $set:ident, $reg:tt) => {
        #[doc = concat!("Reads ", $reg, ".")]
        pub fn $get() -> u64 {
            let v: u64;
            // SAFETY: reading a control register has no effect on memory.
            unsafe { asm!(concat!("mov {}, ", $reg), out(reg) v, options(nomem, nostack, preserves_flags)) };
            v
        }
        #[doc = concat!("Writes ", $reg, "; a reserved bit faults.")]
        pub fn $set(v: u64) {
            // SAFETY: the runtime's own mappings are identity mappings in every
            // address space, so Rust's memory stays where it is.
            unsafe { asm!(concat!("mov ", $reg, ", {}"), in(reg) v, options(nostack, preserves_flags)) };
        }
    };
}
control_register!(cr0, set_cr0, "cr0");
control_register!(cr2, set_cr2, "cr2");
control_register!(cr3, set_cr3, "cr3");
control_register!(cr4, set_cr4, "cr4");
control_register!(cr8, set_cr8, "cr8");
control_register!(dr0, set_dr0, "dr0");
control_register!(dr1, set_dr1, "dr1");
control_register!(dr2, set_dr2, "dr2");
control_register!(dr3, set_dr3, "dr3");
control_register!(dr6, set_dr6, "dr6");
control_register!(dr7, set_dr7, "dr7");

/// Reads a model-specific register; #GP ends the guest.
pub fn rdmsr(index: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: no effect on memory.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags))
    };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes a model-specific register; #GP ends the guest.
pub fn wrmsr(index: u32, value: u64) {
    // SAFETY: no MSR that tests use moves Rust's memory.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// CPUID of a leaf and subleaf; zero for a leaf above the range's maximum.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let max = __cpuid_count(leaf & 0xF000_0000, 0).eax;
    if leaf > max {
        return CpuidResult {
            eax: 0,
            ebx: 0,
            ecx: 0,
            edx: 0,
        };
    }
    __cpuid_count(leaf, subleaf)
}

/// CPU features that decide whether a check applies.
pub mod has {
    use super::cpuid;
    macro_rules! feature {
        ($($(#[$doc:meta])* $name:ident: $leaf:literal, $sub:literal, $reg:ident, $bit:literal;)*) => {
            $($(#[$doc])* pub fn $name() -> bool { cpuid($leaf, $sub).$reg >> $bit & 1 != 0 })*
        };
    }
    feature! {
        /// MONITOR/MWAIT.
        monitor: 1, 0, ecx, 3;
        /// VMX.
        vmx: 1, 0, ecx, 5;
        /// FMA.
        fma: 1, 0, ecx, 12;
        /// CMPXCHG16B.
        cx16: 1, 0, ecx, 13;
        /// PCID.
        pcid: 1, 0, ecx, 17;
        /// x2APIC.
        x2apic: 1, 0, ecx, 21;
        /// MOVBE.
        movbe: 1, 0, ecx, 22;
        /// POPCNT.
        popcnt: 1, 0, ecx, 23;
        /// TSC deadline timer.
        tsc_deadline: 1, 0, ecx, 24;
        /// XSAVE.
        xsave: 1, 0, ecx, 26;
        /// AVX.
        avx: 1, 0, ecx, 28;
        /// RDRAND.
        rdrand: 1, 0, ecx, 30;
        /// SYSENTER.
        sep: 1, 0, edx, 11;
        /// 4 MiB pages in 32-bit paging.
        pse: 1, 0, edx, 3;
        /// Virtual-8086 mode extensions.
        vme: 1, 0, edx, 1;
        /// FSGSBASE.
        fsgsbase: 7, 0, ebx, 0;
        /// TSC_ADJUST.
        tsc_adjust: 7, 0, ebx, 1;
        /// SGX.
        sgx: 7, 0, ebx, 2;
        /// HLE.
        hle: 7, 0, ebx, 4;
        /// AVX2.
        avx2: 7, 0, ebx, 5;
        /// SMEP.
        smep: 7, 0, ebx, 7;
        /// INVPCID.
        invpcid: 7, 0, ebx, 10;
        /// RTM.
        rtm: 7, 0, ebx, 11;
        /// MPX.
        mpx: 7, 0, ebx, 14;
        /// AVX-512 foundation.
        avx512f: 7, 0, ebx, 16;
        /// RDSEED.
        rdseed: 7, 0, ebx, 18;
        /// SMAP.
        smap: 7, 0, ebx, 20;
        /// CLFLUSHOPT.
        clflushopt: 7, 0, ebx, 23;
        /// CLWB.
        clwb: 7, 0, ebx, 24;
        /// SHA.
        sha: 7, 0, ebx, 29;
        /// UMIP.
        umip: 7, 0, ecx, 2;
        /// Protection keys for user pages.
        pku: 7, 0, ecx, 3;
        /// WAITPKG.
        waitpkg: 7, 0, ecx, 5;
        /// CET shadow stacks.
        cet_ss: 7, 0, ecx, 7;
        /// GFNI.
        gfni: 7, 0, ecx, 8;
        /// LA57.
        la57: 7, 0, ecx, 16;
        /// RDPID.
        rdpid: 7, 0, ecx, 22;
        /// Key locker.
        key_locker: 7, 0, ecx, 23;
        /// MOVDIRI.
        movdiri: 7, 0, ecx, 27;
        /// MOVDIR64B.
        movdir64b: 7, 0, ecx, 28;
        /// ENQCMD.
        enqcmd: 7, 0, ecx, 29;
        /// CET indirect branch tracking.
        cet_ibt: 7, 0, edx, 20;
        /// SERIALIZE.
        serialize: 7, 0, edx, 14;
        /// AMX tiles.
        amx_tile: 7, 0, edx, 24;
        /// XSAVEOPT.
        xsaveopt: 0xD, 1, eax, 0;
        /// XSAVEC.
        xsavec: 0xD, 1, eax, 1;
        /// XGETBV with ECX=1.
        xgetbv1: 0xD, 1, eax, 2;
        /// XSAVES.
        xsaves: 0xD, 1, eax, 3;
        /// LAHF in 64-bit mode.
        lahf: 0x8000_0001, 0, ecx, 0;
        /// SVM.
        svm: 0x8000_0001, 0, ecx, 2;
        /// SSE4a.
        sse4a: 0x8000_0001, 0, ecx, 6;
        /// XOP.
        xop: 0x8000_0001, 0, ecx, 11;
        /// FMA4.
        fma4: 0x8000_0001, 0, ecx, 16;
        /// TBM.
        tbm: 0x8000_0001, 0, ecx, 21;
        /// MONITORX.
        monitorx: 0x8000_0001, 0, ecx, 29;
        /// SYSCALL.
        syscall: 0x8000_0001, 0, edx, 11;
        /// No-execute.
        nx: 0x8000_0001, 0, edx, 20;
        /// 1 GiB pages.
        gb_pages: 0x8000_0001, 0, edx, 26;
        /// RDTSCP.
        rdtscp: 0x8000_0001, 0, edx, 27;
        /// 3DNow!.
        amd_3dnow: 0x8000_0001, 0, edx, 31;
        /// Invariant TSC.
        invariant_tsc: 0x8000_0007, 0, edx, 8;
    }

    /// The processor follows AMD's rules where the manuals differ.
    pub fn amd_vendor() -> bool {
        let v = cpuid(0, 0);
        (v.ebx, v.edx, v.ecx) == (0x6874_7541, 0x6974_6E65, 0x444D_4163)
            || (v.ebx, v.edx, v.ecx) == (0x6F67_7948, 0x6E65_476E, 0x656E_6975)
    }
    /// The guest runs on QEMU's TCG, where a few checks would wedge the machine.
    pub fn qemu_tcg() -> bool {
        let v = core::arch::x86_64::__cpuid_count(0x4000_0000, 0);
        super::cpuid(1, 0).ecx >> 31 != 0 && v.ebx == u32::from_le_bytes(*b"TCGT")
    }
    /// Physical address width in bits.
    pub fn physical_bits() -> u32 {
        cpuid(0x8000_0008, 0).eax & 0xFF
    }
}

macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident: $text:literal;)*) => {
        $($(#[$doc])*
        pub fn $name() {
            // SAFETY: changes no register or memory that Rust knows.
            unsafe { asm!($text, options(nostack)) }
        })*
    };
}
plain! {
    /// Disables interrupts.
    cli: "cli";
    /// Enables interrupts.
    sti: "sti";
    /// Halts until an interrupt.
    hlt: "hlt";
    /// Enables interrupts and halts with no window in between.
    sti_hlt: "sti\nhlt";
    /// Spin-wait hint.
    pause: "pause";
    /// Orders all memory accesses.
    mfence: "mfence";
    /// Allows supervisor access to user pages.
    stac: "stac";
    /// Forbids supervisor access to user pages.
    clac: "clac";
    /// Enables then disables interrupts with room for pending ones.
    interrupt_window: "sti\nnop\nnop\ncli";
    /// Breakpoint.
    int3: "int3";
}

/// Drops the TLB entry of one linear address.
pub fn invlpg(address: u64) {
    // SAFETY: only forgets a translation.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) };
}

/// INVPCID of the given type.
pub fn invpcid(kind: u64, pcid: u64, address: u64) {
    let descriptor = [pcid, address];
    // SAFETY: only forgets translations.
    unsafe {
        asm!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor, options(nostack, preserves_flags))
    };
}

/// RFLAGS.
pub fn rflags() -> u64 {
    let v: u64;
    // SAFETY: pushes and pops one value.
    unsafe { asm!("pushfq", "pop {}", out(reg) v, options(preserves_flags)) };
    v
}

/// XCR0, or another extended control register.
pub fn xgetbv(index: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: no effect on memory.
    unsafe {
        asm!("xgetbv", in("ecx") index, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags))
    };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes XCR0.
pub fn xsetbv(index: u32, value: u64) {
    // SAFETY: changes which state XSAVE handles, nothing in memory.
    unsafe {
        asm!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags));
    }
}

/// A ten-byte operand of LGDT, LIDT, SGDT and SIDT.
#[repr(C, packed)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct TablePointer {
    /// Last valid byte offset.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

/// Loads the interrupt descriptor table register.
pub fn lidt(p: TablePointer) {
    // SAFETY: the caller's table outlives its use; interrupts are off.
    unsafe { asm!("lidt [{}]", in(reg) &p, options(nostack, preserves_flags)) };
}

/// Loads the global descriptor table register.
pub fn lgdt(p: TablePointer) {
    // SAFETY: loaded segments keep their cached descriptors.
    unsafe { asm!("lgdt [{}]", in(reg) &p, options(nostack, preserves_flags)) };
}

/// The current interrupt descriptor table register.
pub fn sidt() -> TablePointer {
    let mut p = TablePointer::default();
    // SAFETY: writes ten bytes to a ten-byte object.
    unsafe { asm!("sidt [{}]", in(reg) &mut p, options(nostack, preserves_flags)) };
    p
}

/// The current global descriptor table register.
pub fn sgdt() -> TablePointer {
    let mut p = TablePointer::default();
    // SAFETY: writes ten bytes to a ten-byte object.
    unsafe { asm!("sgdt [{}]", in(reg) &mut p, options(nostack, preserves_flags)) };
    p
}

/// Loads the local descriptor table register.
pub fn lldt(selector: u16) {
    // SAFETY: no segment that Rust uses lives in an LDT.
    unsafe { asm!("lldt {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}

/// Loads the task register; marks the descriptor busy.
pub fn ltr(selector: u16) {
    // SAFETY: the TSS named is one of the runtime's or the test's.
    unsafe { asm!("ltr {0:x}", in(reg) selector, options(nostack, preserves_flags)) };
}
