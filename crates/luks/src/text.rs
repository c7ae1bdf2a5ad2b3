//! Numbers, text and bytes as they are written in headers, messages and pins.

use std::fmt::Write as _;

use openssl::base64;

use crate::LuksError;

/// Text from a header for a message: quoted, control characters escaped, at most 64 characters.
pub(crate) fn shown(text: &str) -> String {
    const CHARACTERS_MAX: usize = 64;
    let mut out: String = text
        .chars()
        .take(CHARACTERS_MAX)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(CHARACTERS_MAX).is_some() {
        out.push('…');
    }
    format!("\"{out}\"")
}

/// Lower-case hexadecimal digits, two for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String can't fail");
        text
    })
}

/// Parses a number that LUKS2 stores as decimal text.
pub(crate) fn number(text: &str, name: &str) -> Result<u64, LuksError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| LuksError::invalid(format!("{name} is {}", shown(text))))
}

/// Decodes canonical base64.
pub(crate) fn decode(text: Option<&str>, what: &str) -> Result<Vec<u8>, LuksError> {
    let invalid = || LuksError::invalid(format!("{what} is not base64"));
    let text = text.ok_or_else(invalid)?;
    let bytes = base64::decode_block(text).map_err(|_| invalid())?;
    // OpenSSL ignores spaces and stray bits.
    if base64::encode_block(&bytes) != text {
        return Err(invalid());
    }
    Ok(bytes)
}

/// The big-endian number of eight bytes at `at`.
pub(crate) fn big_endian_u64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The big-endian number of four bytes at `at`.
pub(crate) fn big_endian_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Text up to the first NUL. What is not UTF-8 is replaced.
pub(crate) fn text_until_nul(field: &[u8]) -> String {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}
