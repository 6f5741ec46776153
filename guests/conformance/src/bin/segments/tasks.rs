//! The 32-bit task switch.

use crate::{CODE_AT, DATA_AT, FREE, NONE, STACK_AT, expect, ring0, ring3};
use caisson_guest_rt::legacy::{LegacyContext, Tss32, gate, sel};
use caisson_guest_rt::memory::{read, write, write_bytes};
use caisson_guest_rt::percpu::descriptor;
use caisson_guest_rt::{Suite, code32, cpu, legacy};

/// 32-bit TSSes of the task-switch tests.
const TSS_A: u32 = 0xC000;
pub(crate) const TSS_B: u32 = 0xD000;

/// Writes a ring-0 task that starts at `eip`.
pub(crate) fn prepare_task(at: u32, eip: u32) {
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

pub(crate) fn tasks(suite: &mut Suite) {
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
