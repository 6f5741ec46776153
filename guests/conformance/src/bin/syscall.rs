//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS, with the corners in which
//! Intel's and AMD's processors differ decided by the CPUID vendor.
//!
//! QEMU TCG 7.2 fails this: it does not check addresses in MSRs for being
//! canonical and loses arithmetic flags in SYSCALL.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit, GP0, SYSCALL_VECTOR, UD, syscall_address};
use caisson_guest_rt::cpu::{flags, has, msr, rdmsr, wrmsr};
use caisson_guest_rt::memory::write_bytes;
use caisson_guest_rt::paging::{self, Arena, CODE, DATA, STACK_TOP};
use caisson_guest_rt::percpu::sel;
use caisson_guest_rt::{Context, Suite, code32, code64, guest};

guest!("syscall", main);

const NON_CANONICAL: u64 = 0x8000_0000_0000;
/// Ring-0 alias of the arena's code page: where SYSENTER lands.
const KERNEL_ALIAS: u64 = 0x4030_0000;
/// SYSRET's base selector: 32-bit user code, data, 64-bit user code.
const USER_BASE: u64 = 0x18;

fn main(suite: &mut Suite) {
    let a = Arena::new();
    a.space.map(KERNEL_ALIAS, a.code + 0x1000, 1, paging::P);
    wrmsr(msr::STAR, USER_BASE << 48 | u64::from(sel::CODE64) << 32);
    wrmsr(msr::LSTAR, syscall_address());
    wrmsr(msr::CSTAR, syscall_address());
    wrmsr(msr::SFMASK, flags::IF | flags::DF | flags::TF | flags::AC);
    let on = rdmsr(msr::EFER) | msr::EFER_SCE;
    wrmsr(msr::EFER, on);
    let entered = Exit::plain(SYSCALL_VECTOR);

    suite.group("SYSCALL", |g| {
        let code = code64!("syscall");
        let user_flags = flags::FIXED | flags::DF | flags::CF | flags::AC | flags::ID;
        let mut c = Context {
            rcx: 1,
            r11: 2,
            rflags: user_flags,
            ..a.user(code)
        };
        g.run("from ring 3", &mut c, entered, CODE + 2);
        g.eq("RCX = next RIP", c.rcx, CODE + 2);
        g.eq("R11 = RFLAGS", c.r11, user_flags);
        g.eq(
            "RFLAGS masked",
            c.entry_rflags,
            user_flags & !(flags::DF | flags::AC),
        );
        g.eq("CS", c.cs, sel::CODE64.into());
        g.eq("SS", c.ss, sel::DATA.into());
        g.eq("RSP untouched", c.rsp, STACK_TOP);
        g.run("from ring 0", &mut a.kernel(code), entered, CODE + 2);
        let mut c = Context {
            rflags: flags::FIXED | flags::RF,
            ..a.user(code)
        };
        g.run("with RF", &mut c, entered, CODE + 2);
        g.eq("R11 without RF", c.r11 & flags::RF, 0);
        wrmsr(msr::EFER, on & !msr::EFER_SCE);
        g.run("without EFER.SCE", &mut a.user(code), UD, CODE);
        g.run(
            "SYSRET without EFER.SCE",
            &mut a.kernel(code64!("sysretq")),
            UD,
            CODE,
        );
        wrmsr(msr::EFER, on);
        if !has::amd_vendor() {
            g.run(
                "compatibility mode: Intel raises #UD",
                &mut a.compat(true, code32!(".byte 0x0F, 0x05")),
                UD,
                CODE,
            );
        } else {
            let mut c = a.compat(true, code32!(".byte 0x0F, 0x05"));
            g.run(
                "compatibility mode: AMD goes to CSTAR",
                &mut c,
                entered,
                CODE + 2,
            );
        }
    });
    suite.group("SYSRET", |g| {
        a.load_at(0x800, code64!("int3"));
        let target = CODE + 0x800;
        let ret64 = code64!("sysretq");
        let ret32 = code64!(".byte 0x0F, 0x07");
        let all = 0x27_7FD7u64 & !(flags::TF | flags::VM | flags::IOPL3 | flags::IF | flags::NT);
        let mut c = Context {
            rcx: target,
            r11: all,
            ..a.kernel(ret64)
        };
        g.run("to 64-bit", &mut c, BP, target + 1);
        g.eq("CS", c.cs, (USER_BASE + 16) | 3);
        g.eq("SS", c.ss, (USER_BASE + 8) | 3);
        g.eq(
            "flags: RF and VM cleared, bit 1 set",
            c.rflags,
            (all | 2) & !(flags::RF | flags::VM),
        );
        g.eq("RSP untouched", c.rsp, STACK_TOP);
        let mut c = Context {
            rcx: target | 0xABCD << 32,
            r11: 2,
            ..a.kernel(ret32)
        };
        g.run("to 32-bit", &mut c, BP, target + 1);
        g.eq("CS", c.cs, USER_BASE | 3);
        g.eq("SS", c.ss, (USER_BASE + 8) | 3);
        g.run(
            "in ring 3",
            &mut Context {
                rcx: target,
                ..a.user(ret64)
            },
            GP0,
            CODE,
        );
        let mut c = Context {
            rcx: NON_CANONICAL,
            r11: 2,
            ..a.kernel(ret64)
        };
        let got = c.enter();
        if has::amd_vendor() {
            g.check(
                got == GP0 && c.cs & 3 == 3,
                format_args!("non-canonical RIP, AMD: got {got} cs {:#x}", c.cs),
            );
        } else {
            g.check(
                got == GP0 && c.cs & 3 == 0 && c.rip == CODE,
                format_args!(
                    "non-canonical RIP, Intel: got {got} cs {:#x} rip {:#x}",
                    c.cs, c.rip
                ),
            );
        }
        // A trap flag restored by SYSRET traps after the first user instruction or before it.
        a.load_at(0x900, code64!("nop", "nop", "int3"));
        let mut c = Context {
            rcx: CODE + 0x900,
            r11: 2 | flags::TF,
            ..a.kernel(ret64)
        };
        let got = c.enter();
        g.check(
            got == Exit::plain(1) && (c.rip == CODE + 0x900 || c.rip == CODE + 0x901),
            format_args!("TF in R11: got {got} at {:#x}", c.rip),
        );
    });
    suite.group("MSR rules", |g| {
        let write = |index: u32, value: u64| {
            let mut c = a.kernel(code64!("wrmsr", "int3"));
            c.rcx = index.into();
            c.rax = value & 0xFFFF_FFFF;
            c.rdx = value >> 32;
            c.enter()
        };
        for index in [
            msr::LSTAR,
            msr::CSTAR,
            msr::FS_BASE,
            msr::GS_BASE,
            msr::KERNEL_GS_BASE,
            msr::SYSENTER_ESP,
            msr::SYSENTER_EIP,
        ] {
            let old = rdmsr(index);
            for bad in [NON_CANONICAL, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63] {
                let got = write(index, bad);
                // AMD's SYSENTER registers hold 32 bits and check nothing.
                let lax =
                    has::amd_vendor() && matches!(index, msr::SYSENTER_ESP | msr::SYSENTER_EIP);
                g.check(
                    got == GP0 || lax,
                    format_args!("msr {index:#x} = {bad:#x}: got {got}"),
                );
            }
            g.check(
                write(index, 0xFFFF_8000_0000_1000) == BP,
                format_args!("msr {index:#x} canonical"),
            );
            wrmsr(index, old);
        }
        wrmsr(msr::LSTAR, syscall_address());
    });
    suite.group("SYSENTER", |g| {
        if !has::sep() {
            g.skip("CPUID offers no SYSENTER");
            return;
        }
        write_bytes(a.code + 0x1000, code64!("int3"));
        wrmsr(msr::SYSENTER_CS, sel::CODE64.into());
        wrmsr(msr::SYSENTER_EIP, KERNEL_ALIAS);
        wrmsr(msr::SYSENTER_ESP, STACK_TOP - 0x100);
        let enter = code64!("sysenter");
        if has::amd_vendor() {
            // AMD processors have neither in long mode.
            g.run("invalid in long mode (AMD)", &mut a.user(enter), UD, CODE);
            g.run(
                "SYSEXIT invalid in long mode (AMD)",
                &mut a.kernel(code64!("sysexit")),
                UD,
                CODE,
            );
            return;
        }
        let mut c = Context {
            rflags: flags::FIXED | flags::CF,
            ..a.user(enter)
        };
        g.run("from ring 3", &mut c, BP, KERNEL_ALIAS + 1);
        g.eq("CS", c.cs, sel::CODE64.into());
        g.eq("SS", c.ss, sel::DATA.into());
        g.eq("RSP", c.rsp, STACK_TOP - 0x100);
        g.eq("flags kept but IF", c.rflags, flags::FIXED | flags::CF);
        g.run(
            "from compatibility mode",
            &mut a.compat(true, code32!("sysenter")),
            BP,
            KERNEL_ALIAS + 1,
        );
        wrmsr(msr::SYSENTER_CS, 0);
        g.run("null CS", &mut a.user(enter), GP0, CODE);
        g.run(
            "SYSEXIT with null CS",
            &mut a.kernel(code64!("sysexit")),
            GP0,
            CODE,
        );
        wrmsr(msr::SYSENTER_CS, sel::CODE64.into());
        a.load_at(0x800, code64!("int3"));
        let mut c = Context {
            rdx: CODE + 0x800,
            rcx: STACK_TOP - 64,
            ..a.kernel(code64!(".byte 0x48, 0x0F, 0x35"))
        };
        g.run("SYSEXIT to 64-bit", &mut c, BP, CODE + 0x801);
        g.eq("CS + 32", c.cs, u64::from(sel::CODE64) + 32 + 3);
        g.eq("SS + 40", c.ss, u64::from(sel::CODE64) + 40 + 3);
        g.eq("RSP = RCX", c.rsp, STACK_TOP - 64);
        let mut c = Context {
            rdx: CODE + 0x800 | 1 << 40,
            rcx: STACK_TOP - 64,
            ..a.kernel(code64!("sysexit"))
        };
        g.run("SYSEXIT to 32-bit", &mut c, BP, CODE + 0x801);
        g.eq("CS + 16", c.cs, u64::from(sel::CODE64) + 16 + 3);
        g.run(
            "SYSEXIT in ring 3",
            &mut a.user(code64!("sysexit")),
            GP0,
            CODE,
        );
        let mut c = Context {
            rdx: NON_CANONICAL,
            ..a.kernel(code64!(".byte 0x48, 0x0F, 0x35"))
        };
        g.run("SYSEXIT to a non-canonical RIP", &mut c, GP0, CODE);
    });
    suite.group("SWAPGS and FS/GS bases", |g| {
        let old = (rdmsr(msr::GS_BASE), rdmsr(msr::KERNEL_GS_BASE));
        wrmsr(msr::GS_BASE, DATA);
        wrmsr(msr::KERNEL_GS_BASE, DATA + 0x100);
        caisson_guest_rt::memory::write::<u64>(a.data, 0x11);
        caisson_guest_rt::memory::write::<u64>(a.data + 0x100, 0x22);
        let mut c = a.kernel(code64!(
            "mov rax, gs:[0]",
            "swapgs",
            "mov rbx, gs:[0]",
            "swapgs",
            "int3"
        ));
        c.enter();
        g.eq("before", c.rax, 0x11);
        g.eq("after", c.rbx, 0x22);
        g.run("in ring 3", &mut a.user(code64!("swapgs")), GP0, CODE);
        wrmsr(msr::GS_BASE, NON_CANONICAL - 8);
        g.run(
            "base plus displacement leaves the canonical range",
            &mut a.user(code64!("mov rax, gs:[16]")),
            GP0,
            CODE,
        );
        wrmsr(msr::GS_BASE, u64::MAX - 15);
        let mut c = Context {
            rdi: DATA + 16,
            ..a.user(code64!("mov rax, gs:[rdi]", "int3"))
        };
        g.run("sum wraps at 2^64", &mut c, BP, CODE + 5);
        g.eq("value", c.rax, 0x11);
        let mut c = Context {
            rdi: (DATA + 16) | 1 << 40,
            ..a.user(code64!("mov rax, gs:[edi]", "int3"))
        };
        c.rax = 0;
        g.run("32-bit offset, 64-bit sum", &mut c, BP, CODE + 6);
        g.eq("value", c.rax, 0x11);
        if has::fsgsbase() {
            use caisson_guest_rt::cpu::{cr, cr4};
            let wr = code64!("wrfsbase rdi", "rdfsbase rax", "int3");
            g.run("without CR4.FSGSBASE", &mut a.user(wr), UD, CODE);
            let with = |c: Context| Context {
                load: 4,
                cr4: cr4() | cr::FSGSBASE,
                ..c
            };
            let mut c = with(a.user(wr));
            g.run("WRFSBASE, RDFSBASE", &mut c, BP, CODE + 11);
            g.eq("value", c.rax, DATA);
            g.eq("MSR", rdmsr(msr::FS_BASE), DATA);
            let mut c = with(a.user(wr));
            c.rdi = NON_CANONICAL;
            g.run("WRFSBASE of a non-canonical value", &mut c, GP0, CODE);
            let mut c = with(a.user(code64!(
                "mov rax, -1",
                "wrgsbase edi",
                "rdgsbase eax",
                "int3"
            )));
            c.rdi = 0xFFFF_FFFF_8000_0000;
            g.run("32-bit forms", &mut c, BP, CODE + 16);
            g.eq("zero extended", c.rax, 0x8000_0000);
            g.eq("MSR", rdmsr(msr::GS_BASE), 0x8000_0000);
            wrmsr(msr::FS_BASE, 0);
        }
        wrmsr(msr::GS_BASE, old.0);
        wrmsr(msr::KERNEL_GS_BASE, old.1);
    });
}
