//! Text for messages: a printable line, and a path quoted for the shell.

use std::path::Path;

/// One line of printable text. A terminal must not see control characters of another program.
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

/// A path for a shell command in a hint, quoted if necessary.
pub(crate) fn quoted(path: &Path) -> String {
    let text = printable(path.as_os_str().as_encoded_bytes());
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@%,=".contains(c);
    if text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}
