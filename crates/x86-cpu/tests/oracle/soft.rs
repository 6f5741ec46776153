//! The software vCPU set up like the host process that runs the oracle: 64-bit
//! mode, CPL 3, the arena at its own address.

use std::cell::RefCell;

use caisson_x86_cpu::{
    cache::CodeCache,
    env::{Env, HostPage, IoOutcome},
    exec,
    fault::Fault,
    state::{Cpu, Segment, VecReg, cr0, cr4, efer, mode, seg},
};

use crate::{
    cases::Case,
    native::{CodeMemory, State},
};

/// Linear address of the arena, in guest and host.
pub(crate) const ARENA: u64 = 0x2000_0000;
/// Its accessible pages; the pages around them are not present.
pub(crate) const ARENA_LEN: usize = 2 * 4096;

/// Linear address of the code, which no host process has there.
pub(crate) const CODE: u64 = 0x1234_5678_9000;

#[repr(C, align(4096))]
struct Page([u64; 512]);

/// The machine around the vCPU: page tables, arena, room for thunks.
pub(crate) struct Machine {
    tables: Box<[Page; 8]>,
    pub(crate) arena: *mut u8,
    code: CodeMemory,
    used: usize,
}

const TABLES: u64 = 0x1000;

impl Machine {
    pub(crate) fn new() -> Self {
        // SAFETY: maps an unused range; fails if it is taken.
        let arena = unsafe {
            let all = libc::mmap(
                (ARENA - 4096) as *mut _,
                ARENA_LEN + 2 * 4096,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            );
            assert_eq!(all as u64, ARENA - 4096, "the arena's address is taken");
            let p = all.cast::<u8>().add(4096);
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(p.cast(), ARENA_LEN, rw), 0);
            p
        };
        let mut tables: Box<[Page; 8]> = Box::new([const { Page([0; 512]) }; 8]);
        tables[0].0[0] = (TABLES + 0x1000) | 7;
        tables[1].0[0] = (TABLES + 0x2000) | 7;
        tables[2].0[(ARENA >> 21) as usize] = (TABLES + 0x3000) | 7;
        for page in 0..ARENA_LEN / 4096 {
            tables[3].0[page] = (ARENA + 4096 * page as u64) | 0x67;
        }
        // The last page is the code's.
        let index = |level: u32| (CODE >> (12 + 9 * level) & 511) as usize;
        tables[0].0[index(3)] = (TABLES + 0x4000) | 7;
        tables[4].0[index(2)] = (TABLES + 0x5000) | 7;
        tables[5].0[index(1)] = (TABLES + 0x6000) | 7;
        tables[6].0[index(0)] = (TABLES + 0x7000) | 0x25;
        Self {
            tables,
            arena,
            code: CodeMemory::new(64 << 20),
            used: 0,
        }
    }

    /// Puts an instruction at the address of the code.
    pub(crate) fn set_code(&mut self, bytes: &[u8]) {
        for (word, chunk) in self.tables[7].0.iter_mut().zip(bytes.chunks(8)) {
            let mut b = [0xcc; 8];
            b[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(b);
        }
    }

    pub(crate) fn memory(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as the process lives; no vCPU runs now.
        unsafe { std::slice::from_raw_parts_mut(self.arena, ARENA_LEN) }
    }

    /// Bytes of thunks made.
    pub(crate) fn thunk_bytes(&self) -> usize {
        self.used
    }
}

