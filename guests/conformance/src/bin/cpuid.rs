//! Prints all of CPUID, one line a leaf, for comparison from outside:
//! `cpuid LEAF SUBLEAF: EAX EBX ECX EDX`. What follows the guest's own settings
//! is as after the boot protocol.
#![no_std]
#![no_main]

use core::arch::x86_64::__cpuid_count;

use caisson_guest_rt::{Suite, guest, println};

guest!("cpuid", main);

/// Leaves with subleaves, and how many are looked at.
const SUBLEAVES: [(u32, u32); 4] = [(4, 8), (7, 3), (0xb, 4), (0xd, 64)];
/// More leaves than this no range has.
const MOST: u32 = 0x100;

fn main(suite: &mut Suite) {
    suite.group("ranges", |g| {
        for base in [0u32, 0x4000_0000, 0x8000_0000] {
            let last = __cpuid_count(base, 0).eax;
            g.check(
                last >= base && last - base < MOST,
                format_args!("range {base:#x} ends at {last:#x}"),
            );
            for leaf in base..=last.min(base + MOST) {
                let count = SUBLEAVES
                    .iter()
                    .find(|(with, _)| *with == leaf)
                    .map_or(1, |(_, count)| *count);
                for subleaf in 0..count {
                    let r = __cpuid_count(leaf, subleaf);
                    if subleaf == 0 || (r.eax, r.ebx) != (0, 0) || r.ecx > 0xff {
                        println!(
                            "cpuid {leaf:08x} {subleaf:02x}: {:08x} {:08x} {:08x} {:08x}",
                            r.eax, r.ebx, r.ecx, r.edx
                        );
                    }
                }
            }
        }
    });
    suite.group("the same again", |g| {
        for leaf in [1, 7, 0xd, 0x8000_0001, 0x8000_0008] {
            let (a, b) = (__cpuid_count(leaf, 0), __cpuid_count(leaf, 0));
            g.check(a == b, format_args!("leaf {leaf:#x} changes: {a:?}, {b:?}"));
        }
    });
}
