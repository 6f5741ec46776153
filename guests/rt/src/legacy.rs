//! Protected mode without long mode, virtual-8086 mode and real mode.
//!
//! [`LegacyContext::enter`] leaves long mode, loads the state (CR0.PE clear
//! means real mode, EFLAGS.VM virtual-8086 mode) and comes back to long mode at
//! the next exception or interrupt. Interrupts stay off unless the state's IF
//! says otherwise. Single processor only: the switch uses fixed memory.

use crate::cpu::TablePointer;
use crate::memory::{read, write};
use crate::percpu::descriptor;
use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, Ordering};

/// Where the real-mode part of the switch lives, and its copy of the context.
const LOW: u32 = 0x9000;
const LOW_CONTEXT: u32 = 0x9F00;

/// Selectors of the legacy GDT.
#[allow(missing_docs)]
pub mod sel {
    pub const CODE32: u32 = 0x08;
    pub const DATA: u32 = 0x10;
    pub const USER_CODE32: u32 = 0x18 | 3;
    pub const USER_DATA: u32 = 0x20 | 3;
    pub const CODE16: u32 = 0x28;
    pub const DATA16: u32 = 0x30;
    pub const TSS: u32 = 0x40;
    pub const LDT: u32 = 0x48;
    /// First slot that tests may use.
    pub const FREE: u32 = 0x50;
}

/// A 32-bit register state, see the module.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
#[allow(missing_docs)]
pub struct LegacyContext {
    pub eax: u32,
    pub ecx: u32,
    pub edx: u32,
    pub ebx: u32,
    pub esp: u32,
    pub ebp: u32,
    pub esi: u32,
    pub edi: u32,
    pub eip: u32,
    pub eflags: u32,
    pub cs: u32,
    pub ss: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub cr0: u32,
    pub cr3: u32,
    pub cr4: u32,
    pub efer: u32,
    pub ldt: u32,
    /// Vector of the exit.
    pub vector: u32,
    /// Error code, all-ones when the vector has none.
    pub error: u32,
    /// CR2 at the exit.
    pub cr2: u32,
    /// Task register at the exit.
    pub tr: u32,
    /// ESP at the handler's entry, before the runtime's own pushes (protected mode).
    pub entry_esp: u32,
}

