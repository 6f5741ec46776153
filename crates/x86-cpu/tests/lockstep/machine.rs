//! A vCPU in 64-bit mode with RAM at 0, and exception handlers that halt.

use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use caisson_x86_cpu::{
    cache::CodeCache,
    env::{Env, HostPage, IoOutcome},
    exec::{self, Stop},
    jit::{CodeMemory, Settings},
    state::{Cpu, Segment, Table, cr0, cr4, efer, request, seg},
    sys,
};

use crate::program::Rng;

const PAGES: usize = 64;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLER: u64 = 0x6000;
/// The loop's counter.
pub(crate) const COUNTER: u64 = 0x6800;
const CODE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
pub(crate) const DATA_LEN: usize = 0x1_0000;
const THUNKS: usize = 4 << 20;
const NATIVE: usize = 4 << 20;
/// After so many slices a program is taken to run for ever, as one that writes
/// over its own code may.
const SLICES: u32 = 40;
const SLICE: Duration = Duration::from_millis(20);

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

struct Board {
    ram: Vec<Page>,
    has_code: [bool; PAGES],
    written: Vec<u64>,
    request: Arc<AtomicU32>,
    thunks: NonNull<u8>,
    used: usize,
}

impl Env for Board {
    fn host_page(&mut self, page: u64) -> Option<HostPage> {
        let page = self.ram.get_mut(usize::try_from(page).ok()?)?;
        Some(HostPage {
            host: page.0.as_mut_ptr(),
            writable: true,
        })
    }
    fn allow_write_tag(&mut self, page: u64) -> bool {
        !self.has_code.get(page as usize).is_some_and(|&code| code)
    }
    fn code_written(&mut self, gpa: u64, _: u64) -> bool {
        let page = gpa >> 12;
        let code = self.has_code.get(page as usize).is_some_and(|&code| code);
        if code {
            self.written.push(page);
            self.request.fetch_or(request::CODE, Ordering::Relaxed);
        }
        code
    }
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> IoOutcome {
        data.fill((gpa >> 3) as u8);
        IoOutcome::Done
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> IoOutcome {
        IoOutcome::Done
    }
    fn port_read(&mut self, _: u16, data: &mut [u8]) -> IoOutcome {
        data.fill(!0);
        IoOutcome::Done
    }
    fn port_write(&mut self, _: u16, _: &[u8]) -> IoOutcome {
        IoOutcome::Done
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        caisson_x86_cpu::cpuid::host(leaf, subleaf)
    }
    fn read_msr(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn tsc(&mut self) -> u64 {
        1
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn begin_exclusive(&mut self) {}
    fn end_exclusive(&mut self) {}
    fn code_page(&mut self, page: u64, _: u64) -> bool {
        if let Some(code) = self.has_code.get_mut(page as usize) {
            *code = true;
        }
        true
    }
    fn pause(&mut self) {}
    fn place_thunk(&mut self, code: &[u8]) -> Option<*const u8> {
        let at = self.used.next_multiple_of(16);
        if at + code.len() > THUNKS {
            return None;
        }
        self.used = at + code.len();
        // SAFETY: in bounds of the mapping.
        unsafe {
            let to = self.thunks.as_ptr().add(at);
            to.copy_from_nonoverlapping(code.as_ptr(), code.len());
            Some(to)
        }
    }
}

fn executable(len: usize) -> NonNull<u8> {
    // SAFETY: a new mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(p, libc::MAP_FAILED);
    NonNull::new(p.cast()).expect("mapped")
}

/// What a program starts with.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    general: [u64; 16],
    rflags: u64,
    mxcsr: u32,
    times: u8,
}

impl Registers {
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let mut general = [0; 16];
        for r in &mut general {
            *r = match rng.below(8) {
                0 => rng.next(),
                1 => rng.below(256),
                2 => DATA + 0x1000 * rng.below(15) + 0xff0 + rng.below(32),
                _ => DATA + rng.below(0xf000),
            };
        }
        general[4] = DATA + 0x1000 + 8 * rng.below(0x1000);
        Self {
            general,
            rflags: rng.next() & 0x8d5 | 2,
            mxcsr: match rng.below(4) {
                0 => rng.next() as u32 & 0xffff,
                1 => rng.next() as u32 & 0xffff | 0x1f80,
                _ => 0x1f80,
            },
            times: 1 + rng.below(4) as u8,
        }
    }
}

/// What a program leaves.
#[derive(PartialEq)]
pub(crate) struct Outcome {
    stop: Stop,
    general: [u64; 16],
    rip: u64,
    rflags: u64,
    cr2: u64,
    mxcsr: u32,
    retired: u64,
    vectors: Vec<[u8; 64]>,
    ram: Vec<u8>,
}

impl Outcome {
    /// The program did not come to its end.
    pub(crate) fn endless(&self) -> bool {
        self.stop == Stop::Request
    }

