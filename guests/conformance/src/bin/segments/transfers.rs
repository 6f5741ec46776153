//! Far transfers: code segments, call gates, IRET, conforming code.

use crate::tasks::{TSS_B, prepare_task};
use crate::{CODE_AT, DATA_AT, FREE, NONE, STACK_AT, expect, ring0, ring3};
use caisson_guest_rt::legacy::{LegacyContext, gate, sel};
use caisson_guest_rt::memory::{read, write, write_bytes};
use caisson_guest_rt::percpu::descriptor;
use caisson_guest_rt::{Group, Suite, code32, legacy};

pub(crate) fn transfers(suite: &mut Suite) {
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
