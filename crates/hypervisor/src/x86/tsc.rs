//! Frequencies of the time-stamp counter.

/// Parts per million by which two measurements of one frequency may differ: a frequency is
/// measured, and no more exactly than that.
const SAME_PPM: u128 = 250;

/// Whether a guest that was given a TSC of `asked` Hz may run at the host's `host` Hz instead: it
/// was most likely measured on such a host.
pub fn same_tsc_frequency(asked: u64, host: u64) -> bool {
    u128::from(asked.abs_diff(host)) * 1_000_000 <= u128::from(host) * SAME_PPM
}

#[cfg(test)]
mod tests {
    use super::same_tsc_frequency;

    #[test]
    fn what_measuring_can_tell_apart_is_not_the_same() {
        assert!(same_tsc_frequency(2_000_500_000, 2_000_000_000));
        assert!(same_tsc_frequency(1_999_500_000, 2_000_000_000));
        assert!(!same_tsc_frequency(2_000_500_001, 2_000_000_000));
        assert!(!same_tsc_frequency(1, u64::MAX));
        assert!(!same_tsc_frequency(1, 0));
    }
}