    pub(crate) fn print_differences(&self, other: &Self) {
        println!(
            "stop: {:?} {:?}, rip {:x} {:x}",
            self.stop, other.stop, self.rip, other.rip
        );
        for (i, (a, b)) in self.general.iter().zip(&other.general).enumerate() {
            if a != b {
                println!("register {i}: {a:x} {b:x}");
            }
        }
        for (name, a, b) in [
            ("rip", self.rip, other.rip),
            ("rflags", self.rflags, other.rflags),
            ("cr2", self.cr2, other.cr2),
            ("mxcsr", self.mxcsr.into(), other.mxcsr.into()),
            ("retired", self.retired, other.retired),
        ] {
            if a != b {
                println!("{name}: {a:x} {b:x}");
            }
        }
        if self.vectors != other.vectors {
            println!("vector registers");
        }
        let memory = self.ram.iter().zip(&other.ram).enumerate();
        for (at, (a, b)) in memory.filter(|(_, (a, b))| a != b).take(16) {
            println!("memory at {at:x}: {a:x} {b:x}");
        }
    }
}

/// The vCPU and its board.
pub(crate) struct Machine {
    board: Box<Board>,
    cpu: Box<Cpu>,
    cache: CodeCache,
    strict: bool,
}

impl Machine {
    /// With `settings`, one that translates. Unless `strict`, the flags that an
    /// exception finds are not looked at.
    pub(crate) fn new(settings: Option<Settings>, strict: bool) -> Self {
        let cpu = Box::new(Cpu::new(40));
        let mut cache = CodeCache::new(2 << 20);
        if let Some(settings) = settings {
            let code = executable(NATIVE);
            // SAFETY: one mapping that nobody else uses, and that stays.
            let memory = unsafe { CodeMemory::new(code, code, NATIVE) };
            assert!(cache.translate_into(memory, settings));
        }
        let wanted = cpu.request.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(SLICE);
                wanted.fetch_or(request::KICK, Ordering::Relaxed);
            }
        });
        Self {
            board: Box::new(Board {
                ram: vec![Page([0; 4096]); PAGES],
                has_code: [false; PAGES],
                written: Vec::new(),
                request: cpu.request.clone(),
                thunks: executable(THUNKS),
                used: 0,
            }),
            cpu,
            cache,
            strict,
        }
    }

    pub(crate) fn translated(&self) -> u64 {
        self.cache.stats.blocks_translated
    }

    fn put(&mut self, mut at: u64, bytes: &[u8]) {
        for &b in bytes {
            self.board.ram[(at >> 12) as usize].0[(at & 0xfff) as usize] = b;
            at += 1;
        }
    }

    /// Runs `code` to its end.
    pub(crate) fn run(&mut self, code: &[u8], registers: &Registers, data: &[u8]) -> Outcome {
        // Some programs find the blocks of those before them, which have other code.
        self.cache.flush(&mut self.cpu);
        self.board.has_code = [false; PAGES];
        self.board.ram.iter_mut().for_each(|p| p.0.fill(0));
        self.put(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
        self.put(TABLES + 0x1000, &((TABLES + 0x2000) | 7).to_le_bytes());
        // The first MiB is small pages' worth of RAM and devices; the rest is not there.
        self.put(TABLES + 0x2000, &0x87u64.to_le_bytes());
        self.put(GDT + 8, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        for vector in 0..32 {
            let gate = HANDLER & 0xffff | 8 << 16 | 0x8e << 40 | (HANDLER >> 16) << 48;
            self.put(IDT + 16 * vector, &gate.to_le_bytes());
        }
        self.put(HANDLER, &[0xf4]);
        self.put(CODE, code);
        self.put(DATA, data);
        self.put(COUNTER, &[registers.times]);
        self.set(registers);
        let env: *mut dyn Env = &mut *self.board;
        self.cpu.env = Some(env);
        let before = self.cpu.retired;
        let mut stop = Stop::Request;
        let mut slices = 0;
        while slices < SLICES {
            stop = exec::run(&mut self.cpu, &mut self.cache);
            if self.cpu.request.load(Ordering::Relaxed) & request::KICK != 0 {
                slices += 1;
            }
            for page in std::mem::take(&mut self.board.written) {
                self.cache.invalidate(&mut self.cpu, page);
                self.board.has_code[page as usize] = false;
            }
            self.cpu.request.store(0, Ordering::Relaxed);
            if stop != Stop::Request {
                break;
            }
        }
        self.cpu.env = None;
        let cpu = &self.cpu;
        let mut ram: Vec<u8> = self.board.ram.iter().flat_map(|p| p.0).collect();
        let in_handler = cpu.rip == HANDLER + 1;
        if in_handler && !self.strict {
            self.forgive(&mut ram);
        }
        // Here an exception's image may lie anywhere, incomplete.
        if stop == Stop::Shutdown && !self.strict {
            ram.clear();
        }
        let mut general = [0; 16];
        general.copy_from_slice(&self.cpu.regs[..16]);
        let forgiven = !self.strict && (in_handler || stop == Stop::Shutdown);
        Outcome {
            stop,
            general,
            rip: self.cpu.rip,
            rflags: if forgiven { 0 } else { self.cpu.rflags() },
            cr2: self.cpu.cr2,
            mxcsr: self.cpu.mxcsr(),
            retired: self.cpu.retired - before,
            vectors: self.cpu.vec.iter().map(|v| v.0).collect(),
            ram,
        }
    }

    /// Flags that nothing looks at may be any in the image on the stack.
    fn forgive(&self, ram: &mut [u8]) {
        // Error code or not: either word may be the flags.
        for word in [2, 3] {
            let at = self.cpu.regs[4].wrapping_add(8 * word) as usize;
            if let Some(bytes) = ram.get_mut(at..at.wrapping_add(8)) {
                bytes.fill(0);
            }
        }
    }

    fn set(&mut self, registers: &Registers) {
        let cpu = &mut self.cpu;
        sys::reset(cpu, false);
        cpu.regs[..16].copy_from_slice(&registers.general);
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PAE;
        cpu.xcr0 = 7;
        cpu.cr0 = cr0::ET | cr0::NE | cr0::PE | cr0::MP | cr0::PG | cr0::WP;
        cpu.cr3 = TABLES;
        cpu.cr2 = 0;
        cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        cpu.cpl = 0;
        for s in seg::ES..=seg::GS {
            cpu.segments[s] = Segment {
                base: if s == seg::GS { DATA } else { 0 },
                limit: !0,
                selector: 0,
                attributes: 0xc093,
                unusable: false,
            };
        }
        cpu.segments[seg::CS].attributes = 0xa09b;
        cpu.segments[seg::CS].selector = 8;
        cpu.gdtr = Table {
            base: GDT,
            limit: 0xff,
        };
        cpu.idtr = Table {
            base: IDT,
            limit: 0x1ff,
        };
        cpu.rip = CODE;
        for (n, v) in cpu.vec.iter_mut().enumerate() {
            v.0.fill(0);
            let bytes = (registers.general[n & 15] | 1).to_le_bytes();
            for (i, b) in v.0[..32].iter_mut().enumerate() {
                *b = bytes[i & 7].wrapping_mul(i as u8 | 1);
            }
        }
        cpu.set_mxcsr(registers.mxcsr);
        cpu.set_rflags(registers.rflags);
        cpu.flush_tlb(false);
        cpu.update_mode();
    }
}
