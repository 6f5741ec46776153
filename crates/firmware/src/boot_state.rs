//! The registers that a boot protocol asks for.

/// Selector of the flat code segment in [`BOOT_GDT`]: Linux' `__BOOT_CS`.
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment in [`BOOT_GDT`]: Linux' `__BOOT_DS`.
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment in [`BOOT_GDT`], which PVH wants in TR.
pub const TSS_SELECTOR: u16 = 0x20;

/// The descriptors that the selectors above name, for either mode. The loader
/// puts them in guest memory at [`BootState::gdt`].
///
/// SDM vol. 3A, 3.4.5: null; unused; code, base 0, limit 4 GiB, execute/read,
/// accessed, DPL 0 (64-bit in one table, 32-bit in the other); data, base 0,
/// limit 4 GiB, read/write, accessed; busy 32-bit TSS, base 0, limit 0x67.
pub const BOOT_GDT: BootGdt = BootGdt {
    long: [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_0000_0067,
        0,
    ],
    protected: [
        0,
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x0000_8b00_0000_0067,
        0,
    ],
};

/// The two forms of the boot GDT. The sixth slot makes the TSS descriptor 16
/// bytes long in long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootGdt {
    /// With a 64-bit code segment.
    pub long: [u64; 6],
    /// With a 32-bit code segment.
    pub protected: [u64; 6],
}

impl BootGdt {
    /// The table for `mode` (real mode has none).
    pub const fn for_mode(&self, mode: BootMode) -> Option<&[u64; 6]> {
        match mode {
            BootMode::Real => None,
            BootMode::Protected32 => Some(&self.protected),
            BootMode::Long64 { .. } => Some(&self.long),
        }
    }
}

/// The processor mode at entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BootMode {
    /// As after a reset, but with CS:IP set so that CS.base + IP is
    /// [`BootState::rip`].
    Real,
    /// Protected mode without paging: CR0.PE set, PG clear, CR4 0, EFER 0. CS, DS, ES,
    /// FS, GS and SS flat over 4 GiB.
    Protected32,
    /// 64-bit mode: CR0.PE and PG, CR4.PAE, EFER.LME and LMA set. CS is a
    /// 64-bit code segment, the data segments are flat.
    Long64 {
        /// Guest physical address of the top-level page table, which
        /// identity-maps at least the first 4 GiB.
        cr3: u64,
    },
}

/// State of the first vCPU at entry. Registers not named are zero; RFLAGS is 2
/// (interrupts off), no interrupt is pending, A20 is on, DR6/DR7, MSRs and FPU
/// are as after reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BootState {
    /// The processor mode.
    pub mode: BootMode,
    /// Where execution starts: a guest physical address, mapped to itself.
    pub rip: u64,
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
    /// Stack pointer; zero where the protocol gives no stack.
    pub rsp: u64,
    /// Guest physical address of [`BOOT_GDT`] in the form for `mode` (limit
    /// 0x2f). CS holds [`CODE_SELECTOR`], the data segments [`DATA_SELECTOR`],
    /// TR [`TSS_SELECTOR`]. `None` in real mode.
    pub gdt: Option<u64>,
}
