//! The least a machine must do: boot, describe its memory, print, exit.
#![no_std]
#![no_main]

use caisson_guest_rt::{Suite, boot, guest, println};

guest!("hello", main);

fn main(suite: &mut Suite) {
    suite.group("boot protocol", |g| {
        let p = boot::protocol();
        g.check(
            p == boot::MULTIBOOT_MAGIC || p == boot::PVH_MAGIC,
            format_args!("unknown entry magic {p:#x}"),
        );
        if p == boot::PVH_MAGIC {
            g.eq(
                "start info magic",
                caisson_guest_rt::memory::read::<u32>(boot::info()),
                boot::PVH_MAGIC,
            );
        }
    });
    suite.group("memory map", |g| {
        let (mut ram, mut image) = (0, false);
        let mut previous_end = 0;
        boot::memory_map(|r| {
            println!(
                "  {:#012x}..{:#012x} type {}",
                r.start,
                r.start + r.len,
                r.kind
            );
            g.that("ranges are sorted and disjoint", r.start >= previous_end);
            previous_end = r.start + r.len;
            if r.kind == 1 {
                ram += r.len;
                image |= r.start <= 0x10_0000 && r.start + r.len >= boot::image_end();
            }
        });
        g.that("the image lies in usable RAM", image);
        g.check(ram >= 60 << 20, format_args!("only {ram:#x} bytes of RAM"));
    });
}
