//! Writes to control registers that fault, and address spaces with numbers.

use crate::{RW, VA};
use caisson_guest_rt::context::{BP, Exit, GP0, UD};
use caisson_guest_rt::cpu::{cr, has};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{Arena, CODE, DATA, frame};
use caisson_guest_rt::{Context, Suite, code64, cpu};

pub(crate) fn control(suite: &mut Suite, a: &Arena) {
    suite.group("control register rules", |g| {
        if has::qemu_tcg() {
            g.skip("QEMU TCG checks too little here and would lose the guest");
            return;
        }
        let cr0 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr0, rax", "int3"))
        };
        let now = cpu::cr0();
        g.run("PG without PE", &mut cr0(now & !cr::PE), GP0, CODE);
        g.run("NW without CD", &mut cr0(now | cr::NW), GP0, CODE);
        g.run("upper half of CR0", &mut cr0(now | 1 << 32), GP0, CODE);
        g.run("CD", &mut cr0(now | cr::CD), BP, CODE + 4);
        cpu::set_cr0(now);
        let cr4 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr4, rax", "int3"))
        };
        let now4 = cpu::cr4();
        for bit in [15u32, 19, 26, 31, 32, 63] {
            let got = cr4(now4 | 1 << bit).enter();
            g.check(got == GP0, format_args!("CR4 bit {bit}: got {got}"));
        }
        for (bit, offered, name) in [
            (cr::VMXE, has::vmx(), "VMXE"),
            (cr::FSGSBASE, has::fsgsbase(), "FSGSBASE"),
            (cr::PCIDE, has::pcid(), "PCIDE"),
            (cr::OSXSAVE, has::xsave(), "OSXSAVE"),
            (cr::SMEP, has::smep(), "SMEP"),
            (cr::SMAP, has::smap(), "SMAP"),
            (cr::UMIP, has::umip(), "UMIP"),
            (cr::PKE, has::pku(), "PKE"),
            (cr::LA57, false, "LA57 in long mode"),
        ] {
            let got = cr4(now4 | bit).enter();
            // The code lies on a user page: with SMEP its next fetch faults.
            let taken = if bit == cr::SMEP {
                Exit::code(14, 0x11)
            } else {
                BP
            };
            g.check(
                got == if offered { taken } else { GP0 },
                format_args!("CR4.{name} (offered: {offered}): got {got}"),
            );
            cpu::set_cr4(now4);
        }
        let cr3 = |v: u64| Context {
            rax: v,
            ..a.kernel(code64!("mov cr3, rax", "int3"))
        };
        let now3 = cpu::cr3();
        g.run(
            "CR3 bit 63 without PCIDE",
            &mut cr3(now3 | 1 << 63),
            GP0,
            CODE,
        );
        if has::physical_bits() < 52 {
            g.run(
                "CR3 above the physical width",
                &mut cr3(now3 | 1 << 51),
                GP0,
                CODE,
            );
        }
        g.run("CR3 cache bits", &mut cr3(now3 | 0x18), BP, CODE + 4);
        cpu::set_cr3(now3);
        g.run(
            "CR8 above 15",
            &mut Context {
                rax: 16,
                ..a.kernel(code64!("mov cr8, rax"))
            },
            GP0,
            CODE,
        );
        g.run(
            "LMSW cannot clear PE",
            &mut Context {
                rax: 0,
                ..a.kernel(code64!("lmsw ax", "int3"))
            },
            BP,
            CODE + 4,
        );
        g.eq("PE", cpu::cr0() & cr::PE, cr::PE);
        cpu::set_cr0(now);
        // STAC and CLAC.
        let ring3 = a.user(code64!("stac")).enter();
        g.check(ring3 == UD, format_args!("STAC in ring 3: {ring3}"));
        if has::smap() {
            let mut c = a.kernel(code64!("stac", "int3"));
            g.run("STAC", &mut c, BP, CODE + 4);
            g.eq("AC", c.rflags & cpu::flags::AC, cpu::flags::AC);
        }
    });
}

