//! Any bytes as code in each mode: the instruction decoder, the block builder,
//! the handlers, self-modification, on either tier.
#![no_main]

use std::cell::RefCell;

use caisson_fuzz::cpu::{Bench, CODE, Mode};
use libfuzzer_sys::fuzz_target;

thread_local!(static BENCH: RefCell<Bench> = RefCell::default());

fuzz_target!(|input: &[u8]| {
    let Some((&[mode, spread], code)) = input.split_first_chunk::<2>() else {
        return;
    };
    let native = mode & 0x80 != 0;
    let mode = match mode % 4 {
        0 => Mode::Real,
        1 => Mode::Protected,
        2 => Mode::Long,
        _ => Mode::User,
    };
    // Addresses that hit RAM, so that most code gets somewhere.
    let mut registers = [0; 16];
    for (i, r) in registers.iter_mut().enumerate() {
        *r = match (usize::from(spread) + i) % 4 {
            0 => CODE + 64 * i as u64,
            1 => i as u64,
            2 => 0x2_0000 + 0x1001 * i as u64,
            _ => !(i as u64),
        };
    }
    registers[4] = 0x2_8000 & if mode == Mode::Real { 0xfff0 } else { !0 };
    BENCH.with_borrow_mut(|bench| bench.run(mode, native, &registers, code));
});
