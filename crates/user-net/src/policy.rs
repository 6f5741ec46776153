//! Where the guest may connect to.

use alloc::{string::String, vec::Vec};
use core::{fmt, net::Ipv4Addr, str::FromStr};

/// What a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Everything.
    Any,
    /// Addresses with these leading bits.
    Network(Ipv4Addr, u8),
    /// The addresses that the guest was told for a name.
    Name(String),
    /// The same for all names that end in a dot and this.
    Subdomains(String),
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It lets pass.
    Allow,
    /// It refuses.
    Deny,
}

/// A part of a policy: `example.org`, `*.example.org:443`, `10.1.0.0/16`, `192.0.2.7:22`, `*`, `*:25`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Where to.
    pub target: Target,
    /// The port there, `None` for all.
    pub port: Option<u16>,
}

/// Text that is no rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleError(String);

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\"{}\" is no destination; write a name, *.NAME, an IPv4 address, ADDRESS/BITS or *, and :PORT behind it if you like",
            self.0
        )
    }
}

impl core::error::Error for RuleError {}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let wrong = || RuleError(text.into());
        let (target, port) = match text.rsplit_once(':') {
            None => (text, None),
            Some((target, port)) => {
                let port = port.parse().ok().filter(|port| *port != 0);
                (target, Some(port.ok_or_else(wrong)?))
            }
        };
        let target = parse_target(target).ok_or_else(wrong)?;
        Ok(Self { target, port })
    }
}

fn parse_target(text: &str) -> Option<Target> {
    if text == "*" {
        return Some(Target::Any);
    }
    if let Ok(address) = text.parse() {
        return Some(Target::Network(address, 32));
    }
    if let Some((address, bits)) = text.split_once('/') {
        let bits = bits.parse().ok().filter(|bits| *bits <= 32)?;
        return Some(Target::Network(address.parse().ok()?, bits));
    }
    let (name, below) = match text.strip_prefix("*.") {
        Some(name) => (name, true),
        None => (text, false),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let good = |part: &str| {
        (1..=63).contains(&part.len())
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // What ends in digits only is an address that was mistyped.
    let last = name.rsplit('.').next().unwrap_or_default();
    if name.len() > 253
        || !name.split('.').all(good)
        || last.bytes().all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    Some(match below {
        true => Target::Subdomains(name),
        false => Target::Name(name),
    })
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Any => f.write_str("*")?,
            Target::Network(address, 32) => write!(f, "{address}")?,
            Target::Network(address, bits) => write!(f, "{address}/{bits}")?,
            Target::Name(name) => f.write_str(name)?,
            Target::Subdomains(name) => write!(f, "*.{name}")?,
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl Target {
    /// Whether `name`, in lower case, is meant. `Any` means every name.
    fn means_name(&self, name: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Network(..) => false,
            Self::Name(own) => own == name,
            Self::Subdomains(own) => name
                .strip_suffix(own.as_str())
                .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
        }
    }

    fn means_address(
        &self,
        address: Ipv4Addr,
        mut names: impl Iterator<Item = impl AsRef<str>>,
    ) -> bool {
        match self {
            Self::Any => true,
            Self::Network(own, bits) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(*bits)).unwrap_or(0);
                (u32::from(*own) ^ u32::from(address)) & mask == 0
            }
            Self::Name(_) | Self::Subdomains(_) => names.any(|name| self.means_name(name.as_ref())),
        }
    }
}

/// Where the guest may connect to: what a rule allows, and what no rule denies. An empty policy denies nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What is allowed whatever is denied.
    pub allow: Vec<Rule>,
    /// What else is denied.
    pub deny: Vec<Rule>,
}

impl Policy {
    /// Whether everything is allowed.
    pub fn is_open(&self) -> bool {
        self.deny.is_empty()
    }

    /// What happens to a connection to `port` at `address`, which the guest knows under `names`.
    pub fn decide<N: AsRef<str>>(&self, address: Ipv4Addr, port: u16, names: &[N]) -> Action {
        let means = |rule: &Rule| {
            rule.port.is_none_or(|own| own == port)
                && rule.target.means_address(address, names.iter())
        };
        match self.deny.iter().any(means) && !self.allow.iter().any(means) {
            true => Action::Deny,
            false => Action::Allow,
        }
    }

    /// What happens to a question for `name`, in lower case. A rule for some port does not keep the name from being
    /// resolved, and one that allows some port lets it be.
    pub fn decide_name(&self, name: &str) -> Action {
        let denied = self
            .deny
            .iter()
            .any(|rule| rule.port.is_none() && rule.target.means_name(name));
        let allowed = self.allow.iter().any(|rule| rule.target.means_name(name));
        match denied && !allowed {
            true => Action::Deny,
            false => Action::Allow,
        }
    }
}
