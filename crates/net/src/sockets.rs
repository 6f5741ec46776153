//! The host's sockets for a router.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use caisson_user_net::{Denied, FlowId, Host, HostError, Protocol};
use rustix::{
    event::epoll::{self, EventData, EventFlags},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrAny, SocketFlags, SocketType,
        sockopt,
    },
};

use crate::{Forward, NetError, UserNetworkSpec, resolver::Resolver};

/// The event that is no flow's: somebody wakes the thread.
pub(crate) const WAKE: u64 = u64::MAX;
/// Forward n has event `FORWARDS - n`.
pub(crate) const FORWARDS: u64 = u64::MAX - 1;
/// How many connections wait to be accepted.
const BACKLOG: i32 = 128;
/// How many lines about what was denied there are in [`LOG_TIME`].
const LOG_LINES: u32 = 20;
const LOG_TIME: Duration = Duration::from_secs(10);

pub(crate) struct Sockets {
    epoll: OwnedFd,
    flows: HashMap<FlowId, OwnedFd>,
    forwards: Vec<(Forward, OwnedFd)>,
    resolver: Resolver,
    log_since: Instant,
    log_lines: u32,
}

fn socket(kind: SocketType) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::INET, kind, flags, None)
}

fn error(errno: Errno) -> HostError {
    match errno {
        Errno::CONNREFUSED => HostError::Refused,
        Errno::HOSTUNREACH
        | Errno::NETUNREACH
        | Errno::NETDOWN
        | Errno::HOSTDOWN
        | Errno::ACCESS => HostError::Unreachable,
        Errno::CONNRESET | Errno::PIPE => HostError::Reset,
        _ => HostError::Failed,
    }
}

/// The call is to be made again later.
fn would_block(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM
    )
}

fn ipv4(address: Option<SocketAddrAny>) -> Option<SocketAddrV4> {
    SocketAddrV4::try_from(address?).ok()
}

impl Sockets {
    pub(crate) fn open(spec: &UserNetworkSpec, wake: &OwnedFd) -> Result<Self, NetError> {
        let setup = |errno: Errno| NetError::Setup(errno.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(setup)?;
        epoll::add(&epoll, wake, EventData::new_u64(WAKE), EventFlags::IN).map_err(setup)?;
        let mut forwards = Vec::new();
        for (index, forward) in (0u64..).zip(&spec.forwards) {
            let listening = listen(forward).and_then(|listening| {
                let event = EventData::new_u64(FORWARDS - index);
                epoll::add(&epoll, &listening, event, EventFlags::IN)?;
                Ok(listening)
            });
            let listening = listening.map_err(|errno| NetError::Forward {
                forward: *forward,
                source: errno.into(),
            })?;
            forwards.push((*forward, listening));
        }
        Ok(Self {
            epoll,
            flows: HashMap::new(),
            forwards,
            resolver: Resolver::new(spec.resolver),
            log_since: Instant::now(),
            log_lines: 0,
        })
    }

    /// A handle to wait for events with.
    pub(crate) fn events(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Forward number `index`.
    pub(crate) fn forward(&self, index: usize) -> Option<Forward> {
        self.forwards.get(index).map(|(forward, _)| *forward)
    }

    /// The next connection to a forward.
    pub(crate) fn accept(&self, index: usize) -> Option<(OwnedFd, SocketAddrV4)> {
        let (_, listening) = self.forwards.get(index)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, peer) = rustix::net::acceptfrom_with(listening, flags).ok()?;
        Some((socket, ipv4(peer)?))
    }

    /// The next datagram to a forward.
    pub(crate) fn receive(&self, index: usize, buffer: &mut [u8]) -> Option<(usize, SocketAddrV4)> {
        let (_, bound) = self.forwards.get(index)?;
        let (len, _, peer) = rustix::net::recvfrom(bound, buffer, RecvFlags::empty()).ok()?;
        Some((len, ipv4(peer)?))
    }

    /// Makes `socket` the one of `flow`.
    pub(crate) fn adopt(
        &mut self,
        flow: FlowId,
        socket: OwnedFd,
        stream: bool,
    ) -> rustix::io::Result<()> {
        let mut events = EventFlags::IN;
        if stream {
            events |= EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            sockopt::set_tcp_nodelay(&socket, true)?;
            sockopt::set_socket_keepalive(&socket, true)?;
        }
        epoll::add(
            &self.epoll,
            &socket,
            EventData::new_u64(flow.to_bits()),
            events,
        )?;
        self.flows.insert(flow, socket);
        Ok(())
    }

    fn get(&self, flow: FlowId) -> Result<&OwnedFd, HostError> {
        self.flows.get(&flow).ok_or(HostError::Failed)
    }
}

fn listen(forward: &Forward) -> rustix::io::Result<OwnedFd> {
    let kind = match forward.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let listening = socket(kind)?;
    if forward.protocol == Protocol::Tcp {
        // A machine that is started again finds its port free.
        sockopt::set_socket_reuseaddr(&listening, true)?;
    }
    rustix::net::bind(&listening, &forward.host)?;
    if forward.protocol == Protocol::Tcp {
        rustix::net::listen(&listening, BACKLOG)?;
    }
    Ok(listening)
}

impl Host for Sockets {
    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError> {
        let socket = socket(SocketType::STREAM).map_err(error)?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(errno) => return Err(error(errno)),
        }
        self.adopt(flow, socket, true).map_err(error)
    }

