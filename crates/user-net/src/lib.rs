//! The user-mode network: a router that puts one guest on the network through ordinary sockets of the host, without any
//! privilege.
//!
//! The guest sees an Ethernet with a router ([`Config::gateway`]), a name server ([`Config::name_server`]) and a DHCP
//! server that gives it [`Config::guest`]. TCP connections end here: the guest talks to a TCP of ours, and the bytes go
//! through a socket of the host. So do UDP datagrams. Nothing that the guest sends reaches the host's network as it is.
//!
//! [`Router`] is a state machine. It is given frames, events and the time, calls sockets through the [`Host`] trait, and
//! leaves frames for the guest. It knows no thread, socket or clock, so tests and fuzz targets replay it exactly.
//!
//! | protocol | what is there | specification |
//! |---|---|---|
//! | ARP | answers for the router and the name server | RFC 826 |
//! | IPv4 | no options are acted on; fragments are dropped | RFC 791 |
//! | ICMP | echo by the router; unreachable for the guest's datagrams | RFC 792 |
//! | DHCP | one lease | RFC 2131, 2132 |
//! | DNS | forwards to the host's resolver over UDP and TCP; checks names | RFC 1035 |
//! | TCP | window scaling, half-close, retransmission without congestion control | RFC 9293, 7323 §2 |
//! | UDP | a socket of the host per flow | RFC 768 |
//!
//! Memory is bounded whatever guest and peers do: [`limits`]. Left out: IPv6, reassembly of fragments, echo to other
//! hosts, urgent data (it is passed on in its place), selective acknowledgements and timestamps.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(any(test, feature = "testing"))]
extern crate std;

mod arp;
mod config;
mod dhcp;
mod dns;
mod flows;
mod host;
mod output;
mod policy;
mod router;
mod state;
mod tcp;
#[cfg(feature = "testing")]
pub mod testing;
mod udp;
mod wire;

pub use config::{Config, GATEWAY_NAME, limits};
pub use dns::{Answer, Question, parse_answers, parse_question};
pub use flows::FlowId;
pub use host::{Denied, Host, HostError, Protocol};
pub use policy::{Action, Policy, Rule, RuleError, Target};
pub use router::{Counters, Router};
