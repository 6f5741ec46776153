//! Whom the host asks for names.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    time::SystemTime,
};

const FILE: &str = "/etc/resolv.conf";
const PORT: u16 = 53;
/// A file longer than this is none.
const LONGEST: u64 = 64 << 10;

/// The host's resolver, read again when its file changes.
#[derive(Debug, Default)]
pub(crate) struct Resolver {
    fixed: Option<SocketAddrV4>,
    read: Option<SystemTime>,
    found: Option<SocketAddrV4>,
}

impl Resolver {
    pub(crate) fn new(fixed: Option<SocketAddrV4>) -> Self {
        Self {
            fixed,
            ..Self::default()
        }
    }

    pub(crate) fn address(&mut self) -> Option<SocketAddrV4> {
        if self.fixed.is_some() {
            return self.fixed;
        }
        let metadata = fs::metadata(FILE).ok().filter(|file| file.len() <= LONGEST);
        let changed = metadata.and_then(|file| file.modified().ok());
        if changed.is_none() || changed != self.read {
            self.read = changed;
            let text = changed.and_then(|_| fs::read_to_string(FILE).ok());
            self.found = text.as_deref().and_then(first_server);
        }
        self.found
    }
}

/// The first IPv4 name server (resolv.conf(5)).
fn first_server(text: &str) -> Option<SocketAddrV4> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let address: Ipv4Addr = match words.next()? {
            "nameserver" => words.next()?.parse().ok()?,
            _ => return None,
        };
        Some(SocketAddrV4::new(address, PORT))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_server_with_an_ipv4_address_is_asked() {
        let text = "# nameserver 192.0.2.9\nsearch test\nnameserver ::1\nnameserver\t192.0.2.1 # that\nnameserver 192.0.2.2\n";
        assert_eq!(first_server(text), Some("192.0.2.1:53".parse().unwrap()));
        assert_eq!(first_server("nameserver\noptions edns0"), None);
    }
}
