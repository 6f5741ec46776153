//! Floating-point, SSE and AVX state: kept across interrupts, and saved and
//! restored by FXSAVE and the XSAVE family with their header rules.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, GP0, UD};
use caisson_guest_rt::cpu::{self, cpuid, cr, has};
use caisson_guest_rt::interrupt;
use caisson_guest_rt::memory::{fill, read, write};
use caisson_guest_rt::paging::{Arena, DATA};
use caisson_guest_rt::{Context, Group, Suite, code64, guest, ioapic, tsc};

guest!("fpu", main);

/// Where the XSAVE area is: physically `data`, at [`DATA`] for snippets.
const HEADER: u64 = 512;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    apic::enable(0xFF);
    across_interrupts(suite, &a);
    fxsave(suite, &a);
    if has::xsave() {
        cpu::set_cr4(cpu::cr4() | cr::OSXSAVE);
        let supported = u64::from(cpuid(0xD, 0).eax);
        cpu::xsetbv(0, supported & 7);
        xsave(suite, &a);
    }
}

fn across_interrupts(suite: &mut Suite, a: &Arena) {
    suite.group("across interrupts", |g| {
        // The handler runs compiled code that uses SSE registers itself.
        interrupt::set_handler(0x40, |_| {
            let noise = core::hint::black_box([tsc::now() as f64, 1.5, 2.5, 3.5]);
            core::hint::black_box(noise.iter().sum::<f64>());
            apic::eoi();
        });
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_1);
        apic::set(reg::LVT_TIMER, apic::PERIODIC | 0x40);
        apic::set(reg::TIMER_INITIAL, 50_000);
        for i in 0..64u64 {
            write(a.data + i * 8, 0x0101_0101_0101_0101 * (i + 1));
        }
        let (mut bad, mut rounds) = (0u64, 0u64);
        let start = tsc::now();
        while interrupt::count(0x40) < 30 && tsc::now() - start < tsc::micros(40_000_000) {
            let (low, high, x87): (u64, u64, f64);
            // SAFETY: reads 256 bytes of the arena and changes only the registers listed.
            unsafe {
                core::arch::asm!(
                    "movups xmm0, [{p}]", "movups xmm7, [{p} + 0x70]", "movups xmm15, [{p} + 0xF0]",
                    "fld1", "fldpi", "sti", "mov ecx, 20000",
                    "2: dec ecx", "jnz 2b",
                    "cli", "fmulp", "fstp qword ptr [{p} + 0x400]",
                    "pxor xmm0, xmm7", "pxor xmm0, xmm15", "movq {l}, xmm0", "psrldq xmm0, 8", "movq {h}, xmm0",
                    "movsd {x}, qword ptr [{p} + 0x400]",
                    p = in(reg) a.data, l = out(reg) low, h = out(reg) high, x = out(xmm_reg) x87,
                    out("ecx") _, out("xmm0") _, out("xmm7") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, options(nostack)
                );
            }
            let word = |i: u64| 0x0101_0101_0101_0101 * (i + 1);
            let want_low = word(0) ^ word(14) ^ word(30);
            let want_high = word(1) ^ word(15) ^ word(31);
            bad += u64::from(low != want_low || high != want_high || x87.to_bits() != core::f64::consts::PI.to_bits());
            rounds += 1;
        }
        apic::set(reg::LVT_TIMER, apic::MASKED);
        apic::set(reg::TIMER_INITIAL, 0);
        g.that("interrupted", interrupt::count(0x40) >= 30 && rounds > 0);
        g.eq("SSE and x87 registers kept", bad, 0);
        // Rounding mode and flags survive an exit to the runtime and back.
        let set = code64!("ldmxcsr [rdi]", "fldcw [rdi + 4]", "int3");
        let get = code64!("stmxcsr [rdi + 8]", "fnstcw [rdi + 12]", "fninit", "ldmxcsr [rdi + 16]", "int3");
        write::<u32>(a.data, 0x7F80);
        write::<u16>(a.data + 4, 0x0C7F);
        write::<u32>(a.data + 16, 0x1F80);
        a.user(set).enter();
        a.user(get).enter();
        g.eq("MXCSR", read::<u32>(a.data + 8), 0x7F80);
        g.eq("x87 control word", read::<u16>(a.data + 12), 0x0C7F);
    });
}

