//! serde `Serializer` that writes an option string.

use alloc::string::{String, ToString};

use serde::ser::{Impossible, Serialize, SerializeStruct, SerializeStructVariant, Serializer};

use super::OptionError;
use super::lex::quote;

pub(super) fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, OptionError> {
    let mut out = String::new();
    value.serialize(Whole { out: &mut out })?;
    Ok(out)
}

/// Writes a value at the start of a string: a struct's items, an enum, or one bare value.
struct Whole<'o> {
    out: &'o mut String,
}

/// Writes a struct's fields; the first one that is written leaves out its key if it can.
struct Items<'o> {
    out: &'o mut String,
    fields: usize,
}

impl Items<'_> {
    fn field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), OptionError> {
        let mut text = String::new();
        value.serialize(Whole { out: &mut text })?;
        if self.fields > 0 {
            self.out.push(',');
            self.out.push_str(key);
            self.out.push('=');
        }
        self.fields += 1;
        self.out.push_str(&text);
        Ok(())
    }
}

impl SerializeStruct for Items<'_> {
    type Ok = ();
    type Error = OptionError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), OptionError> {
        self.field(key, value)
    }

    fn skip_field(&mut self, key: &'static str) -> Result<(), OptionError> {
        if self.fields == 0 {
            // The next field would be taken for this one.
            return Err(OptionError::Missing(key.to_string()));
        }
        Ok(())
    }

    fn end(self) -> Result<(), OptionError> {
        Ok(())
    }
}

impl SerializeStructVariant for Items<'_> {
    type Ok = ();
    type Error = OptionError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        key: &'static str,
        value: &T,
    ) -> Result<(), OptionError> {
        self.field(key, value)
    }

    fn end(self) -> Result<(), OptionError> {
        Ok(())
    }
}

macro_rules! bare {
    ($($method:ident $type:ty)*) => {
        $(fn $method(self, value: $type) -> Result<(), OptionError> {
            self.out.push_str(&quote(&value.to_string()));
            Ok(())
        })*
    };
}

impl<'o> Serializer for Whole<'o> {
    type Ok = ();
    type Error = OptionError;
    type SerializeSeq = Impossible<(), OptionError>;
    type SerializeTuple = Impossible<(), OptionError>;
    type SerializeTupleStruct = Impossible<(), OptionError>;
    type SerializeTupleVariant = Impossible<(), OptionError>;
    type SerializeMap = Impossible<(), OptionError>;
    type SerializeStruct = Items<'o>;
    type SerializeStructVariant = Items<'o>;

    bare! {
        serialize_i8 i8
        serialize_i16 i16
        serialize_i32 i32
        serialize_i64 i64
        serialize_u8 u8
        serialize_u16 u16
        serialize_u32 u32
        serialize_u64 u64
        serialize_char char
        serialize_str &str
    }

    fn serialize_bool(self, value: bool) -> Result<(), OptionError> {
        self.out.push_str(if value { "on" } else { "off" });
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), OptionError> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        value: &T,
    ) -> Result<(), OptionError> {
        value.serialize(self)
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<(), OptionError> {
        self.out.push_str(variant);
        Ok(())
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), OptionError> {
        self.out.push_str(variant);
        self.out.push('=');
        value.serialize(self)
    }

    fn serialize_struct(self, _name: &'static str, _len: usize) -> Result<Items<'o>, OptionError> {
        Ok(Items {
            out: self.out,
            fields: 0,
        })
    }

    fn serialize_struct_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        _len: usize,
    ) -> Result<Items<'o>, OptionError> {
        self.out.push_str(variant);
        self.out.push('=');
        Ok(Items {
            out: self.out,
            fields: 0,
        })
    }

    fn serialize_f32(self, _: f32) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("a floating-point number"))
    }
    fn serialize_f64(self, _: f64) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("a floating-point number"))
    }
    fn serialize_bytes(self, _: &[u8]) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("a byte string"))
    }
    fn serialize_none(self) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("an absent value"))
    }
    fn serialize_unit(self) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("an empty value"))
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<(), OptionError> {
        Err(OptionError::Unsupported("an empty value"))
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, OptionError> {
        Err(OptionError::Unsupported("a sequence"))
    }
    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, OptionError> {
        Err(OptionError::Unsupported("a sequence"))
    }
    fn serialize_tuple_struct(
        self,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleStruct, OptionError> {
        Err(OptionError::Unsupported("a sequence"))
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Self::SerializeTupleVariant, OptionError> {
        Err(OptionError::Unsupported(
            "a variant with several unnamed fields",
        ))
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, OptionError> {
        Err(OptionError::Unsupported("a map"))
    }
}
