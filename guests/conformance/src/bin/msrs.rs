//! MSR rules, the time stamp counter's registers, XCR0, CPUID's dynamic bits.
//!
//! QEMU TCG 7.2 fails this: it lets most reserved bits pass and answers
//! unknown MSRs.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0, UD, load};
use caisson_guest_rt::cpu::{self, cpuid, cr, has, msr, rdmsr, wrmsr};
use caisson_guest_rt::paging::{Arena, CODE};
use caisson_guest_rt::{Context, Suite, code64, guest, tsc};

guest!("msrs", main);

fn read_exit(a: &Arena, index: u32) -> (Exit, u64) {
    let mut c = Context {
        rcx: index.into(),
        ..a.kernel(code64!("rdmsr", "int3"))
    };
    let got = c.enter();
    (got, c.rdx << 32 | c.rax & 0xFFFF_FFFF)
}

fn write_exit(a: &Arena, index: u32, value: u64) -> Exit {
    Context {
        rcx: index.into(),
        rax: value & 0xFFFF_FFFF,
        rdx: value >> 32,
        ..a.kernel(code64!("wrmsr", "int3"))
    }
    .enter()
}

fn main(suite: &mut Suite) {
    let a = Arena::new();
    suite.group("access", |g| {
        for index in [
            0x4000_FFFFu32,
            0xC001_FFFF,
            0x1234_5678,
            0xFFFF_FFFF,
            0x3FFF_FFFF,
        ] {
            let (got, _) = read_exit(&a, index);
            g.check(
                got == GP0,
                format_args!("RDMSR of unknown {index:#x}: {got}"),
            );
            let got = write_exit(&a, index, 0);
            g.check(
                got == GP0,
                format_args!("WRMSR of unknown {index:#x}: {got}"),
            );
        }
        let mut c = Context {
            rax: u64::MAX,
            rdx: u64::MAX,
            rcx: 0xFFFF_FFFF_0000_0000 | u64::from(msr::EFER),
            ..a.kernel(code64!("rdmsr", "int3"))
        };
        g.run("upper half of RCX is ignored", &mut c, BP, CODE + 3);
        g.eq("RAX is zero extended", c.rax >> 32, 0);
        g.eq("RDX is zero extended", c.rdx, 0);
        g.run(
            "RDMSR in ring 3",
            &mut Context {
                rcx: msr::EFER.into(),
                ..a.user(code64!("rdmsr"))
            },
            GP0,
            CODE,
        );
        g.run(
            "WRMSR in ring 3",
            &mut Context {
                rcx: msr::EFER.into(),
                ..a.user(code64!("wrmsr"))
            },
            GP0,
            CODE,
        );
        g.run(
            "RDPMC in ring 3 without PCE",
            &mut Context {
                rcx: 0x4000_0000,
                ..a.user(code64!("rdpmc"))
            },
            GP0,
            CODE,
        );
    });
    suite.group("EFER and PAT", |g| {
        let efer = rdmsr(msr::EFER);
        for bit in [1u32, 2, 7, 9, 16, 32, 63] {
            let got = write_exit(&a, msr::EFER, efer | 1 << bit);
            g.check(got == GP0, format_args!("EFER bit {bit}: {got}"));
        }
        g.check(
            write_exit(&a, msr::EFER, efer & !msr::EFER_LMA) == BP,
            format_args!("LMA is ignored on writes"),
        );
        g.eq("LMA stays", rdmsr(msr::EFER) & msr::EFER_LMA, msr::EFER_LMA);
        wrmsr(msr::EFER, efer);
        let pat = rdmsr(msr::PAT);
        g.eq("PAT at reset", pat, 0x0007_0406_0007_0406);
        for bad in [2u64, 3, 8, 0xFF] {
            let got = write_exit(&a, msr::PAT, pat & !0xFF | bad);
            g.check(got == GP0, format_args!("PAT type {bad:#x}: {got}"));
            let got = write_exit(&a, msr::PAT, pat & !(0xFF << 56) | bad << 56);
            g.check(
                got == GP0,
                format_args!("PAT type {bad:#x} in the last entry: {got}"),
            );
        }
        g.check(
            write_exit(&a, msr::PAT, 0x0007_0406_0105_0406) == BP,
            format_args!("PAT with WC and WP"),
        );
        g.eq("PAT reads back", rdmsr(msr::PAT), 0x0007_0406_0105_0406);
        wrmsr(msr::PAT, pat);
        if cpuid(1, 0).edx >> 12 & 1 != 0 {
            let cap = rdmsr(0xFE);
            let def = rdmsr(0x2FF);
            let got = write_exit(&a, 0xFE, cap);
            g.check(got == GP0, format_args!("MTRRcap is read only: {got}"));
            g.check(
                write_exit(&a, 0x2FF, def | 1 << 8) == GP0,
                format_args!("MTRR default type, reserved bit"),
            );
            g.check(
                write_exit(&a, 0x2FF, def & !0xFF | 2) == GP0,
                format_args!("MTRR default type 2"),
            );
            if cap & 0xFF > 0 {
                g.check(
                    write_exit(&a, 0x200, 0x1000_0003) == GP0,
                    format_args!("MTRR base with type 3"),
                );
                let old = rdmsr(0x200);
                g.check(
                    write_exit(&a, 0x200, 0x1000_0006) == BP,
                    format_args!("MTRR base"),
                );
                g.eq("MTRR base reads back", rdmsr(0x200), 0x1000_0006);
                wrmsr(0x200, old);
            }
        }
    });
    suite.group("APIC base", |g| {
        let base = rdmsr(msr::APIC_BASE);
        g.eq(
            "address, enabled, boot processor",
            base & 0xFFFF_F900,
            0xFEE0_0900,
        );
        for bit in [0u32, 5, 7, 9, 63] {
            let got = write_exit(&a, msr::APIC_BASE, base | 1 << bit);
            g.check(got == GP0, format_args!("reserved bit {bit}: {got}"));
        }
        for index in [0x802u32, 0x808, 0x80B, 0x830, 0x83F] {
            let (got, _) = read_exit(&a, index);
            g.check(
                got == GP0,
                format_args!("x2APIC MSR {index:#x} in xAPIC mode: {got}"),
            );
        }
    });
    suite.group("time stamp counter", |g| {
        let mut last = tsc::now();
        let mut ordered = true;
        for _ in 0..100_000 {
            let now = tsc::now();
            ordered &= now >= last;
            last = now;
        }
        g.that("never goes back", ordered);
        let by_msr = rdmsr(msr::TSC);
        g.that(
            "RDMSR agrees",
            by_msr >= last && by_msr - last < tsc::micros(1_000_000),
        );
        if has::rdtscp() {
            wrmsr(msr::TSC_AUX, 0x1234_5678);
            let mut c = Context {
                rcx: u64::MAX,
                ..a.user(code64!("rdtscp", "int3"))
            };
            g.run("RDTSCP", &mut c, BP, CODE + 4);
            g.eq("TSC_AUX", c.rcx, 0x1234_5678);
            g.that("time", c.rdx << 32 | c.rax > by_msr);
            g.check(
                write_exit(&a, msr::TSC_AUX, 1 << 32) == GP0,
                format_args!("upper half of TSC_AUX"),
            );
            if has::rdpid() {
                let mut c = a.user(code64!("rdpid rax", "int3"));
                g.run("RDPID", &mut c, BP, CODE + 5);
                g.eq("TSC_AUX", c.rax, 0x1234_5678);
            }
        }
        let tsd = |c: Context| Context {
            load: load::CR4,
            cr4: cpu::cr4() | cr::TSD,
            ..c
        };
        g.run(
            "RDTSC in ring 3 with TSD",
            &mut tsd(a.user(code64!("rdtsc"))),
            GP0,
            CODE,
        );
        g.run(
            "RDTSC in ring 0 with TSD",
            &mut tsd(a.kernel(code64!("rdtsc", "int3"))),
            BP,
            CODE + 3,
        );
        if has::rdtscp() {
            g.run(
                "RDTSCP in ring 3 with TSD",
                &mut tsd(a.user(code64!("rdtscp"))),
                GP0,
                CODE,
            );
        }
        // Writing moves the counter; TSC_ADJUST follows by the same amount.
        let adjust = if has::tsc_adjust() {
            rdmsr(msr::TSC_ADJUST)
        } else {
            0
        };
        let jump = 1u64 << 40;
        let before = tsc::now();
        wrmsr(msr::TSC, before + jump);
        let after = tsc::now();
        g.that(
            "written",
            after >= before + jump && after < before + jump + tsc::micros(1_000_000),
        );
        if has::tsc_adjust() {
            let moved = rdmsr(msr::TSC_ADJUST).wrapping_sub(adjust);
            g.check(
                moved <= jump && moved > jump - tsc::micros(1_000_000),
                format_args!("TSC_ADJUST moved by {moved:#x}"),
            );
            wrmsr(msr::TSC_ADJUST, adjust);
            let back = tsc::now();
            g.that(
                "TSC_ADJUST moves the counter back",
                back >= before && back < before + tsc::micros(5_000_000),
            );
        }
    });
    suite.group("XCR0 and CPUID", |g| {
        let with = |c: Context, on: bool| Context {
            load: load::CR4,
            cr4: cpu::cr4() & !cr::OSXSAVE | if on { cr::OSXSAVE } else { 0 },
            ..c
        };
        g.run(
            "XGETBV without OSXSAVE",
            &mut with(a.user(code64!("xor ecx, ecx", "xgetbv")), false),
            UD,
            CODE + 2,
        );
        let osxsave = code64!("mov eax, 1", "cpuid", "int3");
        let mut c = with(a.kernel(osxsave), false);
        c.enter();
        g.eq("CPUID.OSXSAVE clear", c.rcx >> 27 & 1, 0);
        if !has::xsave() {
            g.skip("CPUID offers no XSAVE");
            return;
        }
        let mut c = with(a.kernel(osxsave), true);
        c.enter();
        g.eq("CPUID.OSXSAVE follows CR4", c.rcx >> 27 & 1, 1);
        let supported = u64::from(cpuid(0xD, 0).edx) << 32 | u64::from(cpuid(0xD, 0).eax);
        let set = |index: u64, value: u64| {
            let c = Context {
                rcx: index,
                rax: value & 0xFFFF_FFFF,
                rdx: value >> 32,
                ..a.kernel(code64!("xsetbv", "int3"))
            };
            with(c, true).enter()
        };
        g.check(set(0, 1) == BP, format_args!("x87 only"));
        g.check(set(0, 0) == GP0, format_args!("x87 clear"));
        g.check(set(0, 3) == BP, format_args!("x87 and SSE"));
        g.check(set(0, 5) == GP0, format_args!("AVX without SSE"));
        g.check(
            set(0, 7) == if supported & 4 != 0 { BP } else { GP0 },
            format_args!("AVX"),
        );
        g.check(set(0, 1 << 63 | 3) == GP0, format_args!("reserved bit 63"));
        g.check(set(1, 3) == GP0, format_args!("XCR1"));
        for bit in 2..63u32 {
            if supported >> bit & 1 == 0 {
                let got = set(0, 3 | 1 << bit);
                g.check(
                    got == GP0,
                    format_args!("unsupported component {bit}: {got}"),
                );
            }
        }
        if supported & 0xE0 == 0xE0 {
            g.check(set(0, 0x27) == GP0, format_args!("a part of AVX-512"));
            g.check(set(0, 0xE3) == GP0, format_args!("AVX-512 without AVX"));
        }
        let c = Context {
            rcx: 0,
            rax: 3,
            ..a.user(code64!("xsetbv"))
        };
        let got = with(c, true).enter();
        g.check(got == GP0, format_args!("XSETBV in ring 3: {got}"));
        // The size in CPUID leaf 0xD follows XCR0.
        cpu::set_cr4(cpu::cr4() | cr::OSXSAVE);
        cpu::xsetbv(0, 3);
        g.eq("area for x87 and SSE", cpuid(0xD, 0).ebx, 576);
        if supported & 4 != 0 {
            cpu::xsetbv(0, 7);
            let avx = cpuid(0xD, 2);
            g.eq("area with AVX", cpuid(0xD, 0).ebx, avx.ebx + avx.eax);
            g.eq(
                "AVX component",
                u64::from(avx.ebx) << 32 | u64::from(avx.eax),
                576 << 32 | 256,
            );
        }
        cpu::xsetbv(0, 1);
        let got = a.user(code64!("vxorps ymm0, ymm0, ymm0")).enter();
        g.check(got == UD, format_args!("AVX without XCR0.AVX: {got}"));
        cpu::xsetbv(0, 3);
        cpu::set_cr4(cpu::cr4() & !cr::OSXSAVE);
        let got = a.user(code64!("vxorps ymm0, ymm0, ymm0")).enter();
        g.check(got == UD, format_args!("AVX without OSXSAVE: {got}"));
        // Leaves above the maximum give the last basic leaf on Intel, zeros on AMD; neither faults.
        let mut c = Context {
            rax: 0x8FFF_FFFF,
            ..a.user(code64!("cpuid", "int3"))
        };
        g.run("CPUID beyond the range", &mut c, BP, CODE + 3);
        g.eq(
            "results are 32 bits wide",
            (c.rax | c.rbx | c.rcx | c.rdx) >> 32,
            0,
        );
    });
}
