//! The price of code that runs once: blocks that were never seen before.

use caisson_guest_rt::paging::frames;
use caisson_guest_rt::{memory, println, tsc};

/// Blocks laid out in memory.
const BLOCKS: u64 = 1_000;
/// Bytes from one block to the next.
const STRIDE: u64 = 32;
/// Six instructions, as compilers make them, and a jump to the next block:
/// `mov rax,[rsi]; lea rdx,[rax+rcx*2+8]; and edx,0xff; mov [rsi+8],rdx; cmp rax,rdx; mov r8,rax; jmp`.
const BLOCK: [u8; 25] = [
    0x48, 0x8B, 0x06, 0x48, 0x8D, 0x54, 0x48, 0x08, 0x81, 0xE2, 0xFF, 0, 0, 0, 0x48, 0x89, 0x56,
    0x08, 0x48, 0x39, 0xD0, 0x49, 0x89, 0xC0, 0xEB,
];

/// How often fresh code is laid out: the least time counts.
const ROUNDS: u32 = 200;

/// Runs fresh code once and again. Prints `cold blocks=N first=T second=T`, in
/// nanoseconds: the difference of the times is what N blocks cost to build.
pub(crate) fn run() {
    let (mut first, mut second) = (u64::MAX, u64::MAX);
    for _ in 0..ROUNDS {
        let code = lay_out();
        first = first.min(time(code));
        second = second.min(time(code));
    }
    let nanoseconds = |ticks: u64| u128::from(ticks) * 1_000_000_000 / u128::from(tsc::hz());
    println!(
        "cold blocks={BLOCKS} first={} second={}",
        nanoseconds(first),
        nanoseconds(second)
    );
}

/// Blocks in memory that was never executed; gives the address of the first.
fn lay_out() -> u64 {
    let code = frames(BLOCKS * STRIDE / 4096 + 2, 4096);
    for i in 0..BLOCKS {
        let at = code + i * STRIDE;
        memory::write_bytes(at, &BLOCK);
        memory::write::<u8>(at + 25, (STRIDE - 26) as u8);
    }
    memory::write::<u8>(code + BLOCKS * STRIDE, 0xC3);
    code
}

/// Ticks that the code takes.
fn time(code: u64) -> u64 {
    let mut scratch = [0u64; 2];
    let start = tsc::now();
    // SAFETY: the code ends in RET, changes RAX, RDX, R8 and flags, and writes
    // the second word of `scratch`.
    unsafe {
        core::arch::asm!("call {}", in(reg) code, in("rsi") scratch.as_mut_ptr(), in("rcx") 3u64,
            out("rax") _, out("rdx") _, out("r8") _);
    }
    tsc::now() - start
}
