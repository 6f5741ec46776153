//! The short form of `cargo xtask torture disk`.

mod support;

use std::fs;

use caisson_storage::{Format, torture::Torture};
use support::{qemu, text};

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
fn so_does_one_under_formats_of_blocks() {
    for format in [Format::Vhd, Format::Vhdx] {
        let mut images = 0;
        for seed in 0..6 {
            images += Torture::of_blocks(format, seed).run().unwrap().images;
        }
        assert!(images > 300, "{images}");
    }
}

#[test]
fn failing_calls_lose_nothing_that_was_flushed() {
    for seed in 0..40 {
        for errno in [libc::EIO, libc::ENOSPC] {
            let run = Torture::by_seed(seed).run_with_faults(errno);
            run.unwrap();
            let blocks = [Format::Vhd, Format::Vhdx];
            for format in blocks.into_iter().filter(|_| seed < 12) {
                let run = Torture::of_blocks(format, seed).run_with_faults(errno);
                run.unwrap();
            }
        }
    }
}

#[test]
fn qemu_finds_no_more_than_leaks_in_what_power_cuts_leave() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.qcow2");
    fs::write(folder.path().join("base"), vec![0; 1 << 20]).unwrap();
    let (mut seen, mut checked) = (0, 0);
    for seed in 20..26 {
        let run = Torture::by_seed(seed).run_watched(&mut |image| {
            seen += 1;
            if seen % 23 != 0 {
                return Ok(());
            }
            checked += 1;
            fs::write(&path, image.content()).map_err(|error| error.to_string())?;
            let found = qemu("qemu-img", &["check", "-f", "qcow2", text(&path)]);
            found.map(|_| ()).or_else(|found| {
                let only_leaks = found.contains("leaked clusters") && !found.contains("ERROR");
                if only_leaks { Ok(()) } else { Err(found) }
            })
        });
        run.unwrap();
    }
    assert!(checked > 50);
}
