//! Arithmetic, calls and branches.

use core::hint::black_box;

/// Mixing of 16-word blocks as in a hash function: rotations, additions, xors.
/// One unit is four blocks of 64 rounds.
pub fn hash(units: u64) -> u64 {
    let mut state = [
        0x6A09_E667u32,
        0xBB67_AE85,
        0x3C6E_F372,
        0xA54F_F53A,
        0x510E_527F,
        0x9B05_688C,
        0x1F83_D9AB,
        0x5BE0_CD19,
    ];
    for unit in 0..units {
        for block in 0..4u32 {
            let mut w = [0u32; 16];
            for (i, word) in w.iter_mut().enumerate() {
                *word = (unit as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32) << 8 ^ block;
            }
            let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;
            for round in 0..64usize {
                let x = w[round & 15];
                let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
                let t1 = h
                    .wrapping_add(s1)
                    .wrapping_add((e & f) ^ (!e & g))
                    .wrapping_add(x ^ 0x428A_2F98);
                let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
                let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
                w[round & 15] = x.wrapping_add(w[(round + 9) & 15]).wrapping_add(
                    w[(round + 1) & 15].rotate_right(7) ^ w[(round + 14) & 15].rotate_right(17),
                );
                (h, g, f, e, d, c, b, a) =
                    (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
            }
            for (s, v) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
                *s = s.wrapping_add(v);
            }
        }
    }
    u64::from(state[0]) << 32 | u64::from(state[7])
}

#[inline(never)]
fn fibonacci(n: u32) -> u64 {
    if black_box(n) < 2 {
        n.into()
    } else {
        fibonacci(n - 1) + fibonacci(n - 2)
    }
}

/// Recursive calls: one unit is the 13th Fibonacci number.
pub fn call(units: u64) -> u64 {
    (0..units).fold(0, |sum, unit| {
        sum.wrapping_mul(3).wrapping_add(fibonacci(13) + unit)
    })
}

/// Operations of the little machine that [`bytecode`] interprets.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Op {
    Add,
    Sub,
    Mul,
    Xor,
    Shift,
    Load,
    Store,
    Loop,
    End,
}

/// A bytecode interpreter: one unit runs a program of some 2,000 operations.
pub fn bytecode(units: u64) -> u64 {
    let program: [(Op, u8); 12] = black_box([
        (Op::Add, 7),
        (Op::Store, 1),
        (Op::Mul, 13),
        (Op::Xor, 0x5A),
        (Op::Load, 1),
        (Op::Shift, 3),
        (Op::Sub, 5),
        (Op::Store, 2),
        (Op::Add, 1),
        (Op::Load, 2),
        (Op::Loop, 0),
        (Op::End, 0),
    ]);
    let mut checksum = 0u64;
    for unit in 0..units {
        let (mut at, mut value, mut rounds) = (0usize, unit, 200u32);
        let mut cells = [0u64; 4];
        loop {
            let (op, operand) = program[at];
            at += 1;
            let operand = operand as usize;
            match op {
                Op::Add => value = value.wrapping_add(operand as u64),
                Op::Sub => value = value.wrapping_sub(operand as u64),
                Op::Mul => value = value.wrapping_mul(operand as u64),
                Op::Xor => value ^= operand as u64,
                Op::Shift => value = value.rotate_left(operand as u32),
                Op::Load => value ^= cells[operand & 3],
                Op::Store => cells[operand & 3] = value,
                Op::Loop => {
                    rounds -= 1;
                    if rounds != 0 {
                        at = operand;
                    }
                }
                Op::End => break,
            }
        }
        checksum = checksum.wrapping_mul(31).wrapping_add(value);
    }
    checksum.wrapping_add(units)
}