global_asm!(
    r#"
    .section .text.legacy, "ax"
    .code64
    .global legacy_enter
legacy_enter:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [legacy_rsp], rsp
    mov [legacy_context], edi
    mov rax, cr0
    mov [legacy_cr0], eax
    mov rax, cr3
    mov [legacy_cr3], eax
    mov rax, cr4
    mov [legacy_cr4], eax
    sgdt [legacy_host_gdt]
    sidt [legacy_host_idt]
    str [legacy_host_tr]
    mov ecx, 0xC0000080
    rdmsr
    and eax, 0xFFFFFBFF
    mov [legacy_efer], eax
    lgdt [legacy_gdtr]
    push 0x08
    lea rax, [rip + legacy_compat]
    push rax
    retfq

    .code32
legacy_compat:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, offset legacy_stack_end
    mov eax, cr0
    and eax, 0x7FFFFFFF
    mov cr0, eax
    mov esi, [legacy_context]
    mov ecx, 0xC0000080
    mov eax, [esi + {efer}]
    xor edx, edx
    wrmsr
    mov eax, [esi + {cr4}]
    mov cr4, eax
    mov eax, [esi + {cr3}]
    mov cr3, eax
    lidt [legacy_idtr]
    and byte ptr [legacy_gdt + 0x45], 0xFD
    mov eax, 0x40
    ltr ax
    lldt word ptr [esi + {ldt}]
    mov eax, [esi + {cr0}]
    test al, 1
    jz legacy_to_real
    mov cr0, eax
    jmp 2f
2:  test dword ptr [esi + {eflags}], 0x20000
    jnz 4f
    test dword ptr [esi + {cs}], 3
    jnz 3f
    mov ss, [esi + {ss}]
    mov esp, [esi + {esp}]
    jmp 5f
4:  push dword ptr [esi + {gs}]
    push dword ptr [esi + {fs}]
    push dword ptr [esi + {ds}]
    push dword ptr [esi + {es}]
    push dword ptr [esi + {ss}]
    push dword ptr [esi + {esp}]
    push dword ptr [esi + {eflags}]
    push dword ptr [esi + {cs}]
    push dword ptr [esi + {eip}]
    jmp 6f
3:  push dword ptr [esi + {ss}]
    push dword ptr [esi + {esp}]
5:  push dword ptr [esi + {eflags}]
    push dword ptr [esi + {cs}]
    push dword ptr [esi + {eip}]
    mov es, [esi + {es}]
    mov fs, [esi + {fs}]
    mov gs, [esi + {gs}]
6:  mov eax, [esi + {eax}]
    mov ecx, [esi + {ecx}]
    mov edx, [esi + {edx}]
    mov ebx, [esi + {ebx}]
    mov ebp, [esi + {ebp}]
    mov edi, [esi + {edi}]
    test dword ptr [esi + {eflags}], 0x20000
    jnz 7f
    mov ds, [esi + {ds}]
7:  mov esi, cs:[esi + {esi}]
    .global legacy_iret
legacy_iret:
    iretd

    .balign 16
    .global legacy_stubs
legacy_stubs:
    .set n, 0
    .rept 128
    .balign 16
    .if n == 8 || (n >= 10 && n <= 14) || n == 17
    .else
    push -1
    .endif
    push n
    jmp legacy_common
    .set n, n + 1
    .endr

legacy_common:
    .byte 0x1E                      // push ds, four bytes
    push eax
    mov eax, 0x10
    mov ds, eax
    mov eax, [legacy_context]
    mov [eax + {ecx}], ecx
    mov [eax + {edx}], edx
    mov [eax + {ebx}], ebx
    mov [eax + {ebp}], ebp
    mov [eax + {esi}], esi
    mov [eax + {edi}], edi
    mov word ptr [eax + {es}], es
    mov word ptr [eax + {fs}], fs
    mov word ptr [eax + {gs}], gs
    lea ecx, [esp + 16]
    mov [eax + {entry_esp}], ecx
    pop dword ptr [eax + {eax}]
    pop ecx
    mov word ptr [eax + {ds}], cx
    pop dword ptr [eax + {vector}]
    pop dword ptr [eax + {error}]
    pop dword ptr [eax + {eip}]
    pop ecx
    movzx ecx, cx
    mov [eax + {cs}], ecx
    pop dword ptr [eax + {eflags}]
    test dword ptr [eax + {eflags}], 0x20000
    jnz 2f
    test ecx, 3
    jnz 3f
    mov [eax + {esp}], esp
    mov word ptr [eax + {ss}], ss
    jmp legacy_leave
3:  pop dword ptr [eax + {esp}]
    pop ecx
    mov word ptr [eax + {ss}], cx
    jmp legacy_leave
2:  pop dword ptr [eax + {esp}]
    pop dword ptr [eax + {ss}]
    pop dword ptr [eax + {es}]
    pop dword ptr [eax + {ds}]
    pop dword ptr [eax + {fs}]
    pop dword ptr [eax + {gs}]

    // EAX = context; protected mode, DS flat.
legacy_leave:
    mov ecx, cr2
    mov [eax + {cr2}], ecx
    xor ecx, ecx
    str cx
    mov [eax + {tr}], ecx
    mov ecx, 0x10
    mov ss, ecx
    mov es, ecx
    mov esp, offset legacy_exit_stack
    push 2
    popfd
    mov ebx, cr0
    and ebx, 0x7FFFFFFF
    mov cr0, ebx
    mov eax, [legacy_cr4]
    mov cr4, eax
    mov eax, [legacy_cr3]
    mov cr3, eax
    mov ecx, 0xC0000080
    mov eax, [legacy_efer]
    xor edx, edx
    wrmsr
    mov eax, [legacy_cr0]
    mov cr0, eax
    ljmp 0x38, offset legacy_long

    .code64
legacy_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, [legacy_rsp]
    lgdt [legacy_host_gdt]
    lidt [legacy_host_idt]
    xor eax, eax
    lldt ax
    movzx eax, word ptr [legacy_host_tr]
    mov rcx, [legacy_host_gdt + 2]
    and byte ptr [rcx + rax + 5], 0xFD
    ltr ax
    push 0x08
    lea rax, [rip + legacy_back]
    push rax
    retfq
legacy_back:
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .code32
    // Copies the context low, then leaves protected mode. Paging is off.
legacy_to_real:
    mov edi, {low_context}
    mov ecx, {size} / 4
    rep movsd
    .byte 0xEA
    .long low_protected16
    .word 0x28
legacy_from_real:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov esi, {low_context}
    mov edi, [legacy_context]
    mov ecx, {size} / 4
    rep movsd
    mov eax, [legacy_context]
    jmp legacy_leave

    // The part below 1 MiB, copied to LOW.
    .section .rodata.legacy, "a"
    .balign 16
    .global legacy_low_start
legacy_low_start:
    .code16
1:  mov ax, 0x30
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    mov ss, ax
    mov eax, cr0
    and al, 0xFE
    mov cr0, eax
    .byte 0xEA
    .word low_real
    .word 0
2:  xor ax, ax
    mov ds, ax
    lidt [low_ivt_pointer]
    mov ss, [{low_context} + {ss}]
    mov esp, [{low_context} + {esp}]
    push word ptr [{low_context} + {eflags}]
    push word ptr [{low_context} + {cs}]
    push word ptr [{low_context} + {eip}]
    mov es, [{low_context} + {es}]
    mov fs, [{low_context} + {fs}]
    mov gs, [{low_context} + {gs}]
    mov eax, [{low_context} + {eax}]
    mov ecx, [{low_context} + {ecx}]
    mov edx, [{low_context} + {edx}]
    mov ebx, [{low_context} + {ebx}]
    mov ebp, [{low_context} + {ebp}]
    mov esi, [{low_context} + {esi}]
    mov edi, [{low_context} + {edi}]
    mov ds, [{low_context} + {ds}]
    iret
    .balign 8
    // Interrupt stubs: 128 of 8 bytes.
3:
    .set n, 0
    .rept 128
    .balign 8
    push n
    .byte 0xE9
    .word 4f - . - 2
    .set n, n + 1
    .endr
4:  push ds
    push eax
    push 0
    pop ds
    pop dword ptr [{low_context} + {eax}]
    pop word ptr [{low_context} + {ds}]
    pop word ptr [{low_context} + {vector}]
    pop word ptr [{low_context} + {eip}]
    pop word ptr [{low_context} + {cs}]
    pop word ptr [{low_context} + {eflags}]
    mov [{low_context} + {ecx}], ecx
    mov [{low_context} + {edx}], edx
    mov [{low_context} + {ebx}], ebx
    mov [{low_context} + {ebp}], ebp
    mov [{low_context} + {esi}], esi
    mov [{low_context} + {edi}], edi
    mov [{low_context} + {esp}], esp
    mov word ptr [{low_context} + {ss}], ss
    mov word ptr [{low_context} + {es}], es
    mov word ptr [{low_context} + {fs}], fs
    mov word ptr [{low_context} + {gs}], gs
    cli
    cld
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA
    .long legacy_from_real
    .word 0x08
5:  .word 0x3FF
    .long 0
    .global legacy_low_end
legacy_low_end:
    .set low_protected16, {low} + (1b - legacy_low_start)
    .set low_real, {low} + (2b - legacy_low_start)
    .set low_ivt_pointer, {low} + (5b - legacy_low_start)
    .set low_stubs, {low} + (3b - legacy_low_start)
    .global low_stubs
    .code64

    .section .data.legacy, "aw"
    .balign 16
    .global legacy_gdt
legacy_gdt:
    .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF
    .quad 0x00009B000000FFFF, 0x000093000000FFFF, 0x00AF9B000000FFFF
    .skip 8 * 56
legacy_gdt_end:
    .balign 16
    .global legacy_idt
legacy_idt: .skip 8 * 256
legacy_idt_end:
    .balign 16
legacy_gdtr:
    .word legacy_gdt_end - legacy_gdt - 1
    .quad legacy_gdt
legacy_idtr:
    .word legacy_idt_end - legacy_idt - 1
    .quad legacy_idt
legacy_host_gdt: .skip 10
legacy_host_idt: .skip 10
legacy_host_tr: .skip 4
    .balign 8
legacy_rsp: .quad 0
legacy_context: .long 0
legacy_cr0: .long 0
legacy_cr3: .long 0
legacy_cr4: .long 0
legacy_efer: .long 0
    .balign 16
    .skip 64
legacy_exit_stack:
    .skip 4096
    .global legacy_stack_end
legacy_stack_end:
    .text
    "#,
    low = const LOW,
    low_context = const LOW_CONTEXT,
    size = const size_of::<LegacyContext>(),
    eax = const offset_of!(LegacyContext, eax),
    ecx = const offset_of!(LegacyContext, ecx),
    edx = const offset_of!(LegacyContext, edx),
    ebx = const offset_of!(LegacyContext, ebx),
    esp = const offset_of!(LegacyContext, esp),
    ebp = const offset_of!(LegacyContext, ebp),
    esi = const offset_of!(LegacyContext, esi),
    edi = const offset_of!(LegacyContext, edi),
    eip = const offset_of!(LegacyContext, eip),
    eflags = const offset_of!(LegacyContext, eflags),
    cs = const offset_of!(LegacyContext, cs),
    ss = const offset_of!(LegacyContext, ss),
    ds = const offset_of!(LegacyContext, ds),
    es = const offset_of!(LegacyContext, es),
    fs = const offset_of!(LegacyContext, fs),
    gs = const offset_of!(LegacyContext, gs),
    cr0 = const offset_of!(LegacyContext, cr0),
    cr2 = const offset_of!(LegacyContext, cr2),
    cr3 = const offset_of!(LegacyContext, cr3),
    cr4 = const offset_of!(LegacyContext, cr4),
    efer = const offset_of!(LegacyContext, efer),
    ldt = const offset_of!(LegacyContext, ldt),
    vector = const offset_of!(LegacyContext, vector),
    error = const offset_of!(LegacyContext, error),
    tr = const offset_of!(LegacyContext, tr),
    entry_esp = const offset_of!(LegacyContext, entry_esp),
);

