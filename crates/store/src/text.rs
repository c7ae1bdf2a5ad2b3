//! Text for messages: server text made safe for a terminal, and bytes as hexadecimal digits.

use std::fmt::Write as _;

/// Makes text from the server safe for a terminal: escaped, and cut to 300 characters.
pub(crate) fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut shown = String::new();
    for character in text.trim().chars().take(300) {
        match character {
            // Harmless, and already quoted once.
            '"' | '\'' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    if text.trim().chars().nth(300).is_some() {
        shown.push('…');
    }
    shown
}

/// Returns lower-case hexadecimal digits, two per byte.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String can't fail");
        text
    })
}
