//! The interrupt descriptor table, its 256 stubs and handlers.
//!
//! A stub normalises the stack (vector, error code or all-ones, frame). If the
//! processor has a context entered, control returns from
//! [`crate::Context::enter`]; otherwise the registered handler runs, with all
//! general and SSE registers saved around it. Every gate uses interrupt stack
//! 1 (NMI 2, double fault 3), so that compiled code's red zone is never hit.

use crate::context::Context;
use crate::cpu::{self, TablePointer};
use crate::percpu::{PerCpu, sel};
use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicUsize, Ordering};

/// Registers at an interrupt that a handler function sees.
#[repr(C)]
#[derive(Debug)]
pub struct Frame {
    /// R15, R14 ... RAX in push order, lowest address first.
    pub gprs: [u64; 15],
    /// Vector.
    pub vector: u64,
    /// Error code; all-ones when the processor pushed none.
    pub error: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// Code selector.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack selector.
    pub ss: u64,
}

/// A 64-bit gate.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Gate {
    low: u64,
    high: u64,
}

impl Gate {
    /// A gate with explicit fields; `access` is present bit, DPL and type.
    pub const fn new(selector: u16, offset: u64, ist: u8, access: u8) -> Self {
        Self {
            low: (offset & 0xFFFF)
                | (selector as u64) << 16
                | (ist as u64 & 7) << 32
                | (access as u64) << 40
                | (offset >> 16 & 0xFFFF) << 48,
            high: offset >> 32,
        }
    }
}

/// Access byte of a present ring-0 interrupt gate.
pub const INTERRUPT_GATE: u8 = 0x8E;
/// Access byte of a present ring-0 trap gate.
pub const TRAP_GATE: u8 = 0x8F;
/// Access byte of a present ring-3 interrupt gate.
pub const USER_GATE: u8 = 0xEE;

#[repr(C, align(4096))]
struct Idt(UnsafeCell<[Gate; 256]>);
// SAFETY: written by the boot processor while the others wait.
unsafe impl Sync for Idt {}

static IDT: Idt = Idt(UnsafeCell::new([Gate { low: 0, high: 0 }; 256]));
static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];
/// Interrupts taken by default handlers, for [`count`].
static COUNTS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// A handler for interrupts outside of an entered context.
pub type Handler = fn(&mut Frame);