unsafe extern "C" {
    fn legacy_enter(context: *mut LegacyContext);
    static legacy_low_start: u8;
    static legacy_low_end: u8;
    static low_stubs: u8;
    static legacy_stubs: u8;
    static legacy_gdt: u8;
    static legacy_idt: u8;
    static legacy_stack_end: u8;
    static legacy_iret: u8;
}

/// A 32-bit task state segment.
#[repr(C)]
#[derive(Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Tss32 {
    pub link: u32,
    pub esp0: u32,
    pub ss0: u32,
    pub esp1: u32,
    pub ss1: u32,
    pub esp2: u32,
    pub ss2: u32,
    pub cr3: u32,
    pub eip: u32,
    pub eflags: u32,
    pub eax: u32,
    pub ecx: u32,
    pub edx: u32,
    pub ebx: u32,
    pub esp: u32,
    pub ebp: u32,
    pub esi: u32,
    pub edi: u32,
    pub es: u32,
    pub cs: u32,
    pub ss: u32,
    pub ds: u32,
    pub fs: u32,
    pub gs: u32,
    pub ldt: u32,
    /// Trap bit in the low half, I/O bitmap offset in the high half.
    pub trap_io: u32,
    /// Interrupt redirection bitmap and the start of an I/O bitmap.
    pub tail: [u32; 16],
}

