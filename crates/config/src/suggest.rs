//! "Did you mean": the known word that a mistyped one is nearest to.

use alloc::string::String;
use alloc::vec::Vec;

/// The word of `known` that `typed` was most likely meant to be, or `None` when none is near.
///
/// Near means an edit distance (insert, delete, replace, swap neighbours) of at most a third of
/// the longer word, and at least one; a known word that `typed` abbreviates counts as near too.
pub fn closest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed: String = typed.to_ascii_lowercase().replace('_', "-");
    let mut best: Option<(usize, &str)> = None;
    for word in known {
        let longest = typed.chars().count().max(word.chars().count());
        let limit = (longest / 3).max(1);
        let mut edits = distance(&typed, word);
        if typed.len() >= 3 && word.starts_with(typed.as_str()) {
            edits = edits.min(1);
        }
        if edits <= limit && best.is_none_or(|(least, _)| edits < least) {
            best = Some((edits, word));
        }
    }
    best.map(|(_, word)| word)
}

/// Optimal string alignment distance.
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().take(64).collect();
    let b: Vec<char> = b.chars().take(64).collect();
    let width = b.len() + 1;
    let mut table: Vec<usize> = alloc::vec![0; (a.len() + 1) * width];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            table[i * width + j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replace = table[(i - 1) * width + j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let delete = table[(i - 1) * width + j] + 1;
                let insert = table[i * width + j - 1] + 1;
                let mut least = replace.min(delete).min(insert);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    least = least.min(table[(i - 2) * width + j - 2] + 1);
                }
                least
            };
        }
    }
    table[a.len() * width + b.len()]
}

/// The suggestion for an "unknown field" or "unknown variant" message in serde's words, which is
/// all that file formats keep of the typed error: the quoted words are the typed one, then the
/// known ones.
#[cfg(feature = "std")]
pub(crate) fn for_serde_message(message: &str) -> Option<&str> {
    if !message.contains("unknown field `") && !message.contains("unknown variant `") {
        return None;
    }
    let start = message.find("unknown ")?;
    let mut quoted = message[start..].split('`').skip(1).step_by(2);
    let typed = quoted.next()?;
    closest(typed, quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 5] = ["memory", "cpus", "kernel", "debug-exit", "cmdline"];

    #[test]
    fn typos_are_recognised_and_strangers_are_not() {
        for (typed, meant) in [
            ("memroy", Some("memory")),
            ("Memory", Some("memory")),
            ("mem", Some("memory")),
            ("cpu", Some("cpus")),
            ("debug_exit", Some("debug-exit")),
            ("kernal", Some("kernel")),
            ("cmd-line", Some("cmdline")),
            ("disk", None),
            ("", None),
        ] {
            assert_eq!(closest(typed, KEYS), meant, "{typed}");
        }
    }
}