global_asm!(
    r#"
    .section .text.stubs, "ax"
    .balign 16
    .global interrupt_stubs
interrupt_stubs:
    .set n, 0
    .rept 256
    .balign 16
    push n
    jmp interrupt_common
    .set n, n + 1
    .endr

    // [rsp] = vector (sign-extended), then maybe an error code, then the frame.
    // The processor aligns the stack, so one bit tells whether there is a code.
interrupt_common:
    test spl, 8
    jnz 2f
    push qword ptr [rsp]
    mov qword ptr [rsp + 8], -1
2:  push rax
    push rcx
    movzx eax, byte ptr [rsp + 16]
    mov [rsp + 16], rax
    sub rsp, 16
    sgdt [rsp]
    mov rax, [rsp + 2]
    add rsp, 16
    mov rax, [rax - 8]
    mov rcx, [rax + {pc_context}]
    test rcx, rcx
    jz interrupt_host
    mov [rcx + {rdx}], rdx
    mov [rcx + {rbx}], rbx
    mov [rcx + {rbp}], rbp
    mov [rcx + {rsi}], rsi
    mov [rcx + {rdi}], rdi
    mov [rcx + {r8}], r8
    mov [rcx + {r9}], r9
    mov [rcx + {r10}], r10
    mov [rcx + {r11}], r11
    mov [rcx + {r12}], r12
    mov [rcx + {r13}], r13
    mov [rcx + {r14}], r14
    mov [rcx + {r15}], r15
    lea rdx, [rsp + 32]
    mov [rcx + {entry_rsp}], rdx
    pop [rcx + {rcx_}]
    pop [rcx + {rax}]
    pop rdx
    mov [rcx + {vector}], rdx
    pop [rcx + {error}]
    pop [rcx + {rip}]
    pop [rcx + {cs}]
    pop [rcx + {rflags}]
    pop [rcx + {rsp}]
    pop [rcx + {ss}]
    pushfq
    pop [rcx + {entry_rflags}]
    .global context_leave
context_leave:
    mov rbx, cr2
    mov [rcx + {cr2}], rbx
    mov ebx, [rcx + {load}]
    test bl, 1
    jz 3f
    mov rsi, [rax + {pc_cr0}]
    mov cr0, rsi
3:  test bl, 2
    jz 3f
    mov rsi, [rax + {pc_cr3}]
    mov cr3, rsi
3:  test bl, 4
    jz 3f
    mov rsi, [rax + {pc_cr4}]
    mov cr4, rsi
3:  test bl, 8
    jz 3f
    mov [rcx + {ds}], ds
    mov [rcx + {es}], es
    mov [rcx + {fs}], fs
    mov [rcx + {gs}], gs
    mov esi, {data}
    mov ds, esi
    mov es, esi
3:  mov qword ptr [rax + {pc_context}], 0
    mov rsp, [rax + {pc_rsp}]
    push 2
    popfq
    cmp edx, 2
    jne context_return
    // Only IRET ends the blocking of NMIs.
    mov rdi, rsp
    mov esi, {data}
    push rsi
    push rdi
    pushfq
    push {code}
    push offset context_return
    iretq
context_return:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

interrupt_host:
    pop rcx
    pop rax
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp
    mov rbx, rsp
    and rsp, -16
    sub rsp, 512
    fxsave64 [rsp]
    cld
    call rt_interrupt
    fxrstor64 [rsp]
    mov rsp, rbx
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq

    // fn(*mut Context): loads the context, returns at its next interrupt.
    .global context_enter
context_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 16
    sgdt [rsp]
    mov rax, [rsp + 2]
    add rsp, 16
    mov rax, [rax - 8]
    mov [rax + {pc_rsp}], rsp
    mov ebx, [rdi + {load}]
    test bl, 8
    jz 3f
    mov ds, [rdi + {ds}]
    mov es, [rdi + {es}]
    mov fs, [rdi + {fs}]
    mov gs, [rdi + {gs}]
3:  test bl, 4
    jz 3f
    mov rsi, cr4
    mov [rax + {pc_cr4}], rsi
    mov rsi, [rdi + {cr4}]
    mov cr4, rsi
3:  test bl, 2
    jz 3f
    mov rsi, cr3
    mov [rax + {pc_cr3}], rsi
    mov rsi, [rdi + {cr3}]
    mov cr3, rsi
3:  test bl, 1
    jz 3f
    mov rsi, cr0
    mov [rax + {pc_cr0}], rsi
    mov rsi, [rdi + {cr0}]
    mov cr0, rsi
3:  mov [rax + {pc_context}], rdi
    push qword ptr [rdi + {ss}]
    push qword ptr [rdi + {rsp}]
    push qword ptr [rdi + {rflags}]
    push qword ptr [rdi + {cs}]
    push qword ptr [rdi + {rip}]
    mov rax, [rdi + {rax}]
    mov rcx, [rdi + {rcx_}]
    mov rdx, [rdi + {rdx}]
    mov rbx, [rdi + {rbx}]
    mov rbp, [rdi + {rbp}]
    mov rsi, [rdi + {rsi}]
    mov r8, [rdi + {r8}]
    mov r9, [rdi + {r9}]
    mov r10, [rdi + {r10}]
    mov r11, [rdi + {r11}]
    mov r12, [rdi + {r12}]
    mov r13, [rdi + {r13}]
    mov r14, [rdi + {r14}]
    mov r15, [rdi + {r15}]
    mov rdi, [rdi + {rdi}]
    .global context_iretq
context_iretq:
    iretq

    // SYSCALL target that leaves the entered context with vector 0x100. Uses
    // the absolute scratch words below: the boot processor's tests only.
    .global syscall_exit
syscall_exit:
    mov [syscall_scratch], rax
    mov [syscall_scratch + 8], rcx
    mov [syscall_scratch + 16], rsp
    mov rsp, offset syscall_stack_end
    pushfq
    sgdt [rsp - 32]
    mov rax, [rsp - 30]
    mov rax, [rax - 8]
    mov rcx, [rax + {pc_context}]
    pop [rcx + {entry_rflags}]
    mov [rcx + {rdx}], rdx
    mov [rcx + {rbx}], rbx
    mov [rcx + {rbp}], rbp
    mov [rcx + {rsi}], rsi
    mov [rcx + {rdi}], rdi
    mov [rcx + {r8}], r8
    mov [rcx + {r9}], r9
    mov [rcx + {r10}], r10
    mov [rcx + {r11}], r11
    mov [rcx + {r12}], r12
    mov [rcx + {r13}], r13
    mov [rcx + {r14}], r14
    mov [rcx + {r15}], r15
    mov [rcx + {rflags}], r11
    mov rdx, [syscall_scratch]
    mov [rcx + {rax}], rdx
    mov rdx, [syscall_scratch + 8]
    mov [rcx + {rcx_}], rdx
    mov [rcx + {rip}], rdx
    mov rdx, [syscall_scratch + 16]
    mov [rcx + {rsp}], rdx
    mov [rcx + {cs}], cs
    mov [rcx + {ss}], ss
    mov edx, 0x100
    mov [rcx + {vector}], rdx
    mov qword ptr [rcx + {error}], -1
    jmp context_leave

    .section .bss.syscall, "aw", @nobits
    .balign 16
syscall_scratch: .skip 32
    .skip 256
syscall_stack_end:
    .text
    "#,
    pc_context = const offset_of!(PerCpu, context),
    pc_rsp = const offset_of!(PerCpu, host_rsp),
    pc_cr0 = const offset_of!(PerCpu, host_cr0),
    pc_cr3 = const offset_of!(PerCpu, host_cr3),
    pc_cr4 = const offset_of!(PerCpu, host_cr4),
    rax = const offset_of!(Context, rax),
    rcx_ = const offset_of!(Context, rcx),
    rdx = const offset_of!(Context, rdx),
    rbx = const offset_of!(Context, rbx),
    rsp = const offset_of!(Context, rsp),
    rbp = const offset_of!(Context, rbp),
    rsi = const offset_of!(Context, rsi),
    rdi = const offset_of!(Context, rdi),
    r8 = const offset_of!(Context, r8),
    r9 = const offset_of!(Context, r9),
    r10 = const offset_of!(Context, r10),
    r11 = const offset_of!(Context, r11),
    r12 = const offset_of!(Context, r12),
    r13 = const offset_of!(Context, r13),
    r14 = const offset_of!(Context, r14),
    r15 = const offset_of!(Context, r15),
    rip = const offset_of!(Context, rip),
    rflags = const offset_of!(Context, rflags),
    cs = const offset_of!(Context, cs),
    ss = const offset_of!(Context, ss),
    ds = const offset_of!(Context, ds),
    es = const offset_of!(Context, es),
    fs = const offset_of!(Context, fs),
    gs = const offset_of!(Context, gs),
    cr0 = const offset_of!(Context, cr0),
    cr2 = const offset_of!(Context, cr2),
    cr3 = const offset_of!(Context, cr3),
    cr4 = const offset_of!(Context, cr4),
    load = const offset_of!(Context, load),
    vector = const offset_of!(Context, vector),
    error = const offset_of!(Context, error),
    entry_rsp = const offset_of!(Context, entry_rsp),
    entry_rflags = const offset_of!(Context, entry_rflags),
    data = const sel::DATA,
    code = const sel::CODE64,
);

