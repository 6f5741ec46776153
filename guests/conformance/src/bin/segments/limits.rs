//! Limits, types and rights of data accesses.

use crate::{CODE_AT, DATA_AT, FREE, NONE, expect, ring0};
use caisson_guest_rt::legacy::LegacyContext;
use caisson_guest_rt::percpu::descriptor;
use caisson_guest_rt::{Suite, code32, legacy};

pub(crate) fn limits(suite: &mut Suite) {
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
