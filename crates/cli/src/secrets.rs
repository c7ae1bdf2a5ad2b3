//! Where keys and passphrases come from: files, commands, the terminal; and how a key file is made.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sprat_luks::{RecoveryKey, RecoveryKeyError, Secret, SlotKind};
use zeroize::Zeroizing;

use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::terminal;
use crate::{Exit, Failure};

/// Bytes of a key file that `init` makes; so many random bytes need no slow derivation.
pub(crate) const KEY_BYTES: usize = 4096;
/// Shortest key file that `init` accepts: 256 bits.
const KEY_BYTES_MIN: usize = 32;
/// A shorter key file is treated as a passphrase (argon2id): it may have been typed by a person.
const CHEAP_KDF_BYTES_MIN: usize = 512;
/// Longest new passphrase: cryptsetup's prompt takes no more (lib/utils_crypt.h,
/// `MAX_PASSPHRASE_LENGTH`), and the sheet's commands must open what sprat makes.
const NEW_PASSPHRASE_BYTES_MAX: usize = 512;
/// Longest passphrase, from a file or a command: 8 KiB is more than anybody types.
const PASSPHRASE_BYTES_MAX: usize = 8192;
/// Shortest passphrase that `init` accepts, in bytes.
const PASSPHRASE_BYTES_MIN: usize = 12;

/// Where the secret comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SecretSource {
    /// The whole content of a file.
    KeyFile(PathBuf),
    /// The first line of a file.
    PassphraseFile(PathBuf),
    /// What a command prints.
    PassphraseCommand(Vec<OsString>),
    /// Asked for on the terminal.
    Terminal,
}