pub(crate) fn pcid(suite: &mut Suite, a: &Arena) {
    suite.group("PCID and INVPCID", |g| {
        let inv = |kind: u64, pcid: u64, address: u64| {
            write(a.data, pcid);
            write(a.data + 8, address);
            Context {
                rax: kind,
                ..a.kernel(code64!("invpcid rax, [rdi]", "int3"))
            }
            .enter()
        };
        if has::invpcid() {
            g.check(inv(2, 0, 0) == BP, format_args!("INVPCID all"));
            g.check(inv(3, 0, 0) == BP, format_args!("INVPCID all but global"));
            g.check(inv(4, 0, 0) == GP0, format_args!("INVPCID type 4"));
            g.check(
                inv(0, 0x1000, 0) == GP0,
                format_args!("INVPCID with reserved descriptor bits"),
            );
            g.check(
                inv(0, 0, 0x8000_0000_0000) == GP0,
                format_args!("INVPCID type 0 at a non-canonical address"),
            );
            g.check(
                inv(0, 1, DATA) == GP0,
                format_args!("INVPCID type 0 of PCID 1 without PCIDE"),
            );
            g.check(
                inv(1, 1, 0) == GP0,
                format_args!("INVPCID type 1 of PCID 1 without PCIDE"),
            );
            let got = a.user(code64!("invpcid rax, [rdi]")).enter();
            g.check(got == GP0, format_args!("INVPCID in ring 3: {got}"));
        } else {
            g.check(inv(2, 0, 0) == UD, format_args!("INVPCID is masked"));
        }
        if !has::pcid() {
            g.skip("CPUID offers no PCID");
            return;
        }
        let root = cpu::cr3();
        let cr4 = cpu::cr4();
        let mut c = Context {
            rax: cr4 | cr::PCIDE,
            load: 2,
            cr3: root | 8,
            ..a.kernel(code64!("mov cr4, rax"))
        };
        g.run("PCIDE with CR3[11:0] set", &mut c, GP0, CODE);
        cpu::set_cr4(cr4 | cr::PCIDE);
        let (one, two) = (frame(), frame());
        write::<u32>(one, 1);
        write::<u32>(two, 2);
        let slot = a.space.entry(VA, 1);
        let set = |page: u64| write(slot, page | RW);
        set(one);
        cpu::set_cr3(root | 1);
        g.eq("PCID 1", read::<u32>(VA), 1);
        cpu::set_cr3(root | 2);
        set(two);
        g.eq(
            "PCID 2 does not see PCID 1's translation",
            read::<u32>(VA),
            2,
        );
        cpu::set_cr3(root | 1);
        g.eq("a flushing switch forgets PCID 1's", read::<u32>(VA), 2);
        set(one);
        cpu::set_cr3(root | 2 | 1 << 63);
        g.eq("bit 63 is not stored", cpu::cr3() >> 63, 0);
        cpu::set_cr3(root | 2);
        g.eq("a flushing switch to PCID 2", read::<u32>(VA), 1);
        set(two);
        cpu::set_cr3(root | 3);
        if has::invpcid() {
            cpu::invpcid(1, 2, 0);
        }
        cpu::set_cr3(root | 2 | 1 << 63);
        if has::invpcid() {
            g.eq("INVPCID of one context", read::<u32>(VA), 2);
            set(one);
            cpu::set_cr3(root | 3);
            cpu::invpcid(0, 2, VA);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq(
                "INVPCID of one address in another context",
                read::<u32>(VA),
                1,
            );
            set(two);
            cpu::set_cr3(root | 3 | 1 << 63);
            cpu::invpcid(2, 0, 0);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq("INVPCID of everything", read::<u32>(VA), 2);
            set(one);
            cpu::set_cr3(root | 3 | 1 << 63);
            cpu::invpcid(3, 0, 0);
            cpu::set_cr3(root | 2 | 1 << 63);
            g.eq("INVPCID of all but global", read::<u32>(VA), 1);
        }
        // Clearing PCIDE forgets every context.
        cpu::set_cr3(root);
        cpu::set_cr4(cr4);
        set(two);
        cpu::invlpg(VA);
        g.eq("after clearing PCIDE", read::<u32>(VA), 2);
    });
}
