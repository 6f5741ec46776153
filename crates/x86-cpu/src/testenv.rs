//! A small machine for unit tests: flat RAM, ROM pages on request, and a
//! record of what the core asked for.

use alloc::{
    alloc::{Layout, alloc_zeroed},
    boxed::Box,
    collections::{BTreeMap, BTreeSet},
    vec,
    vec::Vec,
};

use iced_x86::{Decoder, DecoderOptions};

use crate::{
    env::{Env, HostPage, IoOutcome},
    fault::Fault,
    flow::Flow,
    state::{Cpu, Segment, Table, cr0, cr4, efer, mode, seg},
    sys,
};

/// RAM from address 0, in bytes.
pub(crate) const RAM: usize = 4 << 20;
/// Where [`Machine::run`] places code.
pub(crate) const CODE: u64 = 0x1_0000;
/// Where [`Machine::long_mode`] and [`Machine::protected_mode`] put their GDT.
pub(crate) const GDT: u64 = 0x2000;
/// And their IDT.
pub(crate) const IDT: u64 = 0x3000;
/// And their TSS.
pub(crate) const TSS: u64 = 0x4000;
/// And page tables.
pub(crate) const TABLES: u64 = 0x20_0000;
/// And the initial stack's top.
pub(crate) const STACK: u64 = 0x8_0000;

/// Selectors in the GDT of the prepared modes.
#[allow(dead_code, reason = "not every test needs all")]
pub(crate) mod sel {
    pub(crate) const CODE0: u16 = 0x08;
    pub(crate) const DATA0: u16 = 0x10;
    pub(crate) const CODE3: u16 = 0x1b;
    pub(crate) const DATA3: u16 = 0x23;
    pub(crate) const TSS: u16 = 0x28;
    pub(crate) const CODE32: u16 = 0x38;
    /// First slot for a test's own descriptors.
    pub(crate) const FREE: u16 = 0x40;
}

pub(crate) struct TestEnv {
    memory: *mut u8,
    pub(crate) rom: BTreeSet<u64>,
    /// `code_written` calls: address and length.
    pub(crate) written: Vec<(u64, u64)>,
    pub(crate) msrs: BTreeMap<u32, u64>,
    /// Answers by leaf and subleaf.
    pub(crate) cpuid: BTreeMap<(u32, u32), [u32; 4]>,
    pub(crate) tsc: u64,
    pub(crate) cr8: u8,
    pub(crate) pauses: u32,
}

impl Env for TestEnv {
    fn host_page(&mut self, page: u64) -> Option<HostPage> {
        (page < RAM as u64 >> 12).then(|| HostPage {
            // SAFETY: in bounds of the leaked memory.
            host: unsafe { self.memory.add((page << 12) as usize) },
            writable: !self.rom.contains(&page),
        })
    }
    fn allow_write_tag(&mut self, _page: u64) -> bool {
        true
    }
    fn code_written(&mut self, gpa: u64, len: u64) -> bool {
        self.written.push((gpa, len));
        false
    }
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) -> IoOutcome {
        data.fill(0xff);
        IoOutcome::Done
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> IoOutcome {
        IoOutcome::Done
    }
    fn port_read(&mut self, _port: u16, data: &mut [u8]) -> IoOutcome {
        data.fill(0xff);
        IoOutcome::Done
    }
    fn port_write(&mut self, _port: u16, _data: &[u8]) -> IoOutcome {
        IoOutcome::Done
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.cpuid
            .get(&(leaf, subleaf))
            .or_else(|| self.cpuid.get(&(leaf, 0)))
            .copied()
            .unwrap_or_default()
    }
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        self.msrs.get(&index).copied()
    }
    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        self.msrs.get_mut(&index).map(|v| *v = value).is_some()
    }
    fn tsc(&mut self) -> u64 {
        self.tsc += 1;
        self.tsc
    }
    fn cr8(&mut self) -> u8 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u8) {
        self.cr8 = value;
    }
    fn begin_exclusive(&mut self) {}
    fn end_exclusive(&mut self) {}
    fn code_page(&mut self, _page: u64, _granules: u64) -> bool {
        true
    }
    fn pause(&mut self) {
        self.pauses += 1;
    }
    fn place_thunk(&mut self, _code: &[u8]) -> Option<*const u8> {
        None
    }
}

/// One vCPU with its memory. Memory is leaked: tests are short.
pub(crate) struct Machine {
    pub(crate) cpu: Box<Cpu>,
    env: *mut TestEnv,
}

