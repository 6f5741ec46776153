//! What can be loaded into which segment register.

use crate::{CODE_AT, DATA_AT, FREE, NONE, STACK_AT, expect, ring0, ring3};
use caisson_guest_rt::legacy::{LegacyContext, sel};
use caisson_guest_rt::memory::write;
use caisson_guest_rt::percpu::descriptor;
use caisson_guest_rt::{Suite, code32, legacy};

pub(crate) fn loads(suite: &mut Suite) {
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
