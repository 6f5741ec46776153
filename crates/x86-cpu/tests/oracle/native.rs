//! Runs one instruction on the host processor: loads every register, jumps to
//! the instruction, saves every register. Faults come back as what the kernel
//! says of them.

use std::{arch::global_asm, cell::UnsafeCell, sync::atomic::AtomicU64};

/// Register state, as loaded and saved.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct State {
    /// FXSAVE64 image: x87, MXCSR; its XMM part is not used.
    pub(crate) fx: [u8; 512],
    pub(crate) ymm: [[u8; 32]; 16],
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
}

impl State {
    pub(crate) const ZERO: Self = Self {
        fx: [0; 512],
        ymm: [[0; 32]; 16],
        gpr: [0; 16],
        rflags: 2,
    };

    pub(crate) fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.fx[24..28].try_into().unwrap())
    }
}

/// A processor exception.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Trap {
    pub(crate) vector: u8,
    pub(crate) error: u32,
    /// CR2; meaningful for page faults.
    pub(crate) address: u64,
}

#[repr(C, align(64))]
struct Shared(UnsafeCell<State>);
// SAFETY: the tests run one case at a time, under a lock.
unsafe impl Sync for Shared {}

static INPUT: Shared = Shared(UnsafeCell::new(State::ZERO));
static OUTPUT: Shared = Shared(UnsafeCell::new(State::ZERO));
static HOST_RSP: AtomicU64 = AtomicU64::new(0);
static SLOT: AtomicU64 = AtomicU64::new(0);
static TRAP: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

global_asm!(
    ".globl caisson_oracle_enter",
    "caisson_oracle_enter:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov [rip + {rsp}], rsp",
    "fxrstor64 [rip + {i}]",
    ".set k, 0",
    ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovups ymm\\r, [rip + {i} + 512 + 32 * \\r]",
    ".endr",
    "push qword ptr [rip + {i} + 1152]",
    "popfq",
    "mov rax, [rip + {i} + 1024]",
    "mov rcx, [rip + {i} + 1032]",
    "mov rdx, [rip + {i} + 1040]",
    "mov rbx, [rip + {i} + 1048]",
    "mov rsp, [rip + {i} + 1056]",
    "mov rbp, [rip + {i} + 1064]",
    "mov rsi, [rip + {i} + 1072]",
    "mov rdi, [rip + {i} + 1080]",
    "mov r8, [rip + {i} + 1088]",
    "mov r9, [rip + {i} + 1096]",
    "mov r10, [rip + {i} + 1104]",
    "mov r11, [rip + {i} + 1112]",
    "mov r12, [rip + {i} + 1120]",
    "mov r13, [rip + {i} + 1128]",
    "mov r14, [rip + {i} + 1136]",
    "mov r15, [rip + {i} + 1144]",
    "jmp qword ptr [rip + {slot}]",
    ".globl caisson_oracle_leave",
    "caisson_oracle_leave:",
    "mov [rip + {o} + 1024], rax",
    "mov [rip + {o} + 1032], rcx",
    "mov [rip + {o} + 1040], rdx",
    "mov [rip + {o} + 1048], rbx",
    "mov [rip + {o} + 1056], rsp",
    "mov [rip + {o} + 1064], rbp",
    "mov [rip + {o} + 1072], rsi",
    "mov [rip + {o} + 1080], rdi",
    "mov [rip + {o} + 1088], r8",
    "mov [rip + {o} + 1096], r9",
    "mov [rip + {o} + 1104], r10",
    "mov [rip + {o} + 1112], r11",
    "mov [rip + {o} + 1120], r12",
    "mov [rip + {o} + 1128], r13",
    "mov [rip + {o} + 1136], r14",
    "mov [rip + {o} + 1144], r15",
    "mov rsp, [rip + {rsp}]",
    "pushfq",
    "pop qword ptr [rip + {o} + 1152]",
    "push 2",
    "popfq",
    ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovups [rip + {o} + 512 + 32 * \\r], ymm\\r",
    ".endr",
    "fxsave64 [rip + {o}]",
    "fninit",
    "vzeroupper",
    "mov dword ptr [rsp - 8], 0x1f80",
    "ldmxcsr [rsp - 8]",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    i = sym INPUT,
    o = sym OUTPUT,
    rsp = sym HOST_RSP,
    slot = sym SLOT,
);