impl SecretSource {
    /// Fetches the secret, to open a container with; and what is wrong with it as a recovery key,
    /// where it looks like one.
    pub(crate) fn fetch(
        &self,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<(Secret, Option<RecoveryKeyError>), Failure> {
        match self {
            Self::KeyFile(path) => Ok((Secret::key_file(read_key_file(path, output)?), None)),
            Self::PassphraseFile(_) | Self::PassphraseCommand(_) | Self::Terminal => {
                let typed = self.passphrase("Passphrase or recovery key: ", interrupt)?;
                Ok((passphrase_secret(&typed)?, doubt(&typed)))
            }
        }
    }

    /// Fetches the secret for a new container, and says how its slot is derived.
    pub(crate) fn fetch_for_new(
        &self,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<(Secret, SlotKind), Failure> {
        if let Self::KeyFile(path) = self {
            let bytes = read_key_file(path, output)?;
            if bytes.len() < KEY_BYTES_MIN {
                return Err(Failure::usage(format!(
                    "the key file {} is too short: {} bytes, at least {KEY_BYTES_MIN} needed",
                    path.display(),
                    bytes.len()
                ))
                .with_hint("name a file that does not exist, and sprat makes a good one"));
            }
            let kind = if bytes.len() >= CHEAP_KDF_BYTES_MIN {
                SlotKind::KeyFile
            } else {
                SlotKind::Passphrase
            };
            return Ok((Secret::key_file(bytes), kind));
        }
        let typed = self.passphrase("New passphrase: ", interrupt)?;
        if matches!(self, Self::Terminal) {
            let again = terminal::ask("The same again: ", interrupt)?;
            if again != typed {
                return Err(
                    Failure::usage("the two passphrases differ").with_hint("nothing was changed")
                );
            }
        }
        if typed.len() < PASSPHRASE_BYTES_MIN {
            return Err(Failure::usage(format!(
                "the passphrase is too short: at least {PASSPHRASE_BYTES_MIN} bytes needed"
            ))
            .with_hint("the server can try passphrases for as long as it likes: use a long one"));
        }
        let untypable = if typed.len() > NEW_PASSPHRASE_BYTES_MAX {
            format!("is too long: at most {NEW_PASSPHRASE_BYTES_MAX} bytes can be typed")
        } else if typed.contains(['\n', '\r']) {
            "has more than one line: nobody can type it".to_owned()
        } else {
            return Ok((passphrase_secret(&typed)?, SlotKind::Passphrase));
        };
        Err(Failure::usage(format!("the new passphrase {untypable}"))
            .with_hint("nothing was changed. Give random bytes as a key file, not as a passphrase"))
    }

    fn passphrase(
        &self,
        prompt: &str,
        interrupt: &Interrupt,
    ) -> Result<Zeroizing<String>, Failure> {
        let bytes = match self {
            Self::PassphraseFile(path) => {
                let what = || format!("the passphrase file {}", path.display());
                let file = File::open(path).map_err(|error| unreadable(&what(), &error))?;
                read_bounded(file, PASSPHRASE_BYTES_MAX, &what())?
            }
            Self::PassphraseCommand(words) => run_passphrase_command(words)?,
            Self::Terminal => return terminal::ask(prompt, interrupt),
            Self::KeyFile(_) => unreachable!("a key file is no passphrase"),
        };
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| Failure::usage("the passphrase is not UTF-8 text"))?;
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if text.is_empty() {
            return Err(Failure::usage("the passphrase is empty"));
        }
        Ok(Zeroizing::new(text.to_owned()))
    }
}

/// A typed recovery key is brought into its printed form; everything else is taken as it is.
fn passphrase_secret(typed: &str) -> Result<Secret, Failure> {
    match RecoveryKey::parse(typed) {
        Ok(key) => Ok(key.secret()),
        Err(RecoveryKeyError::Checksum) => Err(Failure::new(
            Exit::WrongKey,
            "the recovery key has a typing error",
        )
        .because(RecoveryKeyError::Checksum.to_string())
        .with_hint("compare each group with the sheet")),
        Err(_) => Ok(Secret::passphrase(typed.to_owned())),
    }
}

/// Why it is no recovery key, where it looks like one: about as long, and in groups.
fn doubt(typed: &str) -> Option<RecoveryKeyError> {
    const CHARACTERS: std::ops::RangeInclusive<usize> = 36..=44;
    let groups = typed.trim().split(|c: char| c == '-' || c.is_whitespace());
    let lengths: Vec<usize> = groups
        .map(|group| group.chars().count())
        .filter(|len| *len > 0)
        .collect();
    // Each has four characters; one too many, one lost or a lost dash is a typing error.
    let grouped = lengths.len() >= 8 && lengths.iter().all(|len| *len <= 9);
    let about_as_long = CHARACTERS.contains(&lengths.iter().sum());
    (grouped && about_as_long)
        .then(|| RecoveryKey::parse(typed).err())
        .flatten()
}

fn unreadable(what: &str, error: &std::io::Error) -> Failure {
    let failure = Failure::usage(format!("{what} can't be read")).caused_by(error);
    if error.kind() == std::io::ErrorKind::NotFound {
        return failure.with_hint("check the name; a disk that holds it may not be mounted");
    }
    failure
}

/// Reads a key file; empty ones and those that are no file are refused.
fn read_key_file(path: &Path, output: Output) -> Result<Vec<u8>, Failure> {
    let what = format!("the key file {}", path.display());
    let file = File::open(path).map_err(|error| unreadable(&what, &error))?;
    let about = file.metadata().map_err(|error| unreadable(&what, &error))?;
    if about.is_dir() {
        return Err(Failure::usage(format!("{what} is a folder")));
    }
    if about.is_file() && about.mode() & 0o077 != 0 {
        output.warning(&format!(
            "{what} can be read by others (mode {:04o}): chmod 600 it",
            about.mode() & 0o7777
        ));
    }
    let mut bytes = read_bounded(file, Secret::LEN_MAX, &what)?;
    if bytes.is_empty() {
        return Err(Failure::usage(format!("{what} is empty")));
    }
    Ok(std::mem::take(&mut *bytes))
}

/// Reads at most `bytes_max` bytes. No copy of a part of them is left in freed memory.
fn read_bounded(
    mut from: impl Read,
    bytes_max: usize,
    what: &str,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_BYTES + 1));
    let mut piece = Zeroizing::new([0u8; 4096]);
    loop {
        let got = match from.read(&mut *piece) {
            Ok(0) => return Ok(bytes),
            Ok(got) => got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(what, &error)),
        };
        if bytes.len() + got > bytes_max {
            return Err(Failure::usage(format!(
                "{what} is longer than {bytes_max} bytes"
            )));
        }
        if bytes.len() + got > bytes.capacity() {
            let mut larger = Zeroizing::new(Vec::with_capacity(4 * bytes.capacity() + got));
            larger.extend_from_slice(&bytes);
            bytes = larger;
        }
        bytes.extend_from_slice(&piece[..got]);
    }
}

