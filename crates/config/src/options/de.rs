//! serde `Deserializer`s over an option string and its items.

use alloc::string::{String, ToString};
use alloc::vec::{self, Vec};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, MapAccess,
    VariantAccess, Visitor,
    value::{SeqDeserializer, StrDeserializer},
};
use serde::forward_to_deserialize_any;

use super::OptionError;
use super::lex::{self, Item};

/// A whole option string.
pub(super) struct Text<'t> {
    text: &'t str,
    /// The first item is the value that followed `variant=`, so it has no key of its own.
    value_first: bool,
}

impl<'t> Text<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self {
            text,
            value_first: false,
        }
    }

    /// The single value that the text is, for types that are not structs or enums.
    fn scalar(self) -> Result<Scalar, OptionError> {
        let mut items = lex::items(self.text, true)?;
        match (items.len(), items.pop()) {
            (1, Some(item)) => Ok(Scalar {
                key: String::new(),
                value: Some(item.value),
                more: Vec::new(),
            }),
            _ => Err(OptionError::Value {
                value: self.text.to_string(),
                expected: "a single value".to_string(),
            }),
        }
    }
}

macro_rules! via_scalar {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
            self.scalar()?.$method(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Text<'_> {
    type Error = OptionError;

    /// Hands over the text as it is: the type that asks is one with a [`Shorthand`], which
    /// comes back with its derive.
    ///
    /// [`Shorthand`]: super::Shorthand
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        if !self.value_first {
            return visitor.visit_str(self.text);
        }
        let mut items = lex::items(self.text, true)?.into_iter();
        let first = items.next().map(|item| item.value).unwrap_or_default();
        let mut text = lex::quote(&first).into_owned();
        for item in items {
            text.push(',');
            if let Some(key) = item.key {
                text.push_str(&key);
                text.push('=');
            }
            text.push_str(&lex::quote(&item.value));
        }
        visitor.visit_string(text)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_map(Fields {
            items: lex::items(self.text, self.value_first)?.into_iter(),
            first: fields.first().copied(),
            value: None,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_enum(Variant { text: self.text })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    via_scalar! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_char
        deserialize_str deserialize_string
    }

    forward_to_deserialize_any! {
        f32 f64 bytes byte_buf unit unit_struct seq tuple tuple_struct map identifier ignored_any
    }
}

/// The items of a struct.
struct Fields {
    items: vec::IntoIter<Item>,
    /// The field that an item without a key sets, until the first item is past.
    first: Option<&'static str>,
    value: Option<Scalar>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = OptionError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, OptionError> {
        let Some(item) = self.items.next() else {
            return Ok(None);
        };
        let (key, value) = match (item.key, self.first.take()) {
            (Some(key), _) => (key, Some(item.value)),
            (None, Some(first)) => (first.to_string(), Some(item.value)),
            (None, None) => (item.value, None),
        };
        let (same, others): (Vec<_>, Vec<_>) = self
            .items
            .by_ref()
            .partition(|item| item.key.as_ref() == Some(&key));
        self.items = others.into_iter();
        let more = same.into_iter().map(|item| item.value).collect();
        let scalar = Scalar { key, value, more };
        let key = seed.deserialize(key_deserializer(&scalar.key))?;
        self.value = Some(scalar);
        Ok(Some(key))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, OptionError> {
        match self.value.take() {
            Some(scalar) => seed.deserialize(scalar),
            None => Err(OptionError::custom("a value was asked for before its key")),
        }
    }
}

fn key_deserializer(key: &str) -> StrDeserializer<'_, OptionError> {
    key.into_deserializer()
}

/// The value of one key.
struct Scalar {
    key: String,
    /// `None` when the key stands alone.
    value: Option<String>,
    /// Its further values where the key is there again: then it is a list.
    more: Vec<String>,
}

impl Scalar {
    fn text(self) -> Result<String, OptionError> {
        if !self.more.is_empty() {
            return Err(OptionError::Twice(self.key));
        }
        self.value.ok_or(OptionError::NoValue(self.key))
    }
}

macro_rules! number {
    ($($method:ident $visit:ident $type:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
            let text = self.text()?;
            let digits = text.strip_prefix("0x").or(text.strip_prefix("0X"));
            let number = match digits {
                Some(hex) if !hex.starts_with(['+', '-']) => $type::from_str_radix(hex, 16).ok(),
                Some(_) => None,
                None => text.parse().ok(),
            };
            match number {
                Some(number) => visitor.$visit(number),
                None => Err(OptionError::Value {
                    value: text,
                    expected: alloc::format!("a number from {} to {}", $type::MIN, $type::MAX),
                }),
            }
        })*
    };
}

impl<'de> Deserializer<'de> for Scalar {
    type Error = OptionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        match (self.value, self.more.is_empty()) {
            (Some(text), true) => visitor.visit_string(text),
            (None, true) => visitor.visit_bool(true),
            (first, false) => {
                let values = first.into_iter().chain(self.more);
                let key = self.key;
                visitor
                    .visit_seq(SeqDeserializer::new(values))
                    .map_err(|_: OptionError| OptionError::Twice(key))
            }
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        if !self.more.is_empty() {
            return Err(OptionError::Twice(self.key));
        }
        match self.value.as_deref() {
            None | Some("on" | "true" | "yes") => visitor.visit_bool(true),
            Some("off" | "false" | "no") => visitor.visit_bool(false),
            Some(other) => Err(OptionError::Value {
                value: other.to_string(),
                expected: alloc::format!("on or off, which \"{}\" is set to", self.key),
            }),
        }
    }

    number! {
        deserialize_i8 visit_i8 i8
        deserialize_i16 visit_i16 i16
        deserialize_i32 visit_i32 i32
        deserialize_i64 visit_i64 i64
        deserialize_u8 visit_u8 u8
        deserialize_u16 visit_u16 u16
        deserialize_u32 visit_u32 u32
        deserialize_u64 visit_u64 u64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        let text = self.text()?;
        visitor.visit_enum(Variant { text: &text })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        let text = self.text()?;
        Text::new(&text).deserialize_struct(name, fields, visitor)
    }

    forward_to_deserialize_any! {
        f32 f64 char bytes byte_buf unit unit_struct seq tuple tuple_struct map identifier
        ignored_any
    }
}

/// `variant` or `variant=content`.
struct Variant<'t> {
    text: &'t str,
}

