//! A small machine around the software CPU: RAM at address 0, devices that
//! answer ones everywhere else.

use std::{
    ptr::NonNull,
    sync::{
        Arc, Once,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use caisson_x86_cpu::{
    cache::CodeCache,
    env::{Env, HostPage, IoOutcome},
    exec::{self, Stop},
    jit::{CodeMemory, Settings},
    state::{Cpu, Segment, cr0, cr4, efer, request, seg},
    sys,
};

/// Pages of RAM.
const PAGES: usize = 64;
/// Where the code lies.
pub const CODE: u64 = 0x8000;
/// Page tables: PML4, PDPT, page directory.
const TABLES: u64 = 0x1000;
/// Bytes of room for native thunks.
const THUNKS: usize = 1 << 20;
/// Bytes of room for translated code.
const NATIVE: usize = 1 << 20;
/// Longest time that one run may take before it is stopped.
const SLICE: Duration = Duration::from_millis(1);

#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// RAM, and what the vCPU's code cache has to hear of.
struct Board {
    ram: Vec<Page>,
    has_code: [bool; PAGES],
    written: Vec<u64>,
    request: Arc<AtomicU32>,
    thunks: *mut u8,
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
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> IoOutcome {
        data.fill(!0);
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
    fn read_msr(&mut self, index: u32) -> Option<u64> {
        (index < 0x1000).then_some(0)
    }
    fn write_msr(&mut self, index: u32, _: u64) -> bool {
        index < 0x1000
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
            let to = self.thunks.add(at);
            to.copy_from_nonoverlapping(code.as_ptr(), code.len());
            Some(to)
        }
    }
}

/// Which mode the vCPU starts in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// 32-bit protected mode without paging.
    Protected,
    /// 64-bit mode, CPL 0, the first GiB mapped to itself.
    Long,
    /// 64-bit mode, CPL 3.
    User,
}

/// A vCPU and its machine. Made once per process, set anew for each input.
pub struct Bench {
    board: Box<Board>,
    cpu: Box<Cpu>,
    /// One for each tier.
    caches: [CodeCache; 2],
}

impl Default for Bench {
    fn default() -> Self {
        let code = executable(NATIVE);
        // SAFETY: one mapping that nobody else uses, and that stays.
        let memory = unsafe { CodeMemory::new(code, code, NATIVE) };
        let settings = Settings {
            hot: 1,
            ..Settings::default()
        };
        let mut native = CodeCache::new(2 << 20);
        assert!(native.translate_into(memory, settings));
        let cpu = Box::new(Cpu::new(46));
        Self {
            board: Box::new(Board {
                ram: vec![Page([0; 4096]); PAGES],
                has_code: [false; PAGES],
                written: Vec::new(),
                request: cpu.request.clone(),
                thunks: executable(THUNKS).as_ptr(),
                used: 0,
            }),
            cpu,
            caches: [CodeCache::new(2 << 20), native],
        }
    }
}

/// Memory to execute code from.
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

/// Stops whatever runs, again and again: guest code may loop.
fn watch(request: Arc<AtomicU32>) {
    static STARTED: Once = Once::new();
    STARTED.call_once(move || {
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(SLICE);
                request.fetch_or(request::KICK, Ordering::Relaxed);
            }
        });
    });
}

impl Bench {
    /// Puts the vCPU into `mode` with `registers` and `code`, and runs it for a moment, with
    /// `native` on the native tier.
    pub fn run(&mut self, mode: Mode, native: bool, registers: &[u64; 16], code: &[u8]) {
        watch(self.cpu.request.clone());
        for cache in &mut self.caches {
            cache.flush(&mut self.cpu);
        }
        let tier = usize::from(native);
        self.board.has_code = [false; PAGES];
        self.board.written.clear();
        self.board.ram.iter_mut().for_each(|p| p.0.fill(0));
        let mut put = |at: u64, bytes: &[u8]| {
            let page = &mut self.board.ram[(at >> 12) as usize].0;
            page[(at & 0xfff) as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(TABLES, &((TABLES + 0x1000) | 7).to_le_bytes());
        put(TABLES + 0x1000, &((TABLES + 0x2000) | 7).to_le_bytes());
        for i in 0..512u64 {
            put(TABLES + 0x2000 + 8 * i, &(i << 21 | 0x87).to_le_bytes());
        }
        for (i, chunk) in code.chunks(4096).take(8).enumerate() {
            put(CODE + 4096 * i as u64, chunk);
        }
        self.set(mode, registers);
        let env: *mut dyn Env = &mut *self.board;
        self.cpu.env = Some(env);
        for _ in 0..3 {
            let stop = exec::run(&mut self.cpu, &mut self.caches[tier]);
            for page in std::mem::take(&mut self.board.written) {
                self.caches[tier].invalidate(&mut self.cpu, page);
            }
            self.cpu.request.store(0, Ordering::Relaxed);
            match stop {
                Stop::Request => {}
                Stop::Internal(what) => panic!("the engine gives up: {what}"),
                _ => break,
            }
        }
        self.cpu.env = None;
    }

    fn set(&mut self, mode: Mode, registers: &[u64; 16]) {
        let cpu = &mut self.cpu;
        // Not a new one: that works out anew what the host's processor can do.
        sys::reset(cpu, false);
        let user = mode == Mode::User;
        let long = user || mode == Mode::Long;
        let real = mode == Mode::Real;
        cpu.regs[..16].copy_from_slice(registers);
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.xcr0 = 7;
        cpu.cr0 = cr0::ET | cr0::NE;
        if !real {
            cpu.cr0 |= cr0::PE | cr0::MP;
        }
        if long {
            cpu.cr0 |= cr0::PG | cr0::WP;
            cpu.cr4 |= cr4::PAE;
            cpu.cr3 = TABLES;
            cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        }
        cpu.cpl = if user { 3 } else { 0 };
        for s in seg::ES..=seg::GS {
            cpu.segments[s] = Segment {
                base: 0,
                limit: if real { 0xffff } else { !0 },
                selector: if user { 0x23 } else { 0 },
                attributes: match (real, user) {
                    (true, _) => 0x93,
                    (false, true) => 0xc0f3,
                    (false, false) => 0xc093,
                },
                unusable: false,
            };
        }
        cpu.segments[seg::CS].attributes = match mode {
            Mode::Real => 0x9b,
            Mode::Protected => 0xc09b,
            Mode::Long => 0xa09b,
            Mode::User => 0xa0fb,
        };
        cpu.rip = CODE;
        cpu.set_rflags(2);
        cpu.update_mode();
    }
}
