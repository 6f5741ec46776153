//! Boot through Multiboot 1 or PVH into long mode with identity paging of the
//! first 4 GiB, and start of the other processors.
//!
//! Both protocols enter in 32-bit protected mode without paging: Multiboot
//! with EAX = 0x2BADB002 and EBX = its information, PVH with EBX = its
//! `hvm_start_info`. SSE is enabled before the first compiled instruction.

use crate::memory::read;
use crate::{cpu, interrupt, percpu};
use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Where the real-mode start-up code and its parameters live.
pub const TRAMPOLINE: u64 = 0x8000;
/// Size of one processor's ordinary stack.
pub const STACK_SIZE: usize = 64 * 1024;
/// EAX of a Multiboot 1 loader; also how [`protocol`] reports it.
pub const MULTIBOOT_MAGIC: u32 = 0x2BAD_B002;
/// First word of PVH's `hvm_start_info`.
pub const PVH_MAGIC: u32 = 0x336E_C578;

static PROTOCOL: AtomicU32 = AtomicU32::new(0);
static INFO: AtomicU64 = AtomicU64::new(0);

global_asm!(
    r#"
    .set MB_FLAGS, 0x00010003
    .section .multiboot, "awx"
    .balign 4
multiboot_header:
    .long 0x1BADB002, MB_FLAGS, -(0x1BADB002 + MB_FLAGS)
    .long multiboot_header, _load_start, _load_end, _image_end, _start_multiboot

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long _start_pvh

    .section .boot, "awx"
    .code32
    .global _start_multiboot
_start_multiboot:
    mov edi, eax
    jmp 2f
    .global _start_pvh
_start_pvh:
    mov edi, 0x336EC578
2:  cli
    cld
    mov esi, ebx
    mov esp, offset boot_stack_end
    // Identity map: four page directories of 2 MiB pages, the last GiB uncached.
    mov eax, offset boot_pdpt + 7
    mov dword ptr [boot_pml4], eax
    mov eax, offset boot_pd + 7
    mov ebx, offset boot_pdpt
    mov ecx, 4
3:  mov dword ptr [ebx], eax
    add eax, 4096
    add ebx, 8
    dec ecx
    jnz 3b
    mov eax, 0x83
    mov ebx, offset boot_pd
    mov ecx, 2048
4:  mov dword ptr [ebx], eax
    cmp ecx, 512
    ja 5f
    or dword ptr [ebx], 0x10
5:  add eax, 0x200000
    add ebx, 8
    dec ecx
    jnz 4b
    lgdt [boot_gdt_pointer]
    call enable_long_mode
    ljmp 0x08, offset boot_long
    .code64
boot_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset boot_stack_end
    xor ebp, ebp
    call rt_start
    ud2

    // Enables SSE, PAE, NXE, long mode and paging; clobbers EAX, ECX, EDX.
    .code32
enable_long_mode:
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x901
    wrmsr
    mov eax, cr0
    and eax, 0x9FFFFFF3
    or eax, 0x80010022
    mov cr0, eax
    fninit
    ret

    .balign 16
boot_gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF
boot_gdt_end:
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt

    // Start-up code of the other processors, copied to TRAMPOLINE.
    .global trampoline_start
trampoline_start:
    .code16
    cli
    cld
    xor ax, ax
    mov ds, ax
    lock inc dword ptr [low_started]
    data32 lgdt [low_gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xEA                // ljmp 0x18:ap_protected with a 32-bit offset
    .long ap_protected
    .word 0x18
    .balign 4
    .global trampoline_started
trampoline_started:
    .long 0
trampoline_gdtr:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
    .global trampoline_end
trampoline_end:
    .set low_started, 0x8000 + trampoline_started - trampoline_start
    .set low_gdtr, 0x8000 + trampoline_gdtr - trampoline_start
    .code32
ap_protected:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    // Each processor takes the next index and with it a stack.
    mov eax, 1
    lock xadd dword ptr [ap_next], eax
    mov ebx, eax
    inc eax
    imul eax, eax, {stack_size}
    add eax, offset ap_stacks
    mov esp, eax
    call enable_long_mode
    ljmp 0x08, offset ap_long
    .code64
ap_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, esp
    xor ebp, ebp
    mov edi, ebx
    inc edi
    call rt_start_ap
    ud2
    .balign 4
    .global ap_next
ap_next:
    .long 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .global boot_pml4
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd: .skip 4096 * 4
boot_stack: .skip {stack_size}
boot_stack_end:
ap_stacks: .skip {stack_size} * ({cpus} - 1)
    .text
    "#,
    stack_size = const STACK_SIZE,
    cpus = const percpu::MAX_CPUS,
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static trampoline_started: u8;
    static _image_end: u8;
    fn guest_main() -> !;
}

/// First Rust code of the boot processor.
#[unsafe(no_mangle)]
extern "C" fn rt_start(magic: u32, info: u32) -> ! {
    PROTOCOL.store(magic, Ordering::Relaxed);
    INFO.store(u64::from(info), Ordering::Relaxed);
    interrupt::init();
    percpu::init(0);
    // SAFETY: defined once by the `guest!` macro of the program.
    unsafe { guest_main() }
}

/// First Rust code of another processor; `index` counts from 1.
#[unsafe(no_mangle)]
extern "C" fn rt_start_ap(index: u32) -> ! {
    percpu::init(index as usize);
    crate::smp::ap_main(index as usize)
}

/// Copies the start-up code to [`TRAMPOLINE`] and zeroes its counter.
pub(crate) fn install_trampoline() {
    let start = &raw const trampoline_start;
    let end = &raw const trampoline_end;
    for i in 0..(end as u64 - start as u64) {
        crate::memory::write::<u8>(TRAMPOLINE + i, read(start as u64 + i));
    }
    cpu::mfence();
}

/// How many processors have passed the start-up code's first instructions.
pub fn trampoline_count() -> u32 {
    let offset = &raw const trampoline_started as u64 - &raw const trampoline_start as u64;
    read(TRAMPOLINE + offset)
}

/// [`MULTIBOOT_MAGIC`] or [`PVH_MAGIC`], as the machine was entered.
pub fn protocol() -> u32 {
    PROTOCOL.load(Ordering::Relaxed)
}

/// Address of the boot information: Multiboot's, or PVH's `hvm_start_info`.
pub fn info() -> u64 {
    INFO.load(Ordering::Relaxed)
}

/// First address after the guest's image and its zeroed data.
pub fn image_end() -> u64 {
    &raw const _image_end as u64
}

/// One range of the boot loader's memory map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// E820 type; 1 is usable RAM.
    pub kind: u32,
}

/// Calls `each` for every range of the loader's memory map.
pub fn memory_map(mut each: impl FnMut(MemoryRange)) {
    let info = info();
    if protocol() == MULTIBOOT_MAGIC {
        if read::<u32>(info) & 1 << 6 == 0 {
            return;
        }
        let (len, mut at) = (
            u64::from(read::<u32>(info + 44)),
            u64::from(read::<u32>(info + 48)),
        );
        let end = at + len;
        while at < end {
            let size = u64::from(read::<u32>(at));
            each(MemoryRange {
                start: read(at + 4),
                len: read(at + 12),
                kind: read(at + 20),
            });
            at += size + 4;
        }
    } else if read::<u32>(info + 4) >= 1 {
        let (at, count) = (read::<u64>(info + 40), u64::from(read::<u32>(info + 48)));
        for i in 0..count {
            let entry = at + i * 24;
            each(MemoryRange {
                start: read(entry),
                len: read(entry + 8),
                kind: read(entry + 16),
            });
        }
    }
}
