//! The keys that are Caisson's own: Ctrl-A and one more.

/// Ctrl-A.
const PREFIX: u8 = 0x01;

/// What a key on the console is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// Leave: stop the machine.
    Leave,
    /// List the keys.
    Help,
}

/// What Ctrl-A h says.
pub(crate) const HELP: &str = "\
Ctrl-A x       leave: the machine is stopped at once, as if its power was cut
Ctrl-A h       this list
Ctrl-A Ctrl-A  send one Ctrl-A to the guest
Ctrl-A and any other key: both go to the guest";

/// Splits what is typed into the guest's bytes and Caisson's own keys.
#[derive(Debug, Default)]
pub(crate) struct Escape {
    /// The last byte was a Ctrl-A whose meaning the next one decides.
    pending: bool,
}

impl Escape {
    /// Takes what was typed; appends what the guest should get to `guest` and calls `key` for each
    /// key of ours, in order. Nothing after a [`Key::Leave`] is looked at.
    pub(crate) fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>, mut key: impl FnMut(Key)) {
        for &byte in typed {
            if !std::mem::take(&mut self.pending) {
                if byte == PREFIX {
                    self.pending = true;
                } else {
                    guest.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => return key(Key::Leave),
                b'h' | b'H' | b'?' => key(Key::Help),
                PREFIX => guest.push(PREFIX),
                other => guest.extend([PREFIX, other]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(pieces: &[&[u8]]) -> (Vec<u8>, Vec<Key>) {
        let (mut escape, mut guest, mut keys) = (Escape::default(), Vec::new(), Vec::new());
        for piece in pieces {
            escape.filter(piece, &mut guest, |key| keys.push(key));
        }
        (guest, keys)
    }

    #[test]
    fn ordinary_bytes_pass_in_any_encoding() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != PREFIX).collect();
        assert_eq!(run(&[&all]), (all.clone(), vec![]));
    }

    #[test]
    fn keys_are_taken_out_also_across_reads() {
        assert_eq!(run(&[b"a\x01hb"]), (b"ab".to_vec(), vec![Key::Help]));
        assert_eq!(run(&[b"a\x01", b"?b"]), (b"ab".to_vec(), vec![Key::Help]));
        assert_eq!(
            run(&[b"a\x01xrest"]),
            (b"a".to_vec(), vec![Key::Leave]),
            "what follows is for nobody"
        );
    }

    #[test]
    fn ctrl_a_can_be_sent() {
        assert_eq!(run(&[b"\x01\x01"]), (vec![1], vec![]));
        assert_eq!(run(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(run(&[b"\x01e\x01"]), (b"\x01e".to_vec(), vec![]));
        assert_eq!(run(&[b"\x01", b"\x01"]), (vec![1], vec![]));
    }
}
