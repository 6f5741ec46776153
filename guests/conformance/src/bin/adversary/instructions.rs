//! Instructions that are not offered, and random ones.

use crate::Random;
use caisson_guest_rt::apic::reg;
use caisson_guest_rt::context::{BP, Exit, GP0, UD};
use caisson_guest_rt::cpu::{has, msr};
use caisson_guest_rt::paging::{Arena, CODE, DATA};
use caisson_guest_rt::{Context, Suite, apic, code64, cpu, guest, interrupt};

pub(crate) fn masked_instructions(suite: &mut Suite, a: &Arena) {
    suite.group("instructions that CPUID does not offer", |g| {
        // Name, encoding, whether CPUID offers it.
        let cases: &[(&str, &[u8], bool)] = &[
            ("vmcall", &[0x0F, 0x01, 0xC1], true),
            ("vmlaunch", &[0x0F, 0x01, 0xC2], has::vmx()),
            ("vmresume", &[0x0F, 0x01, 0xC3], has::vmx()),
            ("vmxoff", &[0x0F, 0x01, 0xC4], has::vmx()),
            ("vmread", &[0x0F, 0x78, 0xC0], has::vmx()),
            ("vmwrite", &[0x0F, 0x79, 0xC0], has::vmx()),
            ("vmptrld", &[0x0F, 0xC7, 0x37], has::vmx()),
            ("vmclear", &[0x66, 0x0F, 0xC7, 0x37], has::vmx()),
            ("vmxon", &[0xF3, 0x0F, 0xC7, 0x37], has::vmx()),
            ("invept", &[0x66, 0x0F, 0x38, 0x80, 0x07], has::vmx()),
            ("invvpid", &[0x66, 0x0F, 0x38, 0x81, 0x07], has::vmx()),
            ("vmrun", &[0x0F, 0x01, 0xD8], has::svm()),
            ("vmload", &[0x0F, 0x01, 0xDA], has::svm()),
            ("vmsave", &[0x0F, 0x01, 0xDB], has::svm()),
            ("stgi", &[0x0F, 0x01, 0xDC], has::svm()),
            ("clgi", &[0x0F, 0x01, 0xDD], has::svm()),
            ("skinit", &[0x0F, 0x01, 0xDE], has::svm()),
            ("invlpga", &[0x0F, 0x01, 0xDF], has::svm()),
            ("encls", &[0x0F, 0x01, 0xCF], has::sgx()),
            ("enclu", &[0x0F, 0x01, 0xD7], has::sgx()),
            ("enclv", &[0x0F, 0x01, 0xC0], has::sgx()),
            ("xbegin", &[0xC7, 0xF8, 0, 0, 0, 0], has::rtm()),
            ("xend", &[0x0F, 0x01, 0xD5], has::rtm()),
            ("xtest", &[0x0F, 0x01, 0xD6], has::rtm() || has::hle()),
            ("xabort", &[0xC6, 0xF8, 0x00], has::rtm()),
            ("monitor", &[0x0F, 0x01, 0xC8], has::monitor()),
            ("mwait", &[0x0F, 0x01, 0xC9], has::monitor()),
            ("monitorx", &[0x0F, 0x01, 0xFA], has::monitorx()),
            ("mwaitx", &[0x0F, 0x01, 0xFB], has::monitorx()),
            (
                "clzero",
                &[0x0F, 0x01, 0xFC],
                cpu::cpuid(0x8000_0008, 0).ebx & 1 != 0,
            ),
            ("rdpkru", &[0x0F, 0x01, 0xEE], has::pku()),
            ("wrpkru", &[0x0F, 0x01, 0xEF], has::pku()),
            ("serialize", &[0x0F, 0x01, 0xE8], has::serialize()),
            ("umonitor", &[0xF3, 0x0F, 0xAE, 0xF0], has::waitpkg()),
            ("umwait", &[0xF2, 0x0F, 0xAE, 0xF0], has::waitpkg()),
            ("tpause", &[0x66, 0x0F, 0xAE, 0xF0], has::waitpkg()),
            ("setssbsy", &[0xF3, 0x0F, 0x01, 0xE8], has::cet_ss()),
            ("saveprevssp", &[0xF3, 0x0F, 0x01, 0xEA], has::cet_ss()),
            ("clrssbsy", &[0xF3, 0x0F, 0xAE, 0x37], has::cet_ss()),
            ("wrss", &[0x0F, 0x38, 0xF6, 0x07], has::cet_ss()),
            ("wruss", &[0x66, 0x0F, 0x38, 0xF5, 0x07], has::cet_ss()),
            (
                "ldtilecfg",
                &[0xC4, 0xE2, 0x78, 0x49, 0x07],
                has::amx_tile(),
            ),
            (
                "tilerelease",
                &[0xC4, 0xE2, 0x78, 0x49, 0xC0],
                has::amx_tile(),
            ),
            ("tilezero", &[0xC4, 0xE2, 0x7B, 0x49, 0xC0], has::amx_tile()),
            ("tdpbssd", &[0xC4, 0xE2, 0x6B, 0x5E, 0xC1], has::amx_tile()),
            ("vaddps zmm", &[0x62, 0xF1, 0x74, 0x48, 0x58, 0xC0], false),
            (
                "vaddps xmm, EVEX",
                &[0x62, 0xF1, 0x74, 0x08, 0x58, 0xC0],
                false,
            ),
            ("kmovw", &[0xC5, 0xF8, 0x92, 0xC0], false),
            ("enqcmd", &[0xF2, 0x0F, 0x38, 0xF8, 0x07], has::enqcmd()),
            (
                "movdir64b",
                &[0x66, 0x0F, 0x38, 0xF8, 0x07],
                has::movdir64b(),
            ),
            ("movdiri", &[0x0F, 0x38, 0xF9, 0x07], has::movdiri()),
            (
                "loadiwkey",
                &[0xF3, 0x0F, 0x38, 0xDC, 0xC1],
                has::key_locker(),
            ),
            (
                "aesenc128kl",
                &[0xF3, 0x0F, 0x38, 0xDC, 0x07],
                has::key_locker(),
            ),
            ("getsec", &[0x0F, 0x37], false),
            ("rsm", &[0x0F, 0xAA], false),
            ("femms", &[0x0F, 0x0E], has::amd_3dnow()),
            ("3DNow!", &[0x0F, 0x0F, 0xC0, 0x9E], has::amd_3dnow()),
            ("extrq", &[0x66, 0x0F, 0x79, 0xC1], has::sse4a()),
            ("movntss", &[0xF3, 0x0F, 0x2B, 0x07], has::sse4a()),
            (
                "XOP vpmacssww",
                &[0x8F, 0xE8, 0x78, 0x85, 0xC0, 0x00],
                has::xop(),
            ),
            (
                "FMA4 vfmaddps",
                &[0xC4, 0xE3, 0xF9, 0x68, 0xC0, 0x00],
                has::fma4(),
            ),
            ("pconfig", &[0x0F, 0x01, 0xC5], false),
            (
                "invlpgb",
                &[0x0F, 0x01, 0xFE],
                cpu::cpuid(0x8000_0008, 0).ebx >> 3 & 1 != 0,
            ),
            (
                "tlbsync",
                &[0x0F, 0x01, 0xFF],
                cpu::cpuid(0x8000_0008, 0).ebx >> 3 & 1 != 0,
            ),
            (
                "rdpru",
                &[0x0F, 0x01, 0xFD],
                cpu::cpuid(0x8000_0008, 0).ebx >> 4 & 1 != 0,
            ),
            ("hreset", &[0xF3, 0x0F, 0x3A, 0xF0, 0xC0, 0x00], false),
            ("uiret", &[0xF3, 0x0F, 0x01, 0xEC], false),
            ("wrmsrns", &[0x0F, 0x01, 0xC6], false),
            ("bndmk", &[0xF3, 0x0F, 0x1B, 0x07], true),
        ];
        for (name, bytes, offered) in cases {
            if *offered {
                continue;
            }
            for user in [false, true] {
                let mut code = [0xCC; 24];
                code[..bytes.len()].copy_from_slice(bytes);
                let mut c = if user { a.user(&code) } else { a.kernel(&code) };
                let got = c.enter();
                g.check(
                    got == UD && c.rip == CODE,
                    format_args!("{name} in ring {}: {got}", if user { 3 } else { 0 }),
                );
            }
        }
        for (name, code) in [
            ("invd", code64!("invd", "int3")),
            ("wbinvd", code64!("wbinvd", "int3")),
        ] {
            let got = a.kernel(code).enter();
            g.check(got == BP, format_args!("{name} in ring 0: {got}"));
            let got = a.user(code).enter();
            g.check(got == GP0, format_args!("{name} in ring 3: {got}"));
        }
        // A system call instruction must reach the guest's kernel, never the host's.
        cpu::wrmsr(msr::EFER, cpu::rdmsr(msr::EFER) & !msr::EFER_SCE);
        for (name, code) in [
            ("syscall", code64!("syscall")),
            ("int 0x80", code64!("int 0x80")),
        ] {
            // exit_group, kill, munmap by number.
            for number in [231u64, 60, 62, 11, 1, 252, 37] {
                let mut c = Context {
                    rax: number,
                    rdi: DATA,
                    rsi: 4096,
                    ..a.user(code)
                };
                let got = c.enter();
                let want = if name == "syscall" {
                    UD
                } else {
                    Exit::plain(0x80)
                };
                g.check(got == want, format_args!("{name} {number}: {got}"));
            }
        }
    });
}

