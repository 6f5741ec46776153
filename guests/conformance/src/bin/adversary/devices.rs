//! Ports, MSRs and controllers with senseless contents.

use caisson_guest_rt::context::{BP, GP0};
use caisson_guest_rt::memory::read;
use caisson_guest_rt::paging::{Arena, DATA};
use caisson_guest_rt::port::{inb, inl, inw, outb, outl, outw};
use caisson_guest_rt::{Context, Suite, apic, code64, cpu, interrupt, ioapic, paging, port};

pub(crate) fn ports(suite: &mut Suite, a: &Arena) {
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

pub(crate) fn msrs(suite: &mut Suite, a: &Arena) {
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

pub(crate) fn controllers(suite: &mut Suite) {
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