/// A code or data descriptor with base, 4 KiB-granular limit where it does not fit.
pub(crate) fn descriptor(base: u32, limit: u32, attributes: u16) -> u64 {
    let (limit, g) = if limit > 0xf_ffff {
        (limit >> 12, 0x8000)
    } else {
        (limit, 0)
    };
    let (base, limit) = (u64::from(base), u64::from(limit));
    let attributes = u64::from(attributes & !0x0f00 | g);
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | attributes << 40
        | (limit >> 16) << 48
        | (base >> 24) << 56
}

impl Machine {
    /// Real mode, as after power-on, with CS based at 0.
    pub(crate) fn new() -> Self {
        let layout = Layout::from_size_align(RAM, 4096).expect("a valid layout");
        // SAFETY: the size is not zero. Untouched pages cost nothing.
        let memory = unsafe { alloc_zeroed(layout) };
        assert!(!memory.is_null());
        let mut cpuid = BTreeMap::new();
        cpuid.insert((0, 0), [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
        cpuid.insert((1, 0), [0x306c3, 0, 0x7fda_3203, 0x0789_fbff]);
        // FSGSBASE SMEP INVPCID SMAP; UMIP RDPID LA57.
        cpuid.insert(
            (7, 0),
            [
                0,
                1 | 1 << 7 | 1 << 10 | 1 << 20,
                1 << 2 | 1 << 16 | 1 << 22,
                0,
            ],
        );
        // SYSCALL NX 1G RDTSCP LM.
        cpuid.insert(
            (0x8000_0001, 0),
            [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29],
        );
        let env = Box::leak(Box::new(TestEnv {
            memory,
            rom: BTreeSet::new(),
            written: vec![],
            msrs: BTreeMap::new(),
            cpuid,
            tsc: 0,
            cr8: 0,
            pauses: 0,
        }));
        let env: *mut TestEnv = env;
        let mut cpu = Box::new(Cpu::new(40));
        cpu.env = Some(env);
        let cs = &mut cpu.segments[seg::CS];
        cs.base = 0;
        cs.selector = 0;
        cpu.set_stack_pointer(0x8000);
        cpu.update_mode();
        Self { cpu, env }
    }

    pub(crate) fn env(&mut self) -> &mut TestEnv {
        // SAFETY: leaked, and only borrowed here between calls into the core.
        unsafe { &mut *self.env }
    }

    pub(crate) fn write(&mut self, gpa: u64, data: &[u8]) {
        let gpa = gpa as usize;
        assert!(gpa + data.len() <= RAM);
        // SAFETY: checked above.
        unsafe {
            self.env()
                .memory
                .add(gpa)
                .copy_from_nonoverlapping(data.as_ptr(), data.len());
        }
    }

    pub(crate) fn read(&mut self, gpa: u64, size: usize) -> u64 {
        assert!(gpa as usize + size <= RAM && size <= 8);
        let mut b = [0; 8];
        // SAFETY: checked above.
        unsafe {
            self.env()
                .memory
                .add(gpa as usize)
                .copy_to_nonoverlapping(b.as_mut_ptr(), size);
        }
        u64::from_le_bytes(b)
    }

    pub(crate) fn write_u64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    pub(crate) fn write_u32(&mut self, gpa: u64, value: u32) {
        self.write(gpa, &value.to_le_bytes());
    }

    /// Sets a descriptor of the GDT.
    pub(crate) fn set_descriptor(&mut self, selector: u16, value: u64) {
        self.write_u64(GDT + u64::from(selector & !7), value);
    }

    /// Fills in an IDT gate of the present mode's format: `kind` is its type.
    pub(crate) fn set_gate(
        &mut self,
        vector: u8,
        selector: u16,
        offset: u64,
        kind: u8,
        dpl: u8,
        ist: u8,
    ) {
        let access = 0x80 | u64::from(dpl) << 5 | u64::from(kind);
        let low = offset & 0xffff
            | u64::from(selector) << 16
            | u64::from(ist) << 32
            | access << 40
            | (offset >> 16 & 0xffff) << 48;
        if self.cpu.is_long() {
            let at = IDT + 16 * u64::from(vector);
            self.write_u64(at, low);
            self.write_u64(at + 8, offset >> 32);
        } else {
            self.write_u64(IDT + 8 * u64::from(vector), low);
        }
    }

    fn tables(&mut self, tss_type: u16) {
        self.cpu.gdtr = Table {
            base: GDT,
            limit: 0xfff,
        };
        self.cpu.idtr = Table {
            base: IDT,
            limit: 0xfff,
        };
        self.cpu.segments[seg::TR] = Segment {
            base: TSS,
            limit: 0x1fff,
            selector: sel::TSS,
            attributes: tss_type,
            unusable: false,
        };
        self.cpu.segments[seg::LDTR] = Segment {
            unusable: true,
            ..Segment::default()
        };
        self.set_descriptor(sel::TSS, descriptor(TSS as u32, 0x1fff, tss_type));
        self.set_descriptor(sel::CODE32, descriptor(0, !0, 0xc09b));
        self.set_descriptor(sel::DATA0, descriptor(0, !0, 0xc093));
        self.set_descriptor(sel::DATA3, descriptor(0, !0, 0xc0f3));
    }

    fn flat(&mut self, code: u16, cpl: u8) {
        let rpl = u16::from(cpl);
        let dpl = u16::from(cpl) << 5;
        let data = if cpl == 3 { sel::DATA3 } else { sel::DATA0 };
        for s in seg::ES..=seg::GS {
            self.cpu.segments[s] = Segment {
                base: 0,
                limit: !0,
                selector: data | rpl,
                attributes: 0xc093 | dpl,
                unusable: false,
            };
        }
        self.cpu.segments[seg::CS].selector = if cpl == 3 { sel::CODE3 } else { sel::CODE0 };
        self.cpu.segments[seg::CS].attributes = code | dpl;
        self.cpu.cpl = cpl;
        self.cpu.update_mode();
    }

    /// 32-bit protected mode without paging: flat segments, TSS, empty IDT.
    pub(crate) fn protected_mode(cpl: u8) -> Self {
        let mut m = Self::new();
        m.cpu.cr0 = cr0::PE | cr0::ET | cr0::NE;
        m.tables(0x8b);
        m.set_descriptor(sel::CODE0, descriptor(0, !0, 0xc09b));
        m.set_descriptor(sel::CODE3, descriptor(0, !0, 0xc0fb));
        m.flat(0xc09b, cpl);
        m.cpu.set_stack_pointer(STACK);
        // The stacks for privilege levels 0 to 2.
        for level in 0..3 {
            m.write_u32(TSS + 4 + 8 * level, 0x7_0000 + 0x1000 * level as u32);
            m.write_u32(TSS + 8 + 8 * level, u32::from(sel::DATA0));
        }
        m
    }

    /// 64-bit mode: RAM mapped to itself by user-accessible 2 MiB pages.
    pub(crate) fn long_mode(cpl: u8) -> Self {
        let mut m = Self::new();
        m.write_u64(TABLES, (TABLES + 0x1000) | 7);
        m.write_u64(TABLES + 0x1000, (TABLES + 0x2000) | 7);
        for i in 0..(RAM as u64 >> 21) {
            m.write_u64(TABLES + 0x2000 + 8 * i, i << 21 | 0x87);
        }
        m.cpu.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
        m.cpu.cr4 = cr4::PAE | cr4::PGE;
        m.cpu.cr3 = TABLES;
        m.cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        m.tables(0x8b);
        m.set_descriptor(sel::CODE0, descriptor(0, !0, 0xa09b));
        m.set_descriptor(sel::CODE3, descriptor(0, !0, 0xa0fb));
        m.flat(0xa09b, cpl);
        m.cpu.set_stack_pointer(STACK);
        for level in 0..3 {
            m.write_u64(TSS + 4 + 8 * level, 0x7_0000 + 0x1000 * level);
        }
        for ist in 0..7 {
            m.write_u64(TSS + 0x24 + 8 * ist, 0x6_0000 + 0x1000 * ist);
        }
        m
    }

    pub(crate) fn bitness(&self) -> u32 {
        if self.cpu.mode & mode::CODE64 != 0 {
            64
        } else if self.cpu.mode & mode::CODE32 != 0 {
            32
        } else {
            16
        }
    }

    /// Executes the instruction `bytes` as if it were at CS:RIP; advances RIP
    /// as the engine would. Faults are returned, not delivered.
    pub(crate) fn run(&mut self, bytes: &[u8]) -> Result<Flow, Fault> {
        let insn =
            Decoder::with_ip(self.bitness(), bytes, self.cpu.rip, DecoderOptions::NONE).decode();
        assert!(
            !insn.is_invalid() && insn.len() == bytes.len(),
            "{bytes:02x?}"
        );
        assert!(sys::handles(insn.code()), "{:?}", insn.code());
        self.cpu.replay.begin_instruction();
        let flow = sys::exec(&mut self.cpu, &insn)?;
        if flow != Flow::Jump {
            self.cpu.rip = self
                .cpu
                .mask_ip(self.cpu.rip.wrapping_add(bytes.len() as u64));
        }
        Ok(flow)
    }
}