unsafe extern "C" {
    fn caisson_oracle_enter();
    fn caisson_oracle_leave();
}

/// Memory that is writable at one address and executable at another.
pub(crate) struct CodeMemory {
    pub(crate) writable: *mut u8,
    pub(crate) executable: *mut u8,
    pub(crate) len: usize,
}

impl CodeMemory {
    pub(crate) fn new(len: usize) -> Self {
        // SAFETY: fresh mappings of a fresh memfd; nothing else is touched.
        unsafe {
            let fd = libc::memfd_create(c"oracle".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, len as i64) == 0);
            let map = |protection| {
                let p = libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                );
                assert_ne!(p, libc::MAP_FAILED);
                p.cast::<u8>()
            };
            let writable = map(libc::PROT_READ | libc::PROT_WRITE);
            let executable = map(libc::PROT_READ | libc::PROT_EXEC);
            libc::close(fd);
            Self {
                writable,
                executable,
                len,
            }
        }
    }

    /// Copies `code` to offset `at`.
    pub(crate) fn put(&self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.len);
        // SAFETY: in bounds; the executable alias is not running.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(at), code.len());
        }
    }
}

/// The host processor as an oracle.
pub(crate) struct Native {
    slot: CodeMemory,
}

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    use std::sync::atomic::Ordering::Relaxed;
    // SAFETY: the kernel passes a valid context to a SA_SIGINFO handler.
    let gregs = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let slot = SLOT.load(Relaxed);
    if gregs[libc::REG_RIP as usize] as u64 != slot {
        // Not ours: let it strike again with the default action.
        for s in SIGNALS {
            // SAFETY: resets a disposition.
            unsafe { libc::signal(s, libc::SIG_DFL) };
        }
        return;
    }
    TRAP[0].store(1, Relaxed);
    TRAP[1].store(gregs[libc::REG_TRAPNO as usize] as u64, Relaxed);
    TRAP[2].store(gregs[libc::REG_ERR as usize] as u64, Relaxed);
    TRAP[3].store(gregs[libc::REG_CR2 as usize] as u64, Relaxed);
    gregs[libc::REG_RIP as usize] = caisson_oracle_leave as *const () as i64;
    // RF is set in the frame of a fault.
    gregs[libc::REG_EFL as usize] &= !0x10000;
}

const SIGNALS: [i32; 5] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
];

impl Native {
    /// Installs the signal handlers for this thread's cases.
    pub(crate) fn new() -> Self {
        let stack = Box::leak(vec![0u8; 256 << 10].into_boxed_slice());
        // SAFETY: the stack lives for ever; the handler has SA_SIGINFO's signature.
        unsafe {
            let s = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: stack.len(),
            };
            assert_eq!(libc::sigaltstack(&s, std::ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in SIGNALS {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
        Self {
            slot: CodeMemory::new(4096),
        }
    }

    /// Where the instruction runs.
    pub(crate) fn address(&self) -> u64 {
        self.slot.executable as u64
    }

    /// Runs `bytes`, which must neither branch nor call.
    pub(crate) fn run(&mut self, bytes: &[u8], input: &State) -> (State, Option<Trap>) {
        use std::sync::atomic::Ordering::Relaxed;
        let mut code = bytes.to_vec();
        // jmp [rip]
        code.extend([0xff, 0x25, 0, 0, 0, 0]);
        code.extend((caisson_oracle_leave as *const () as u64).to_le_bytes());
        self.slot.put(0, &code);
        SLOT.store(self.address(), Relaxed);
        TRAP[0].store(0, Relaxed);
        // SAFETY: one case at a time (`&mut self`); the trampoline restores
        // everything that compiled code relies on.
        let output = unsafe {
            *INPUT.0.get() = *input;
            caisson_oracle_enter();
            *OUTPUT.0.get()
        };
        let trap = (TRAP[0].load(Relaxed) != 0).then(|| Trap {
            vector: TRAP[1].load(Relaxed) as u8,
            error: TRAP[2].load(Relaxed) as u32,
            address: TRAP[3].load(Relaxed),
        });
        (output, trap)
    }
}
