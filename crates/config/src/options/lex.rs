//! Splitting an option string into its items, and quoting values for one.

use alloc::borrow::Cow;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use super::OptionError;

/// One item between commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    /// What stands before the first `=`, when there is one.
    pub(super) key: Option<String>,
    /// The value with its quotes resolved; the whole item when there is no key.
    pub(super) value: String,
}

/// Splits at commas outside quotes.
///
/// With `value_first`, an equals sign in the first item belongs to its value: it is what follows
/// `variant=`.
pub(super) fn items(text: &str, value_first: bool) -> Result<Vec<Item>, OptionError> {
    let mut items = Vec::new();
    let mut rest = text;
    loop {
        let key_end = rest
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '_')
            .unwrap_or(rest.len());
        let has_key = key_end > 0 && rest[key_end..].starts_with('=');
        let key = if has_key && !(value_first && items.is_empty()) {
            let key = rest[..key_end].to_string();
            rest = &rest[key_end + 1..];
            Some(key)
        } else {
            None
        };
        let quoted = rest.starts_with('"');
        let (value, after) = if quoted { unquote(rest)? } else { bare(rest) };
        if key.is_none() && !quoted && value.is_empty() {
            return Err(OptionError::EmptyItem(text.to_string()));
        }
        items.push(Item { key, value });
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(items),
            None => return Err(OptionError::AfterQuote(after.to_string())),
        }
    }
}

fn bare(text: &str) -> (String, &str) {
    let end = text.find(',').unwrap_or(text.len());
    (text[..end].to_string(), &text[end..])
}

fn unquote(text: &str) -> Result<(String, &str), OptionError> {
    let mut value = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, c @ ('"' | '\\'))) => value.push(c),
                Some((_, other)) => return Err(OptionError::Escape(other.to_string())),
                None => break,
            },
            c => value.push(c),
        }
    }
    Err(OptionError::OpenQuote(text.to_string()))
}

/// The value as it has to stand in an option string.
pub(super) fn quote(value: &str) -> Cow<'_, str> {
    let plain = !value.is_empty() && !value.starts_with('"') && !value.contains([',', '=']);
    if plain {
        return Cow::Borrowed(value);
    }
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('"');
    for c in value.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    Cow::Owned(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(key: Option<&str>, value: &str) -> Item {
        Item {
            key: key.map(str::to_string),
            value: value.to_string(),
        }
    }

    #[test]
    fn items_are_split_at_commas_outside_quotes() {
        assert_eq!(
            items(r#"1G,path="a,b\"\\c",on,x=,y=1=2"#, false).unwrap(),
            [
                item(None, "1G"),
                item(Some("path"), "a,b\"\\c"),
                item(None, "on"),
                item(Some("x"), ""),
                item(Some("y"), "1=2"),
            ]
        );
        assert_eq!(
            items("/tmp/a=b,append", false).unwrap(),
            [item(None, "/tmp/a=b"), item(None, "append")]
        );
        assert_eq!(items("a=b", true).unwrap(), [item(None, "a=b")]);
        assert_eq!(
            items(r"C:\x", false).unwrap(),
            [item(None, r"C:\x")],
            "a backslash outside quotes is itself"
        );
    }

    #[test]
    fn malformed_text_is_refused() {
        for bad in [
            "", ",", "a,", "a,,b", "\"a", "\"a\\", "\"a\\n\"", "\"a\"b", "k=\"a\"b",
        ] {
            assert!(items(bad, false).is_err(), "{bad:?}");
        }
    }
}