    fn tcp_connected(&mut self, flow: FlowId) -> Result<bool, HostError> {
        let socket = self.get(flow)?;
        sockopt::socket_error(socket)
            .map_err(error)?
            .map_err(error)?;
        match rustix::net::getpeername(socket) {
            Ok(_) => Ok(true),
            Err(Errno::NOTCONN) => Ok(false),
            Err(errno) => Err(error(errno)),
        }
    }

    fn tcp_send(&mut self, flow: FlowId, data: &[u8]) -> Result<usize, HostError> {
        match rustix::net::send(self.get(flow)?, data, SendFlags::NOSIGNAL) {
            Ok(count) => Ok(count),
            Err(errno) if would_block(errno) => Ok(0),
            Err(errno) => Err(error(errno)),
        }
    }

    fn tcp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError> {
        match rustix::net::recv(self.get(flow)?, data, RecvFlags::empty()) {
            Ok((_, count)) => Ok(Some(count)),
            Err(errno) if would_block(errno) => Ok(None),
            Err(errno) => Err(error(errno)),
        }
    }

    fn tcp_shutdown(&mut self, flow: FlowId) {
        if let Some(socket) = self.flows.get(&flow) {
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    fn udp_open(&mut self, flow: FlowId, to: SocketAddrV4) -> Result<(), HostError> {
        let socket = socket(SocketType::DGRAM).map_err(error)?;
        rustix::net::connect(&socket, &to).map_err(error)?;
        self.adopt(flow, socket, false).map_err(error)
    }

    fn udp_send(&mut self, flow: FlowId, data: &[u8], size: usize) -> Result<(), HostError> {
        let socket = self.get(flow)?;
        let send = |piece: &[u8]| match rustix::net::send(socket, piece, SendFlags::NOSIGNAL) {
            Err(errno) if !would_block(errno) => Err(error(errno)),
            _ => Ok(()),
        };
        match data.is_empty() {
            true => send(data),
            false => data.chunks(size.max(1)).try_for_each(send),
        }
    }

    fn udp_receive(&mut self, flow: FlowId, data: &mut [u8]) -> Result<Option<usize>, HostError> {
        match rustix::net::recv(self.get(flow)?, data, RecvFlags::empty()) {
            Ok((_, count)) => Ok(Some(count)),
            Err(errno) if would_block(errno) => Ok(None),
            Err(errno) => Err(error(errno)),
        }
    }

    fn forward_send(&mut self, forward: u16, to: SocketAddrV4, data: &[u8]) {
        if let Some((_, socket)) = self.forwards.get(usize::from(forward)) {
            let _ = rustix::net::sendto(socket, data, SendFlags::NOSIGNAL, &to);
        }
    }

    fn close(&mut self, flow: FlowId, abort: bool) {
        // Dropping the last handle takes it out of the events too.
        if let Some(socket) = self.flows.remove(&flow)
            && abort
        {
            let _ = sockopt::set_socket_linger(socket.as_fd(), Some(Duration::ZERO));
        }
    }

    fn resolver(&mut self) -> Option<SocketAddrV4> {
        self.resolver.address()
    }

    fn is_own(&mut self, address: Ipv4Addr) -> bool {
        // Only to an address of its own does a host bind.
        let bound = socket(SocketType::DGRAM)
            .and_then(|socket| rustix::net::bind(&socket, &SocketAddrV4::new(address, 0)));
        bound.is_ok()
    }

    fn denied(&mut self, denied: Denied) {
        if self.log_since.elapsed() > LOG_TIME {
            (self.log_since, self.log_lines) = (Instant::now(), 0);
        }
        self.log_lines = self.log_lines.saturating_add(1);
        if self.log_lines > LOG_LINES {
            return;
        }
        match denied {
            Denied::Address(Protocol::Tcp, to) => {
                tracing::info!("network: denied a connection to {to}")
            }
            Denied::Address(Protocol::Udp, to) => {
                tracing::info!("network: denied a datagram to {to}")
            }
            Denied::Name(name) => tracing::info!("network: denied the name {name}"),
        }
    }
}
