//! Register values after power-on, INIT and SIPI (Intel SDM Vol. 3 §11.1.1,
//! table 11-1).

use alloc::sync::Arc;
use core::sync::atomic::AtomicU32;

use crate::{
    state::{
        Activity, CoreMsrs, Cpu, FpuImage, Segment, Shadow, Stats, Table, VecReg, cr0, reg, seg,
    },
    tlb::Tlb,
};

/// PAT after power-on: WB WT UC- UC, twice.
const PAT_POWER_ON: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings on; no BTS, no PEBS.
const MISC_ENABLE_POWER_ON: u64 = 1 | 1 << 11 | 1 << 12;
/// DR6 with no condition noted.
const DR6_POWER_ON: u64 = 0xffff_0ff0;
/// DR7 with everything off.
const DR7_POWER_ON: u64 = 0x400;

impl Cpu {
    /// A vCPU as it is after power-on. `phys_bits` is the width of guest
    /// physical addresses (CPUID 8000_0008h), 32 to 52.
    pub fn new(phys_bits: u8) -> Self {
        let mut cpu = Self {
            regs: [0; reg::COUNT],
            cc: 0,
            tlb: core::ptr::null_mut(),
            native: crate::jit::Frame::new(),
            request: Arc::new(AtomicU32::new(0)),
            window_wanted: false,
            mode: 0,
            generations: crate::generation::Generations::new(),
            retired: 0,
            rip: 0,
            rflags_system: 0,
            cpl: 0,
            shadow: Shadow::None,
            break_block: false,
            activity: Activity::Running,
            fault: None,
            segments: [Segment::default(); 8],
            gdtr: Table::default(),
            idtr: Table::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            pdptes: [0; 4],
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            msr: CoreMsrs::default(),
            nmi_masked: false,
            pending_db: 0,
            delivering: None,
            step: super::debug::Step::default(),
            vec: [VecReg([0; 64]); 32],
            fpu: FpuImage([0; 512]),
            bounce: VecReg([0; 64]),
            access: Default::default(),
            tlbs: Tlb::new(),
            replay: Default::default(),
            stats: Stats::default(),
            vector: crate::vector::Unit::default(),
            phys_bits: phys_bits.clamp(32, 52),
            gib_pages: true,
            env: None,
        };
        reset(&mut cpu, false);
        cpu
    }
}

/// Puts `cpu` into the state after power-on or, with `init`, after INIT, which
/// leaves the caches' control bits, x87 and vector registers, XCR0 and most
/// MSRs alone. The vCPU is running from the reset vector afterwards; for an
/// application processor the caller sets [`Activity::WaitForSipi`].
pub fn reset(cpu: &mut Cpu, init: bool) {
    let cache_bits = if init {
        cpu.cr0 & (cr0::CD | cr0::NW)
    } else {
        cr0::CD | cr0::NW
    };
    cpu.regs = [0; reg::COUNT];
    cpu.regs[reg::RDX] = match cpu.env {
        Some(_) => u64::from(cpu.env().cpuid(1, 0)[0]),
        None => 0,
    };
    cpu.rip = 0xfff0;
    cpu.set_rflags(2);
    cpu.cpl = 0;
    cpu.shadow = Shadow::None;
    cpu.break_block = true;
    cpu.activity = Activity::Running;
    cpu.fault = None;
    let data = Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes: 0x93,
        unusable: false,
    };
    cpu.segments = [data; 8];
    cpu.segments[seg::CS] = Segment {
        base: 0xffff_0000,
        selector: 0xf000,
        attributes: 0x9b,
        ..data
    };
    cpu.segments[seg::LDTR].attributes = 0x82;
    cpu.segments[seg::TR].attributes = 0x8b;
    cpu.gdtr = Table {
        base: 0,
        limit: 0xffff,
    };
    cpu.idtr = cpu.gdtr;
    cpu.cr0 = cr0::ET | cache_bits;
    cpu.cr2 = 0;
    cpu.cr3 = 0;
    cpu.cr4 = 0;
    cpu.efer = 0;
    cpu.pdptes = [0; 4];
    cpu.dr = [0; 4];
    cpu.dr6 = DR6_POWER_ON;
    cpu.dr7 = DR7_POWER_ON;
    cpu.nmi_masked = false;
    cpu.pending_db = 0;
    cpu.delivering = None;
    cpu.step = super::debug::Step::default();
    if !init {
        cpu.xcr0 = 1;
        cpu.msr = CoreMsrs {
            pat: PAT_POWER_ON,
            misc_enable: MISC_ENABLE_POWER_ON,
            ..CoreMsrs::default()
        };
        cpu.vec = [VecReg([0; 64]); 32];
        let fpu = &mut cpu.fpu.0;
        fpu.fill(0);
        // FCW 0040h, every register zero and valid, MXCSR 1F80h.
        fpu[0] = 0x40;
        fpu[4] = 0xff;
        fpu[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    }
    cpu.replay.abandon();
    cpu.flush_tlb(false);
    cpu.update_mode();
}

/// Starts a vCPU that waits for it at `vector` × 4 KiB (Intel SDM Vol. 3
/// §10.4.4). The register values are those that INIT left.
pub fn start_up(cpu: &mut Cpu, vector: u8) {
    let cs = &mut cpu.segments[seg::CS];
    cs.selector = u16::from(vector) << 8;
    cs.base = u64::from(vector) << 12;
    cpu.rip = 0;
    cpu.activity = Activity::Running;
    cpu.update_mode();
}
