//! A package of any bytes, and a sound archive around any bytes as its uncompressed content: it is
//! unpacked or refused, and nothing is made outside of the folder.
#![no_main]

use std::fs;

use caisson_image::{Limits, unpack};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits {
    bytes: 1 << 16,
    entries: 64,
    memory: 1 << 20,
};

/// An `ar` archive (ar(5)).
fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, content) in members {
        let header = format!(
            "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n",
            0,
            0,
            0,
            644,
            content.len()
        );
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(2), b'\n');
    }
    out
}

fuzz_target!(|input: &[u8]| {
    let folder = tempfile::tempdir().expect("a folder");
    let (deb, into) = (folder.path().join("x.deb"), folder.path().join("into"));
    let sound = ar(&[
        ("debian-binary", b"2.0\n"),
        ("control.tar", &[0; 1024]),
        ("data.tar", input),
    ]);
    for bytes in [input, &sound] {
        fs::write(&deb, bytes).expect("write");
        let _ = unpack(&deb, &into, LIMITS);
        for entry in fs::read_dir(folder.path()).expect("list") {
            let name = entry.expect("entry").file_name();
            assert!(name == "x.deb" || name == "into", "{name:?} was made");
        }
    }
});
