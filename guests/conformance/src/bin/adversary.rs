//! A hostile guest: tries to leave its sandbox or to wedge the machine. It
//! passes when every attempt has its architectural outcome and the machine
//! still answers at the end.
#![no_std]
#![no_main]

use caisson_guest_rt::apic::{self, reg};
use caisson_guest_rt::context::{BP, Exit, GP0, SS0, UD, load};
use caisson_guest_rt::cpu::{self, cr, has, msr};
use caisson_guest_rt::interrupt::{self, Gate};
use caisson_guest_rt::memory::{read, write};
use caisson_guest_rt::paging::{self, Arena, CODE, DATA, P, PS, STACK, U, W};
use caisson_guest_rt::percpu::sel;
use caisson_guest_rt::port::{self, inb, inl, inw, outb, outl, outw};
use caisson_guest_rt::{Context, Group, Suite, code64, guest, ioapic};

guest!("adversary", main);

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    apic::enable(0xFF);
    wild_addresses(suite, &a);
    wild_physical(suite, &a);
    masked_instructions(suite, &a);
    random_code(suite, &a);
    ports(suite, &a);
    msrs(suite, &a);
    storms(suite, &a);
    controllers(suite);
    suite.group("the machine still works", |g| {
        g.run(
            "ring 3",
            &mut a.user(code64!("mov eax, 7", "int3")),
            BP,
            CODE + 6,
        );
        g.run(
            "page fault",
            &mut Context {
                rdi: HOLE,
                ..a.user(code64!("mov [rdi], al"))
            },
            Exit::code(14, 6),
            CODE,
        );
    });
}

/// Where nothing is mapped.
const HOLE: u64 = STACK + 0x10_0000;

/// A small generator: the run is the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn wild_addresses(suite: &mut Suite, a: &Arena) {
    suite.group("addresses that could alias in a software TLB", |g| {
        // Fill the translations of a few pages, then use addresses that share
        // their low bits but differ above: none may hit.
        write::<u64>(a.data, 0x5AFE);
        let load8 = code64!("mov rax, [rdi]", "int3");
        let store8 = code64!("mov [rdi], rax", "int3");
        let fill = |g: &mut Group| {
            let mut c = a.user(load8);
            g.run("fill", &mut c, BP, CODE + 4);
            let mut c = Context {
                rax: 0x5AFE,
                ..a.user(store8)
            };
            g.run("fill for writing", &mut c, BP, CODE + 4);
        };
        for bit in 24..64u32 {
            fill(g);
            let address = DATA ^ 1 << bit;
            let canonical = (address << 16) as i64 >> 16 == address as i64;
            for code in [load8, store8] {
                let mut c = Context {
                    rdi: address,
                    rax: 0xBAD,
                    ..a.user(code)
                };
                let got = c.enter();
                let fine = if canonical {
                    got.vector == 14 && c.cr2 == address
                } else {
                    got == GP0
                };
                g.check(fine, format_args!("DATA with bit {bit} flipped: {got}"));
            }
            g.eq("memory unharmed", read::<u64>(a.data), 0x5AFE);
        }
        // Sign extension the wrong way, all ones, poison-like values.
        for high in [
            0xFFFFu64 << 48,
            0x8000 << 48,
            0x7FFF << 48,
            1 << 62,
            0xFFF << 47,
            0x1_0000 << 47,
        ] {
            for code in [load8, store8] {
                let mut c = Context {
                    rdi: DATA | high,
                    ..a.user(code)
                };
                let got = c.enter();
                g.check(got != BP, format_args!("DATA | {high:#x}: {got}"));
            }
            let mut c = Context {
                rbp: DATA | high,
                ..a.user(code64!("mov rax, [rbp]"))
            };
            let got = c.enter();
            g.check(
                got == SS0 || got.vector == 14,
                format_args!("[rbp] with {high:#x}: {got}"),
            );
        }
        // The complement of the slot number in the page bits.
        for slot in 0..4096u64 {
            let address = (!slot & 0xFFF) << 12;
            for offset in [0, 0xFF8, 0xFFC] {
                let mut c = Context {
                    rdi: address | 0x7F00_0000_0000 | offset,
                    ..a.user(load8)
                };
                let got = c.enter();
                if got.vector != 14 {
                    g.check(
                        false,
                        format_args!("slot {slot:#x} offset {offset:#x}: {got}"),
                    );
                }
            }
        }
        let mut random = Random(0x1234_5678_9ABC_DEF1);
        let mut escaped = 0u64;
        for _ in 0..20_000 {
            let address = random.next();
            // Everything this space maps for ring 3 lies in 0x4000_0000..0x4030_0000.
            if (CODE..CODE + 0x30_0000).contains(&address) {
                continue;
            }
            let mut c = Context {
                rdi: address,
                ..a.user(load8)
            };
            let got = c.enter();
            escaped += u64::from(got == BP || !(got.vector == 14 || got == GP0));
        }
        g.eq("random addresses that were readable in ring 3", escaped, 0);
    });
}

