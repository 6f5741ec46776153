//! The machine's network cards: the networks that they are in, opened before the machine is made.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;

use anyhow::{Context, Result};
use caisson_config::{MachineConfig, Net};
use caisson_machine::NetSpec;
use caisson_net::{Capture, UserNetwork, UserNetworkSpec};
use caisson_packet::{MacAddress, PacketBackend};
use caisson_user_net::{Config, Policy, Rule};

use crate::exit::UsageError;

/// The port of name servers.
const DNS_PORT: u16 = 53;

/// Opens what the description names.
pub(super) fn open(config: &MachineConfig) -> Result<Vec<NetSpec>> {
    let cards = (0u8..).zip(config.cards());
    cards
        .map(|(index, net)| {
            let spec = spec(config, net, index)?;
            let mac = spec.router.guest_mac;
            let mut backend: Arc<dyn PacketBackend> = UserNetwork::open(spec)?;
            if let Some(path) = &net.pcap {
                backend = Capture::new(backend, path.as_path())?;
            }
            Ok(NetSpec { mac, backend })
        })
        .collect()
}

/// Refuses what is no network, before anything is opened.
pub(super) fn check(config: &MachineConfig) -> Result<()> {
    for net in config.cards() {
        spec(config, net, 0)?;
    }
    Ok(())
}

fn usage(error: impl std::fmt::Display) -> anyhow::Error {
    UsageError(format!("net: {error}")).into()
}

fn spec(config: &MachineConfig, net: &Net, index: u8) -> Result<UserNetworkSpec> {
    let rules = |texts: &[String]| {
        let rules: Result<Vec<Rule>, _> = texts.iter().map(|text| text.parse()).collect();
        rules.map_err(usage)
    };
    let guest_mac = match &net.mac {
        Some(text) => text.parse().map_err(usage)?,
        None => made_up(config.name.as_str(), index),
    };
    if guest_mac.is_multicast() {
        return Err(usage(format!(
            "{guest_mac} is the address of a group, not of a card"
        )));
    }
    let plan = Config::default();
    // Each card is in a network of its own.
    let place = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        Ipv4Addr::new(a, b, c + index, d)
    };
    let router = Config {
        guest: place(plan.guest),
        gateway: place(plan.gateway),
        name_server: place(plan.name_server),
        mtu: net.mtu.unwrap_or(plan.mtu),
        guest_mac,
        host_access: net.host_access,
        policy: Policy {
            allow: rules(&net.allow)?,
            deny: rules(&net.deny)?,
        },
        ..plan
    };
    let forwards = net.forward.iter().map(|text| text.parse());
    let forwards: Result<_, caisson_net::ForwardError> = forwards.collect();
    let resolver = net.dns.as_deref().map(resolver).transpose();
    Ok(UserNetworkSpec {
        router,
        forwards: forwards.map_err(usage)?,
        resolver: resolver?,
    })
}

fn resolver(text: &str) -> Result<SocketAddrV4> {
    let alone = || {
        text.parse()
            .map(|address| SocketAddrV4::new(address, DNS_PORT))
    };
    text.parse().or_else(|_| alone()).with_context(|| {
        UsageError(format!(
            "net: dns=\"{text}\" is no IPv4 address, with or without :PORT"
        ))
    })
}

/// An address for card `index` that is this machine's whenever it runs, and hardly ever another's (FNV-1a).
fn made_up(name: &str, index: u8) -> MacAddress {
    let hash = name
        .bytes()
        .chain([index])
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    // Administered by nobody, and of one card.
    MacAddress([0x02, a, b, c, d, e])
}
