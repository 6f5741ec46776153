//! Mode switches: real, 16-bit and 32-bit protected, virtual-8086,
//! compatibility and long mode, back and forth, with 32-bit and PAE paging.
//!
//! QEMU TCG 7.2 fails this: it checks no segment limits in real and
//! virtual-8086 mode, lets reserved PDPTE bits pass, and is spared
//! clearing CR0.PG in 64-bit mode.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, GP0, UD};
use caisson_guest_rt::cpu::{cr, flags, has};
use caisson_guest_rt::legacy::{self, LegacyContext, sel};
use caisson_guest_rt::memory::{fill, read, write, write_bytes};
use caisson_guest_rt::paging::{self, Arena, CODE, DATA, frame};
use caisson_guest_rt::percpu::descriptor;
use caisson_guest_rt::{Context, Group, Suite, code16, code32, code64, guest};

guest!("modes", main);

/// Low memory for 16-bit code, data and stack.
const LOW_CODE: u32 = 0x1_0000;
const LOW_DATA: u32 = 0x2_0000;
const LOW_STACK: u32 = 0x3_0000;
const NONE: u32 = u32::MAX;

fn expect(g: &mut Group, what: &str, c: &mut LegacyContext, vector: u32, error: u32, eip: u32) {
    let got = c.enter();
    let at = c.eip;
    g.check(
        got == (vector, error) && at == eip,
        format_args!("{what}: got vector {:#x} error {:#x} at {at:#x}, want {vector:#x} {error:#x} at {eip:#x}", got.0, got.1),
    );
}

fn real(code: &[u8]) -> LegacyContext {
    write_bytes(LOW_CODE.into(), code);
    LegacyContext {
        ds: LOW_DATA >> 4,
        es: LOW_DATA >> 4,
        ..LegacyContext::real(LOW_CODE >> 4, 0, LOW_STACK >> 4, 0x1000)
    }
}

fn v86(code: &[u8]) -> LegacyContext {
    write_bytes(LOW_CODE.into(), code);
    LegacyContext {
        ds: LOW_DATA >> 4,
        es: LOW_DATA >> 4,
        ..LegacyContext::v86(LOW_CODE >> 4, 0, LOW_STACK >> 4, 0x1000)
    }
}

fn protected(code: &[u8]) -> LegacyContext {
    write_bytes(LOW_CODE.into(), code);
    LegacyContext::protected(LOW_CODE, LOW_STACK + 0x1000)
}

