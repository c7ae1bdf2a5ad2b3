//! The login on the server: with the keys that root has, else with a key of sprat's own.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sprat_session::Failure;
use sprat_session::address::SshLocation;
use sprat_snapshot::local_file;

use super::place::login;
use crate::config::Words;
use crate::program::{self, start};

/// ssh's keys are made and read in far less.
const KEYGEN_TIME: Duration = Duration::from_secs(30);

/// The key that setup makes, below the folder of the config.
pub(super) fn own_key(config_folder: &Path) -> PathBuf {
    config_folder.join("keys/ssh_ed25519")
}

/// `ssh` with this key, and with no key of an agent: a timer has no agent.
pub(super) fn with_key(ssh: &[OsString], key: &Path) -> Words {
    let mut words = ssh.to_vec();
    words.extend(["-i".into(), key.into()]);
    words.extend(["-o", "IdentitiesOnly=yes"].map(OsString::from));
    words
}

/// `ssh` as a timer runs it.
pub(super) fn without_agent(ssh: &[OsString]) -> Words {
    let mut words = ssh.to_vec();
    words.extend(["-o", "IdentityAgent=none"].map(OsString::from));
    words
}

/// Makes a key without a passphrase. The key gets its name only when it is whole.
pub(super) fn make_key(key: &Path, comment: &str) -> Result<(), Failure> {
    let cannot = |why: String| {
        Failure::failed(format!("can't make the ssh key {}", key.display()))
            .because(why)
            .with_hint("nothing was changed")
    };
    let folder = key.parent().unwrap_or(Path::new("/"));
    let make = || -> std::io::Result<(tempfile::TempDir, program::Ended)> {
        local_file::make_private_folder(folder)?;
        let part = tempfile::Builder::new()
            .prefix(".")
            .suffix(".part")
            .tempdir_in(folder)?;
        let file = part.path().join("key");
        let words: [&OsStr; 9] = [
            "ssh-keygen".as_ref(),
            "-q".as_ref(),
            "-t".as_ref(),
            "ed25519".as_ref(),
            "-N".as_ref(),
            "".as_ref(),
            "-C".as_ref(),
            comment.as_ref(),
            "-f".as_ref(),
        ];
        let words: Vec<&OsStr> = words.into_iter().chain([file.as_os_str()]).collect();
        let ended = program::run(&words, b"", KEYGEN_TIME)?;
        Ok((part, ended))
    };
    let (part, ended) = make().map_err(|error| cannot(error.to_string()))?;
    if !ended.status.is_some_and(|status| status.success()) {
        return Err(cannot(
            String::from_utf8_lossy(&ended.stderr).trim().to_owned(),
        ));
    }
    let made = part.path().join("key");
    let place = || -> std::io::Result<()> {
        std::fs::File::open(&made)?.sync_all()?;
        std::fs::rename(made.with_extension("pub"), key.with_extension("pub"))?;
        // Never over another key.
        std::fs::hard_link(&made, key)?;
        std::fs::File::open(folder)?.sync_all()
    };
    place().map_err(|error| cannot(error.to_string()))
}

/// The public line of a private key file, for `authorized_keys`.
///
/// # Errors
/// It is no private key, or has a passphrase, which nobody types for a timer.
pub(super) fn public_line(key: &Path) -> Result<String, Failure> {
    let file = key.as_os_str();
    let words: [&OsStr; 6] = [
        "ssh-keygen".as_ref(),
        "-y".as_ref(),
        "-P".as_ref(),
        "".as_ref(),
        "-f".as_ref(),
        file,
    ];
    let refused = |why: String| {
        Failure::usage(format!("the ssh key {} can't be used", key.display()))
            .because(why)
            .with_hint("nothing was changed. Give a private key file without a passphrase, or leave --ssh-key out")
    };
    let ended =
        program::run(&words, b"", KEYGEN_TIME).map_err(|error| refused(error.to_string()))?;
    if !ended.status.is_some_and(|status| status.success()) {
        return Err(refused(
            String::from_utf8_lossy(&ended.stderr).trim().to_owned(),
        ));
    }
    Ok(String::from_utf8_lossy(&ended.stdout).trim().to_owned())
}

/// What to do by hand so that the server accepts the key.
pub(super) fn by_hand(server: &SshLocation, line: &str) -> String {
    format!(
        "add this line to the file .ssh/authorized_keys of {} on the server, then run the same command \
         again: {line}",
        login(server)
    )
}

/// Puts the key into the account's `authorized_keys`: ssh asks for the account's password once, itself.
/// `false`: it did not work, or `ssh` is another program.
pub(super) fn send_key(ssh: &[OsString], server: &SshLocation, key: &Path) -> bool {
    let (Some(options), Some(program)) =
        (copied_options(ssh), start::find(OsStr::new("ssh-copy-id")))
    else {
        return false;
    };
    let Ok(stderr) = rustix::io::dup(rustix::stdio::stderr()) else {
        return false;
    };
    let mut command = Command::new(program);
    // SFTP mode: it needs no shell on the server.
    command.arg("-s").args(options).arg("-i").arg(key);
    if let Some(port) = server.port {
        command.args(["-p", &port.to_string()]);
    }
    let status = command
        .arg(login(server))
        .stdout(Stdio::from(stderr))
        .status();
    status.is_ok_and(|status| status.success())
}

/// Those options of ssh that ssh-copy-id hands on; `None`: there are others, or it is not ssh.
fn copied_options(ssh: &[OsString]) -> Option<Vec<OsString>> {
    let (program, words) = ssh.split_first()?;
    if Path::new(program).file_name() != Some(OsStr::new("ssh")) {
        return None;
    }
    let known = |pair: &[OsString]| pair.len() == 2 && (pair[0] == "-F" || pair[0] == "-o");
    words.chunks(2).all(known).then(|| words.to_vec())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use sprat_testkit::{needs, requires};

    use super::*;

    #[test]
    fn key_is_made_for_root_only_and_never_over_another() {
        requires!(needs::program("ssh-keygen"));
        let folder = tempfile::tempdir().unwrap();
        let key = own_key(folder.path());
        make_key(&key, "sprat@laptop").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&key), mode(key.parent().unwrap())), (0o600, 0o700));
        let line = public_line(&key).unwrap();
        assert!(
            line.starts_with("ssh-ed25519 ") && line.ends_with(" sprat@laptop"),
            "{line}"
        );
        let written = std::fs::read_to_string(key.with_extension("pub")).unwrap();
        assert_eq!(written.trim(), line);
        let before = std::fs::read(&key).unwrap();
        assert!(make_key(&key, "other").is_err());
        assert_eq!(std::fs::read(&key).unwrap(), before);
        let names = std::fs::read_dir(key.parent().unwrap()).unwrap();
        assert_eq!(names.count(), 2, "a part is left");
        assert!(public_line(&folder.path().join("none")).is_err());
    }

    #[test]
    fn only_options_that_ssh_copy_id_knows_are_handed_on() {
        let words = |text: &str| -> Words { text.split(' ').map(OsString::from).collect() };
        assert_eq!(copied_options(&words("ssh")), Some(Vec::new()));
        let some = copied_options(&words("/usr/bin/ssh -F a -o B=c"));
        assert_eq!(some, Some(words("-F a -o B=c")));
        for other in ["sshpass -e ssh", "ssh -4 -F a", "ssh -o"] {
            assert_eq!(copied_options(&words(other)), None, "{other}");
        }
    }
}