fn fxsave(suite: &mut Suite, a: &Arena) {
    suite.group("FXSAVE and FXRSTOR", |g| {
        fill(a.data, 4096, 0xEE);
        let code = code64!(
            "fninit",
            "fldpi",
            "fld1",
            "mov rax, 0x1122334455667788",
            "movq xmm3, rax",
            "movq xmm12, rax",
            "fxsave64 [rdi]",
            "fninit",
            "int3"
        );
        let got = a.user(code).enter();
        g.check(got == BP, format_args!("fxsave: {got}"));
        g.eq("control word", read::<u16>(a.data), 0x37F);
        g.eq("top of stack is 6", read::<u16>(a.data + 2) >> 11 & 7, 6);
        g.eq("abridged tag word", read::<u8>(a.data + 4), 0xC0);
        g.eq("MXCSR", read::<u32>(a.data + 24), 0x1F80);
        g.eq("ST0 = 1, significand", read::<u64>(a.data + 32), 1 << 63);
        g.eq("ST0 = 1, exponent", read::<u16>(a.data + 40), 0x3FFF);
        g.eq("ST1 = pi", read::<u64>(a.data + 48), 0xC90F_DAA2_2168_C235);
        g.eq(
            "XMM3",
            read::<u64>(a.data + 160 + 48),
            0x1122_3344_5566_7788,
        );
        g.eq(
            "XMM12",
            read::<u64>(a.data + 160 + 192),
            0x1122_3344_5566_7788,
        );
        g.eq(
            "software's bytes untouched",
            read::<u64>(a.data + 464),
            0xEEEE_EEEE_EEEE_EEEE,
        );
        write::<u64>(a.data + 160, 0xABCD);
        let mut c = a.user(code64!(
            "fxrstor64 [rdi]",
            "movq rax, xmm0",
            "fstp qword ptr [rdi + 0x400]",
            "fninit",
            "int3"
        ));
        c.enter();
        g.eq("XMM0 restored", c.rax, 0xABCD);
        g.eq(
            "ST0 restored",
            read::<u64>(a.data + 0x400),
            1.0f64.to_bits(),
        );
        write::<u32>(a.data + 24, 0x1_1F80);
        let got = a.user(code64!("fxrstor [rdi]")).enter();
        g.check(got == GP0, format_args!("reserved MXCSR bit: {got}"));
        write::<u32>(a.data + 24, 0x1F80);
        let mask = read::<u32>(a.data + 28);
        g.that(
            "MXCSR mask has the sixteen bits",
            mask & 0xFFFF == 0xFFFF || mask == 0,
        );
    });
}

/// Runs an XSAVE-family snippet with the component mask in EDX:EAX.
fn go(a: &Arena, code: &[u8], mask: u64) -> (caisson_guest_rt::Exit, u64) {
    let mut c = Context {
        rax: mask & 0xFFFF_FFFF,
        rdx: mask >> 32,
        ..a.user(code)
    };
    (c.enter(), c.rbx)
}

