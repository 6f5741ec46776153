//! Frames: one encoder and one bounded decoder for both directions.

use super::crc::crc32;

/// Bytes before the payload.
pub const HEADER: usize = 8;
/// Bytes after the payload.
pub const TRAILER: usize = 4;
/// The longest payload, in bytes.
pub const MAX_PAYLOAD: usize = 4096;
/// The longest frame, in bytes.
pub const MAX_FRAME: usize = HEADER + MAX_PAYLOAD + TRAILER;

const SYNC: [u8; 2] = [0xCA, 0x15];

fn header_check(header: &[u8]) -> [u8; 2] {
    (crc32(&header[2..6]) as u16).to_le_bytes()
}

/// Writes one frame to the front of `out` and returns its length.
///
/// `None` if the payload is longer than [`MAX_PAYLOAD`] or the frame does not fit `out`.
#[must_use]
pub fn encode_frame(kind: u8, sequence: u8, payload: &[u8], out: &mut [u8]) -> Option<usize> {
    if payload.len() > MAX_PAYLOAD {
        return None;
    }
    let total = HEADER + payload.len() + TRAILER;
    let out = out.get_mut(..total)?;
    out[..2].copy_from_slice(&SYNC);
    out[2] = kind;
    out[3] = sequence;
    out[4..6].copy_from_slice(&(payload.len() as u16).to_le_bytes());
    let check = header_check(out);
    out[6..8].copy_from_slice(&check);
    out[HEADER..HEADER + payload.len()].copy_from_slice(payload);
    out[HEADER + payload.len()..].copy_from_slice(&crc32(payload).to_le_bytes());
    Some(total)
}

/// What the decoder found.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A whole frame in its turn.
    Frame {
        /// The message kind.
        kind: u8,
        /// Between 0 and [`MAX_PAYLOAD`] bytes.
        payload: &'a [u8],
        /// The frame's length on the wire, for flow control.
        wire_len: usize,
    },
    /// At least one frame was damaged or is missing before the next one.
    Lost,
}

enum Look {
    Need(usize),
    Skip(usize),
    Whole(usize),
    Damaged(usize),
}

/// Finds frames in a stream of bytes. Holds at most [`MAX_FRAME`] bytes and does work linear in
/// the bytes it is given.
pub struct Decoder {
    held: [u8; MAX_FRAME],
    len: usize,
    delivered: usize,
    expected: u8,
    skipped: u64,
}

impl Decoder {
    /// A decoder at the start of a stream: the first frame has sequence number 0.
    #[must_use]
    pub const fn new() -> Self {
        Decoder {
            held: [0; MAX_FRAME],
            len: 0,
            delivered: 0,
            expected: 0,
            skipped: 0,
        }
    }

