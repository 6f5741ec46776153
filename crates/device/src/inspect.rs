//! A tree of named values that shows what a device is doing.

use alloc::{string::String, vec::Vec};
use core::fmt;

use serde::ser::{Serialize, SerializeMap, Serializer};

/// One value of an [`Inspector`].
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A count or a quantity.
    U64(u64),
    /// A register or an address; shown as `0x…`.
    Hex(u64),
    /// A yes or no.
    Bool(bool),
    /// A state's name, or other text.
    Text(String),
    /// Values that belong together.
    Node(Inspector),
}

/// Collects the values that a device shows, in the order given. Serialises as a map; hexadecimal values as strings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inspector {
    entries: Vec<(String, Value)>,
}

impl Inspector {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a count or a quantity.
    pub fn u64(&mut self, name: impl Into<String>, value: impl Into<u64>) -> &mut Self {
        self.add(name, Value::U64(value.into()))
    }

    /// Adds a register or an address.
    pub fn hex(&mut self, name: impl Into<String>, value: impl Into<u64>) -> &mut Self {
        self.add(name, Value::Hex(value.into()))
    }

    /// Adds a yes or no.
    pub fn bool(&mut self, name: impl Into<String>, value: bool) -> &mut Self {
        self.add(name, Value::Bool(value))
    }

    /// Adds text.
    pub fn text(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.add(name, Value::Text(value.into()))
    }

    /// Adds the values that `fill` gives as a subtree.
    pub fn child(
        &mut self,
        name: impl Into<String>,
        fill: impl FnOnce(&mut Inspector),
    ) -> &mut Self {
        let mut node = Inspector::new();
        fill(&mut node);
        self.add(name, Value::Node(node))
    }

    fn add(&mut self, name: impl Into<String>, value: Value) -> &mut Self {
        self.entries.push((name.into(), value));
        self
    }

    /// The names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }

    /// The value at `path`, names separated by `/`.
    pub fn get(&self, path: &str) -> Option<&Value> {
        let (name, rest) = match path.split_once('/') {
            Some((name, rest)) => (name, Some(rest)),
            None => (path, None),
        };
        let (_, value) = self.entries.iter().find(|(entry, _)| entry == name)?;
        match (value, rest) {
            (_, None) => Some(value),
            (Value::Node(node), Some(rest)) => node.get(rest),
            _ => None,
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, depth: usize) -> fmt::Result {
        for (name, value) in &self.entries {
            write!(f, "{:indent$}{name}:", "", indent = depth * 2)?;
            match value {
                Value::U64(value) => writeln!(f, " {value}")?,
                Value::Hex(value) => writeln!(f, " {value:#x}")?,
                Value::Bool(value) => writeln!(f, " {value}")?,
                Value::Text(value) => writeln!(f, " {value}")?,
                Value::Node(node) => {
                    writeln!(f)?;
                    node.write(f, depth + 1)?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Inspector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, 0)
    }
}

impl Serialize for Inspector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (name, value) in &self.entries {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Value::U64(value) => serializer.serialize_u64(*value),
            Value::Hex(value) => serializer.collect_str(&format_args!("{value:#x}")),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::Text(value) => serializer.serialize_str(value),
            Value::Node(node) => node.serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn sample() -> Inspector {
        let mut tree = Inspector::new();
        tree.u64("bytes", 5u64)
            .hex("ier", 0x0fu8)
            .child("fifo", |fifo| {
                fifo.bool("full", false).text("mode", "16550A");
            });
        tree
    }

    #[test]
    fn paths_reach_into_children() {
        assert_eq!(sample().get("fifo/full"), Some(&Value::Bool(false)));
        assert_eq!(sample().get("bytes"), Some(&Value::U64(5)));
        assert_eq!(sample().get("bytes/x"), None);
        assert_eq!(sample().get("none"), None);
    }

    #[test]
    fn prints_as_an_indented_list_and_serialises_as_a_map() {
        assert_eq!(
            sample().to_string(),
            "bytes: 5\nier: 0xf\nfifo:\n  full: false\n  mode: 16550A\n"
        );
        assert_eq!(
            serde_json::to_string(&sample()).unwrap(),
            r#"{"bytes":5,"ier":"0xf","fifo":{"full":false,"mode":"16550A"}}"#
        );
    }
}
