//! The native tier against the interpreting one: the same random programs on
//! both must leave the same registers, flags, memory and instruction counts.
#![cfg(target_arch = "x86_64")]

mod machine;
mod program;

use caisson_x86_cpu::jit::Settings;
use machine::{Machine, Registers};
use program::Rng;

/// Programs per test, unless the environment asks for more.
const PROGRAMS: u64 = 6_000;

fn programs() -> u64 {
    let asked = std::env::var("LOCKSTEP_PROGRAMS").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(PROGRAMS)
}

fn compare(seeds: std::ops::Range<u64>, strict: bool, program: fn(&mut Rng) -> Vec<u8>) {
    let mut interpreted = Machine::new(None, strict);
    let mut native = Machine::new(
        Some(Settings {
            hot: 1,
            strict_flags: strict,
        }),
        strict,
    );
    let mut endless = 0;
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let code = program(&mut rng);
        let registers = Registers::random(&mut rng);
        let data: Vec<u8> = (0..machine::DATA_LEN).map(|_| rng.next() as u8).collect();
        let a = interpreted.run(&code, &registers, &data);
        let b = native.run(&code, &registers, &data);
        // One that writes over its own code may run for ever, and is slow to translate.
        if a.endless() || b.endless() {
            endless += 1;
            continue;
        }
        if a == b {
            continue;
        }
        println!("seed {seed}");
        program::print(&code);
        println!("before: {registers:x?}");
        a.print_differences(&b);
        panic!("the tiers disagree (seed {seed})");
    }
    assert!(endless < programs() / 500, "{endless} programs do not end");
    assert!(native.translated() > 0 && interpreted.translated() == 0);
}

#[test]
fn random_programs_end_alike_to_the_last_flag() {
    compare(0..programs(), true, program::random);
}

#[test]
fn random_programs_end_alike() {
    compare(1_000_000..1_000_000 + programs(), false, program::random);
}

#[test]
fn multiplications_end_alike() {
    compare(0..programs(), false, program::multiplications);
}