fn main(suite: &mut Suite) {
    suite.group("real mode", |g| {
        expect(g, "int3", &mut real(code16!("nop", "int3")), 3, NONE, 2);
        let mut c = LegacyContext {
            eax: 0x1234_5678,
            ebx: 1,
            ..real(code16!(
                "add ax, bx",
                "add eax, 0x10000",
                "mov [0x10], eax",
                "int3"
            ))
        };
        c.enter();
        g.eq("32-bit operands", c.eax, 0x1235_5679);
        g.eq(
            "store through DS",
            read::<u32>(u64::from(LOW_DATA) + 0x10),
            0x1235_5679,
        );
        let mut c = LegacyContext {
            esp: 0,
            eax: 0xABCD,
            ..real(code16!("push ax", "int3"))
        };
        c.enter();
        g.eq("SP wraps to the top of the segment", c.esp, 0xFFFE);
        g.eq(
            "pushed there",
            read::<u16>(u64::from(LOW_STACK) + 0xFFFE),
            0xABCD,
        );
        expect(
            g,
            "word at 0xFFFF passes the limit",
            &mut LegacyContext {
                ebx: 0xFFFF,
                ..real(code16!("mov ax, [bx]"))
            },
            13,
            NONE,
            0,
        );
        expect(
            g,
            "offset above 64 KiB",
            &mut LegacyContext {
                ebx: 0x1_0000,
                ..real(code16!("mov al, [ebx]"))
            },
            13,
            NONE,
            0,
        );
        expect(
            g,
            "stack access above 64 KiB",
            &mut LegacyContext {
                ebp: 0x1_0000,
                ..real(code16!("mov al, [ebp]"))
            },
            12,
            NONE,
            0,
        );
        expect(
            g,
            "divide error is a fault",
            &mut real(code16!("xor cx, cx", "div cx")),
            0,
            NONE,
            2,
        );
        expect(
            g,
            "into",
            &mut real(code16!("mov al, 0x7F", "inc al", "into")),
            4,
            NONE,
            5,
        );
        expect(
            g,
            "bound",
            &mut LegacyContext {
                eax: 5,
                ..real(code16!(
                    "mov word ptr [0], 6",
                    "mov word ptr [2], 9",
                    ".byte 0x62, 0x06, 0, 0"
                ))
            },
            5,
            NONE,
            12,
        );
        expect(
            g,
            "lldt is invalid",
            &mut real(code16!("lldt ax")),
            6,
            NONE,
            0,
        );
        expect(
            g,
            "arpl is invalid",
            &mut real(code16!("arpl ax, cx")),
            6,
            NONE,
            0,
        );
        expect(
            g,
            "sgdt is valid",
            &mut real(code16!("sgdt [0]", "int3")),
            3,
            NONE,
            6,
        );
        expect(
            g,
            "lock on a register",
            &mut real(code16!(".byte 0xF0, 0x40")),
            6,
            NONE,
            0,
        );
        expect(
            g,
            "cli, sti, hlt are allowed",
            &mut real(code16!("sti", "cli", "int3")),
            3,
            NONE,
            3,
        );
        let mut c = LegacyContext {
            ecx: 4,
            edi: 0xFFFE,
            ..real(code16!("cld", "mov al, 0x5A", "rep stosb", "int3"))
        };
        c.enter();
        g.eq("REP STOSB wraps DI", c.edi, 2);
        g.eq(
            "below the wrap",
            read::<u16>(u64::from(LOW_DATA) + 0xFFFE),
            0x5A5A,
        );
        g.eq("above the wrap", read::<u16>(LOW_DATA.into()), 0x5A5A);
        let mut c = LegacyContext {
            ds: 0xFFFF,
            ebx: 0xF,
            ..real(code16!("mov al, [bx]", "int3"))
        };
        expect(
            g,
            "FFFF:000F is the last byte of the first MiB",
            &mut c,
            3,
            NONE,
            3,
        );
        let first = read::<u8>(0x10_0010);
        let mut c = LegacyContext {
            ds: 0xFFFF,
            ebx: 0x20,
            ..real(code16!("mov al, [bx]", "int3"))
        };
        expect(g, "FFFF:0020 is above it", &mut c, 3, NONE, 3);
        g.eq("no wrap at 1 MiB", c.eax as u8, first);
        let mut c = LegacyContext {
            eax: 0x1111,
            ..real(code16!("call 2f", "int3", "2: shl eax, 4", "ret"))
        };
        c.enter();
        g.eq("near call and return", c.eax, 0x1_1110);
        write_bytes(
            u64::from(LOW_CODE) + 0x100,
            code16!("mov bx, cs", ".byte 0xCB"),
        );
        let mut c = real(code16!(".byte 0x9A", ".word 0", ".word 0x1010", "int3"));
        c.enter();
        g.eq("far call", c.ebx, 0x1010);
        g.eq("far return", c.cs, LOW_CODE >> 4);
        let mut c = real(code16!("mov eax, cr0", "smsw bx", "int3"));
        c.enter();
        g.eq("CR0.PE is clear", c.eax & 1, 0);
        g.eq("SMSW agrees", c.ebx & 0xFFFF, c.eax & 0xFFFF);
    });
    suite.group("unreal mode", |g| {
        // A data segment of 4 GiB loaded in protected mode keeps its limit.
        let code = code16!(
            "mov eax, cr0",
            "or al, 1",
            "mov cr0, eax",
            "mov bx, 0x10",
            "mov ds, bx",
            "and al, 0xFE",
            "mov cr0, eax",
            "xor bx, bx",
            "mov ds, bx",
            "mov ebx, 0x200000",
            "mov dword ptr [ebx], 0x600DCAFE",
            "int3"
        );
        let mut c = real(code);
        let saved: u32 = read(0x20_0000);
        let got = c.enter();
        g.eq("left by INT3", got.0, 3);
        g.eq(
            "32-bit address reached",
            read::<u32>(0x20_0000),
            0x600D_CAFE,
        );
        write(0x20_0000, saved);
    });
    suite.group("32-bit protected mode", |g| {
        expect(
            g,
            "int3",
            &mut protected(code32!("inc eax", "int3")),
            3,
            NONE,
            LOW_CODE + 2,
        );
        expect(g, "ud2", &mut protected(code32!("ud2")), 6, NONE, LOW_CODE);
        expect(
            g,
            "into",
            &mut protected(code32!("mov al, 0x7F", "inc al", "into")),
            4,
            NONE,
            LOW_CODE + 5,
        );
        let mut c = protected(code32!(
            "mov eax, 0x1234",
            "aam",
            "mov ebx, eax",
            "mov al, 0x9A",
            "daa",
            "int3"
        ));
        c.enter();
        g.eq("AAM", c.ebx, 0x0502);
        let mut c = LegacyContext {
            eax: 1,
            ecx: 2,
            edx: 3,
            ebx: 4,
            ebp: 6,
            esi: 7,
            edi: 8,
            ..protected(code32!("pushad", "int3"))
        };
        c.enter();
        let esp = u64::from(c.esp);
        let order = [8u32, 7, 6, LOW_STACK + 0x1000, 4, 3, 2, 1];
        for (i, want) in order.iter().enumerate() {
            g.eq("PUSHAD order", read::<u32>(esp + i as u64 * 4), *want);
        }
        expect(
            g,
            "ring 3 hlt",
            &mut LegacyContext {
                ..user(code32!("hlt"))
            },
            13,
            0,
            LOW_CODE,
        );
        let mut c = user(code32!("int3"));
        expect(g, "ring 3 int3", &mut c, 3, NONE, LOW_CODE + 1);
        g.eq("cs of ring 3", c.cs, sel::USER_CODE32);
        g.eq(
            "frame of five words on ESP0",
            c.entry_esp,
            legacy::stack_top() - 20,
        );
        expect(
            g,
            "syscall of 64-bit mode only",
            &mut protected(code32!(".byte 0x0F, 0x01, 0xF8")),
            6,
            NONE,
            LOW_CODE,
        );
    });
    suite.group("16-bit protected mode", |g| {
        legacy::set_gdt(sel::FREE, descriptor(LOW_CODE, 0xFFFF, 0x9B, 0));
        legacy::set_gdt(sel::FREE + 8, descriptor(LOW_DATA, 0x0FFF, 0x93, 0));
        legacy::set_gdt(sel::FREE + 16, descriptor(LOW_STACK, 0xFFFF, 0x93, 0));
        let mut c = protected(code16!(
            "mov ax, 0x1234",
            "mov [0x20], ax",
            "push ax",
            "int3"
        ));
        c.cs = sel::FREE;
        c.eip = 0;
        c.ds = sel::FREE + 8;
        c.ss = sel::FREE + 16;
        c.esp = 0xFFFF_1000;
        expect(g, "int3", &mut c, 3, NONE, 8);
        g.eq(
            "stored through a based segment",
            read::<u16>(u64::from(LOW_DATA) + 0x20),
            0x1234,
        );
        g.eq("only SP changes", c.esp & 0xFFFF, 0x1000 - 2);
        c = LegacyContext {
            eip: 0,
            ebx: 0xFFF,
            ..c
        };
        write_bytes(LOW_CODE.into(), code16!("mov ax, [bx]"));
        c.esp = 0x1000;
        expect(g, "beyond the limit", &mut c, 13, 0, 0);
    });
    suite.group("32-bit paging", |g| {
        let (dir, table, page) = (frame(), frame(), frame());
        write::<u32>(dir, 0x83);
        write::<u32>(dir + 4 * 0x100, table as u32 | 3);
        for i in 1..16 {
            write::<u32>(dir + 4 * i, (i as u32) << 22 | 0x83);
        }
        write::<u32>(table, page as u32 | 3);
        write::<u32>(page, 0xFACE);
        let with = |code: &[u8]| LegacyContext {
            cr0: 0x8001_0033,
            cr3: dir as u32,
            cr4: 0x610,
            ebx: 0x4000_0000,
            ..protected(code)
        };
        let mut c = with(code32!("mov eax, [ebx]", "int3"));
        expect(g, "read", &mut c, 3, NONE, LOW_CODE + 3);
        g.eq("through the table", c.eax, 0xFACE);
        g.eq(
            "accessed bits",
            (read::<u32>(dir + 0x400) | read::<u32>(table)) & 0x60,
            0x20,
        );
        let mut c = with(code32!("mov [ebx], eax", "int3"));
        expect(g, "write", &mut c, 3, NONE, LOW_CODE + 3);
        g.eq(
            "dirty bit in the leaf only",
            (read::<u32>(table) & 0x40, read::<u32>(dir + 0x400) & 0x40).0,
            0x40,
        );
        let mut c = LegacyContext {
            ebx: 0x4000_1004,
            ..with(code32!("mov [ebx], eax"))
        };
        expect(g, "not present", &mut c, 14, 2, LOW_CODE);
        g.eq("cr2", c.cr2, 0x4000_1004);
        write::<u32>(table, page as u32 | 1);
        expect(
            g,
            "write protected with WP",
            &mut with(code32!("mov [ebx], eax")),
            14,
            3,
            LOW_CODE,
        );
        let mut c = LegacyContext {
            cr0: 0x8000_0033,
            ..with(code32!("mov [ebx], eax", "int3"))
        };
        expect(g, "allowed without WP", &mut c, 3, NONE, LOW_CODE + 3);
        // Without PSE the PS bit is ignored and the entry names a table.
        write::<u32>(table, page as u32 | 3);
        write::<u32>(dir + 4 * 0x101, table as u32 | 0x83);
        write::<u32>(page, 0xBEEF);
        g.eq("4 MiB pages are offered", u32::from(has::pse()), 1);
        let mut c = LegacyContext {
            ebx: 0x4040_0000,
            ..with(code32!(
                "mov eax, cr4",
                "and al, 0xEF",
                "mov cr4, eax",
                "mov eax, [ebx]",
                "int3"
            ))
        };
        // Code and stack must then be mapped through tables too.
        let low = frame();
        for i in 0..1024 {
            write::<u32>(low + 4 * i, (i as u32) << 12 | 3);
        }
        write::<u32>(dir, low as u32 | 3);
        write::<u32>(dir + 4 * 4, 0);
        expect(g, "PS without PSE", &mut c, 3, NONE, LOW_CODE + 11);
        g.eq("read through the table", c.eax, 0xBEEF);
    });
    suite.group("PAE paging", |g| {
        let (pdpt, dirs, table, page) = (frame(), paging::frames(4, 4096), frame(), frame());
        for i in 0..4u64 {
            write(pdpt + i * 8, dirs + i * 4096 + 1);
        }
        for i in 0..32u64 {
            write(dirs + i * 8, i << 21 | 0x83);
        }
        write(dirs + 4096, table | 3);
        write(table, page | 3 | paging::NX);
        write(table + 8, page | 3);
        fill(page, 4096, 0xCC);
        let with = |code: &[u8]| LegacyContext {
            cr0: 0x8001_0033,
            cr3: pdpt as u32,
            cr4: 0x620,
            efer: 0x800,
            ebx: 0x4000_0000,
            ..protected(code)
        };
        let mut c = with(code32!("mov eax, [ebx]", "int3"));
        expect(g, "read", &mut c, 3, NONE, LOW_CODE + 3);
        g.eq("value", c.eax, 0xCCCC_CCCC);
        let mut c = with(code32!("jmp ebx"));
        expect(g, "NX", &mut c, 14, 0x11, 0x4000_0000);
        let mut c = LegacyContext {
            ebx: 0x4000_1000,
            ..with(code32!("jmp ebx"))
        };
        expect(g, "executable alias", &mut c, 3, NONE, 0x4000_1001);
        // Without NXE the bit is reserved.
        let mut c = LegacyContext {
            efer: 0,
            ..with(code32!("mov eax, [ebx]"))
        };
        expect(g, "NX bit without NXE", &mut c, 14, 9, LOW_CODE);
        // PDPTEs are loaded with CR3: a later change has no effect.
        let mut c = with(code32!(
            "mov dword ptr [edi], 0",
            "mov eax, [ebx]",
            "mov ecx, cr3",
            "mov cr3, ecx",
            "mov eax, [ebx]"
        ));
        c.edi = pdpt as u32 + 8;
        c.cr4 &= !0x80;
        let got = c.enter();
        g.eq("cleared PDPTE faults after MOV CR3 only", got.0, 14);
        g.eq("at the second read", c.eip, LOW_CODE + 14);
        write(pdpt + 8, (dirs + 4096) | 1);
        // A reserved bit in a PDPTE makes MOV CR3 fault.
        let mut c = with(code32!(
            "mov dword ptr [edi], 7",
            "mov ecx, cr3",
            "mov cr3, ecx"
        ));
        c.edi = pdpt as u32 + 16;
        expect(g, "reserved bits in a PDPTE", &mut c, 13, 0, LOW_CODE + 9);
        write(pdpt + 16, (dirs + 8192) | 1);
    });
    suite.group("virtual-8086 mode", |g| {
        expect(
            g,
            "int3 needs IOPL 3",
            &mut v86(code16!("int3")),
            3,
            NONE,
            1,
        );
        let mut c = v86(code16!(
            "mov ax, cs",
            "mov bx, ss",
            "mov [0x30], ax",
            ".byte 0xF1"
        ));
        c.enter();
        g.eq("cs", c.eax, LOW_CODE >> 4);
        g.eq("ss", c.ebx, LOW_STACK >> 4);
        g.eq("saved ds", c.ds, LOW_DATA >> 4);
        g.eq(
            "stored",
            read::<u16>(u64::from(LOW_DATA) + 0x30),
            (LOW_CODE >> 4) as u16,
        );
        g.eq("frame of nine words", c.entry_esp, legacy::stack_top() - 36);
        expect(g, "cli with IOPL 0", &mut v86(code16!("cli")), 13, 0, 0);
        expect(g, "pushf with IOPL 0", &mut v86(code16!("pushf")), 13, 0, 0);
        expect(
            g,
            "int n with IOPL 0",
            &mut v86(code16!("int 0x40")),
            13,
            0,
            0,
        );
        expect(g, "hlt", &mut v86(code16!("hlt")), 13, 0, 0);
        expect(
            g,
            "in without a bitmap",
            &mut v86(code16!("in al, 0x80")),
            13,
            0,
            0,
        );
        expect(g, "mov cr0", &mut v86(code16!("mov eax, cr0")), 13, 0, 0);
        expect(g, "lldt", &mut v86(code16!("lldt ax")), 6, NONE, 0);
        let iopl3 = |c: LegacyContext| LegacyContext {
            eflags: 0x2_3002,
            ..c
        };
        expect(
            g,
            "cli with IOPL 3",
            &mut iopl3(v86(code16!("cli", "int3"))),
            3,
            NONE,
            2,
        );
        expect(
            g,
            "int n with IOPL 3",
            &mut iopl3(v86(code16!("int 0x40"))),
            0x40,
            NONE,
            2,
        );
        let mut c = iopl3(v86(code16!("pushf", "pop ax", "int3")));
        c.enter();
        g.eq("pushf with IOPL 3", c.eax & 0x3002, 0x3002);
        expect(
            g,
            "limit",
            &mut LegacyContext {
                ebx: 0x1_0000,
                ..v86(code16!("mov al, [ebx]"))
            },
            13,
            0,
            0,
        );
        if has::vme() {
            // VME: INT n through the redirection bitmap, and virtual IF.
            let vme = |c: LegacyContext| LegacyContext {
                cr4: c.cr4 | 1,
                ..c
            };
            write::<u32>(0x40 * 4, (LOW_CODE >> 4) << 16 | 0x80);
            write_bytes(
                u64::from(LOW_CODE) + 0x80,
                code16!("mov ax, 0x7A7A", "iret"),
            );
            legacy::set_tss_field(100, (104 + 32) << 16);
            legacy::set_gdt(sel::TSS, descriptor(legacy::TSS, 103 + 32 + 8, 0x89, 0));
            let mut c = vme(v86(code16!("int 0x40", "int3")));
            let got = c.enter();
            g.eq(
                "VME: INT n goes to the program's handler",
                (got.0, c.eax & 0xFFFF).1,
                0x7A7A,
            );
            let mut c = vme(v86(code16!("sti", "pushf", "pop ax", "cli", "int3")));
            c.enter();
            g.eq(
                "VME: STI sets VIF, PUSHF shows it as IF with IOPL 3",
                c.eax & 0x3200,
                0x3200,
            );
            g.eq("VME: CLI clears VIF", c.eflags & 1 << 19, 0);
            legacy::set_tss_field(100, 104 << 16);
            legacy::set_gdt(sel::TSS, descriptor(legacy::TSS, 103, 0x89, 0));
        }
    });
    let a = Arena::new();
    suite.group("compatibility mode", |g| {
        let mut c = Context {
            rax: 0xFFFF_FFFF_0000_0001,
            ..a.compat(true, code32!("inc eax", "int3"))
        };
        g.run("0x40 is INC", &mut c, BP, CODE + 2);
        g.eq("upper half", c.rax & 0xFFFF_FFFF, 2);
        let mut c = Context {
            rdi: DATA | 1 << 32,
            ..a.compat(true, code32!("mov dword ptr [edi], 0x55", "int3"))
        };
        g.run("addresses are 32 bits", &mut c, BP, CODE + 7);
        g.eq("stored", read::<u32>(a.data), 0x55);
        write::<u32>(a.data, 0x66);
        let mut c = a.compat(true, code32!("mov eax, [edi - 0x60000000]", "int3"));
        c.rdi = DATA + 0x6000_0000;
        g.run("plain address", &mut c, BP, CODE + 7);
        let mut c = a.compat(true, code32!("mov eax, [edi + 0x60000000]", "int3"));
        c.rdi = DATA + 0xA000_0000;
        g.run("address sums wrap at 4 GiB", &mut c, BP, CODE + 7);
        g.eq("wrapped", c.rax as u32, 0x66);
        let (ss, sp) = (c.ss, c.rsp);
        let mut c = a.compat(true, code32!("push ebx", "int3"));
        g.run("push", &mut c, BP, CODE + 2);
        g.eq("four bytes", sp - c.rsp, 4);
        g.eq("ss", c.ss, ss);
        g.run(
            "into is valid but OF is clear",
            &mut a.compat(true, code32!("xor eax, eax", "into", "int3")),
            BP,
            CODE + 4,
        );
        let mut c = a.compat(
            true,
            code32!("mov eax, 5", "xor ecx, ecx", "dec ecx", "int3"),
        );
        g.run("flow", &mut c, BP, CODE + 9);
        // 64-bit code and back through far jumps with an m16:32 operand.
        write::<u32>(a.data, CODE as u32 + 0x100);
        write::<u16>(a.data + 4, caisson_guest_rt::percpu::sel::USER_CODE64);
        a.load_at(0x100, code64!("movabs rax, 0x1122334455667788", "int3"));
        let mut c = a.compat(true, code32!("ljmp [edi]"));
        g.run("far jump to 64-bit code", &mut c, BP, CODE + 0x10B);
        g.eq("64-bit operand", c.rax, 0x1122_3344_5566_7788);
        g.eq(
            "cs",
            c.cs,
            caisson_guest_rt::percpu::sel::USER_CODE64.into(),
        );
        write::<u16>(a.data + 4, caisson_guest_rt::percpu::sel::USER_CODE32);
        a.load_at(0x100, code32!("inc eax", "int3"));
        let mut c = Context {
            rax: 7,
            ..a.user(code64!(".byte 0xFF, 0x2F"))
        };
        g.run("far jump to compatibility mode", &mut c, BP, CODE + 0x102);
        g.eq("32-bit INC", c.rax, 8);
        let slot = caisson_guest_rt::percpu::sel::FREE;
        caisson_guest_rt::percpu::this().set_gdt(slot, descriptor(CODE as u32, 0xFFFF, 0xFB, 0));
        let mut c = a.compat(
            true,
            code16!("mov ax, 0x1234", "mov ebx, 0x12345678", "int3"),
        );
        c.cs = u64::from(slot | 3);
        c.rip = 0;
        g.run("16-bit code in a based segment", &mut c, BP, 10);
        g.eq("16-bit operand by default", c.rax as u32, 0x1234);
        g.eq("32-bit operand with a prefix", c.rbx as u32, 0x1234_5678);
    });
    suite.group("leaving and entering long mode", |g| {
        if has::qemu_tcg() {
            g.skip("QEMU TCG checks too little here and would lose the guest");
            return;
        }
        let mut rounds = 0;
        for _ in 0..200 {
            if protected(code32!("int3")).enter() == (3, NONE)
                && real(code16!("int3")).enter() == (3, NONE)
            {
                rounds += 1;
            }
        }
        g.eq("two hundred round trips", rounds, 200);
        g.run(
            "CR4.PAE in long mode",
            &mut Context {
                rax: 0x600,
                ..a.kernel(code64!("mov cr4, rax"))
            },
            GP0,
            CODE,
        );
        g.run(
            "CR0.PG in 64-bit mode",
            &mut Context {
                rax: 0x8005_0033 & !cr::PG,
                ..a.kernel(code64!("mov cr0, rax"))
            },
            GP0,
            CODE,
        );
        let code = code64!(
            "mov ecx, 0xC0000080",
            "rdmsr",
            "and eax, 0xFFFFFEFF",
            "wrmsr"
        );
        g.run("EFER.LME with paging", &mut a.kernel(code), GP0, CODE + 12);
        // From 32-bit protected mode: PG with LME but without PAE.
        write_bytes(
            LOW_CODE.into(),
            code32!("mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax"),
        );
        let mut c = LegacyContext {
            efer: 0x100,
            cr3: paging::boot_root() as u32,
            ..LegacyContext::protected(LOW_CODE, LOW_STACK + 0x1000)
        };
        expect(g, "PG with LME needs PAE", &mut c, 13, 0, LOW_CODE + 8);
        g.run(
            "still in 64-bit mode",
            &mut a.kernel(code64!(".byte 0x06")),
            UD,
            CODE,
        );
        g.eq("flags", caisson_guest_rt::cpu::rflags() & flags::IF, 0);
    });
}

fn user(code: &[u8]) -> LegacyContext {
    write_bytes(LOW_CODE.into(), code);
    LegacyContext::user(LOW_CODE, LOW_STACK + 0x1000)
}
