//! A flow of datagrams.

use alloc::string::String;
use core::net::SocketAddrV4;

use crate::wire::Ends;

const SECOND: u64 = 1_000_000_000;
/// How long a flow lives that nobody has answered.
const ONE_WAY: u64 = 30 * SECOND;
/// How long one lives that was answered.
const ANSWERED: u64 = 300 * SECOND;
/// What these times are rounded to, so that they do not change all the time.
const STEP: u64 = 5 * SECOND;

/// Where its datagrams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through a socket of its own.
    Socket,
    /// Through that of a forward, to a peer of its.
    Forward(u16, SocketAddrV4),
}

pub(crate) struct Udp {
    /// From the remote to the guest.
    pub(crate) ends: Ends,
    pub(crate) way: Way,
    /// It goes to the name server: the number and the name of the last question.
    pub(crate) question: Option<(u16, String)>,
    pub(crate) answered: bool,
    pub(crate) active: u64,
}

impl Udp {
    pub(crate) fn deadline(&self) -> u64 {
        let life = if self.answered { ANSWERED } else { ONE_WAY };
        (self.active.saturating_add(life) / STEP + 1) * STEP
    }
}
