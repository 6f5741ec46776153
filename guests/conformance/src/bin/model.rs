//! What CPUID does not offer is not there: instructions raise #UD, bits of CR4
//! and XCR0 are reserved, MSRs fault; what it offers is there. Meant for `soft`
//! under each processor model: hardware virtualisation cannot take an instruction
//! away that has no switch.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, GP0, UD, load};
use caisson_guest_rt::cpu::{self, cpuid, cr, has};
use caisson_guest_rt::memory::fill;
use caisson_guest_rt::paging::{Arena, CODE, P, PAGES, STACK, U, W};
use caisson_guest_rt::{Context, Suite, code64, guest};

guest!("model", main);

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

fn offered(leaf: u32, subleaf: u32, register: usize, bit: u32) -> bool {
    let r = cpuid(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx][register] >> bit & 1 != 0
}

/// A bit of CPUID: leaf, subleaf, register, number.
type CpuidBit = (u32, u32, usize, u32);

/// An instruction, where CPUID offers it, and its encoding: on registers, or on
/// memory at RDI.
type Case = (&'static str, CpuidBit, &'static [u8]);

#[rustfmt::skip]
const INSTRUCTIONS: &[Case] = &[
    ("haddps", (1, 0, ECX, 0), &[0xF2, 0x0F, 0x7C, 0xC0]),
    ("pclmulqdq", (1, 0, ECX, 1), &[0x66, 0x0F, 0x3A, 0x44, 0xC0, 0x00]),
    ("pabsb", (1, 0, ECX, 9), &[0x66, 0x0F, 0x38, 0x1C, 0xC0]),
    ("cmpxchg16b", (1, 0, ECX, 13), &[0x48, 0x0F, 0xC7, 0x0F]),
    ("pmulld", (1, 0, ECX, 19), &[0x66, 0x0F, 0x38, 0x40, 0xC0]),
    ("pcmpgtq", (1, 0, ECX, 20), &[0x66, 0x0F, 0x38, 0x37, 0xC0]),
    ("crc32", (1, 0, ECX, 20), &[0xF2, 0x0F, 0x38, 0xF0, 0xC0]),
    ("movbe", (1, 0, ECX, 22), &[0x0F, 0x38, 0xF0, 0x07]),
    ("popcnt", (1, 0, ECX, 23), &[0xF3, 0x0F, 0xB8, 0xC0]),
    ("aesenc", (1, 0, ECX, 25), &[0x66, 0x0F, 0x38, 0xDC, 0xC0]),
    ("xsave", (1, 0, ECX, 26), &[0x0F, 0xAE, 0x27]),
    ("rdrand", (1, 0, ECX, 30), &[0x0F, 0xC7, 0xF0]),
    ("vaddps xmm", (1, 0, ECX, 28), &[0xC5, 0xF8, 0x58, 0xC0]),
    ("vfmadd132ps", (1, 0, ECX, 12), &[0xC4, 0xE2, 0x79, 0x98, 0xC0]),
    ("vcvtph2ps", (1, 0, ECX, 29), &[0xC4, 0xE2, 0x79, 0x13, 0xC0]),
    ("andn", (7, 0, EBX, 3), &[0xC4, 0xE2, 0x78, 0xF2, 0xC0]),
    ("vpaddd ymm", (7, 0, EBX, 5), &[0xC5, 0xFD, 0xFE, 0xC0]),
    ("rorx", (7, 0, EBX, 8), &[0xC4, 0xE3, 0x7B, 0xF0, 0xC0, 0x01]),
    ("rdseed", (7, 0, EBX, 18), &[0x0F, 0xC7, 0xF8]),
    ("adcx", (7, 0, EBX, 19), &[0x66, 0x0F, 0x38, 0xF6, 0xC0]),
    ("clflushopt", (7, 0, EBX, 23), &[0x66, 0x0F, 0xAE, 0x3F]),
    ("clwb", (7, 0, EBX, 24), &[0x66, 0x0F, 0xAE, 0x37]),
    ("sha1nexte", (7, 0, EBX, 29), &[0x0F, 0x38, 0xC8, 0xC0]),
    ("vaddps zmm", (7, 0, EBX, 16), &[0x62, 0xF1, 0x7C, 0x48, 0x58, 0xC0]),
    ("gf2p8mulb", (7, 0, ECX, 8), &[0x66, 0x0F, 0x38, 0xCF, 0xC0]),
    ("vaesenc ymm", (7, 0, ECX, 9), &[0xC4, 0xE2, 0x7D, 0xDC, 0xC0]),
    ("vpclmulqdq ymm", (7, 0, ECX, 10), &[0xC4, 0xE3, 0x7D, 0x44, 0xC0, 0x00]),
    ("rdpid", (7, 0, ECX, 22), &[0xF3, 0x0F, 0xC7, 0xF8]),
    ("serialize", (7, 0, EDX, 14), &[0x0F, 0x01, 0xE8]),
    ("vpdpbusd", (7, 1, EAX, 4), &[0xC4, 0xE2, 0x79, 0x50, 0xC0]),
    ("xsaveopt", (0xD, 1, EAX, 0), &[0x0F, 0xAE, 0x37]),
    ("xsavec", (0xD, 1, EAX, 1), &[0x0F, 0xC7, 0x27]),
    ("rdtscp", (0x8000_0001, 0, EDX, 27), &[0x0F, 0x01, 0xF9]),
];

