//! Ports of the host that lead to the guest.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
    str::FromStr,
};

use caisson_user_net::Protocol;

/// A port of the host that leads to one of the guest's: `tcp:8080:80`, `udp:0.0.0.0:5353:53`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Connections or datagrams.
    pub protocol: Protocol,
    /// Where the host listens.
    pub host: SocketAddrV4,
    /// The guest's port.
    pub guest: u16,
}

/// Text that is no forward.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is no forward; write tcp:HOST-PORT:GUEST-PORT or udp:…, with the host's address in front of its port to listen there instead of on 127.0.0.1"
)]
pub struct ForwardError(String);

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, ForwardError> {
        parse(text).ok_or_else(|| ForwardError(text.into()))
    }
}

fn parse(text: &str) -> Option<Forward> {
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let (protocol, rest) = text.split_once(':')?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    let (host, guest) = rest.rsplit_once(':')?;
    let (address, host_port) = match host.rsplit_once(':') {
        Some((address, port)) => (address.parse().ok()?, port),
        None => (Ipv4Addr::LOCALHOST, host),
    };
    Some(Forward {
        protocol,
        host: SocketAddrV4::new(address, port(host_port)?),
        guest: port(guest)?,
    })
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        match *self.host.ip() == Ipv4Addr::LOCALHOST {
            true => write!(f, "{protocol}:{}:{}", self.host.port(), self.guest),
            false => write!(f, "{protocol}:{}:{}", self.host, self.guest),
        }
    }
}
