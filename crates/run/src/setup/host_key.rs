//! The server's host key: scanned as ssh does, shown as ssh shows it, and written to root's `known_hosts` only
//! after a person's yes.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use sprat_session::ssh_config::KnownServer;
use sprat_session::{Exit, Failure};
use sprat_snapshot::local_file;

use crate::program;

/// How long the scan may take, for all kinds of keys together.
const SCAN_TIME: Duration = Duration::from_secs(40);
/// How long ssh-keyscan waits for one connection, in seconds.
const CONNECT_SECONDS: &str = "10";
/// The kinds of keys, the best first.
const KINDS: [&str; 3] = ["ssh-ed25519", "ecdsa-sha2-", "ssh-rsa"];

/// A public host key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostKey {
    /// Such as `ssh-ed25519`.
    kind: String,
    /// Base64.
    key: String,
    /// `SHA256:…`, as `ssh-keygen -l` prints it.
    pub(super) fingerprint: String,
}

impl HostKey {
    /// Kind and fingerprint for a person, such as `ED25519 SHA256:…`.
    pub(super) fn shown(&self) -> String {
        let kind = self.kind.trim_start_matches("ssh-").split('-').next();
        format!(
            "{} {}",
            kind.unwrap_or_default().to_uppercase(),
            self.fingerprint
        )
    }
}

/// Asks the server for its host keys, the best first. At least one.
pub(super) fn scan(server: &KnownServer) -> Result<Vec<HostKey>, Failure> {
    let port = server.port.to_string();
    let words = [
        "ssh-keyscan",
        "-T",
        CONNECT_SECONDS,
        "-p",
        &port,
        "--",
        &server.host,
    ];
    let unreachable = |why: String| {
        Failure::new(
            Exit::Unreachable,
            format!("can't get the host key of {}", server.host),
        )
        .because(why)
        .with_hint("nothing was changed. Check the name, the port, and that the server is on")
    };
    let ended = program::run(&words, b"", SCAN_TIME)
        .map_err(|error| unreachable(format!("ssh-keyscan: {error}")))?;
    let keys = read(&String::from_utf8_lossy(&ended.stdout));
    if keys.is_empty() {
        let said = String::from_utf8_lossy(&ended.stderr);
        let last = said.lines().rfind(|line| !line.starts_with('#'));
        return Err(unreachable(last.unwrap_or("no answer").to_owned()));
    }
    Ok(keys)
}

/// The keys in ssh-keyscan's output: `NAME KIND KEY` in each line.
fn read(output: &str) -> Vec<HostKey> {
    let key = |line: &str| {
        let [_, kind, key] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        KINDS.iter().find(|known| kind.starts_with(**known))?;
        let blob = openssl::base64::decode_block(key).ok()?;
        let hash = openssl::base64::encode_block(&openssl::sha::sha256(&blob));
        Some(HostKey {
            kind: kind.to_owned(),
            key: key.to_owned(),
            fingerprint: format!("SHA256:{}", hash.trim_end_matches('=')),
        })
    };
    let lines = output.lines().filter(|line| !line.starts_with('#'));
    let mut keys: Vec<HostKey> = lines.filter_map(key).collect();
    let rank = |key: &HostKey| KINDS.iter().position(|kind| key.kind.starts_with(kind));
    keys.sort_by_key(rank);
    keys
}

/// The key that a fingerprint names.
pub(super) fn named<'k>(keys: &'k [HostKey], fingerprint: &str) -> Option<&'k HostKey> {
    let bare = |text: &str| {
        let text = text.strip_prefix("SHA256:").unwrap_or(text);
        text.trim_end_matches('=').to_owned()
    };
    let wanted = bare(fingerprint.split_whitespace().last().unwrap_or_default());
    keys.iter().find(|key| bare(&key.fingerprint) == wanted)
}

/// Adds the key to the end of `known_hosts`, as ssh does after a yes. Nothing else in the file changes.
pub(super) fn accept(key: &HostKey, known_as: &str, file: &Path) -> Result<(), Failure> {
    let line = format!("{known_as} {} {}\n", key.kind, key.key);
    append(file, &line).map_err(|error| {
        Failure::failed(format!("can't write {}", file.display()))
            .caused_by(&error)
            .with_hint("nothing was changed")
    })
}

fn append(path: &Path, line: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        local_file::make_private_folder(folder)?;
    }
    let mut options = OpenOptions::new();
    let options = options.read(true).append(true).create(true);
    let mut file: File = options.mode(0o600).open(path)?;
    let mut text = String::new();
    // A last line without its end would swallow the new one.
    if file.metadata()?.len() > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != [b'\n'] {
            text.push('\n');
        }
    }
    text.push_str(line);
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ED25519: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl";

    #[test]
    fn scanned_keys_have_the_fingerprint_that_ssh_shows() {
        // github.com's, whose fingerprint is published.
        let output = format!(
            "# nas:22 SSH-2.0-x\nnas ssh-rsa AAAAB3NzaC1yc2E=\nnas ssh-ed25519 {ED25519}\nnas x y\nnoise\n"
        );
        let keys = read(&output);
        assert_eq!(keys.len(), 2, "{keys:?}");
        let known = "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU";
        assert_eq!(keys[0].fingerprint, known);
        assert_eq!(keys[0].shown(), format!("ED25519 {known}"));
        for typed in [
            known,
            &known[7..],
            &format!("{known}="),
            &format!("ED25519 {known}"),
        ] {
            assert_eq!(named(&keys, typed), Some(&keys[0]), "{typed}");
        }
        for other in ["", "SHA256:", "yes", &known[..40]] {
            assert_eq!(named(&keys, other), None, "{other}");
        }
    }

    #[test]
    fn accepted_key_is_added_and_the_rest_of_the_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(".ssh/known_hosts");
        let key = &read(&format!("nas ssh-ed25519 {ED25519}\n"))[0];
        let line = format!("[nas]:23 ssh-ed25519 {ED25519}\n");
        accept(key, "[nas]:23", &file).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), line);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
        std::fs::write(&file, "old entry").unwrap();
        accept(key, "[nas]:23", &file).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(text, format!("old entry\n{line}"));
    }
}