fn wild_physical(suite: &mut Suite, a: &Arena) {
    suite.group("page tables that point outside of memory", |g| {
        let width = has::physical_bits();
        let va = 0x5000_0000;
        let slot = a.space.entry(va, 1);
        let mut random = Random(0xFEED_FACE_CAFE_BEEF);
        let load8 = code64!("mov rax, [rdi]", "int3");
        let store8 = code64!("mov [rdi], rax", "int3");
        let jump = code64!("jmp rdi");
        let mut surprises = 0u64;
        for i in 0..4000u64 {
            let mut physical = random.next() & ((1 << width) - 1) & paging::ADDRESS;
            if i % 4 == 0 {
                physical = ((1 << width) - 4096) - (i << 12);
            }
            // Leave the devices and the guest's own RAM alone here.
            if physical < 0x1_0000_0000 {
                physical |= 1 << 33;
            }
            write(slot, physical | P | W | U);
            cpu::invlpg(va);
            for code in [load8, store8, jump] {
                let got = Context {
                    rdi: va,
                    ..a.user(code)
                }
                .enter();
                // Nothing is there: reads give ones, writes vanish, a fetch cannot succeed as INT3.
                surprises += u64::from(got.vector > 31);
            }
        }
        g.eq(
            "accesses ended by something other than their own exception",
            surprises,
            0,
        );
        // Tables in nonexistent memory, and tables that contain themselves.
        for (what, level) in [
            ("page table", 2),
            ("page directory", 3),
            ("directory pointers", 4),
        ] {
            let upper = a.space.entry(0x700_0000_0000, level);
            let table = (1 << (width - 1)) | P | W | U;
            write(upper, table);
            let got = Context {
                rdi: 0x700_0000_0000,
                ..a.user(load8)
            }
            .enter();
            g.check(
                got.vector == 14 || got == BP,
                format_args!("{what} outside of memory: {got}"),
            );
            write(upper, (upper & !0xFFF) | P | W | U);
            let got = Context {
                rdi: 0x700_0000_0000,
                ..a.user(load8)
            }
            .enter();
            g.check(
                got.vector == 14 || got == BP,
                format_args!("{what} in itself: {got}"),
            );
            write(upper, 0u64);
            cpu::set_cr3(cpu::cr3());
        }
        // A 1 GiB page that ends beyond the physical width.
        if has::gb_pages() {
            let upper = a.space.entry(0x600_0000_0000, 3);
            write(upper, ((1u64 << width) - (1 << 30)) | P | W | U | PS);
            for offset in [0u64, 0x3FFF_FFF8] {
                let got = Context {
                    rdi: 0x600_0000_0000 + offset,
                    ..a.user(load8)
                }
                .enter();
                g.check(
                    got == BP || got.vector == 14,
                    format_args!("last GiB + {offset:#x}: {got}"),
                );
            }
        }
        // CR3 itself outside of memory: only a fetch from nothing can follow, so
        // the triple fault guest does that. Here: a root that maps us and itself.
        let copy = paging::frame();
        for i in 0..512u64 {
            write::<u64>(copy + i * 8, read(a.space.root + i * 8));
        }
        write::<u64>(copy + 511 * 8, copy | P | W);
        let mut c = Context {
            load: load::CR3,
            cr3: copy,
            rdi: 0xFFFF_FFFF_FFFF_FFF8,
            ..a.kernel(load8)
        };
        let got = c.enter();
        g.check(
            got == BP && c.rax & paging::ADDRESS == copy,
            format_args!("recursive root: {got} {:#x}", c.rax),
        );
    });
}

