//! Converts file names to printable text and back: bytes that are not printable UTF-8 become `\#ooo`.
//!
//! rsync writes names in its messages in the same way. A backslash is written as itself unless `#` and
//! three octal digits follow it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Writes a file name or path as text for JSON and for a terminal.
#[must_use]
pub fn escape_name(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        let rest = &name[at..];
        if rest[0] == b'\\' && octal_after_mark(rest).is_some() {
            push_escaped(&mut text, b'\\');
            at += 1;
            continue;
        }
        match first_char(rest) {
            Some(c) if !c.is_control() => {
                text.push(c);
                at += c.len_utf8();
            }
            Some(c) => {
                rest[..c.len_utf8()]
                    .iter()
                    .for_each(|b| push_escaped(&mut text, *b));
                at += c.len_utf8();
            }
            None => {
                push_escaped(&mut text, rest[0]);
                at += 1;
            }
        }
    }
    text
}

/// Parses what [`escape_name`] or rsync wrote.
#[must_use]
pub fn unescape_name(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut name = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if let Some(byte) = octal_after_mark(&bytes[at..]) {
            name.push(byte);
            at += 5;
        } else {
            name.push(bytes[at]);
            at += 1;
        }
    }
    name
}

/// The byte that `\#ooo` at the beginning of `bytes` stands for.
fn octal_after_mark(bytes: &[u8]) -> Option<u8> {
    let digits = bytes.strip_prefix(b"\\#")?.get(..3)?;
    let mut value = 0u16;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return None;
        }
        value = value * 8 + u16::from(digit - b'0');
    }
    u8::try_from(value).ok()
}

fn push_escaped(text: &mut String, byte: u8) {
    text.push_str("\\#");
    for shift in [6, 3, 0] {
        text.push(char::from(b'0' + ((byte >> shift) & 7)));
    }
}

fn first_char(bytes: &[u8]) -> Option<char> {
    let head = &bytes[..bytes.len().min(4)];
    match std::str::from_utf8(head) {
        Ok(text) => text.chars().next(),
        Err(e) => std::str::from_utf8(&head[..e.valid_up_to()])
            .ok()?
            .chars()
            .next(),
    }
}

pub(crate) fn escape_path(path: &Path) -> String {
    escape_name(path.as_os_str().as_bytes())
}

pub(crate) fn unescape_path(text: &str) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&unescape_name(text)))
}

/// serde: a path as escaped text, so that names that are not UTF-8 can be in JSON.
pub(crate) mod path_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::path::{Path, PathBuf};

    pub(crate) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&super::escape_path(path))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(super::unescape_path(&String::deserialize(from)?))
    }
}

/// serde: a list of paths as escaped texts.
pub(crate) mod path_texts {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::path::PathBuf;

    pub(crate) fn serialize<S: Serializer>(paths: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(paths.iter().map(|path| super::escape_path(path)))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<PathBuf>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        Ok(texts
            .iter()
            .map(|text| super::unescape_path(text))
            .collect())
    }
}

/// serde: an optional path as escaped text.
pub(crate) mod path_text_option {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::path::PathBuf;

    pub(crate) fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        path.as_deref().map(super::escape_path).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        Ok(Option::<String>::deserialize(from)?.map(|text| super::unescape_path(&text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_escaped_like_rsync_does() {
        assert_eq!(escape_name(b"a\nb"), "a\\#012b");
        assert_eq!(escape_name(b"\xff"), "\\#377");
        assert_eq!(escape_name("ü\\x".as_bytes()), "ü\\x");
        assert_eq!(escape_name(b"a\\#012"), "a\\#134#012");
        assert_eq!(escape_name("\u{85}".as_bytes()), "\\#302\\#205");
    }

    proptest! {
        #[test]
        fn every_name_is_restored_by_unescape(name in prop::collection::vec(any::<u8>(), 0..40)) {
            let text = escape_name(&name);
            prop_assert!(!text.chars().any(char::is_control));
            prop_assert_eq!(unescape_name(&text), name);
        }

        #[test]
        fn every_name_with_backslashes_is_restored_by_unescape(name in "[\\\\#0-7a]{0,20}") {
            prop_assert_eq!(unescape_name(&escape_name(name.as_bytes())), name.into_bytes());
        }
    }
}