fn xsave(suite: &mut Suite, a: &Arena) {
    let init = code64!(
        "fninit",
        "xorps xmm0, xmm0",
        "xorps xmm1, xmm1",
        "xorps xmm2, xmm2",
        "xorps xmm3, xmm3",
        "int3"
    );
    suite.group("XSAVE and XRSTOR", |g| {
        let all = cpu::xgetbv(0);
        let avx = all & 4 != 0;
        a.user(init).enter();
        fill(a.data, 4096, 0xEE);
        fill(a.data + HEADER, 64, 0);
        let save = code64!(
            "mov rcx, 0x5A5A5A5A",
            "movq xmm1, rcx",
            "xsave64 [rdi]",
            "int3"
        );
        g.check(go(a, save, all).0 == BP, format_args!("XSAVE"));
        g.eq("XSTATE_BV has SSE", read::<u64>(a.data + HEADER) & 2, 2);
        g.eq("XMM1", read::<u64>(a.data + 176), 0x5A5A_5A5A);
        g.eq(
            "nothing else in the header",
            read::<u64>(a.data + HEADER + 8),
            0,
        );
        // Only the components asked for are written; the other bits stay.
        fill(a.data, 4096, 0xEE);
        fill(a.data + HEADER, 64, 0);
        write::<u64>(a.data + HEADER, 1);
        g.check(go(a, save, 2).0 == BP, format_args!("XSAVE of SSE"));
        g.eq("x87 area untouched", read::<u16>(a.data), 0xEEEE);
        g.eq("bit of x87 kept, SSE set", read::<u64>(a.data + HEADER), 3);
        // XRSTOR of a component whose bit is clear initialises it.
        write::<u64>(a.data + HEADER, 0u64);
        write::<u32>(a.data + 24, 0x1F80);
        let load = code64!(
            "mov rcx, -1",
            "movq xmm1, rcx",
            "xrstor64 [rdi]",
            "movq rbx, xmm1",
            "int3"
        );
        let (got, rbx) = go(a, load, 3);
        g.check(
            got == BP && rbx == 0,
            format_args!("XRSTOR initialises: {got}, {rbx:#x}"),
        );
        write::<u64>(a.data + HEADER, 2u64);
        write::<u64>(a.data + 176, 0x1234);
        let (got, rbx) = go(a, load, 3);
        g.check(
            got == BP && rbx == 0x1234,
            format_args!("XRSTOR loads: {got}, {rbx:#x}"),
        );
        let (got, rbx) = go(a, load, 1);
        g.check(
            got == BP && rbx == u64::MAX,
            format_args!("not asked for, not changed: {got}, {rbx:#x}"),
        );
        // Faults.
        let plain = code64!("xrstor [rdi]", "int3");
        for (what, offset, value) in [
            ("unsupported bit in XSTATE_BV", HEADER, 1u64 << 62),
            ("XCOMP_BV without compaction", HEADER + 8, 1),
            ("reserved header bytes", HEADER + 16, 1),
            ("bit 63 of XSTATE_BV", HEADER, 1 << 63),
        ] {
            fill(a.data + HEADER, 64, 0);
            write(a.data + offset, value);
            let got = go(a, plain, all).0;
            g.check(got == GP0, format_args!("{what}: {got}"));
        }
        fill(a.data + HEADER, 64, 0);
        write::<u64>(a.data + HEADER, 2u64);
        write::<u32>(a.data + 24, 0xFFFF_0000);
        g.check(go(a, plain, 2).0 == GP0, format_args!("reserved MXCSR bit"));
        write::<u32>(a.data + 24, 0x1F80);
        let mut c = Context {
            rax: all,
            rdi: DATA + 32,
            ..a.user(code64!("xsave [rdi]"))
        };
        let got = c.enter();
        g.check(
            got == GP0,
            format_args!("32-byte alignment is not enough: {got}"),
        );
        let got = a.user(&[0xF0, 0x0F, 0xAE, 0x27]).enter();
        g.check(got == UD, format_args!("LOCK XSAVE: {got}"));
        let mut c = Context {
            load: 4,
            cr4: cpu::cr4() & !cr::OSXSAVE,
            rax: all,
            ..a.user(code64!("xsave [rdi]"))
        };
        let got = c.enter();
        g.check(got == UD, format_args!("without OSXSAVE: {got}"));
        let mut c = Context {
            load: 1,
            cr0: cpu::cr0() | cr::TS,
            rax: all,
            ..a.user(code64!("xsave [rdi]"))
        };
        let got = c.enter();
        g.check(
            got == caisson_guest_rt::Exit::plain(7),
            format_args!("with TS: {got}"),
        );
        if avx {
            ymm(g, a);
        } else {
            let got = a.user(code64!("vaddps ymm0, ymm0, ymm0")).enter();
            g.check(got == UD, format_args!("AVX is masked: {got}"));
        }
    });
    suite.group("XSAVEOPT, XSAVEC, XSAVES", |g| {
        let all = cpu::xgetbv(0);
        let optional: [(&str, bool, &[u8]); 3] = [
            (
                "XSAVEOPT",
                has::xsaveopt(),
                code64!("xsaveopt [rdi]", "int3"),
            ),
            ("XSAVEC", has::xsavec(), code64!("xsavec [rdi]", "int3")),
            ("XSAVES", has::xsaves(), code64!("xsaves [rdi]", "int3")),
        ];
        for (name, offered, code) in optional {
            fill(a.data, 4096, 0);
            let got = Context {
                rax: all,
                ..a.kernel(code)
            }
            .enter();
            g.check(
                got == if offered { BP } else { UD },
                format_args!("{name} (offered: {offered}): {got}"),
            );
        }
        if has::xsaves() {
            let got = Context {
                rax: all,
                ..a.user(code64!("xsaves [rdi]"))
            }
            .enter();
            g.check(got == GP0, format_args!("XSAVES in ring 3: {got}"));
        }
        if has::xgetbv1() {
            a.user(init).enter();
            let mut c = a.user(code64!("fninit", "mov ecx, 1", "xgetbv", "int3"));
            c.enter();
            g.eq("XINUSE has nothing outside of XCR0", c.rax & !all, 0);
        }
        if !has::xsavec() {
            g.skip("CPUID offers no XSAVEC");
            return;
        }
        fill(a.data, 4096, 0xEE);
        let code = code64!(
            "fninit",
            "mov rcx, 0x77",
            "movq xmm1, rcx",
            "xsavec [rdi]",
            "int3"
        );
        g.check(go(a, code, 2).0 == BP, format_args!("XSAVEC of SSE"));
        g.eq("XSTATE_BV", read::<u64>(a.data + HEADER), 2);
        g.eq("XCOMP_BV", read::<u64>(a.data + HEADER + 8), 1 << 63 | 2);
        g.eq("XMM1", read::<u64>(a.data + 176), 0x77);
        let load = code64!(
            "mov rcx, -1",
            "movq xmm1, rcx",
            "xrstor [rdi]",
            "movq rbx, xmm1",
            "int3"
        );
        for i in 2..8 {
            write::<u64>(a.data + HEADER + i * 8, 0u64);
        }
        let (got, rbx) = go(a, load, 2);
        g.check(
            got == BP && rbx == 0x77,
            format_args!("XRSTOR of the compacted form: {got}, {rbx:#x}"),
        );
        write::<u64>(a.data + HEADER, 3u64);
        let (got, _) = go(a, load, 2);
        g.check(got == GP0, format_args!("XSTATE_BV beyond XCOMP_BV: {got}"));
    });
}

