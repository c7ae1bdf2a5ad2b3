//! A server that rewrites headers: it changes the metadata and corrects the checksums.

use openssl::sha::sha256;
use serde_json::Value;

pub const SIZE: usize = 16 << 10;

/// The offsets of the two copies.
pub const COPIES: [usize; 2] = [0, SIZE];

/// Corrects the checksum of the copy at `copy`.
pub fn seal(bytes: &mut [u8], copy: usize) {
    bytes[copy + 448..copy + 512].fill(0);
    let sum = sha256(&bytes[copy..copy + SIZE]);
    bytes[copy + 448..copy + 480].copy_from_slice(&sum);
}

/// The text of the metadata in the primary copy.
pub fn text(bytes: &[u8]) -> String {
    let area = &bytes[4096..SIZE];
    let end = area.iter().position(|&b| b == 0).unwrap();
    String::from_utf8(area[..end].to_vec()).unwrap()
}

/// Replaces the metadata of one copy.
pub fn set_text(bytes: &mut [u8], copy: usize, text: &str) {
    let area = &mut bytes[copy + 4096..copy + SIZE];
    area.fill(0);
    area[..text.len()].copy_from_slice(text.as_bytes());
    seal(bytes, copy);
}

/// Rewrites the metadata of both copies.
pub fn rewrite(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut metadata: Value = serde_json::from_str(&text(bytes)).unwrap();
    change(&mut metadata);
    replace_text(bytes, &metadata.to_string())
}

/// Writes `text` into both copies.
pub fn replace_text(bytes: &[u8], text: &str) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for copy in COPIES {
        set_text(&mut bytes, copy, text);
    }
    bytes
}

/// Changes the same bytes of the binary header in both copies.
pub fn rewrite_binary(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for copy in COPIES {
        bytes[copy + at..][..new.len()].copy_from_slice(new);
        seal(&mut bytes, copy);
    }
    bytes
}