    /// Bytes so far that belonged to no frame.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes bytes off the front of `input` until there is something to report, or none are left.
    pub fn next<'a>(&'a mut self, input: &mut &[u8]) -> Option<Event<'a>> {
        self.drop_front(self.delivered);
        self.delivered = 0;
        loop {
            match self.look() {
                Look::Need(total) => {
                    let take = (total - self.len).min(input.len());
                    if take == 0 {
                        return None;
                    }
                    let (taken, rest) = input.split_at(take);
                    self.held[self.len..self.len + take].copy_from_slice(taken);
                    self.len += take;
                    *input = rest;
                }
                Look::Skip(count) => {
                    self.skipped += count as u64;
                    self.drop_front(count);
                }
                Look::Damaged(total) => {
                    self.skipped += total as u64;
                    self.expected = self.held[3].wrapping_add(1);
                    self.drop_front(total);
                    return Some(Event::Lost);
                }
                Look::Whole(total) => {
                    let sequence = self.held[3];
                    if sequence != self.expected {
                        self.expected = sequence;
                        return Some(Event::Lost);
                    }
                    self.expected = sequence.wrapping_add(1);
                    self.delivered = total;
                    return Some(Event::Frame {
                        kind: self.held[2],
                        payload: &self.held[HEADER..total - TRAILER],
                        wire_len: total,
                    });
                }
            }
        }
    }

    fn look(&self) -> Look {
        let held = &self.held[..self.len];
        let start = held.iter().position(|&byte| byte == SYNC[0]);
        match start {
            None if held.is_empty() => return Look::Need(HEADER),
            None => return Look::Skip(held.len()),
            Some(0) => {}
            Some(count) => return Look::Skip(count),
        }
        if held.len() < HEADER {
            return Look::Need(HEADER);
        }
        let payload = usize::from(u16::from_le_bytes([held[4], held[5]]));
        if held[1] != SYNC[1] || held[6..8] != header_check(held) || payload > MAX_PAYLOAD {
            return Look::Skip(1);
        }
        let total = HEADER + payload + TRAILER;
        if held.len() < total {
            return Look::Need(total);
        }
        let check = crc32(&held[HEADER..HEADER + payload]).to_le_bytes();
        if held[total - TRAILER..total] == check {
            Look::Whole(total)
        } else {
            Look::Damaged(total)
        }
    }

    fn drop_front(&mut self, count: usize) {
        self.held.copy_within(count..self.len, 0);
        self.len -= count;
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Frame(u8, Vec<u8>),
        Lost,
    }

    fn decode(decoder: &mut Decoder, mut bytes: &[u8]) -> Vec<Seen> {
        let mut seen = Vec::new();
        while let Some(event) = decoder.next(&mut bytes) {
            seen.push(match event {
                Event::Frame { kind, payload, .. } => Seen::Frame(kind, payload.to_vec()),
                Event::Lost => Seen::Lost,
            });
        }
        assert!(bytes.is_empty());
        seen
    }

    fn frame(kind: u8, sequence: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = std::vec![0; MAX_FRAME];
        let len = encode_frame(kind, sequence, payload, &mut out).unwrap();
        out.truncate(len);
        out
    }

    #[test]
    fn noise_between_frames_is_skipped_and_counted() {
        let mut stream = b"[    0.1] Linux\xCA\xCA\x15\x01\r\n".to_vec();
        let noise = stream.len() as u64;
        stream.extend(frame(7, 0, b"hello"));
        stream.extend(b"\xCA");
        stream.extend(frame(8, 1, b""));
        let mut decoder = Decoder::new();
        let seen = decode(&mut decoder, &stream);
        assert_eq!(
            seen,
            [
                Seen::Frame(7, b"hello".to_vec()),
                Seen::Frame(8, Vec::new())
            ]
        );
        assert_eq!(decoder.skipped(), noise + 1);
    }

    #[test]
    fn a_damaged_frame_is_reported_and_the_next_one_arrives() {
        let mut stream = frame(1, 0, b"one");
        stream[HEADER + 1] ^= 0x20;
        stream.extend(frame(2, 1, b"two"));
        assert_eq!(
            decode(&mut Decoder::new(), &stream),
            [Seen::Lost, Seen::Frame(2, b"two".to_vec())]
        );
    }

    #[test]
    fn a_missing_frame_shows_in_the_sequence() {
        let mut stream = frame(1, 0, b"one");
        stream.extend(frame(3, 2, b"three"));
        stream.extend(frame(4, 3, b"four"));
        assert_eq!(
            decode(&mut Decoder::new(), &stream),
            [
                Seen::Frame(1, b"one".to_vec()),
                Seen::Lost,
                Seen::Frame(3, b"three".to_vec()),
                Seen::Frame(4, b"four".to_vec()),
            ]
        );
    }

    #[test]
    fn a_header_that_announces_too_much_does_not_make_the_decoder_wait() {
        let mut header = [0xCA, 0x15, 1, 0, 0xFF, 0xFF, 0, 0];
        let check = header_check(&header);
        header[6..].copy_from_slice(&check);
        let mut stream = header.to_vec();
        stream.extend(frame(5, 0, b"after"));
        assert_eq!(
            decode(&mut Decoder::new(), &stream),
            [Seen::Frame(5, b"after".to_vec())]
        );
    }

    #[test]
    fn the_encoder_refuses_what_does_not_fit() {
        let mut out = [0; MAX_FRAME];
        assert_eq!(encode_frame(1, 0, &[0; MAX_PAYLOAD + 1], &mut out), None);
        assert_eq!(
            encode_frame(1, 0, &[0; MAX_PAYLOAD], &mut out),
            Some(MAX_FRAME)
        );
        assert_eq!(encode_frame(1, 0, b"abc", &mut out[..14]), None);
    }

    proptest! {
        #[test]
        fn any_split_of_a_stream_gives_the_same_frames(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cuts in prop::collection::vec(1usize..40, 1..20),
        ) {
            let mut stream = Vec::new();
            for (index, payload) in payloads.iter().enumerate() {
                stream.extend(frame(index as u8 + 1, index as u8, payload));
            }
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                seen.extend(decode(&mut decoder, now));
                rest = later;
            }
            let expected: Vec<_> = payloads
                .into_iter()
                .enumerate()
                .map(|(index, payload)| Seen::Frame(index as u8 + 1, payload))
                .collect();
            prop_assert_eq!(seen, expected);
        }

        #[test]
        fn any_bytes_are_survived_and_a_frame_after_enough_of_them_is_found(
            noise in prop::collection::vec(any::<u8>(), 0..5000),
        ) {
            let mut decoder = Decoder::new();
            decode(&mut decoder, &noise);
            // Whatever header the noise may have ended in is over after a frame's length.
            decode(&mut decoder, &[0; MAX_FRAME]);
            let sequence = decoder.expected;
            let seen = decode(&mut decoder, &frame(9, sequence, b"found"));
            prop_assert_eq!(seen, [Seen::Frame(9, b"found".to_vec())]);
        }
    }
}
