//! The benchmark kernels of `cargo xtask bench soft`.
//!
//! The same source runs bare-metal in the `bench` guest and natively on the
//! host. A kernel does `units` equal pieces of work and returns a checksum that
//! depends on all of them, so that both sides can be compared and nothing is
//! optimised away. One unit executes the same instructions every time.
#![no_std]

mod compute;
mod copy;
mod structures;
mod vector;

/// One kernel.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Its name in reports.
    pub name: &'static str,
    /// Does that many units of work; gives the checksum.
    pub run: fn(u64) -> u64,
    /// Whether the time is in REP string instructions: their iterations count
    /// as instructions, so a rate says little; bytes per second says more.
    pub repeats: bool,
    /// Bytes moved by one unit, for the kernels that only move memory.
    pub bytes: u64,
    /// Whether it needs AVX2.
    pub avx2: bool,
}

const fn kernel(name: &'static str, run: fn(u64) -> u64) -> Kernel {
    Kernel {
        name,
        run,
        repeats: false,
        bytes: 0,
        avx2: false,
    }
}

impl Kernel {
    /// Whether the processor has what it needs. An operating system, or whoever is in its place, has enabled that.
    pub fn runs(&self) -> bool {
        !self.avx2 || core::arch::x86_64::__cpuid_count(7, 0).ebx & 1 << 5 != 0
    }
}

/// All kernels, in the order of reports.
pub const KERNELS: &[Kernel] = &[
    kernel("hash", compute::hash),
    kernel("sort", structures::sort),
    kernel("list", structures::list),
    kernel("call", compute::call),
    kernel("bytecode", compute::bytecode),
    kernel("tree", structures::tree),
    kernel("divide", vector::divide),
    kernel("float", vector::float),
    kernel("string", vector::string),
    Kernel {
        avx2: true,
        ..kernel("avx2", vector::avx2)
    },
    Kernel {
        name: "copy",
        run: copy::words,
        repeats: false,
        bytes: copy::LEN as u64,
        avx2: false,
    },
    Kernel {
        name: "rep-movs",
        run: copy::rep_movs,
        repeats: true,
        bytes: copy::LEN as u64,
        avx2: false,
    },
    Kernel {
        name: "rep-stos",
        run: copy::rep_stos,
        repeats: true,
        bytes: copy::LEN as u64,
        avx2: false,
    },
];

#[cfg(test)]
mod tests {
    use super::KERNELS;

    #[test]
    fn checksums_depend_on_the_amount_of_work_and_repeat() {
        for k in KERNELS.iter().filter(|k| k.runs()) {
            assert_eq!((k.run)(3), (k.run)(3), "{}", k.name);
            assert_ne!((k.run)(3), (k.run)(4), "{}", k.name);
        }
    }
}
