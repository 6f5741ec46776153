//! The networks that network devices are put in front of.
//!
//! | type | what |
//! |---|---|
//! | [`UserNetwork`] | the router of `caisson-user-net` on sockets of the host, on a thread of its own; Linux |
//! | [`Capture`] | writes what passes to a file, in front of any network |
#![forbid(unsafe_code)]

mod capture;
mod error;
mod forward;
#[cfg(not(target_os = "linux"))]
mod no_user;
#[cfg(target_os = "linux")]
mod resolver;
#[cfg(target_os = "linux")]
mod sockets;
#[cfg(target_os = "linux")]
mod user;

pub use capture::{CAPTURE_LIMIT, Capture};
pub use error::NetError;
pub use forward::{Forward, ForwardError};
#[cfg(not(target_os = "linux"))]
pub use no_user::UserNetwork;
#[cfg(target_os = "linux")]
pub use user::UserNetwork;

use std::net::SocketAddrV4;

/// A user-mode network, and what it is joined to on the host.
#[derive(Clone, Debug, Default)]
pub struct UserNetworkSpec {
    /// The network.
    pub router: caisson_user_net::Config,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// Whom to ask for names; the host's own resolver if there is none.
    pub resolver: Option<SocketAddrV4>,
}
