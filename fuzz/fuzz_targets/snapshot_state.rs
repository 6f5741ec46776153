//! A sound saved machine with bytes of its parts replaced, under the right checksums: it is restored
//! and runs, or is refused. And any bytes as the file of all parts.
#![no_main]

use caisson_device::StateRecord;
use caisson_fuzz::saved::{restore, sound};
use caisson_machine::SavedMachine;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let _ = SavedMachine::decode(input);
    let mut parts = sound().parts().to_vec();
    let mut rest = input;
    // Which part, where in it, how many bytes; 255 is all that is left in place of the body.
    while let Some(([part, at, page, len], tail)) = rest.split_first_chunk() {
        let count = parts.len();
        let (_, record) = &mut parts[usize::from(*part) % count];
        let mut body = record.body().to_vec();
        let at = usize::from(u16::from_le_bytes([*at, *page]));
        let bytes;
        if *len == 255 {
            (bytes, rest) = (tail, &[]);
            body = bytes.to_vec();
        } else {
            (bytes, rest) = tail.split_at(tail.len().min(usize::from(*len)));
            for (to, from) in body.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        }
        *record = StateRecord::new(record.id(), record.version(), body).expect("short enough");
    }
    let file = SavedMachine::from_parts(parts).encode();
    let saved = SavedMachine::decode(&file).expect("it was written so");
    restore(&saved);
});