fn masked_instructions(suite: &mut Suite, a: &Arena) {
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

fn random_code(suite: &mut Suite, a: &Arena) {
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

fn ports(suite: &mut Suite, a: &Arena) {
    suite.group("every port, every width", |g| {
        // Reading everything, and writing what does not end or reset the machine.
        let pm =
            caisson_guest_rt::acpi::pm1a_control().map_or(0..0, |p| p & !0x7F..(p & !0x7F) + 0x100);
        let mut sum = 0u32;
        for port in 0..=0xFFFFu16 {
            if (0x3F8..0x400).contains(&port) || port == port::DEBUGCON {
                continue;
            }
            sum = sum.wrapping_add(inb(port).into());
            if port < 0x1000 || port % 7 == 0 {
                sum = sum.wrapping_add(inw(port).into());
                sum = sum.wrapping_add(inl(port));
            }
        }
        g.that("read", sum != 1);
        for port in 0..=0xFFFFu16 {
            let near = |p: u16| port.wrapping_add(3) >= p && port <= p;
            // Debug exit, keyboard controller, reset control, PM block, consoles, PCI configuration.
            if (port::DEBUG_EXIT - 3..port::DEBUG_EXIT + 8).contains(&port)
                || near(0x64)
                || near(0x60)
                || near(0x92)
                || near(0xCF9)
                || (0xCF8..=0xCFF).contains(&port)
                || (0x3F5..0x400).contains(&port)
                || near(port::DEBUGCON)
                || pm.contains(&port)
                || (0x505..0x520).contains(&port)
                || (0x5F0..0x700).contains(&port)
                || (0xB000..0xB100).contains(&port)
            {
                continue;
            }
            if port < 0x1000 || port % 61 == 0 {
                outb(port, 0xA5);
                outw(port, 0x5AA5);
                outl(port, 0xFFFF_FFFF);
            }
        }
        ioapic::mask_pics();
        // A DMA request of fw_cfg at nonsense addresses.
        for address in [0u64, 0xFFFF_FFFF_FFFF_FFFF, 0x1000, 1 << 45] {
            outl(0x514, ((address >> 32) as u32).swap_bytes());
            outl(0x518, (address as u32).swap_bytes());
        }
        let mut c = Context {
            rdx: 0x5A50,
            rcx: 200_000,
            rsi: DATA,
            ..a.kernel(code64!(
                "2: push rcx",
                "mov ecx, 1000",
                "rep outsb",
                "mov rsi, rdi",
                "pop rcx",
                "sub ecx, 1000",
                "jnz 2b",
                "int3"
            ))
        };
        let got = c.enter();
        g.check(got == BP, format_args!("200,000 OUTS: {got}"));
        let mut c = Context {
            rdx: 0x5A50,
            rcx: u64::MAX,
            ..a.kernel(code64!("rep insb"))
        };
        let got = c.enter();
        g.check(
            got.vector == 14 && c.rdi == DATA + paging::PAGES * 4096,
            format_args!("INS without end: {got} rdi {:#x}", c.rdi),
        );
    });
}

fn msrs(suite: &mut Suite, a: &Arena) {
    suite.group("every MSR", |g| {
        let rd = code64!("rdmsr", "int3");
        let wr = code64!("wrmsr", "int3");
        let mut odd = 0u64;
        for (start, end) in [(0u32, 0x2000u32), (0x4000_0000, 0x4000_0800), (0xC000_0000, 0xC000_0400), (0xC001_0000, 0xC001_0400)] {
            for index in start..end {
                let mut c = Context { rcx: index.into(), ..a.kernel(rd) };
                let got = c.enter();
                odd += u64::from(got != BP && got != GP0);
                // What could be read may be written back; what could not takes nonsense.
                let keep = matches!(index, 0x1B | 0x10 | 0x3B | 0x6E0 | 0x800..=0x8FF | 0x4000_0000..=0x4000_0800)
                    || (0xC000_0080..=0xC000_0103).contains(&index);
                if !keep {
                    let (low, high) = if got == BP { (c.rax, c.rdx) } else { (0xFFFF_FFFF, 0xFFFF_FFFF) };
                    let got = Context { rcx: index.into(), rax: low, rdx: high, ..a.kernel(wr) }.enter();
                    odd += u64::from(got != BP && got != GP0);
                }
            }
        }
        g.eq("MSRs that ended in neither a value nor #GP", odd, 0);
    });
}

fn storms(suite: &mut Suite, a: &Arena) {
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

fn controllers(suite: &mut Suite) {
    suite.group("interrupt controller abuse", |g| {
        apic::enable(0xFF);
        // Every delivery mode to nobody, every vector to itself while masked.
        for command in 0..0x10_0000u32 / 64 {
            let command = command * 64;
            let mode = command >> 8 & 7;
            let shorthand = command >> 18 & 3;
            // No INIT, start-up, SMI or NMI to this processor.
            if shorthand == 0 && mode != 4 && mode != 5 && mode != 6 && mode != 2 {
                apic::send(0xEE, command);
            }
        }
        // Not those of exceptions, which have handlers that would not know.
        for vector in (0..16).chain(32..=255u32) {
            apic::send(apic::id(), apic::ASSERT | vector);
        }
        // Take them all.
        for vector in 32..=255u8 {
            interrupt::set_handler(vector, |_| apic::eoi());
        }
        cpu::sti();
        for _ in 0..2000 {
            cpu::pause();
        }
        cpu::cli();
        let taken: usize = (32..=254u8).map(interrupt::count).sum();
        g.eq("each vector once", taken, 223);
        for _ in 0..10_000 {
            apic::eoi();
        }
        for pin in 0..ioapic::pins() {
            for bits in [
                u64::MAX,
                0xFFFF,
                0x8700,
                0x700,
                0x200,
                0x500,
                0x0100_0000_0001_0000,
            ] {
                ioapic::set_entry(pin, bits | ioapic::MASKED);
            }
        }
        for index in 0..256u32 {
            if !(0x10..0x40).contains(&index) {
                ioapic::set(index, u32::MAX);
            }
        }
        ioapic::set(0, 0);
    });
}
