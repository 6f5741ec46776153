//! Ethernet addresses.

use core::{fmt, str::FromStr};

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddress(
    /// In the order in which they are sent.
    pub [u8; 6],
);

impl MacAddress {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it names a group of cards.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Text that is no address of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacError;

impl fmt::Display for MacError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address is six pairs of hexadecimal digits, as in 02:00:00:00:00:01")
    }
}

impl core::error::Error for MacError {}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut address = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut address {
            let part = parts.next().filter(|part| part.len() == 2);
            let digits = part.filter(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(digits.ok_or(MacError)?, 16).map_err(|_| MacError)?;
        }
        match parts.next() {
            None => Ok(Self(address)),
            Some(_) => Err(MacError),
        }
    }
}