unsafe extern "C" {
    static interrupt_stubs: u8;
}

/// Address of the stub of a vector, for gates that tests build.
pub fn stub(vector: u8) -> u64 {
    &raw const interrupt_stubs as u64 + u64::from(vector) * 16
}

/// The gate that the runtime uses for a vector. Ring 3 may use INT with
/// vectors 3, 4 and 0x80 up.
pub fn default_gate(vector: u8) -> Gate {
    let ist = match vector {
        2 => 2,
        8 => 3,
        _ => 1,
    };
    let access = if matches!(vector, 3 | 4) || vector >= 0x80 {
        USER_GATE
    } else {
        INTERRUPT_GATE
    };
    Gate::new(sel::CODE64, stub(vector), ist, access)
}

/// Replaces one gate.
pub fn set_gate(vector: u8, gate: Gate) {
    // SAFETY: in bounds; volatile because the processor reads the table.
    unsafe {
        (IDT.0.get() as *mut Gate)
            .add(usize::from(vector))
            .write_volatile(gate)
    };
}

/// Puts the runtime's gate back.
pub fn reset_gate(vector: u8) {
    set_gate(vector, default_gate(vector));
}

/// Linear address of the table.
pub fn idt_base() -> u64 {
    IDT.0.get() as u64
}

pub(crate) fn init() {
    for vector in 0..=255 {
        reset_gate(vector);
    }
}

/// Loads the table register of the running processor.
pub fn load() {
    cpu::lidt(TablePointer {
        limit: 4095,
        base: idt_base(),
    });
}

/// Registers what runs when a vector arrives outside of a context.
pub fn set_handler(vector: u8, handler: Handler) {
    COUNTS[usize::from(vector)].store(0, Ordering::SeqCst);
    HANDLERS[usize::from(vector)].store(handler as usize, Ordering::SeqCst);
}

/// Removes a handler: the vector is again unexpected.
pub fn clear_handler(vector: u8) {
    HANDLERS[usize::from(vector)].store(0, Ordering::SeqCst);
}

/// How often the vector's handler ran since it was set, on all processors.
pub fn count(vector: u8) -> usize {
    COUNTS[usize::from(vector)].load(Ordering::SeqCst)
}

#[unsafe(no_mangle)]
extern "C" fn rt_interrupt(frame: &mut Frame) {
    let index = frame.vector as usize & 0xFF;
    let handler = HANDLERS[index].load(Ordering::SeqCst);
    if handler == 0 {
        panic!(
            "unexpected vector {:#x} error {:#x} at {:#x}:{:#x} flags {:#x} stack {:#x} cr2 {:#x}",
            frame.vector,
            frame.error,
            frame.cs,
            frame.rip,
            frame.rflags,
            frame.rsp,
            cpu::cr2()
        );
    }
    // SAFETY: only `set_handler` stores non-zero values, all `Handler`s.
    let handler: Handler = unsafe { core::mem::transmute(handler) };
    handler(frame);
    COUNTS[index].fetch_add(1, Ordering::SeqCst);
}
