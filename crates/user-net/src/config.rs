//! What a user-mode network is like.

use core::net::Ipv4Addr;

use caisson_packet::MacAddress;

use crate::Policy;

/// The name under which the guest finds the router.
pub const GATEWAY_NAME: &str = "host.caisson.internal";

/// How much of everything there is. What is over is refused, or the oldest of it ended.
pub mod limits {
    /// TCP connections.
    pub const TCP: usize = 4096;
    /// Of these, such as have not been set up yet.
    pub const HALF_OPEN: usize = 256;
    /// UDP flows.
    pub const UDP: usize = 1024;
    /// Bytes that wait for the guest or for the host in all connections together.
    pub const POOL: usize = 64 << 20;
    /// Bytes of one connection that wait for the host.
    pub const TO_HOST: usize = 256 << 10;
    /// Bytes of one connection that wait for the guest.
    pub const TO_GUEST: usize = 1 << 20;
    /// Frames that wait for the guest besides those that there is room for.
    pub const FRAMES: usize = 1024;
    /// Addresses that names were resolved to.
    pub const NAMES: usize = 4096;
}

/// A user-mode network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The guest's address, which DHCP gives it.
    pub guest: Ipv4Addr,
    /// The router's.
    pub gateway: Ipv4Addr,
    /// The name server's.
    pub name_server: Ipv4Addr,
    /// How many leading bits the addresses of this network have in common, 8 to 30.
    pub prefix: u8,
    /// The largest IP packet that is not to be segmented, in bytes: 1280 to 65521.
    pub mtu: u16,
    /// The router's card.
    pub router_mac: MacAddress,
    /// The guest's card, until it is heard under another address.
    pub guest_mac: MacAddress,
    /// Whether the router's address stands for the host's loopback.
    pub host_access: bool,
    /// Where the guest may connect to.
    pub policy: Policy,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            guest: Ipv4Addr::new(10, 0, 2, 15),
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            name_server: Ipv4Addr::new(10, 0, 2, 3),
            prefix: 24,
            mtu: 1500,
            router_mac: MacAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]),
            guest_mac: MacAddress([0x02, 0, 0, 0, 0, 1]),
            host_access: false,
            policy: Policy::default(),
        }
    }
}

impl Config {
    /// The network's mask.
    pub(crate) fn mask(&self) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(self.prefix.clamp(8, 30)))
            .unwrap_or(u32::MAX)
    }

    /// Whether `address` is of this network.
    pub(crate) fn is_inside(&self, address: Ipv4Addr) -> bool {
        (u32::from(address) ^ u32::from(self.gateway)) & self.mask() == 0
    }

    /// Whether `address` can be the guest's.
    pub(crate) fn is_guests(&self, address: Ipv4Addr) -> bool {
        let host = u32::from(address) & !self.mask();
        self.is_inside(address)
            && address != self.gateway
            && address != self.name_server
            && host != 0
            && host != !self.mask()
    }
}
