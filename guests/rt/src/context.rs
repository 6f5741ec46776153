//! A register state that can be entered, in any ring of long mode.

use crate::cpu::flags;
use crate::percpu::sel;
use core::fmt;

/// Which parts of a [`Context`] are loaded besides the general registers.
pub mod load {
    /// Load CR0; the runtime's comes back on exit.
    pub const CR0: u32 = 1;
    /// Load CR3.
    pub const CR3: u32 = 2;
    /// Load CR4.
    pub const CR4: u32 = 4;
    /// Load and save DS, ES, FS and GS.
    pub const SEGMENTS: u32 = 8;
}

/// Vector that [`Context::enter`] reports when SYSCALL reached the runtime's target.
pub const SYSCALL_VECTOR: u64 = 0x100;

/// Registers to load, and after [`Self::enter`] the registers that the
/// interrupted code had, with what the processor reported.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[allow(missing_docs)]
pub struct Context {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: u64,
    pub ss: u64,
    pub ds: u16,
    pub es: u16,
    pub fs: u16,
    pub gs: u16,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// CR2 at the exit.
    pub cr2: u64,
    /// Bits of [`load`].
    pub load: u32,
    pub vector: u64,
    /// Error code, all-ones if none was pushed.
    pub error: u64,
    /// Address of the saved RIP: where the processor's frame starts, error code aside.
    pub entry_rsp: u64,
    /// RFLAGS that the processor set up for the handler.
    pub entry_rflags: u64,
}

/// Why a context was left.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Vector, or [`SYSCALL_VECTOR`].
    pub vector: u64,
    /// Error code if the processor pushed one.
    pub error: Option<u64>,
}

impl Exit {
    /// An exit without error code.
    pub const fn plain(vector: u64) -> Self {
        Self {
            vector,
            error: None,
        }
    }

    /// An exit with error code.
    pub const fn code(vector: u64, error: u64) -> Self {
        Self {
            vector,
            error: Some(error),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.error {
            Some(e) => write!(f, "vector {:#x} error {e:#x}", self.vector),
            None => write!(f, "vector {:#x}", self.vector),
        }
    }
}

/// Invalid opcode.
pub const UD: Exit = Exit::plain(6);
/// Breakpoint: how snippets end.
pub const BP: Exit = Exit::plain(3);
/// Debug exception.
pub const DB: Exit = Exit::plain(1);
/// General protection with error code 0.
pub const GP0: Exit = Exit::code(13, 0);
/// Stack fault with error code 0.
pub const SS0: Exit = Exit::code(12, 0);

unsafe extern "C" {
    fn context_enter(context: *mut Context);
    static context_iretq: u8;
    static syscall_exit: u8;
}

impl Context {
    /// Ring 0, 64-bit, interrupts off.
    pub fn kernel(rip: u64, rsp: u64) -> Self {
        Self {
            rip,
            rsp,
            rflags: flags::FIXED,
            cs: sel::CODE64.into(),
            ss: sel::DATA.into(),
            ..Self::default()
        }
    }

    /// Ring 3, 64-bit, interrupts off.
    pub fn user(rip: u64, rsp: u64) -> Self {
        Self {
            cs: sel::USER_CODE64.into(),
            ss: sel::USER_DATA.into(),
            ..Self::kernel(rip, rsp)
        }
    }

    /// Compatibility mode with flat segments, in ring 0 or ring 3.
    pub fn compat(ring3: bool, eip: u64, esp: u64) -> Self {
        let (cs, ss) = if ring3 {
            (sel::USER_CODE32, sel::USER_DATA)
        } else {
            (sel::CODE32, sel::DATA)
        };
        Self {
            cs: cs.into(),
            ss: ss.into(),
            ds: ss,
            es: ss,
            load: load::SEGMENTS,
            ..Self::kernel(eip, esp)
        }
    }

    /// Runs the context on this processor until its next exception or interrupt.
    pub fn enter(&mut self) -> Exit {
        // SAFETY: the stubs restore the caller's stack, callee-saved and
        // control registers; the context is a live object.
        unsafe { context_enter(self) };
        Exit {
            vector: self.vector,
            error: (self.error != u64::MAX).then_some(self.error),
        }
    }
}

/// Address of the IRETQ that enters contexts: where a bad context faults.
pub fn iretq_address() -> u64 {
    &raw const context_iretq as u64
}

/// Address to put into LSTAR so that SYSCALL leaves the entered context.
pub fn syscall_address() -> u64 {
    &raw const syscall_exit as u64
}