/// Runs the command with our stderr and no input, and takes what it prints.
fn run_passphrase_command(words: &[OsString]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let program = words[0].to_string_lossy().into_owned();
    let what = format!("the passphrase command {program:?}");
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Failure::usage(format!("{what} can't be started")).caused_by(&error))?;
    let printed = match child.stdout.take() {
        Some(stdout) => read_bounded(
            stdout,
            PASSPHRASE_BYTES_MAX,
            &format!("the answer of {what}"),
        ),
        None => unreachable!("its stdout is a pipe"),
    };
    let status = child.wait().map_err(|error| {
        Failure::failed(format!("{what} can't be waited for")).caused_by(&error)
    })?;
    let printed = printed?;
    if !status.success() {
        return Err(Failure::failed(format!("{what} failed")).because(status.to_string()));
    }
    Ok(printed)
}

/// Makes a key file of random bytes, mode 0600, durable before it is used; its folder (0700) too
/// where it is missing. `false`: there is one already, and it was left alone.
pub(crate) fn make_key_file(path: &Path) -> Result<bool, Failure> {
    let cannot = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't make the key file {}", path.display())).caused_by(error)
    };
    if path.symlink_metadata().is_ok() {
        return Ok(false);
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| cannot(&error))?;
    let mut key = Zeroizing::new([0u8; KEY_BYTES]);
    openssl::rand::rand_priv_bytes(&mut *key).map_err(|error| cannot(&error))?;
    // Written under another name: a half-written key file must never look like a whole one.
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let _ = std::fs::remove_file(&part);
    let made = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(&*key)?;
        file.sync_all()?;
        rename_new(&part, path)?;
        File::open(folder)?.sync_all()
    })();
    match made {
        Ok(()) => Ok(true),
        Err(error) => {
            let _ = std::fs::remove_file(&part);
            if error.kind() == std::io::ErrorKind::AlreadyExists {
                return Ok(false);
            }
            Err(cannot(&error))
        }
    }
}

/// Renames; fails where `to` exists. Some file systems (NFS) need the way round by a hard link.
fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        done => Ok(done?),
    }
}

/// The SHA-256 of a key, which the recovery sheet shows so that a copy of it can be checked.
pub(crate) fn sha256_hex(secret: &Secret) -> String {
    let hash = openssl::sha::sha256(secret.expose());
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_recovery_key_and_is_none_says_why() {
        let key = RecoveryKey::generate().unwrap().text().to_owned();
        assert_eq!(doubt(&key), None);
        let lost = &key[1..];
        assert_eq!(doubt(lost), Some(RecoveryKeyError::Length { found: 39 }));
        let one_more = format!("{key}a");
        let found = Some(RecoveryKeyError::Length { found: 41 });
        assert_eq!(doubt(&one_more), found);
        let zero = format!("{}0{}", &key[..5], &key[6..]);
        let group = Some(RecoveryKeyError::Character { group: 2 });
        assert_eq!(doubt(&zero), group);
        assert_eq!(doubt(&zero.replace('-', " ")), group);
        for passphrase in [
            "correct horse battery staple",
            "a passphrase of forty characters and more",
            &"x".repeat(40),
        ] {
            assert_eq!(doubt(passphrase), None, "{passphrase}");
        }
    }
}
