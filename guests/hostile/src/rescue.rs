//! Attempts that may fault.

use caisson_guest_rt::interrupt::{Gate, INTERRUPT_GATE, set_gate};
use caisson_guest_rt::percpu::sel;
use core::arch::global_asm;
use core::mem::transmute;

global_asm!(
    ".section .text.rescue, \"ax\"",
    // extern "C" fn(function, argument): calls, and returns also when the call faults.
    ".global rescue_call",
    "rescue_call:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rescue_stack], rsp",
    "mov rax, rdi",
    "mov rdi, rsi",
    "sub rsp, 8",
    "call rax",
    ".global rescue_trap",
    "rescue_trap:",
    "mov rsp, [rescue_stack]",
    "cld",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // Takes an interrupt of the local APIC.
    ".global rescue_interrupt",
    "rescue_interrupt:",
    "push rax",
    "inc qword ptr [rescue_interrupts]",
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rax",
    "iretq",
    ".section .bss.rescue, \"aw\", @nobits",
    ".balign 8",
    "rescue_stack: .skip 8",
    ".global rescue_interrupts",
    "rescue_interrupts: .skip 8",
    ".text",
);

unsafe extern "C" {
    fn rescue_call(function: extern "C" fn(u64), argument: u64);
    static rescue_trap: u8;
    static rescue_interrupt: u8;
}

/// The first vector that is no exception's.
pub(crate) const FIRST_INTERRUPT: u8 = 32;

/// Sends every vector to the end of the present attempt.
pub(crate) fn install() {
    for vector in 0..=255 {
        gate(vector, &raw const rescue_trap as u64);
    }
}

/// Sends the vectors of interrupts to a handler that ends them.
pub(crate) fn take_interrupts() {
    for vector in FIRST_INTERRUPT..=255 {
        gate(vector, &raw const rescue_interrupt as u64);
    }
}

fn gate(vector: u8, offset: u64) {
    set_gate(vector, Gate::new(sel::CODE64, offset, 1, INTERRUPT_GATE));
}

/// Calls `function` with `argument`, until it returns or faults. It must hold nothing that needs dropping.
pub(crate) fn attempt(function: extern "C" fn(u64), argument: u64) {
    // SAFETY: registers that the caller keeps are restored either way; the guest is alone on its processor.
    unsafe { rescue_call(function, argument) }
}

/// Calls `function` with what `argument` refers to, like [`attempt`].
pub(crate) fn attempt_on<T>(function: extern "C" fn(&T), argument: &T) {
    // SAFETY: to the callee a reference to something of known size is its address, in the register of a `u64`.
    let function = unsafe { transmute::<extern "C" fn(&T), extern "C" fn(u64)>(function) };
    attempt(function, &raw const *argument as u64);
}