static READY: AtomicBool = AtomicBool::new(false);

/// Physical address of the main task state segment, in low RAM.
pub const TSS: u32 = 0xB000;

/// The main task state segment, by value.
pub fn tss_field(offset: u32) -> u32 {
    read((TSS + offset).into())
}

/// Writes a 32-bit word of the main task state segment.
pub fn set_tss_field(offset: u32, value: u32) {
    write((TSS + offset).into(), value);
}

/// Writes a descriptor of the legacy GDT.
pub fn set_gdt(selector: u32, value: u64) {
    write(
        &raw const legacy_gdt as u64 + u64::from(selector & !7),
        value,
    );
}

/// Reads a descriptor of the legacy GDT.
pub fn gdt(selector: u32) -> u64 {
    read(&raw const legacy_gdt as u64 + u64::from(selector & !7))
}

/// Linear address of the legacy GDT.
pub fn gdt_base() -> u32 {
    &raw const legacy_gdt as u64 as u32
}

/// A 32-bit gate descriptor.
pub const fn gate(selector: u32, offset: u32, access: u8) -> u64 {
    (offset & 0xFFFF) as u64
        | (selector as u64 & 0xFFFF) << 16
        | (access as u64) << 40
        | ((offset >> 16) as u64) << 48
}

/// Writes a gate of the legacy IDT.
pub fn set_idt(vector: u8, value: u64) {
    write(&raw const legacy_idt as u64 + u64::from(vector) * 8, value);
}

