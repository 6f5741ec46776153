//! The host's sockets, as the router calls them.

use alloc::string::String;
use core::net::SocketAddrV4;

use crate::FlowId;

/// Why the host's side of a flow does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostError {
    /// Nobody listens there.
    Refused,
    /// There is no way there.
    Unreachable,
    /// The peer ended the connection.
    Reset,
    /// The host has no socket to spare, or fails otherwise.
    Failed,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Something that the guest was kept from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// A connection or a datagram to there.
    Address(Protocol, SocketAddrV4),
    /// The resolution of a name.
    Name(String),
}

/// The host. No call blocks. After [`Router::on_ready`](crate::Router::on_ready) for a flow, calls are made until one
/// would block; the next event for it has to come when that changes.
pub trait Host {
    /// Starts a connection to `to` for `flow`. An event follows when it is decided.
    ///
    /// # Errors
    /// It is decided already.
    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError>;

    /// Whether the connection of `flow` is there.
    ///
    /// # Errors
    /// It will not be.
    fn tcp_connected(&mut self, flow: FlowId) -> Result<bool, HostError>;

    /// Sends of `data` what the host takes and returns how many bytes those were; 0 if it would block.
    ///
    /// # Errors
    /// The connection is over.
    fn tcp_send(&mut self, flow: FlowId, data: &[u8]) -> Result<usize, HostError>;

    /// Reads into `data`: how many bytes, 0 at the end of the stream, `None` if it would block.
    ///
    /// # Errors
    /// The connection is over.
    fn tcp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError>;

    /// The guest sends nothing more.
    fn tcp_shutdown(&mut self, flow: FlowId);

    /// Opens a socket for datagrams to and from `to`.
    ///
    /// # Errors
    /// There is no such way.
    fn udp_open(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError>;

    /// Sends datagrams: `data` cut into pieces of `size` bytes. One that would block is lost.
    ///
    /// # Errors
    /// An earlier one was not delivered.
    fn udp_send(&mut self, flow: FlowId, data: &[u8], size: usize) -> Result<(), HostError>;

    /// Reads a datagram into `data`: how many bytes, `None` if it would block.
    ///
    /// # Errors
    /// An earlier one of the guest's was not delivered.
    fn udp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError>;

    /// Sends a datagram from the socket of forward `forward` to `to`.
    fn forward_send(&mut self, forward: u16, to: SocketAddrV4, data: &[u8]);

    /// Forgets the sockets of `flow`; with `abort`, its peer is told that the connection failed.
    fn close(&mut self, flow: FlowId, abort: bool);

    /// Whom to ask for names.
    fn resolver(&mut self) -> Option<SocketAddrV4>;

    /// Whether `address` is one of the host's own.
    fn is_own(&mut self, address: core::net::Ipv4Addr) -> bool;

    /// Tells that the guest was kept from something.
    fn denied(&mut self, denied: Denied);
}
