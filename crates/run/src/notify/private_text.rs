//! Secrets of the config: in the config itself, in a file, or printed by a program.

use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use sprat_session::trusted_file;
use zeroize::Zeroizing;

use crate::program;

/// Longest secret, in bytes.
const BYTES_MAX: u64 = 8192;

/// Where a secret is. `Debug` never shows it.
#[derive(Clone, PartialEq, Eq)]
pub enum PrivateText {
    /// Here.
    Text(Zeroizing<String>),
    /// In a file, without the line end.
    File(PathBuf),
    /// A program prints it.
    Command(Vec<OsString>),
}

impl PrivateText {
    /// A secret that stands in the config.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self::Text(Zeroizing::new(text.to_owned()))
    }

    /// Reads the secret; a program has `limit` to print it.
    ///
    /// # Errors
    /// In words that don't show it.
    pub fn read(&self, limit: Duration) -> Result<Zeroizing<String>, String> {
        let bytes = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::File(path) => {
                let failed = |error| format!("can't read {}: {error}", path.display());
                let mut bytes = Zeroizing::new(Vec::new());
                let file = trusted_file::open(path).map_err(failed)?;
                file.take(BYTES_MAX + 1)
                    .read_to_end(&mut bytes)
                    .map_err(failed)?;
                bytes
            }
            Self::Command(words) => {
                let name = words.first().map(|name| name.to_string_lossy());
                let name = name.unwrap_or_default();
                let ended = program::run(words, b"", limit)
                    .map_err(|error| format!("can't start {name}: {error}"))?;
                match ended.status {
                    Some(status) if status.success() => Zeroizing::new(ended.stdout),
                    Some(status) => return Err(format!("{name} failed: {status}")),
                    None => return Err(format!("{name} did not end in time")),
                }
            }
        };
        let text = std::str::from_utf8(&bytes).map_err(|_| "the secret is no text".to_owned())?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.is_empty() {
            return Err("the secret is empty".to_owned());
        }
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format!("the secret is longer than {BYTES_MAX} bytes"));
        }
        Ok(Zeroizing::new(text.to_owned()))
    }
}

impl fmt::Debug for PrivateText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("***"),
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Command(_) => f.write_str("command"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn command(script: &str) -> PrivateText {
        PrivateText::Command(["sh", "-c", script].map(OsString::from).to_vec())
    }

    #[test]
    fn secret_comes_from_text_file_and_program_without_the_line_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, "hush hush\n").unwrap();
        for secret in [
            PrivateText::text("hush hush"),
            PrivateText::File(path),
            command("echo hush hush"),
        ] {
            assert_eq!(secret.read(LIMIT).unwrap().as_str(), "hush hush");
            assert!(!format!("{secret:?}").contains("hush"));
        }
    }

    #[test]
    fn failures_do_not_show_the_secret() {
        let folder = tempfile::tempdir().unwrap();
        let empty = folder.path().join("empty");
        std::fs::write(&empty, "\n").unwrap();
        for (secret, says) in [
            (
                PrivateText::File(folder.path().join("none")),
                "No such file",
            ),
            (
                PrivateText::File(folder.path().to_owned()),
                "it is a folder",
            ),
            (PrivateText::File(empty), "the secret is empty"),
            (command("echo hush; exit 7"), "exit status: 7"),
            (
                PrivateText::Command(vec!["/no/program".into()]),
                "No such file",
            ),
        ] {
            let why = secret.read(LIMIT).unwrap_err();
            assert!(why.contains(says) && !why.contains("hush"), "{why}");
        }
        let slow = command("exec sleep 100").read(Duration::from_millis(50));
        assert_eq!(slow.unwrap_err(), "sh did not end in time");
    }
}