/// Bits of CR4, and where CPUID offers what they switch on.
#[rustfmt::skip]
const CR4_BITS: &[(&str, u64, CpuidBit)] = &[
    ("VME", cr::VME, (1, 0, EDX, 1)),
    ("UMIP", cr::UMIP, (7, 0, ECX, 2)),
    ("FSGSBASE", cr::FSGSBASE, (7, 0, EBX, 0)),
    ("PCIDE", cr::PCIDE, (1, 0, ECX, 17)),
    ("OSXSAVE", cr::OSXSAVE, (1, 0, ECX, 26)),
    ("SMEP", cr::SMEP, (7, 0, EBX, 7)),
    ("SMAP", cr::SMAP, (7, 0, EBX, 20)),
    ("PKE", cr::PKE, (7, 0, ECX, 3)),
    ("CET", cr::CET, (7, 0, ECX, 7)),
];

fn main(suite: &mut Suite) {
    let a = Arena::new();
    // SMEP and SMAP, once on, keep the kernel out of the user's pages.
    let map = |bits| {
        a.space.map_range(CODE, a.code, PAGES, bits);
        a.space.map_range(STACK, a.stack, PAGES, bits);
        a.space.activate();
    };
    map(P | W);
    suite.group("bits of CR4", |g| {
        for (name, bit, (leaf, subleaf, register, feature)) in CR4_BITS {
            let mut c = Context {
                rax: cpu::cr4() | bit,
                rcx: cpu::cr4(),
                ..a.kernel(code64!("mov cr4, rax", "mov cr4, rcx", "int3"))
            };
            let got = c.enter();
            let want = if offered(*leaf, *subleaf, *register, *feature) {
                BP
            } else {
                GP0
            };
            g.check(got == want, format_args!("{name}: got {got}"));
        }
    });
    let components = if has::xsave() {
        cpu::set_cr4(cpu::cr4() | cr::OSXSAVE);
        let r = cpuid(0xD, 0);
        let components = u64::from(r.edx) << 32 | u64::from(r.eax);
        cpu::xsetbv(0, components);
        components
    } else {
        0
    };
    map(P | W | U);
    suite.group("instructions", |g| {
        fill(a.data, 4096, 0);
        for (name, (leaf, subleaf, register, bit), bytes) in INSTRUCTIONS {
            let mut code = [0xCC; 16];
            code[..bytes.len()].copy_from_slice(bytes);
            let mut c = a.user(&code);
            c.rax = 0;
            c.rdx = 0;
            let got = c.enter();
            let there = offered(*leaf, *subleaf, *register, *bit);
            let want = if there { BP } else { UD };
            g.check(
                got == want,
                format_args!(
                    "{name}, {}: got {got}",
                    if there { "offered" } else { "masked" }
                ),
            );
        }
        let fsgsbase = has::fsgsbase();
        let mut c = Context {
            load: load::CR4,
            cr4: cpu::cr4() | if fsgsbase { cr::FSGSBASE } else { 0 },
            ..a.user(code64!("rdfsbase rax", "int3"))
        };
        let got = c.enter();
        let want = if fsgsbase { BP } else { UD };
        g.check(got == want, format_args!("rdfsbase: got {got}"));
        // The encodings of LZCNT and TZCNT are BSR and BSF to those who do not know them.
        let mut c = Context {
            rax: 1 << 4,
            ..a.user(&[0xF3, 0x0F, 0xBD, 0xC0, 0xCC])
        };
        let got = c.enter();
        let want = if offered(0x8000_0001, 0, ECX, 5) {
            27
        } else {
            4
        };
        g.check(
            got == BP && c.rax == want,
            format_args!("lzcnt: got {got}, {}", c.rax),
        );
    });
    suite.group("XCR0 and XGETBV", |g| {
        if !has::xsave() {
            let got = a.kernel(code64!("xgetbv", "int3")).enter();
            g.check(got == UD, format_args!("XGETBV without XSAVE: got {got}"));
            return;
        }
        for bit in 2..19 {
            let wanted = components | 1 << bit;
            let mut c = Context {
                rcx: 0,
                rax: wanted & 0xFFFF_FFFF,
                rdx: wanted >> 32,
                ..a.kernel(code64!("xsetbv", "int3"))
            };
            let got = c.enter();
            let want = if components >> bit & 1 != 0 { BP } else { GP0 };
            g.check(got == want, format_args!("XCR0 bit {bit}: got {got}"));
        }
        let mut c = Context {
            rcx: 1,
            ..a.kernel(code64!("xgetbv", "int3"))
        };
        let got = c.enter();
        let want = if has::xgetbv1() { BP } else { GP0 };
        g.check(got == want, format_args!("XGETBV with ECX=1: got {got}"));
        let all = cpuid(0xD, 0);
        let end = (2..63u32)
            .filter(|bit| components >> bit & 1 != 0)
            .map(|bit| cpuid(0xD, bit))
            .map(|r| r.eax + r.ebx)
            .max();
        g.eq(
            "the area ends with the last component",
            all.ecx,
            end.unwrap_or(576),
        );
        g.eq("and has that size, with all enabled", all.ebx, all.ecx);
    });
    suite.group("MSRs", |g| {
        let speculation = offered(7, 0, EDX, 26);
        for (name, index, there) in [
            ("IA32_SPEC_CTRL", 0x48u64, speculation),
            ("IA32_ARCH_CAPABILITIES", 0x10A, offered(7, 0, EDX, 29)),
        ] {
            let mut c = Context {
                rcx: index,
                ..a.kernel(code64!("rdmsr", "int3"))
            };
            let got = c.enter();
            let want = if there { BP } else { GP0 };
            g.check(got == want, format_args!("reading {name}: got {got}"));
            if index == 0x10A && there {
                // "IBRS need be set only once" is nothing for who cannot set it.
                g.check(
                    speculation || c.rax & 2 == 0,
                    format_args!("{name} says {:#x}", c.rax),
                );
            }
        }
        for (name, index, value, there) in [
            ("IA32_SPEC_CTRL", 0x48u64, 1u64, speculation),
            ("IA32_PRED_CMD", 0x49, 1, speculation),
            ("IA32_SPEC_CTRL, reserved", 0x48, 1 << 20, false),
        ] {
            let mut c = Context {
                rcx: index,
                rax: value,
                rdx: 0,
                ..a.kernel(code64!("wrmsr", "int3"))
            };
            let got = c.enter();
            let want = if there { BP } else { GP0 };
            g.check(got == want, format_args!("writing {name}: got {got}"));
        }
    });
}
