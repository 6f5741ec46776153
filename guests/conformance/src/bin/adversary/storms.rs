//! Endless faults and interrupts.

use crate::{HOLE, Random};
use caisson_guest_rt::context::{BP, Exit, GP0, load};
use caisson_guest_rt::cpu::cr;
use caisson_guest_rt::interrupt::Gate;
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, P, U, W};
use caisson_guest_rt::percpu::sel;
use caisson_guest_rt::{Context, Suite, apic, code64, cpu, interrupt, ioapic};

pub(crate) fn storms(suite: &mut Suite, a: &Arena) {
    suite.group("MMIO and exception storms", |g| {
        // Every word of the APIC pages, read and scribbled on.
        let base = apic::base();
        for offset in (0..4096u64).step_by(16) {
            let _ = read::<u32>(base + offset);
            if !matches!(offset, 0xF0 | 0x300 | 0x310 | 0x320..=0x390) {
                write::<u32>(base + offset, 0xFFFF_FFFF);
            }
        }
        for offset in 0..64u64 {
            let _ = read::<u8>(base + offset);
            let _ = read::<u16>(ioapic::BASE + offset);
            let _ = read::<u64>(ioapic::BASE + offset * 8);
        }
        apic::enable(0xFF);
        for v in [0x380u32] {
            apic::set(v, 0);
        }
        for index in 0..256u32 {
            let _ = ioapic::get(index);
        }
        for _ in 0..20_000 {
            let _ = read::<u32>(0xD000_0000);
        }
        // Code that runs from devices and from nothing.
        for target in [base, ioapic::BASE, 0xD000_0000u64, 0xFEF0_0000] {
            let got = Context {
                rdi: target,
                ..a.kernel(code64!("jmp rdi"))
            }
            .enter();
            g.check(got.vector < 32, format_args!("jump to {target:#x}: {got}"));
        }
        // A stack in a device.
        let got = Context {
            rsp: ioapic::BASE + 0x20,
            ..a.kernel(code64!("push rax", "pop rbx", "int3"))
        }
        .enter();
        g.check(got == BP, format_args!("stack in the I/O APIC: {got}"));
        // Page tables in a device: walks read registers.
        let got = Context {
            load: load::CR3,
            cr3: cpu::cr3(),
            rdi: 0x680_0000_0000,
            ..a.kernel(code64!("mov rax, [rdi]", "int3"))
        }
        .enter();
        g.check(got.vector == 14, format_args!("unmapped: {got}"));
        let upper = a.space.entry(0x680_0000_0000, 4);
        for device in [base, ioapic::BASE] {
            write(upper, device | P | W | U);
            cpu::set_cr3(cpu::cr3());
            let got = Context {
                rdi: 0x680_0000_0000,
                ..a.kernel(code64!("mov rax, [rdi]", "int3"))
            }
            .enter();
            g.check(
                got == BP || got.vector == 14,
                format_args!("table at {device:#x}: {got}"),
            );
        }
        write(upper, 0u64);
        cpu::set_cr3(cpu::cr3());
        // Descriptor tables in a hole, in a device, at the end of the address space.
        for (what, table) in [
            ("hole", HOLE),
            ("device", ioapic::BASE),
            ("nothing", 0xD000_0000),
            ("top", u64::MAX - 15),
        ] {
            write::<u16>(a.data, 0xFFFF);
            write::<u64>(a.data + 2, table);
            let code = code64!(
                "sgdt [rdi + 0x20]",
                "lgdt [rdi]",
                "mov ds, eax",
                "lgdt [rdi + 0x20]",
                "int3"
            );
            let mut c = Context {
                rax: 0x20,
                ..a.kernel(code)
            };
            // The stub finds its processor through GDTR, so only loads that cannot fault are tried.
            if what != "hole" && what != "top" {
                a.load(code64!(
                    "sgdt [rdi + 0x20]",
                    "lgdt [rdi]",
                    "nop",
                    "lgdt [rdi + 0x20]",
                    "int3"
                ));
            } else {
                a.load(code64!(
                    "sgdt [rdi + 0x20]",
                    "lgdt [rdi]",
                    "lgdt [rdi + 0x20]",
                    "int3"
                ));
            }
            c.rip = CODE;
            let got = c.enter();
            g.check(
                got == BP || got == GP0,
                format_args!("GDT in a {what}: {got}"),
            );
        }
        // A fault loop that the double fault handler ends.
        interrupt::set_gate(14, Gate::new(sel::CODE64, 0x8000_0000_0000, 1, 0x8E));
        interrupt::set_gate(13, Gate::new(sel::CODE64, 0x8000_0000_0000, 1, 0x8E));
        for _ in 0..2000 {
            let got = Context {
                rdi: HOLE,
                ..a.user(code64!("mov [rdi], al"))
            }
            .enter();
            if got != Exit::code(8, 0) {
                g.check(false, format_args!("fault loop: {got}"));
                break;
            }
        }
        interrupt::reset_gate(14);
        interrupt::reset_gate(13);
        // Control-register values at random: each either loads or faults.
        let mut random = Random(0x5EED_5EED_5EED_5EED);
        for _ in 0..2000 {
            let bits = random.next()
                & !(cr::PCIDE
                    | cr::LA57
                    | cr::PAE
                    | cr::SMAP
                    | cr::SMEP
                    | cr::OSFXSR
                    | cr::CET
                    | cr::PKE);
            let value = cpu::cr4() ^ 1 << (bits % 64);
            let mut c = Context {
                load: load::CR4,
                cr4: cpu::cr4(),
                rax: value | cr::PAE | cr::OSFXSR,
                ..a.kernel(code64!("mov cr4, rax", "int3"))
            };
            if value & (cr::PCIDE | cr::LA57) != 0 {
                continue;
            }
            let got = c.enter();
            // The code lies on a user page: with SMEP its next fetch faults.
            let smep = value & cr::SMEP != 0 && got == Exit::code(14, 0x11);
            if got != BP && got != GP0 && !smep {
                g.check(false, format_args!("CR4 = {value:#x}: {got}"));
            }
        }
    });
}
