//! The short form of `cargo xtask torture disk`.

use caisson_storage::torture::Torture;

#[test]
fn a_power_cut_at_any_moment_leaves_what_was_flushed() {
    let mut images = 0;
    for seed in 0..12 {
        let tally = Torture::by_seed(seed).run().unwrap();
        assert!(tally.cuts > 10, "{tally:?}");
        images += tally.images;
    }
    assert!(images > 1000);
}

#[test]
fn failing_calls_lose_nothing_that_was_flushed() {
    for seed in 0..40 {
        for errno in [libc::EIO, libc::ENOSPC] {
            let run = Torture::by_seed(seed).run_with_faults(errno);
            run.unwrap();
        }
    }
}
