//! Page access rights, exhaustively: every combination of P, W, U, NX, A and D
//! in the leaf and of P, W, U and NX above it, for 4 KiB and 2 MiB pages, with
//! CR0.WP, CR4.SMEP, CR4.SMAP, RFLAGS.AC and EFER.NXE, for read, write and
//! fetch in rings 0 and 3. Each outcome (exit, error code, CR2, accessed and
//! dirty bits) is compared with a model of SDM volume 3, 5.6 and 5.7.
//!
//! QEMU TCG 7.2 fails this: it leaves P out of the error code for reserved bits.
#![no_std]
#![no_main]

use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::cpu::{self, cr, flags, has, msr};
use caisson_guest_rt::memory::{fill, read, write, write_bytes};
use caisson_guest_rt::paging::{A, AddressSpace, D, G, NX, P, PS, U, W, frame, frames};
use caisson_guest_rt::{Context, Group, Suite, code64, guest};

guest!("access", main);

const USER_CODE: u64 = 0x4000_0000;
const KERNEL_CODE: u64 = 0x4000_1000;
const SMALL: u64 = 0x5000_0000;
const LARGE: u64 = 0x8000_0000;
const READ_AT: u64 = 0x00;
const WRITE_AT: u64 = 0x10;
const FETCH_AT: u64 = 0x20;

#[derive(Clone, Copy, PartialEq)]
enum Access {
    Read,
    Write,
    Fetch,
}

#[derive(Clone, Copy)]
struct Control {
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    nxe: bool,
}

/// What the architecture says: the page-fault error code, or success.
fn model(
    upper: u64,
    leaf: u64,
    large: bool,
    c: Control,
    access: Access,
    user: bool,
) -> Result<(), u64> {
    let code = u64::from(access == Access::Write) << 1
        | u64::from(user) << 2
        | u64::from(access == Access::Fetch && (c.nxe || c.smep)) << 4;
    let reserved_always = 1u64 << 51;
    for (entry, is_leaf) in [(upper, false), (leaf, true)] {
        if entry & P == 0 {
            return Err(code);
        }
        let mut reserved = if c.nxe { 0 } else { NX };
        if has::physical_bits() < 52 {
            reserved |= reserved_always;
        }
        if is_leaf && large {
            reserved |= 1 << 13;
        }
        if entry & reserved != 0 {
            return Err(code | 1 << 3 | 1);
        }
    }
    let writable = upper & leaf & W != 0;
    let user_page = upper & leaf & U != 0;
    let no_execute = (upper | leaf) & NX != 0;
    let allowed = match (user, access) {
        (true, Access::Read) => user_page,
        (true, Access::Write) => user_page && writable,
        (true, Access::Fetch) => user_page && !no_execute,
        (false, Access::Read) => !(user_page && c.smap && !c.ac),
        (false, Access::Write) => !(user_page && c.smap && !c.ac) && (writable || !c.wp),
        (false, Access::Fetch) => !(no_execute || user_page && c.smep),
    };
    if allowed { Ok(()) } else { Err(code | 1) }
}

struct Page {
    va: u64,
    pa: u64,
    upper_slot: u64,
    leaf_slot: u64,
    table: u64,
    large: bool,
}

/// Tries one access and compares everything with the model.
fn probe(
    g: &mut Group,
    page: &Page,
    upper_bits: u64,
    leaf_bits: u64,
    c: Control,
    access: Access,
    user: bool,
) {
    let upper = page.table | upper_bits | A;
    let leaf = page.pa | leaf_bits;
    write(page.upper_slot, upper);
    write(page.leaf_slot, leaf);
    cpu::invlpg(page.va);
    let code = if user { USER_CODE } else { KERNEL_CODE };
    let entry = match access {
        Access::Read => READ_AT,
        Access::Write => WRITE_AT,
        Access::Fetch => FETCH_AT,
    };
    let mut context = if user {
        Context::user(code + entry, 0)
    } else {
        Context::kernel(code + entry, 0)
    };
    context.rdi = page.va;
    context.rdx = 0xCC;
    if c.ac {
        context.rflags |= flags::AC;
    }
    let got = context.enter();
    let after: u64 = read(page.leaf_slot);
    let (want, want_rip, want_leaf) = match model(upper, leaf, page.large, c, access, user) {
        Ok(()) => {
            let rip = if access == Access::Fetch {
                page.va + 1
            } else {
                code + entry + 3
            };
            (
                BP,
                rip,
                leaf | A | if access == Access::Write { D } else { 0 },
            )
        }
        Err(error) => {
            let rip = if access == Access::Fetch {
                page.va
            } else {
                code + entry
            };
            (Exit::code(14, error), rip, leaf)
        }
    };
    let cr2_ok = want == BP || context.cr2 == page.va;
    let ok = got == want && context.rip == want_rip && after == want_leaf && cr2_ok;
    g.check(
        ok,
        format_args!(
            "{} {} ring {} upper {upper_bits:#x} leaf {leaf_bits:#x} wp {} smep {} smap {} ac {} nxe {}: \
             got {got} rip {:#x} cr2 {:#x} leaf {after:#x}, want {want} rip {want_rip:#x} leaf {want_leaf:#x}",
            if page.large { "2M" } else { "4K" },
            match access {
                Access::Read => "read",
                Access::Write => "write",
                Access::Fetch => "fetch",
            },
            if user { 3 } else { 0 },
            u8::from(c.wp),
            u8::from(c.smep),
            u8::from(c.smap),
            u8::from(c.ac),
            u8::from(c.nxe),
            context.rip,
            context.cr2,
        ),
    );
}