impl Env for Machine {
    fn host_page(&mut self, page: u64) -> Option<HostPage> {
        let first = ARENA >> 12;
        let host = match page {
            1..=8 => (&raw mut self.tables[page as usize - 1]).cast(),
            p if (first..first + ARENA_LEN as u64 / 4096).contains(&p) => {
                // SAFETY: inside the arena.
                unsafe { self.arena.add(((p - first) << 12) as usize) }
            }
            _ => return None,
        };
        Some(HostPage {
            host,
            writable: true,
        })
    }
    fn allow_write_tag(&mut self, _: u64) -> bool {
        true
    }
    fn code_written(&mut self, _: u64, _: u64) -> bool {
        false
    }
    fn mmio_read(&mut self, gpa: u64, _: &mut [u8]) -> IoOutcome {
        panic!("device read at {gpa:#x}")
    }
    fn mmio_write(&mut self, gpa: u64, _: &[u8]) -> IoOutcome {
        panic!("device write at {gpa:#x}")
    }
    fn port_read(&mut self, _: u16, _: &mut [u8]) -> IoOutcome {
        panic!("port read")
    }
    fn port_write(&mut self, _: u16, _: &[u8]) -> IoOutcome {
        panic!("port write")
    }
    fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
        [0; 4]
    }
    fn read_msr(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&mut self, _: u32, _: u64) -> bool {
        false
    }
    fn tsc(&mut self) -> u64 {
        0
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn begin_exclusive(&mut self) {}
    fn end_exclusive(&mut self) {}
    fn code_page(&mut self, _: u64, _: u64) -> bool {
        true
    }
    fn pause(&mut self) {}
    fn place_thunk(&mut self, code: &[u8]) -> Option<*const u8> {
        let at = self.used.next_multiple_of(16);
        if at + code.len() > self.code.len {
            return None;
        }
        self.code.put(at, code);
        self.used = at + code.len();
        // SAFETY: in bounds.
        Some(unsafe { self.code.executable.add(at) })
    }
}

/// A vCPU in 64-bit mode at CPL 3, in `machine`.
pub(crate) fn vcpu(machine: &mut Machine) -> Box<Cpu> {
    let mut cpu = Box::new(Cpu::new(46));
    cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    cpu.cr3 = TABLES;
    cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    cpu.xcr0 = 7;
    cpu.cpl = 3;
    for s in seg::ES..=seg::GS {
        cpu.segments[s] = Segment {
            base: 0,
            limit: !0,
            selector: 0x23,
            attributes: 0xc0f3,
            unusable: false,
        };
    }
    cpu.segments[seg::CS].attributes = 0xa0fb;
    let env: *mut dyn Env = machine;
    // SAFETY: only forgets the borrow's lifetime: the machine outlives the vCPU
    // in every test, and is not used while the vCPU runs.
    cpu.env = Some(unsafe { std::mem::transmute::<*mut dyn Env, *mut (dyn Env + 'static)>(env) });
    cpu.set_rflags(2);
    cpu.update_mode();
    assert_ne!(cpu.mode & mode::CODE64, 0);
    cpu
}

/// Loads the vCPU's registers.
pub(crate) fn load(cpu: &mut Cpu, state: &State, rip: u64) {
    cpu.regs[..16].copy_from_slice(&state.gpr);
    cpu.set_rflags(state.rflags);
    cpu.rip = rip;
    cpu.fpu.0 = state.fx;
    for (v, y) in cpu.vec.iter_mut().zip(&state.ymm) {
        *v = VecReg([0; 64]);
        v.0[..32].copy_from_slice(y);
    }
}

/// Reads the vCPU's registers.
pub(crate) fn save(cpu: &Cpu) -> State {
    let mut state = State::ZERO;
    state.gpr.copy_from_slice(&cpu.regs[..16]);
    state.rflags = cpu.rflags();
    state.fx = cpu.fpu.0;
    for (v, y) in cpu.vec.iter().zip(&mut state.ymm) {
        y.copy_from_slice(&v.0[..32]);
        assert!(v.0[32..].iter().all(|&b| b == 0), "state above bit 255");
    }
    state
}

thread_local! {
    static CACHE: RefCell<CodeCache> = RefCell::new(CodeCache::new(2 << 20));
}

/// Runs the instruction at the address of the code the whole way.
pub(crate) fn run_whole(cpu: &mut Cpu, _: &Case) -> Result<(), Fault> {
    CACHE.with_borrow_mut(|cache| {
        cache.flush(cpu);
        exec::run_one(cpu, cache).map(|_| ())
    })
}
