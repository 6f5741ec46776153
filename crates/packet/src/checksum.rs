//! The Internet checksum (RFC 1071).

/// A sum in ones' complement over 16-bit words. Parts but the last are of even length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes; one that is left over counts as the high half of a word.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // Each adds less than 2^32: no sum over a frame comes near 2^64. Folding makes halves of words out of it.
        for word in words {
            self.0 += u64::from(u32::from_be_bytes(*word));
        }
        self.0 += match *rest {
            [a] => u64::from(a) << 8,
            [a, b] => u64::from(u16::from_be_bytes([a, b])),
            [a, b, c] => u64::from(u16::from_be_bytes([a, b])) + (u64::from(c) << 8),
            _ => 0,
        };
        Self(self.fold().into())
    }

    /// Adds one word.
    pub fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The sum in 16 bits, as a checksum field that is left open holds it.
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// What a checksum field holds.
    pub fn finish(self) -> u16 {
        !self.fold()
    }
}

/// Completes a checksum that was left open: the sum over `bytes` from `start` on goes to `start + offset`. Returns
/// whether that lies within.
pub fn complete(bytes: &mut [u8], start: u16, offset: u16) -> bool {
    let (start, offset) = (usize::from(start), usize::from(offset));
    let Some(covered) = bytes.get_mut(start..) else {
        return false;
    };
    let sum = Sum::default().bytes(covered).finish();
    // Zero means that there is none (RFC 768); both forms are equal in ones' complement.
    let sum = if sum == 0 { 0xffff } else { sum };
    match covered.get_mut(offset..offset + 2) {
        Some(field) => {
            field.copy_from_slice(&sum.to_be_bytes());
            true
        }
        None => false,
    }
}
