//! Segmentation: limit, type and null checks, far transfers through code
//! segments, call gates and IRET, conforming code, the LDT, the 32-bit task
//! switch, and what long mode changes in each.
//!
//! QEMU TCG 7.2 fails this: it checks no limits on data accesses, knows no
//! debug trap of tasks and loads a null or non-canonical TR and LDTR.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0};
use caisson_guest_rt::cpu::{self, has};
use caisson_guest_rt::legacy::{self, LegacyContext, Tss32, gate, sel};
use caisson_guest_rt::memory::{read, write, write_bytes};
use caisson_guest_rt::paging::{Arena, CODE, DATA, STACK, STACK_TOP};
use caisson_guest_rt::percpu::{self, call_gate64, descriptor, sel as sel64, system_descriptor};
use caisson_guest_rt::{Context, Group, Suite, code32, code64, guest};

guest!("segments", main);

const CODE_AT: u32 = 0x1_0000;
const DATA_AT: u32 = 0x2_0000;
const STACK_AT: u32 = 0x3_1000;
const NONE: u32 = u32::MAX;
const FREE: u32 = sel::FREE;
/// 32-bit TSSes of the task-switch tests.
const TSS_A: u32 = 0xC000;
const TSS_B: u32 = 0xD000;

fn expect(g: &mut Group, what: &str, c: &mut LegacyContext, vector: u32, error: u32, eip: u32) {
    let got = c.enter();
    let at = c.eip;
    g.check(
        got == (vector, error) && at == eip,
        format_args!("{what}: got vector {:#x} error {:#x} at {at:#x}, want {vector:#x} {error:#x} at {eip:#x}", got.0, got.1),
    );
}

fn ring0(code: &[u8]) -> LegacyContext {
    write_bytes(CODE_AT.into(), code);
    LegacyContext::protected(CODE_AT, STACK_AT)
}

fn ring3(code: &[u8]) -> LegacyContext {
    write_bytes(CODE_AT.into(), code);
    LegacyContext::user(CODE_AT, STACK_AT)
}

fn main(suite: &mut Suite) {
    limits(suite);
    loads(suite);
    transfers(suite);
    tasks(suite);
    let a = Arena::new();
    long_mode(suite, &a);
}

fn limits(suite: &mut Suite) {
    suite.group("segment limits and types", |g| {
        // A data segment of 0x100 bytes, and an expand-down one above 0x100.
        legacy::set_gdt(FREE, descriptor(DATA_AT, 0xFF, 0x93, 4));
        legacy::set_gdt(FREE + 8, descriptor(DATA_AT, 0xFF, 0x97, 4));
        legacy::set_gdt(FREE + 16, descriptor(DATA_AT, 0xFF, 0x91, 4));
        legacy::set_gdt(FREE + 24, descriptor(CODE_AT, 0xFFFF, 0x99, 4));
        legacy::set_gdt(FREE + 32, descriptor(CODE_AT, 0xFFFF, 0x9B, 4));
        let load = code32!("mov eax, [ebx]", "int3");
        let byte = code32!("mov al, [ebx]", "int3");
        let store = code32!("mov [ebx], eax", "int3");
        let through = |code: &[u8], ds: u32, ebx: u32| LegacyContext {
            ds,
            ebx,
            ..ring0(code)
        };
        expect(
            g,
            "last dword",
            &mut through(load, FREE, 0xFC),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "one byte too far",
            &mut through(load, FREE, 0xFD),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "last byte",
            &mut through(byte, FREE, 0xFF),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "byte after the limit",
            &mut through(byte, FREE, 0x100),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "offset wrap",
            &mut through(load, FREE, 0xFFFF_FFFE),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "expand down: below",
            &mut through(byte, FREE + 8, 0xFF),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "expand down: above",
            &mut through(byte, FREE + 8, 0x100),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "expand down: just inside from below",
            &mut through(load, FREE + 8, 0xFE),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "write to read-only data",
            &mut through(store, FREE + 16, 0),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "read of read-only data",
            &mut through(load, FREE + 16, 0),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "read of readable code",
            &mut through(load, FREE + 32, 0),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "write to code",
            &mut through(store, FREE + 32, 0),
            13,
            0,
            CODE_AT,
        );
        expect(g, "null DS", &mut through(load, 0, 0), 13, 0, CODE_AT);
        let mut c = LegacyContext {
            ss: FREE,
            esp: 0x100,
            ..ring0(code32!("mov eax, [ebp]"))
        };
        c.ebp = 0x100;
        expect(g, "stack segment limit", &mut c, 12, 0, CODE_AT);
        let mut c = LegacyContext {
            cs: FREE + 24,
            eip: 0,
            ..ring0(code32!("mov eax, cs:[0]"))
        };
        expect(g, "read of execute-only code", &mut c, 13, 0, 0);
        legacy::set_gdt(FREE + 40, descriptor(CODE_AT, 3, 0x9B, 4));
        let mut c = LegacyContext {
            cs: FREE + 40,
            eip: 0,
            ..ring0(code32!("nop", "nop", "nop", "nop", "nop"))
        };
        expect(g, "execution beyond the limit", &mut c, 13, 0, 4);
        let mut c = LegacyContext {
            cs: FREE + 40,
            eip: 0,
            ..ring0(code32!("jmp 2f", "nop", "nop", "nop", "2: nop"))
        };
        expect(g, "jump beyond the limit", &mut c, 13, 0, 0);
        let mut c = LegacyContext {
            cs: FREE + 40,
            eip: 0,
            ..ring0(code32!("nop", "mov eax, 0x12345678"))
        };
        expect(g, "instruction across the limit", &mut c, 13, 0, 1);
        // A granular limit ends on a page.
        legacy::set_gdt(FREE, descriptor(DATA_AT, 0, 0x93, 0xC));
        expect(
            g,
            "page granularity, last byte",
            &mut through(byte, FREE, 0xFFF),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "page granularity, beyond",
            &mut through(byte, FREE, 0x1000),
            13,
            0,
            CODE_AT,
        );
    });
}

