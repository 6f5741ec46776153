//! A hostile guest: tries to leave its sandbox or to wedge the machine. It
//! passes when every attempt has its architectural outcome and the machine
//! still answers at the end.
#![no_std]
#![no_main]

mod devices;
mod instructions;
mod memory;
mod storms;

use caisson_guest_rt::context::{BP, Exit};
use caisson_guest_rt::guest;
use caisson_guest_rt::paging::{Arena, CODE, STACK};
use caisson_guest_rt::{Context, Suite, apic, code64, ioapic};

guest!("adversary", main);

fn main(suite: &mut Suite) {
    let a = Arena::new();
    ioapic::mask_pics();
    apic::enable(0xFF);
    memory::wild_addresses(suite, &a);
    memory::wild_physical(suite, &a);
    instructions::masked_instructions(suite, &a);
    instructions::random_code(suite, &a);
    devices::ports(suite, &a);
    devices::msrs(suite, &a);
    storms::storms(suite, &a);
    devices::controllers(suite);
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
