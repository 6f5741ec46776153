//! What long mode changes.

use caisson_guest_rt::context::{BP, Exit, GP0};
use caisson_guest_rt::cpu::has;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, STACK, STACK_TOP};
use caisson_guest_rt::percpu::{call_gate64, descriptor, sel as sel64, system_descriptor};
use caisson_guest_rt::{Context, Suite, code64, cpu, percpu};

pub(crate) fn long_mode(suite: &mut Suite, a: &Arena) {
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
