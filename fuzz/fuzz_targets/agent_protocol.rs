//! Any bytes from the guest's side of the command protocol, in pieces; well-formed frames around
//! any payload; any start record.
#![no_main]

use caisson_agent_protocol::{
    Session, StartRequest,
    wire::{MAX_FRAME, MAX_PAYLOAD, StartHeader, ToGuest, encode_frame},
};
use libfuzzer_sys::fuzz_target;

fn session() -> Session {
    let request = StartRequest {
        arguments: vec![b"true".to_vec()],
        ..StartRequest::default()
    };
    Session::new(&request).expect("a sound request")
}

fn feed(session: &mut Session, bytes: &[u8]) {
    let outcome = session.receive(bytes, |_| {});
    let room = session.stdin_room();
    assert!(session.send_stdin(&[0; 64]) <= room);
    session.take_output();
    if outcome.is_err() {
        assert_eq!(session.stdin_room(), 0, "a broken session takes nothing");
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&piece, input)) = input.split_first() else {
        return;
    };
    let mut raw = session();
    for bytes in input.chunks(usize::from(piece).max(1)) {
        feed(&mut raw, bytes);
    }

    // The same as messages whose frames are sound: kind, length, payload.
    let (mut framed, mut rest, mut sequence) = (session(), input, 0u8);
    while let [kind, len, tail @ ..] = rest {
        let (payload, tail) = tail.split_at(usize::from(*len).min(tail.len()).min(MAX_PAYLOAD));
        let mut frame = [0; MAX_FRAME];
        let Some(total) = encode_frame(*kind, sequence, payload, &mut frame) else {
            return;
        };
        feed(&mut framed, &frame[..total]);
        let _ = ToGuest::parse(*kind, payload);
        sequence = sequence.wrapping_add(1);
        rest = tail;
    }
    let _ = StartHeader::parse(input);
});