impl<'de, 't> EnumAccess<'de> for Variant<'t> {
    type Error = OptionError;
    type Variant = Content<'t>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Content<'t>), OptionError> {
        let (name, text) = match self.text.find(['=', ',']) {
            Some(at) if self.text[at..].starts_with('=') => {
                (&self.text[..at], Some(&self.text[at + 1..]))
            }
            Some(at) => {
                let name = &self.text[..at];
                seed.deserialize(key_deserializer(name))?;
                return Err(OptionError::NoContent(name.to_string()));
            }
            None => (self.text, None),
        };
        let value = seed.deserialize(key_deserializer(name))?;
        let name = name.to_string();
        Ok((value, Content { name, text }))
    }
}

/// What follows `variant=`.
struct Content<'t> {
    name: String,
    text: Option<&'t str>,
}

impl<'t> Content<'t> {
    fn text(self) -> Result<Text<'t>, OptionError> {
        match self.text {
            Some(text) if !text.is_empty() => Ok(Text {
                text,
                value_first: true,
            }),
            _ => Err(OptionError::NoValue(self.name)),
        }
    }
}

impl<'de> VariantAccess<'de> for Content<'_> {
    type Error = OptionError;

    fn unit_variant(self) -> Result<(), OptionError> {
        match self.text {
            None => Ok(()),
            Some(_) => Err(OptionError::NoContent(self.name)),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<T::Value, OptionError> {
        seed.deserialize(self.text()?)
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        _len: usize,
        _visitor: V,
    ) -> Result<V::Value, OptionError> {
        Err(OptionError::Unsupported(
            "a variant with several unnamed fields",
        ))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        self.text()?.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        path: String,
        #[serde(default)]
        readonly: bool,
        #[serde(default)]
        queues: Option<u16>,
        #[serde(default)]
        cache: Option<Cache>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Cache {
        None,
        WriteBack,
        Limited { size: u32 },
    }

    fn disk(text: &str) -> Result<Disk, OptionError> {
        super::super::from_str(text)
    }

    #[test]
    fn a_struct_takes_its_first_field_without_a_key() {
        let expected = Disk {
            path: "a,b".to_string(),
            readonly: true,
            queues: Some(16),
            cache: Some(Cache::WriteBack),
        };
        assert_eq!(
            disk("\"a,b\",readonly,queues=0x10,cache=write-back").unwrap(),
            expected
        );
        assert_eq!(
            disk("cache=write-back,queues=16,readonly=yes,path=\"a,b\"").unwrap(),
            expected
        );
        assert_eq!(
            disk("x,cache=limited=7").unwrap().cache,
            Some(Cache::Limited { size: 7 })
        );
    }

    #[test]
    fn errors_name_the_item_and_the_way_out() {
        for (text, message) in [
            (
                "",
                "there is an empty item in \"\"; separate items with single commas",
            ),
            (
                "x,",
                "there is an empty item in \"x,\"; separate items with single commas",
            ),
            (
                "x,redonly=on",
                "unknown key \"redonly\" (did you mean \"readonly\"?); known: path, readonly, queues, cache",
            ),
            (
                "x,cache=writeback",
                "unknown value \"writeback\" (did you mean \"write-back\"?); known: none, write-back, limited",
            ),
            ("x,cache=none=1", "\"none\" takes no value"),
            (
                "x,cache=limited",
                "\"limited\" needs a value: write limited=…",
            ),
            ("x,queues", "\"queues\" needs a value: write queues=…"),
            (
                "x,queues=70000",
                "\"70000\" is not a number from 0 to 65535",
            ),
            ("x,queues=0x+1", "\"0x+1\" is not a number from 0 to 65535"),
            (
                "x,readonly=maybe",
                "\"maybe\" is not on or off, which \"readonly\" is set to",
            ),
            ("x,path=y", "\"path\" is given twice"),
            ("readonly=on", "\"path\" is missing: add path=…"),
            ("\"x", "the quote that opens at \"\\\"x\" is never closed"),
        ] {
            assert_eq!(disk(text).unwrap_err().to_string(), message, "{text}");
        }
    }
}