pub(crate) fn random_code(suite: &mut Suite, a: &Arena) {
    suite.group("random bytes as code", |g| {
        if has::qemu_tcg() {
            g.skip("QEMU TCG does not come back from some of them");
            return;
        }
        let mut random = Random(0x0DDB_1A5E_5BAD_5EED);
        let mut exits = 0u64;
        // A budget against endless loops: the timer takes the processor back.
        apic::set(reg::TIMER_DIVIDE, apic::DIVIDE_BY_1);
        apic::set(reg::LVT_TIMER, 0x41);
        for round in 0..6000u64 {
            let mut code = [0u8; 64];
            for chunk in code.chunks_mut(8) {
                chunk.copy_from_slice(&random.next().to_le_bytes());
            }
            if round % 3 == 0 {
                code[0] = 0x0F;
            }
            if round % 7 == 0 {
                code[0] = [0xC4, 0xC5, 0x62, 0x8F][round as usize % 4];
            }
            let compat = round % 5 == 0;
            let mut c = if compat {
                a.compat(true, &code)
            } else {
                a.user(&code)
            };
            c.rflags |= cpu::flags::IF;
            c.rax = random.next();
            c.rcx = random.next() & 0xFFF;
            c.rdx = random.next();
            c.rbx = random.next();
            c.rsi = DATA + random.next() % 0x4000;
            apic::set(reg::TIMER_INITIAL, 200_000);
            let got = c.enter();
            apic::set(reg::TIMER_INITIAL, 0);
            if apic::bit(reg::ISR, 0x41) {
                apic::eoi();
            }
            exits += u64::from(got.vector <= 0xFF || got.vector == 0x100);
            // Whatever it did, it did in ring 3.
            if c.cs & 3 != 3 {
                g.check(
                    false,
                    format_args!(
                        "round {round} ended in ring {}: {got} cs {:#x}",
                        c.cs & 3,
                        c.cs
                    ),
                );
            }
        }
        // A late timer interrupt must not surprise the next test.
        cpu::set_dr7(0x400);
        interrupt::set_handler(0x41, |_| apic::eoi());
        cpu::interrupt_window();
        apic::set(reg::LVT_TIMER, apic::MASKED | 0x41);
        g.eq("every round came back", exits, 6000);
        let state = code64!(
            "fninit",
            "mov dword ptr [rdi], 0x1F80",
            "ldmxcsr [rdi]",
            "int3"
        );
        g.check(a.user(state).enter() == BP, format_args!("state reset"));
    });
}
