//! Data structures: sorting, a linked list, a binary tree.

use core::hint::black_box;

fn shuffled(seed: &mut u32) -> u32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    *seed >> 8
}

const SORTED: usize = 256;

/// Quicksort by median of three; one unit sorts 256 numbers.
pub fn sort(units: u64) -> u64 {
    let mut checksum = units;
    for _ in 0..units {
        let mut seed = 1;
        let mut values = [0u32; SORTED];
        for v in &mut values {
            *v = shuffled(&mut seed);
        }
        quicksort(black_box(&mut values));
        checksum = checksum
            .wrapping_mul(31)
            .wrapping_add(values[SORTED / 2].into());
    }
    checksum
}

fn quicksort(values: &mut [u32]) {
    let n = values.len();
    if n < 2 {
        return;
    }
    let (a, b, c) = (values[0], values[n / 2], values[n - 1]);
    let pivot = a.min(b).max(a.max(b).min(c));
    let (mut low, mut high) = (0isize, n as isize - 1);
    while low <= high {
        while values[low as usize] < pivot {
            low += 1;
        }
        while values[high as usize] > pivot {
            high -= 1;
        }
        if low <= high {
            values.swap(low as usize, high as usize);
            low += 1;
            high -= 1;
        }
    }
    let (left, right) = values.split_at_mut(low as usize);
    quicksort(&mut left[..(high + 1) as usize]);
    quicksort(right);
}

const NODES: usize = 2048;

/// Follows a shuffled ring of 2,048 links; one unit is one round.
pub fn list(units: u64) -> u64 {
    let mut order = [0u16; NODES];
    for (i, slot) in order.iter_mut().enumerate() {
        *slot = i as u16;
    }
    let mut seed = 7;
    for i in (1..NODES).rev() {
        order.swap(i, shuffled(&mut seed) as usize % (i + 1));
    }
    let mut next = [0u64; NODES];
    for i in 0..NODES {
        next[order[i] as usize] = order[(i + 1) % NODES].into();
    }
    let next = black_box(&next);
    let (mut at, mut sum) = (0u64, 0u64);
    for _ in 0..units {
        for _ in 0..NODES {
            at = next[at as usize];
            sum = sum.wrapping_add(at);
        }
    }
    sum
}

const KEYS: usize = 192;

/// Inserts into an unbalanced binary tree; one unit is 192 insertions.
pub fn tree(units: u64) -> u64 {
    let mut checksum = units;
    for _ in 0..units {
        let mut keys = [0u32; KEYS + 1];
        let mut children = [[0u8; 2]; KEYS + 1];
        let mut seed = 3;
        let mut depth_sum = 0u64;
        keys[1] = shuffled(&mut seed);
        for new in 2..=KEYS {
            let key = shuffled(&mut seed);
            keys[new] = key;
            let mut at = 1usize;
            loop {
                depth_sum += 1;
                let side = usize::from(key >= keys[at]);
                let child = children[at][side] as usize;
                if child == 0 {
                    children[at][side] = new as u8;
                    break;
                }
                at = child;
            }
        }
        checksum = checksum.wrapping_mul(31).wrapping_add(black_box(depth_sum));
    }
    checksum
}
