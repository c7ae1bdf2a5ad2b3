//! Text for messages: one printable line, and a path that a shell takes as it is.

use std::path::Path;

/// One line of printable text: a terminal sees no control characters of a program's making.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut out = String::new();
    for line in lines {
        if !out.is_empty() {
            out.push_str("; ");
        }
        out.extend(line.chars().filter(|c| !c.is_control()));
    }
    out
}

/// A path for a shell command in a hint: quoted where the shell would take it for something else.
pub(crate) fn quoted(path: &Path) -> String {
    let text = printable(path.as_os_str().as_encoded_bytes());
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