/// Puts the runtime's gate of a vector back.
pub fn reset_idt(vector: u8) {
    let access = if matches!(vector, 3 | 4) || vector >= 0x30 {
        0xEE
    } else {
        0x8E
    };
    set_idt(vector, gate(sel::CODE32, stub(vector), access));
}

/// Address of the protected-mode stub of a vector below 128.
pub fn stub(vector: u8) -> u32 {
    assert!(vector < 128);
    &raw const legacy_stubs as u64 as u32 + u32::from(vector) * 16
}

/// Address of the IRETD that enters contexts.
pub fn iret_address() -> u32 {
    &raw const legacy_iret as u64 as u32
}

/// Top of the stack of ring 0 in protected mode.
pub fn stack_top() -> u32 {
    &raw const legacy_stack_end as u64 as u32
}

fn prepare() {
    if READY.swap(true, Ordering::SeqCst) {
        return;
    }
    let (start, end) = (
        &raw const legacy_low_start as u64,
        &raw const legacy_low_end as u64,
    );
    assert!(end - start < u64::from(LOW_CONTEXT - LOW));
    for i in 0..end - start {
        write::<u8>(u64::from(LOW) + i, read(start + i));
    }
    for vector in 0..128u32 {
        reset_idt(vector as u8);
        // Segment 0, offset of the stub.
        write::<u32>(
            u64::from(vector) * 4,
            &raw const low_stubs as u64 as u32 + vector * 8,
        );
    }
    for offset in (0..104 + 64).step_by(4) {
        set_tss_field(offset, 0);
    }
    set_tss_field(4, stack_top());
    set_tss_field(8, sel::DATA);
    set_tss_field(100, 104 << 16);
    set_gdt(sel::TSS, descriptor(TSS, 103, 0x89, 0));
}

impl LegacyContext {
    /// Ring 0 in 32-bit protected mode with flat segments and no paging.
    pub fn protected(eip: u32, esp: u32) -> Self {
        prepare();
        Self {
            eip,
            esp,
            eflags: 2,
            cs: sel::CODE32,
            ss: sel::DATA,
            ds: sel::DATA,
            es: sel::DATA,
            fs: sel::DATA,
            gs: sel::DATA,
            cr0: 0x31,
            cr4: 0x600,
            ..Self::default()
        }
    }

    /// Ring 3 in 32-bit protected mode.
    pub fn user(eip: u32, esp: u32) -> Self {
        let data = sel::USER_DATA;
        Self {
            cs: sel::USER_CODE32,
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ..Self::protected(eip, esp)
        }
    }

    /// Virtual-8086 mode: real-mode segments.
    pub fn v86(cs: u32, ip: u32, ss: u32, sp: u32) -> Self {
        Self {
            cs,
            ss,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
            eflags: 0x20002,
            ..Self::protected(ip, sp)
        }
    }

    /// Real mode.
    pub fn real(cs: u32, ip: u32, ss: u32, sp: u32) -> Self {
        Self {
            cr0: 0x30,
            eflags: 2,
            ..Self::v86(cs, ip, ss, sp)
        }
    }

    /// Runs the state until its next exception or interrupt; gives the vector
    /// and the error code, all-ones if none.
    pub fn enter(&mut self) -> (u32, u32) {
        prepare();
        self.vector = 0;
        self.error = u32::MAX;
        // SAFETY: the switch restores everything that compiled code relies on;
        // the context lies below 4 GiB, as the whole image does.
        unsafe { legacy_enter(self) };
        (self.vector, self.error)
    }
}

/// The pointer operand for LGDT and LIDT of a table in 32-bit code.
pub const fn table(base: u32, limit: u16) -> TablePointer {
    TablePointer {
        limit,
        base: base as u64,
    }
}
