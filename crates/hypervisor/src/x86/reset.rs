//! The state after power-on and INIT.

use alloc::vec;

use super::{ApicState, RunState, Segment, VcpuState, XsaveArea};

/// IA32_APIC_BASE: the page at FEE0_0000h, enabled.
const APIC_BASE: u64 = 0xfee0_0000 | 1 << 11;
/// IA32_APIC_BASE.BSP.
const BSP: u64 = 1 << 8;
/// CR0.CD and NW, which INIT leaves alone.
const CACHE_BITS: u64 = 0x6000_0000;
/// CR0.ET.
const ET: u64 = 1 << 4;
/// Words of the APIC's register page, one for every sixteen bytes.
const APIC_WORDS: usize = 64;
/// Version register: version 14h, six local vector entries, as on processors
/// of today.
const APIC_VERSION: u32 = 0x0005_0014;

impl ApicState {
    /// The local APIC after power-on (Intel SDM Vol. 3 §12.4.7.1).
    pub fn at_power_on(apic_id: u32, bsp: bool) -> Self {
        let mut regs = vec![0; APIC_WORDS];
        regs[0x02] = apic_id << 24;
        regs[0x03] = APIC_VERSION;
        // Flat model, spurious vector, each local vector entry masked.
        regs[0x0e] = u32::MAX;
        regs[0x0f] = 0xff;
        for word in [0x2f, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37] {
            regs[word] = 1 << 16;
        }
        Self {
            base: APIC_BASE | if bsp { BSP } else { 0 },
            regs,
            tsc_deadline: 0,
            timer_remaining_ns: None,
        }
    }
}

impl VcpuState {
    /// A vCPU after power-on (Intel SDM Vol. 3 §10.1.1). `signature` is what
    /// CPUID.1:EAX gives. MSRs are not among it: each backend knows its own.
    pub fn at_power_on(apic_id: u32, bsp: bool, signature: u32) -> Self {
        let mut xsave = XsaveArea {
            xcr0: 1,
            area: vec![0; 576],
        };
        // FCW 40h, MXCSR 1F80h; in use: x87 and SSE.
        xsave.area[0] = 0x40;
        xsave.area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        xsave.area[512] = 3;
        let mut state = Self {
            xsave,
            apic: ApicState::at_power_on(apic_id, bsp),
            cr0: CACHE_BITS | ET,
            ..Self::default()
        };
        state.start(signature, bsp);
        state
    }

    /// The same vCPU after INIT: caches' control bits, x87 and vector registers,
    /// XCR0, MSRs and the APIC's place and number stay.
    #[must_use]
    pub fn after_init(&self, signature: u32) -> Self {
        let bsp = self.apic.base & BSP != 0;
        let id = self.apic.regs.get(2).copied().unwrap_or(0);
        let mut apic = ApicState::at_power_on(0, bsp);
        apic.base = self.apic.base;
        apic.regs[2] = id;
        let mut state = Self {
            xsave: self.xsave.clone(),
            msrs: self.msrs.clone(),
            apic,
            cr0: self.cr0 & CACHE_BITS | ET,
            ..Self::default()
        };
        state.start(signature, bsp);
        state
    }

    /// What power-on and INIT have in common.
    fn start(&mut self, signature: u32, bsp: bool) {
        self.run_state = if bsp {
            RunState::Running
        } else {
            RunState::WaitForSipi
        };
        self.gprs.regs[2] = signature.into();
        self.gprs.rip = 0xfff0;
        self.gprs.rflags = 2;
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            attributes: 0x93,
            unusable: false,
        };
        let s = &mut self.segments;
        for segment in [&mut s.es, &mut s.ss, &mut s.ds, &mut s.fs, &mut s.gs] {
            *segment = data;
        }
        s.cs = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            attributes: 0x9b,
            ..data
        };
        s.ldtr = Segment {
            attributes: 0x82,
            ..data
        };
        s.tr = Segment {
            attributes: 0x8b,
            ..data
        };
        self.gdtr.limit = 0xffff;
        self.idtr.limit = 0xffff;
        self.debug.dr6 = 0xffff_0ff0;
        self.debug.dr7 = 0x400;
    }
}