/// Spreads the low bits of `n` over the given entry bits.
fn spread(n: u64, bits: &[u64]) -> u64 {
    bits.iter()
        .enumerate()
        .filter(|(i, _)| n >> i & 1 != 0)
        .fold(0, |acc, (_, b)| acc | b)
}

fn apply(c: Control) {
    let bit = |on: bool, b: u64| if on { b } else { 0 };
    cpu::set_cr0(cpu::cr0() & !cr::WP | bit(c.wp, cr::WP));
    cpu::set_cr4(
        cpu::cr4() & !(cr::SMEP | cr::SMAP) | bit(c.smep, cr::SMEP) | bit(c.smap, cr::SMAP),
    );
    cpu::wrmsr(
        msr::EFER,
        cpu::rdmsr(msr::EFER) & !msr::EFER_NXE | bit(c.nxe, msr::EFER_NXE),
    );
}

fn sweep(g: &mut Group, page: &Page, c: Control) {
    apply(c);
    for upper in 0..9 {
        // Eight combinations of W, U and NX, then not present.
        let upper_bits = if upper == 8 {
            W | U
        } else {
            P | spread(upper, &[W, U, NX])
        };
        for leaf in 0..64 {
            let leaf_bits = spread(leaf, &[P, W, U, A, D, NX]) | if page.large { PS } else { 0 };
            for access in [Access::Read, Access::Write, Access::Fetch] {
                probe(g, page, upper_bits, leaf_bits, c, access, false);
                if !c.ac {
                    probe(g, page, upper_bits, leaf_bits, c, access, true);
                }
            }
        }
    }
}

fn main(suite: &mut Suite) {
    let space = AddressSpace::new();
    let code = frame();
    fill(code, 4096, 0xCC);
    write_bytes(code + READ_AT, code64!(".byte 0x8A, 0x17, 0xCC"));
    write_bytes(code + WRITE_AT, code64!(".byte 0x88, 0x17, 0xCC"));
    write_bytes(code + FETCH_AT, code64!("jmp rdi"));
    space.map(USER_CODE, code, 1, P | U | A);
    space.map(KERNEL_CODE, code, 1, P | A);
    let small = Page {
        va: SMALL,
        pa: frame(),
        upper_slot: space.entry(SMALL, 2),
        leaf_slot: space.entry(SMALL, 1),
        table: read::<u64>(space.entry(SMALL, 2)) & !0xFFF,
        large: false,
    };
    let large = Page {
        va: LARGE,
        pa: frames(512, 2 << 20),
        upper_slot: space.entry(LARGE, 3),
        leaf_slot: space.entry(LARGE, 2),
        table: read::<u64>(space.entry(LARGE, 3)) & !0xFFF,
        large: true,
    };
    fill(small.pa, 4096, 0xCC);
    fill(large.pa, 4096, 0xCC);
    space.activate();

    for (page, name) in [(&small, "4 KiB pages"), (&large, "2 MiB pages")] {
        suite.group(name, |g| {
            for n in 0..16 {
                let c = Control {
                    wp: n & 1 != 0,
                    smep: n & 2 != 0,
                    smap: n & 4 != 0,
                    ac: n & 8 != 0,
                    nxe: true,
                };
                // AC means something only with SMAP.
                if (c.smep && !has::smep()) || (c.smap && !has::smap()) || (c.ac && !c.smap) {
                    continue;
                }
                sweep(g, page, c);
            }
            for smep in [false, has::smep()] {
                sweep(
                    g,
                    page,
                    Control {
                        wp: true,
                        smep,
                        smap: false,
                        ac: false,
                        nxe: false,
                    },
                );
            }
        });
    }
    let c = Control {
        wp: true,
        smep: false,
        smap: false,
        ac: false,
        nxe: true,
    };
    apply(c);
    suite.group("reserved bits", |g| {
        for user in [false, true] {
            for access in [Access::Read, Access::Write, Access::Fetch] {
                for rights in [0, W, U, W | U] {
                    probe(
                        g,
                        &large,
                        P | W | U,
                        P | PS | rights | 1 << 13,
                        c,
                        access,
                        user,
                    );
                    for page in [&small, &large] {
                        let ps = if page.large { PS } else { 0 };
                        probe(
                            g,
                            page,
                            P | W | U | 1 << 51,
                            P | ps | rights,
                            c,
                            access,
                            user,
                        );
                        probe(
                            g,
                            page,
                            P | W | U,
                            P | ps | rights | 1 << 51,
                            c,
                            access,
                            user,
                        );
                        // A not-present entry hides its reserved bits.
                        probe(g, page, P | W | U, ps | rights | 1 << 51, c, access, user);
                        // Available bits and G mean nothing to access rights.
                        probe(
                            g,
                            page,
                            P | W | U | 0xE00,
                            P | ps | rights | 0xE00 | G | 0x7F << 52,
                            c,
                            access,
                            user,
                        );
                        cpu::set_cr3(cpu::cr3());
                    }
                }
            }
        }
    });
}
