//! Network cards.

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::HostPath;
use crate::options::shorthand;

/// A network card, and the network that it is in.
///
/// As an option string, the kind of network comes first: `user`, `user,forward=tcp:8080:80,deny=*`. `forward`, `allow`
/// and `deny` can be there several times; in a file they are lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    default,
    rename_all = "kebab-case",
    remote = "Self"
)]
pub struct Net {
    /// What is behind the card.
    pub kind: NetKind,
    /// Ports of the host that lead to the guest: `tcp:HOST-PORT:GUEST-PORT`, `udp:ADDRESS:HOST-PORT:GUEST-PORT`.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "list")]
    pub forward: Vec<String>,
    /// Where the guest may connect to whatever is denied: a name, `*.NAME`, an address, `ADDRESS/BITS` or `*`, and
    /// `:PORT` behind it for one port.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "list")]
    pub allow: Vec<String>,
    /// Where it may not connect to, in the same form.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "list")]
    pub deny: Vec<String>,
    /// Whether the router's address stands for the host's loopback, and the host's own addresses are reached.
    #[serde(skip_serializing_if = "is_off")]
    pub host_access: bool,
    /// Whom the guest's questions for names are passed to, `ADDRESS` or `ADDRESS:PORT`: without it the host's own
    /// resolver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<String>,
    /// The largest packet, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// The card's address. Without it one is made from the machine's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// A file that gets every frame, for Wireshark and tcpdump.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcap: Option<HostPath>,
}

shorthand!(Net);

/// What is behind a network card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// The user-mode network: a router on sockets of the host, which needs no privilege.
    #[default]
    User,
    /// Nothing: there is no card.
    None,
}

fn is_off(flag: &bool) -> bool {
    !*flag
}

/// A list, or one value of it.
fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Visitor;
    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("text, or a list of texts")
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(alloc::vec![text.to_string()])
        }
        fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<String>, A::Error> {
            let mut list = Vec::new();
            while let Some(text) = seq.next_element()? {
                list.push(text);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_any(Visitor)
}