fn ymm(g: &mut Group, a: &Arena) {
    let offset = u64::from(cpuid(0xD, 2).ebx);
    fill(a.data, 4096, 0);
    for i in 0..4u64 {
        write(a.data + 0xE00 + i * 8, 0x1111 * (i + 1));
    }
    let code = code64!(
        "vmovups ymm9, [rdi + 0xE00]",
        "xsave [rdi]",
        "vzeroall",
        "int3"
    );
    g.check(go(a, code, 7).0 == BP, format_args!("XSAVE with AVX"));
    g.eq("XSTATE_BV has AVX", read::<u64>(a.data + HEADER) & 4, 4);
    g.eq(
        "lower half in the legacy area",
        read::<u64>(a.data + 160 + 9 * 16),
        0x1111,
    );
    g.eq(
        "upper half in the AVX area",
        read::<u64>(a.data + offset + 9 * 16 + 8),
        0x4444,
    );
    let code = code64!(
        "xrstor [rdi]",
        "vmovups [rdi + 0xE40], ymm9",
        "vzeroall",
        "int3"
    );
    g.check(go(a, code, 7).0 == BP, format_args!("XRSTOR with AVX"));
    g.eq("restored, low", read::<u64>(a.data + 0xE40), 0x1111);
    g.eq("restored, high", read::<u64>(a.data + 0xE58), 0x4444);
    // Legacy SSE keeps the upper half, VEX.128 clears it.
    let code = code64!(
        "vmovups ymm2, [rdi + 0xE00]",
        "vmovups ymm3, [rdi + 0xE00]",
        "paddq xmm2, xmm2",
        "vpaddq xmm3, xmm3, xmm3",
        "vmovups [rdi + 0xE40], ymm2",
        "vmovups [rdi + 0xE80], ymm3",
        "vzeroall",
        "int3"
    );
    a.user(code).enter();
    g.eq("legacy SSE: sum", read::<u64>(a.data + 0xE40), 0x2222);
    g.eq(
        "legacy SSE keeps the upper half",
        read::<u64>(a.data + 0xE58),
        0x4444,
    );
    g.eq(
        "VEX.128 clears the upper half",
        read::<u64>(a.data + 0xE98),
        0,
    );
    let mut c = Context {
        rdi: DATA + 1,
        ..a.user(code64!("vmovaps ymm0, [rdi]"))
    };
    let got = c.enter();
    g.check(got == GP0, format_args!("VMOVAPS misaligned: {got}"));
    let mut c = Context {
        rdi: DATA + 0x3FF0,
        ..a.user(code64!("vmovups ymm0, [rdi]"))
    };
    let got = c.enter();
    g.check(
        got.vector == 14 && c.cr2 == DATA + 0x4000,
        format_args!("VMOVUPS into a hole: {got} cr2 {:#x}", c.cr2),
    );
    let mut c = Context {
        load: 1,
        cr0: cpu::cr0() | cr::TS,
        ..a.user(code64!("vaddps ymm0, ymm0, ymm0"))
    };
    let got = c.enter();
    g.check(
        got == caisson_guest_rt::Exit::plain(7),
        format_args!("AVX with TS: {got}"),
    );
    let got = a
        .compat(
            true,
            caisson_guest_rt::code32!("vaddps ymm0, ymm0, ymm0", "int3"),
        )
        .enter();
    g.check(got == BP, format_args!("AVX in compatibility mode: {got}"));
}