fn loads(suite: &mut Suite) {
    suite.group("segment loads", |g| {
        let ds = code32!("mov ds, eax", "int3");
        let ss = code32!("mov ss, eax", "int3");
        let with = |c: LegacyContext, eax: u32| LegacyContext { eax, ..c };
        let set = |access: u8| legacy::set_gdt(FREE, descriptor(0, 0xF_FFFF, access, 0xC));
        set(0x92);
        expect(g, "data", &mut with(ring0(ds), FREE), 3, NONE, CODE_AT + 3);
        g.eq("accessed bit", legacy::gdt(FREE) >> 40 & 1, 1);
        set(0x12);
        expect(
            g,
            "not present",
            &mut with(ring0(ds), FREE),
            11,
            FREE,
            CODE_AT,
        );
        g.eq(
            "no accessed bit after a fault",
            legacy::gdt(FREE) >> 40 & 1,
            0,
        );
        expect(
            g,
            "SS not present",
            &mut with(ring0(ss), FREE),
            12,
            FREE,
            CODE_AT,
        );
        set(0x98);
        expect(
            g,
            "execute-only code into DS",
            &mut with(ring0(ds), FREE),
            13,
            FREE,
            CODE_AT,
        );
        set(0x9A);
        expect(
            g,
            "readable code into DS",
            &mut with(ring0(ds), FREE),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(
            g,
            "code into SS",
            &mut with(ring0(ss), FREE),
            13,
            FREE,
            CODE_AT,
        );
        set(0x90);
        expect(
            g,
            "read-only data into SS",
            &mut with(ring0(ss), FREE),
            13,
            FREE,
            CODE_AT,
        );
        set(0x82);
        expect(
            g,
            "LDT descriptor into DS",
            &mut with(ring0(ds), FREE),
            13,
            FREE,
            CODE_AT,
        );
        set(0x92);
        expect(
            g,
            "ring-0 data from ring 3",
            &mut with(ring3(ds), FREE | 3),
            13,
            FREE,
            CODE_AT,
        );
        set(0x9E);
        expect(
            g,
            "conforming readable ring-0 code from ring 3",
            &mut with(ring3(ds), FREE | 3),
            3,
            NONE,
            CODE_AT + 3,
        );
        expect(g, "SS null", &mut with(ring0(ss), 0), 13, 0, CODE_AT);
        expect(
            g,
            "SS with RPL 3 in ring 0",
            &mut with(ring0(ss), sel::DATA | 3),
            13,
            sel::DATA,
            CODE_AT,
        );
        // LDT.
        write::<u64>(DATA_AT.into(), 0);
        write::<u64>(u64::from(DATA_AT) + 8, descriptor(0x1000, 0xFFF, 0x92, 4));
        legacy::set_gdt(sel::LDT, descriptor(DATA_AT, 15, 0x82, 0));
        let mut c = LegacyContext {
            ldt: sel::LDT,
            ..with(ring0(ds), 0xC)
        };
        expect(g, "data in the LDT", &mut c, 3, NONE, CODE_AT + 3);
        g.eq("selector", c.ds, 0xC);
        let mut c = LegacyContext {
            ldt: sel::LDT,
            ..with(ring0(ds), 0x14)
        };
        expect(g, "beyond the LDT's limit", &mut c, 13, 0x14, CODE_AT);
        expect(g, "no LDT", &mut with(ring0(ds), 0xC), 13, 0xC, CODE_AT);
        expect(
            g,
            "LLDT of a data segment",
            &mut with(ring0(code32!("lldt ax")), sel::DATA),
            13,
            sel::DATA,
            CODE_AT,
        );
        legacy::set_gdt(FREE, descriptor(DATA_AT, 15, 0x02, 0));
        expect(
            g,
            "LLDT of an absent LDT",
            &mut with(ring0(code32!("lldt ax")), FREE),
            11,
            FREE,
            CODE_AT,
        );
        expect(
            g,
            "LTR of a busy TSS",
            &mut with(ring0(code32!("ltr ax")), sel::TSS),
            13,
            sel::TSS,
            CODE_AT,
        );
        // LAR, LSL, VERR, VERW, ARPL.
        legacy::set_gdt(FREE, descriptor(0, 0xF_FFFF, 0xF3, 0xC));
        let mut c = with(
            ring3(code32!(
                "mov eax, 0x53",
                "lar ebx, eax",
                "lsl ecx, eax",
                "verw ax",
                "int3"
            )),
            0,
        );
        c.enter();
        g.eq("LAR", c.ebx & 0x00F0_FF00, 0x00C0_F300);
        g.eq("LSL", c.ecx, u32::MAX);
        g.eq("VERW sets ZF", c.eflags & 0x40, 0x40);
        let mut c = with(ring3(code32!("lar ebx, eax", "int3")), sel::DATA);
        c.ebx = 7;
        c.enter();
        g.eq(
            "LAR of an invisible segment clears ZF",
            (c.eflags & 0x40) | c.ebx,
            7,
        );
        let mut c = with(ring3(code32!("mov ecx, 3", "arpl ax, cx", "int3")), 0x50);
        c.enter();
        g.eq("ARPL", c.eax, 0x53);
        // LDS and LES load both halves or nothing.
        write::<u32>(DATA_AT.into(), 0x1234);
        write::<u16>(u64::from(DATA_AT) + 4, 0xFFF8);
        let mut c = LegacyContext {
            ebx: DATA_AT,
            eax: 1,
            ..ring0(code32!(".byte 0xC4, 0x03"))
        };
        expect(g, "LES with a bad selector", &mut c, 13, 0xFFF8, CODE_AT);
        g.eq("register unchanged", c.eax, 1);
        let mut c = LegacyContext {
            esp: STACK_AT - 4,
            ..ring0(code32!("pop ds"))
        };
        write::<u32>(u64::from(STACK_AT) - 4, 0xFFF8);
        c.eip = CODE_AT;
        expect(g, "POP DS of a bad selector", &mut c, 13, 0xFFF8, CODE_AT);
        g.eq("ESP unchanged", c.esp, STACK_AT - 4);
    });
}

fn transfers(suite: &mut Suite) {
    suite.group("far transfers", |g| {
        let target = CODE_AT + 0x100;
        write_bytes(target.into(), code32!("mov edx, cs", "int3"));
        let pointer = |selector: u32| {
            write::<u32>(DATA_AT.into(), target);
            write::<u16>(u64::from(DATA_AT) + 4, selector as u16);
        };
        let jmp = code32!("ljmp [edi]");
        let call = code32!("lcall [edi]");
        let on = |c: LegacyContext| LegacyContext { edi: DATA_AT, ..c };
        pointer(sel::CODE32);
        expect(g, "far jump", &mut on(ring0(jmp)), 3, NONE, target + 3);
        pointer(sel::USER_CODE32);
        expect(
            g,
            "far jump to a less privileged segment",
            &mut on(ring0(jmp)),
            13,
            sel::USER_CODE32 & !3,
            CODE_AT,
        );
        pointer(sel::CODE32);
        expect(
            g,
            "far jump to a more privileged segment",
            &mut on(ring3(jmp)),
            13,
            sel::CODE32,
            CODE_AT,
        );
        pointer(sel::DATA);
        expect(
            g,
            "far jump to data",
            &mut on(ring0(jmp)),
            13,
            sel::DATA,
            CODE_AT,
        );
        pointer(0);
        expect(g, "far jump to null", &mut on(ring0(jmp)), 13, 0, CODE_AT);
        legacy::set_gdt(FREE, descriptor(0, 0xF_FFFF, 0x1B, 0xC));
        pointer(FREE);
        expect(
            g,
            "far jump to an absent segment",
            &mut on(ring0(jmp)),
            11,
            FREE,
            CODE_AT,
        );
        legacy::set_gdt(FREE, descriptor(0, 0xF_FFFF, 0x9F, 0xC));
        let mut c = on(ring3(jmp));
        expect(
            g,
            "conforming code keeps the ring",
            &mut c,
            3,
            NONE,
            target + 3,
        );
        g.eq("CS with the caller's RPL", c.cs, FREE | 3);
        pointer(sel::CODE32);
        let mut c = on(ring0(call));
        expect(g, "far call", &mut c, 3, NONE, target + 3);
        g.eq(
            "pushed CS",
            read::<u32>(u64::from(c.esp) + 4) & 0xFFFF,
            sel::CODE32,
        );
        g.eq("pushed EIP", read::<u32>(c.esp.into()), CODE_AT + 2);

        // Call gate from ring 3 with two parameters.
        let access = |dpl: u8, present: u8| present << 7 | dpl << 5 | 0xC;
        let put_gate =
            |a: u8, count: u64| legacy::set_gdt(FREE, gate(sel::CODE32, target, a) | count << 32);
        put_gate(access(3, 1), 2);
        write::<u32>(DATA_AT.into(), 0xDEAD);
        write::<u16>(u64::from(DATA_AT) + 4, (FREE | 3) as u16);
        let mut c = on(ring3(call));
        c.esp = STACK_AT - 8;
        write::<u32>(u64::from(STACK_AT) - 8, 0x1111);
        write::<u32>(u64::from(STACK_AT) - 4, 0x2222);
        expect(g, "call gate to ring 0", &mut c, 3, NONE, target + 3);
        g.eq("CS", c.edx, sel::CODE32);
        let esp = u64::from(c.esp);
        g.eq("stack of ring 0", c.esp, legacy::stack_top() - 24);
        for (i, want) in [
            CODE_AT + 2,
            sel::USER_CODE32,
            0x1111,
            0x2222,
            STACK_AT - 8,
            sel::USER_DATA,
        ]
        .iter()
        .enumerate()
        {
            let got = read::<u32>(esp + i as u64 * 4)
                & if matches!(i, 1 | 5) { 0xFFFF } else { u32::MAX };
            g.eqf(format_args!("call gate frame word {i}"), got, *want);
        }
        // And back with RETF 8.
        write_bytes(target.into(), code32!(".byte 0xCA, 8, 0"));
        write_bytes(u64::from(CODE_AT) + 2, &[0xCC]);
        let mut c = on(ring3(code32!("lcall [edi]", "int3")));
        c.esp = STACK_AT - 8;
        expect(g, "RETF 8 to ring 3", &mut c, 3, NONE, CODE_AT + 3);
        g.eq("parameters popped from both stacks", c.esp, STACK_AT);
        g.eq("CS of ring 3", c.cs, sel::USER_CODE32);
        write_bytes(target.into(), code32!("mov edx, cs", "int3"));
        put_gate(access(0, 1), 0);
        expect(
            g,
            "gate DPL below CPL",
            &mut on(ring3(call)),
            13,
            FREE,
            CODE_AT,
        );
        put_gate(access(3, 0), 0);
        expect(g, "absent gate", &mut on(ring3(call)), 11, FREE, CODE_AT);
        put_gate(access(3, 1), 0);
        expect(
            g,
            "jump through a gate to inner nonconforming code",
            &mut on(ring3(jmp)),
            13,
            sel::CODE32,
            CODE_AT,
        );
        // A bad ring-0 stack in the TSS.
        put_gate(access(3, 1), 0);
        legacy::set_tss_field(8, 0);
        expect_df_or_ts(g, "null SS0", on(ring3(call)));
        legacy::set_tss_field(8, sel::DATA);

        // IRET.
        let iret = |frame: &[u32], flags: u32| {
            let mut c = ring0(code32!("iretd"));
            c.esp = STACK_AT - 0x40;
            c.eflags = flags;
            for (i, v) in frame.iter().enumerate() {
                write::<u32>(u64::from(c.esp) + i as u64 * 4, *v);
            }
            c
        };
        let user_frame = |cs: u32, flags: u32, ss: u32| [target, cs, flags, STACK_AT, ss];
        let mut c = iret(&user_frame(sel::USER_CODE32, 2, sel::USER_DATA), 2);
        expect(g, "IRET to ring 3", &mut c, 3, NONE, target + 3);
        g.eq("ESP", c.esp, STACK_AT);
        g.eq("ring-0 DS is nulled", c.ds, 0);
        expect(
            g,
            "IRET to a null CS",
            &mut iret(&user_frame(0, 2, 0x23), 2),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "IRET with SS of another ring",
            &mut iret(&user_frame(sel::USER_CODE32, 2, sel::DATA), 2),
            13,
            sel::DATA,
            CODE_AT,
        );
        expect(
            g,
            "IRET to a null SS",
            &mut iret(&user_frame(sel::USER_CODE32, 2, 0), 2),
            13,
            0,
            CODE_AT,
        );
        expect(
            g,
            "IRET to data",
            &mut iret(&user_frame(sel::USER_DATA, 2, sel::USER_DATA), 2),
            13,
            sel::USER_DATA & !3,
            CODE_AT,
        );
        // Ring 3 cannot IRET to ring 0, nor change IF or IOPL.
        let mut c = ring3(code32!("iretd"));
        c.esp = STACK_AT - 0x40;
        for (i, v) in [target, sel::CODE32, 2].iter().enumerate() {
            write::<u32>(u64::from(c.esp) + i as u64 * 4, *v);
        }
        expect(g, "IRET to an inner ring", &mut c, 13, sel::CODE32, CODE_AT);
        let mut c = ring3(code32!("iretd"));
        c.esp = STACK_AT - 0x40;
        for (i, v) in [target, sel::USER_CODE32, 0x3202].iter().enumerate() {
            write::<u32>(u64::from(c.esp) + i as u64 * 4, *v);
        }
        expect(g, "IRET in ring 3", &mut c, 3, NONE, target + 3);
        g.eq("IF and IOPL unchanged", c.eflags & 0x3200, 0);
    });
}

/// A call gate onto a null SS0 raises #TS with selector 0.
fn expect_df_or_ts(g: &mut Group, what: &str, mut c: LegacyContext) {
    // The handler needs a ring-0 stack too: #TS through a task would be needed,
    // so a task gate for #DF catches the double fault that follows.
    prepare_task(TSS_B, CODE_AT + 0x200);
    write_bytes(
        u64::from(CODE_AT) + 0x200,
        code32!("mov word ptr [0xB008], 0x10", "int3"),
    );
    legacy::set_gdt(FREE + 24, descriptor(TSS_B, 103, 0x89, 0));
    legacy::set_idt(8, gate(FREE + 24, 0, 0x85));
    let got = c.enter();
    g.check(
        got.0 == 3 && c.tr == FREE + 24,
        format_args!("{what}: got vector {:#x} in task {:#x}", got.0, c.tr),
    );
    legacy::reset_idt(8);
}

/// Writes a ring-0 task that starts at `eip`.
fn prepare_task(at: u32, eip: u32) {
    let tss = Tss32 {
        esp0: legacy::stack_top(),
        ss0: sel::DATA,
        eip,
        eflags: 2,
        esp: STACK_AT - 0x200,
        eax: 0xA5A5,
        ebx: 0xB6B6,
        cs: sel::CODE32,
        ss: sel::DATA,
        ds: sel::DATA,
        es: sel::DATA,
        fs: sel::DATA,
        gs: sel::DATA,
        trap_io: 104 << 16,
        ..Tss32::default()
    };
    // SAFETY: the structure is plain words.
    let words: [u32; size_of::<Tss32>() / 4] = unsafe { core::mem::transmute(tss) };
    for (i, word) in words.iter().enumerate() {
        write(u64::from(at) + i as u64 * 4, *word);
    }
}

fn tasks(suite: &mut Suite) {
    suite.group("32-bit task switch", |g| {
        let task = FREE;
        let entry = CODE_AT + 0x100;
        let fresh = |code: &[u8]| {
            prepare_task(TSS_A, entry);
            write_bytes(entry.into(), code);
            legacy::set_gdt(task, descriptor(TSS_A, 103, 0x89, 0));
        };
        write::<u32>(DATA_AT.into(), 0);
        write::<u16>(u64::from(DATA_AT) + 4, task as u16);
        let on = |code: &[u8]| LegacyContext {
            edi: DATA_AT,
            ecx: 0x77,
            ..ring0(code)
        };

        fresh(code32!("mov esi, [esp]", "int3"));
        let mut c = on(code32!("ljmp [edi]"));
        let got = c.enter();
        g.eq("jump to a TSS", got.0, 3);
        g.eq("EAX from the TSS", c.eax, 0xA5A5);
        g.eq("EBX from the TSS", c.ebx, 0xB6B6);
        g.eq("TR", c.tr, task);
        g.eq("new TSS is busy", legacy::gdt(task) >> 41 & 1, 1);
        g.eq("old TSS is not", legacy::gdt(sel::TSS) >> 41 & 1, 0);
        g.eq("old EIP saved", legacy::tss_field(32), CODE_AT + 2);
        g.eq("old ECX saved", legacy::tss_field(44), 0x77);
        g.eq("NT clear after a jump", c.eflags & 0x4000, 0);

        fresh(code32!("mov eax, cr0", "pushfd", "pop ebx", "iretd"));
        let mut c = on(code32!("lcall [edi]", "int3"));
        let got = c.enter();
        g.eq(
            "call and IRET back",
            (got.0 == 3 && c.eip == CODE_AT + 3) as u32,
            1,
        );
        g.eq("TR is the caller's", c.tr, sel::TSS);
        g.eq("ECX is the caller's", c.ecx, 0x77);
        g.eq("back link", read::<u32>(TSS_A.into()) & 0xFFFF, sel::TSS);
        g.eq(
            "NT in the called task",
            read::<u32>(u64::from(TSS_A) + 52) & 0x4000,
            0x4000,
        );
        g.eq(
            "CR0.TS in the called task",
            read::<u32>(u64::from(TSS_A) + 40) & 8,
            8,
        );
        g.eq(
            "both TSS: callee free, caller busy",
            legacy::gdt(task) >> 41 & 1,
            0,
        );

        fresh(code32!("int3"));
        legacy::set_gdt(task, descriptor(TSS_A, 103, 0x8B, 0));
        expect(
            g,
            "busy TSS",
            &mut on(code32!("ljmp [edi]")),
            13,
            task,
            CODE_AT,
        );
        legacy::set_gdt(task, descriptor(TSS_A, 103, 0x09, 0));
        expect(
            g,
            "absent TSS",
            &mut on(code32!("ljmp [edi]")),
            11,
            task,
            CODE_AT,
        );
        legacy::set_gdt(task, descriptor(TSS_A, 102, 0x89, 0));
        expect(
            g,
            "TSS too small",
            &mut on(code32!("ljmp [edi]")),
            10,
            task,
            CODE_AT,
        );
        legacy::set_gdt(task, descriptor(TSS_A, 103, 0x89, 0));
        let mut c = LegacyContext {
            edi: DATA_AT,
            ..ring3(code32!("ljmp [edi]"))
        };
        expect(g, "TSS with DPL 0 from ring 3", &mut c, 13, task, CODE_AT);
        let mut c = LegacyContext {
            eflags: 0x4002,
            ..ring0(code32!("iretd"))
        };
        legacy::set_tss_field(0, 0);
        let got = c.enter();
        g.check(
            got == (10, 0),
            format_args!(
                "IRET with NT and a null link: vector {:#x} error {:#x}",
                got.0, got.1
            ),
        );

        // A task gate in the IDT, with an error code pushed on the new stack.
        fresh(code32!("mov esi, [esp]", "int3"));
        legacy::set_idt(13, gate(task, 0, 0x85));
        let mut c = ring0(code32!("mov ds, eax"));
        c.eax = 0xFFF8;
        let got = c.enter();
        g.eq("#GP through a task gate", got.0, 3);
        g.eq("error code on the task's stack", c.esi, 0xFFF8);
        g.eq("NT set", c.eflags & 0x4000, 0x4000);
        g.eq("link", read::<u32>(TSS_A.into()) & 0xFFFF, sel::TSS);
        legacy::reset_idt(13);

        // The trap bit raises #DB in the new task before its first instruction.
        fresh(code32!("nop", "int3"));
        write::<u32>(u64::from(TSS_A) + 100, 104 << 16 | 1);
        cpu::set_dr6(0xFFFF_0FF0);
        let mut c = on(code32!("ljmp [edi]"));
        expect(g, "T bit", &mut c, 1, NONE, entry);
        g.eq("DR6.BT", cpu::dr6() >> 15 & 1, 1);
        // A bad code segment in the incoming task faults in its context.
        fresh(code32!("int3"));
        write::<u32>(u64::from(TSS_A) + 76, sel::DATA);
        let got = on(code32!("ljmp [edi]")).enter();
        g.check(
            got == (10, sel::DATA),
            format_args!("data as CS: vector {:#x} error {:#x}", got.0, got.1),
        );
    });
}

fn long_mode(suite: &mut Suite, a: &Arena) {
    suite.group("long mode", |g| {
        let slot = sel64::FREE;
        let pc = percpu::this();
        a.load_at(0x100, code64!("mov edx, cs", "int3"));
        let target = CODE + 0x100;
        let pointer = |selector: u16| {
            write::<u64>(a.data, target);
            write::<u16>(a.data + 8, selector);
        };
        pointer(sel64::USER_CODE64);
        // The 64-bit offset form exists on Intel only; AMD reads 32 bits.
        write::<u16>(a.data + 4, sel64::USER_CODE64);
        let mut c = a.user(code64!(".byte 0xFF, 0x2F"));
        g.run("far jump m16:32", &mut c, BP, target + 3);
        // Both L and D set is reserved.
        pc.set_gdt(slot, descriptor(0, 0xF_FFFF, 0xFB, 0xE));
        write::<u16>(a.data + 4, slot | 3);
        g.run(
            "L and D both set",
            &mut a.user(code64!(".byte 0xFF, 0x2F")),
            Exit::code(13, slot.into()),
            CODE,
        );
        write::<u16>(a.data + 4, 0);
        g.run(
            "null selector",
            &mut a.user(code64!(".byte 0xFF, 0x2F")),
            GP0,
            CODE,
        );
        // 64-bit call gates.
        let gate_access = |dpl: u8, present: u8| present << 7 | dpl << 5 | 0xC;
        let put = |g64: [u64; 2]| percpu::this().set_gdt2(slot, g64);
        put(call_gate64(sel64::CODE64, target, gate_access(3, 1)));
        pointer(slot | 3);
        write::<u16>(a.data + 4, slot | 3);
        let far_call = code64!(".byte 0xFF, 0x1F");
        let mut c = a.user(far_call);
        g.run("call gate", &mut c, BP, target + 3);
        g.eq("CS", c.rdx, sel64::CODE64.into());
        g.eq("SS is null", c.ss, 0);
        let top = percpu::stack_top(0, 0);
        g.eq("stack of ring 0", c.rsp, top - 32);
        g.eq("saved SS", read::<u64>(top - 8), sel64::USER_DATA.into());
        g.eq("saved RSP", read::<u64>(top - 16), STACK_TOP);
        g.eq("saved CS", read::<u64>(top - 24), sel64::USER_CODE64.into());
        g.eq("saved RIP", read::<u64>(top - 32), CODE + 2);
        put(call_gate64(sel64::CODE32, target, gate_access(3, 1)));
        g.run(
            "gate to 32-bit code",
            &mut a.user(far_call),
            Exit::code(13, sel64::CODE32.into()),
            CODE,
        );
        put(call_gate64(
            sel64::CODE64,
            0x8000_0000_0000,
            gate_access(3, 1),
        ));
        g.run(
            "gate to a non-canonical offset",
            &mut a.user(far_call),
            GP0,
            CODE,
        );
        put(call_gate64(sel64::CODE64, target, gate_access(0, 1)));
        g.run(
            "gate of DPL 0",
            &mut a.user(far_call),
            Exit::code(13, slot.into()),
            CODE,
        );
        put([
            call_gate64(sel64::CODE64, target, gate_access(3, 1))[0],
            1 << 40,
        ]);
        g.run(
            "type bits in the upper half",
            &mut a.user(far_call),
            Exit::code(13, slot.into()),
            CODE,
        );
        put(system_descriptor(0, 103, 0xE9));
        g.run(
            "no task switch in long mode",
            &mut a.user(far_call),
            Exit::code(13, slot.into()),
            CODE,
        );

        // Segment limits and types do not exist for DS, ES, SS.
        pc.set_gdt(slot, descriptor(0x1000, 0, 0xF1, 0));
        let mut c = Context {
            rax: (slot | 3).into(),
            ..a.user(code64!(
                "mov ds, eax",
                "mov [rdi], rax",
                "mov fs, eax",
                "mov rbx, fs:[rdi - 0x1000]",
                "int3"
            ))
        };
        let got = c.enter();
        g.check(
            got == BP,
            format_args!("read-only, zero-limit DS: got {got}"),
        );
        g.eq("FS base counts", c.rbx, (slot | 3).into());
        let mut c = Context {
            rax: 0,
            ..a.user(code64!(
                "mov fs, eax",
                "mov ds, eax",
                "mov rbx, [rdi]",
                "int3"
            ))
        };
        let got = c.enter();
        g.check(got == BP, format_args!("null DS: got {got}"));
        cpu::wrmsr(cpu::msr::FS_BASE, 0);
        // LDT with a 64-bit base: a 16-byte descriptor.
        write::<u64>(a.data + 0x108, descriptor(0, 0xF_FFFF, 0xF3, 0xC));
        pc.set_gdt2(slot, system_descriptor(DATA + 0x100, 15, 0x82));
        cpu::lldt(slot);
        let mut c = Context {
            rax: 0xF,
            ..a.user(code64!("mov ds, eax", "mov ebx, ds", "int3"))
        };
        let got = c.enter();
        g.check(
            got == BP && c.rbx == 0xF,
            format_args!("data in the LDT: {got}, ds {:#x}", c.rbx),
        );
        g.run(
            "beyond the LDT",
            &mut Context {
                rax: 0x17,
                ..a.user(code64!("mov ds, eax"))
            },
            Exit::code(13, 0x14),
            CODE,
        );
        cpu::lldt(0);
        let lldt = |value: u64| Context {
            rax: value,
            ..a.kernel(code64!("lldt ax", "int3"))
        };
        pc.set_gdt2(slot, [system_descriptor(DATA, 15, 0x82)[0], 0x8000]);
        g.run(
            "LLDT with a non-canonical base",
            &mut lldt(slot.into()),
            Exit::code(13, slot.into()),
            CODE,
        );
        g.run(
            "LTR of the busy TSS",
            &mut Context {
                rax: sel64::TSS.into(),
                ..a.kernel(code64!("ltr ax"))
            },
            Exit::code(13, sel64::TSS.into()),
            CODE,
        );
        if !has::qemu_tcg() {
            g.run(
                "LTR null",
                &mut Context {
                    rax: 0,
                    ..a.kernel(code64!("ltr ax"))
                },
                GP0,
                CODE,
            );
        }

        // IRETQ.
        let iretq = |frame: [u64; 5], user: bool| {
            let code = code64!("iretq");
            let mut c = if user { a.user(code) } else { a.kernel(code) };
            c.rsp = STACK + 0x400;
            for (i, v) in frame.iter().enumerate() {
                write(a.stack + 0x400 + i as u64 * 8, *v);
            }
            c
        };
        let (cs, ss) = (u64::from(sel64::USER_CODE64), u64::from(sel64::USER_DATA));
        let mut c = iretq([target, cs, 2, STACK_TOP, ss], false);
        g.run("to ring 3", &mut c, BP, target + 3);
        g.eq("RSP", c.rsp, STACK_TOP);
        let mut c = iretq([target, sel64::CODE64.into(), 2, STACK_TOP, 0], false);
        g.run("null SS stays legal in ring 0", &mut c, BP, target + 3);
        g.eq("RSP is popped in the same ring too", c.rsp, STACK_TOP);
        g.run(
            "null SS for ring 3",
            &mut iretq([target, cs, 2, STACK_TOP, 0], false),
            GP0,
            CODE,
        );
        g.run(
            "to an inner ring",
            &mut iretq([target, 8, 2, STACK_TOP, 0x10], true),
            Exit::code(13, 8),
            CODE,
        );
        g.run(
            "with NT",
            &mut Context {
                rflags: 0x4002,
                ..iretq([target, cs, 2, STACK_TOP, ss], false)
            },
            GP0,
            CODE,
        );
        g.run(
            "to compatibility mode",
            &mut iretq([target, sel64::USER_CODE32.into(), 2, STACK_TOP, ss], true),
            BP,
            target + 3,
        );
        let mut c = iretq([0x8000_0000_0000, cs, 2, STACK_TOP, ss], false);
        let got = c.enter();
        g.check(got == GP0, format_args!("non-canonical RIP: got {got}"));
        let mut c = iretq([target, cs, 0x3202 | 1 << 17, STACK_TOP, ss], true);
        g.run(
            "ring 3 changes neither IF, IOPL nor VM",
            &mut c,
            BP,
            target + 3,
        );
        g.eq("flags", c.rflags & 0x2_3200, 0);
    });
}
