//! Where keys and passphrases come from: files, commands, the terminal; and how a key file is made.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use sprat_luks::{RecoveryKey, RecoveryKeyError, Secret, SlotKind};
use sprat_session::interrupt::Interrupt;
use sprat_session::trusted_file;
use sprat_store::hex;
use zeroize::Zeroizing;

use crate::output::Output;
use crate::{Failure, passphrase_command, terminal};

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
pub(crate) const PASSPHRASE_BYTES_MAX: usize = 8192;
/// Shortest passphrase that `init` accepts, in bytes.
const PASSPHRASE_BYTES_MIN: usize = 12;
/// What some editors put before UTF-8 text.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// What may be wrong with a secret that opens nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// It looks like a recovery key, and is none.
    RecoveryKey(RecoveryKeyError),
    /// Its line ended in a carriage return, which was dropped.
    CarriageReturn,
    /// It begins with a byte order mark, as some editors write.
    ByteOrderMark,
}

impl Doubt {
    /// What is to be told of it: a cause, and what to do.
    pub(crate) fn told(&self) -> (String, &'static str) {
        match self {
            Self::RecoveryKey(error) => (
                format!("if it is meant to be a recovery key: {error}"),
                "Compare each group with the sheet",
            ),
            Self::CarriageReturn => (
                "the passphrase's line ends in a carriage return (CR LF), which was dropped"
                    .to_owned(),
                "Where the carriage return belongs to the passphrase, give the file with --key-file, \
                 without a newline at its end",
            ),
            Self::ByteOrderMark => (
                "the passphrase begins with a byte order mark (U+FEFF)".to_owned(),
                "Write the file as UTF-8 without a byte order mark",
            ),
        }
    }
}

/// A passphrase as it was typed or read.
struct Typed {
    text: Zeroizing<String>,
    carriage_return: bool,
}

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
    /// Fetches the secret, to open a container with; and what may be wrong with it should it open
    /// nothing.
    pub(crate) fn fetch(
        &self,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<(Secret, Option<Doubt>), Failure> {
        match self {
            Self::KeyFile(path) => Ok((Secret::key_file(read_key_file(path, output)?), None)),
            Self::PassphraseFile(_) | Self::PassphraseCommand(_) | Self::Terminal => {
                let typed = self.passphrase("Passphrase or recovery key: ", output, interrupt)?;
                Ok((passphrase_secret(&typed.text), doubt(&typed)))
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
        let Typed {
            text: typed,
            carriage_return,
        } = self.passphrase("New passphrase: ", output, interrupt)?;
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
        } else if carriage_return {
            "ends in a carriage return (CR LF): cryptsetup would take that for a part of it"
                .to_owned()
        } else if typed.contains(['\n', '\r']) {
            "has more than one line: nobody can type it".to_owned()
        } else if typed.starts_with(BYTE_ORDER_MARK) {
            "begins with a byte order mark (U+FEFF): nobody can type it".to_owned()
        } else if typed.chars().any(|c| c.is_control() && c != '\t') {
            "has a control character: nobody can type it".to_owned()
        } else {
            return Ok((passphrase_secret(&typed), SlotKind::Passphrase));
        };
        Err(
            Failure::usage(format!("the new passphrase {untypable}")).with_hint(
                "nothing was changed. Give one line of plain text; give random bytes as a key file",
            ),
        )
    }

    /// How the slot of a secret that opens one container is derived in another one.
    pub(crate) fn slot_kind(&self, secret: &Secret) -> SlotKind {
        let is_recovery_key = |text| {
            RecoveryKey::parse(text).is_ok_and(|key| key.secret().expose() == secret.expose())
        };
        match self {
            Self::KeyFile(_) if secret.expose().len() >= CHEAP_KDF_BYTES_MIN => SlotKind::KeyFile,
            _ if std::str::from_utf8(secret.expose()).is_ok_and(is_recovery_key) => {
                SlotKind::Recovery
            }
            _ => SlotKind::Passphrase,
        }
    }

    fn passphrase(
        &self,
        prompt: &str,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<Typed, Failure> {
        let bytes = match self {
            Self::PassphraseFile(path) => {
                let what = format!("the passphrase file {}", path.display());
                read_bounded(
                    open_secret(path, &what, output)?,
                    PASSPHRASE_BYTES_MAX,
                    &what,
                )?
            }
            Self::PassphraseCommand(words) => passphrase_command::run(words, interrupt)?,
            Self::Terminal => {
                return Ok(Typed {
                    text: terminal::ask(prompt, interrupt)?,
                    carriage_return: false,
                });
            }
            Self::KeyFile(_) => unreachable!("a key file is no passphrase"),
        };
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| Failure::usage("the passphrase is not UTF-8 text"))?;
        let line = text.strip_suffix('\n').unwrap_or(text);
        let text = line.strip_suffix('\r').unwrap_or(line);
        if text.is_empty() {
            return Err(Failure::usage("the passphrase is empty"));
        }
        Ok(Typed {
            text: Zeroizing::new(text.to_owned()),
            carriage_return: text.len() < line.len(),
        })
    }
}

/// A typed recovery key is brought into its printed form; everything else is taken as it is: what only
/// looks like a recovery key may be a passphrase of cryptsetup's.
fn passphrase_secret(typed: &str) -> Secret {
    match RecoveryKey::parse(typed) {
        Ok(key) => key.secret(),
        Err(_) => Secret::passphrase(typed.to_owned()),
    }
}

fn doubt(typed: &Typed) -> Option<Doubt> {
    let text = &typed.text;
    let recovery_key = || no_recovery_key(text).map(Doubt::RecoveryKey);
    let mark = || {
        text.starts_with(BYTE_ORDER_MARK)
            .then_some(Doubt::ByteOrderMark)
    };
    let carriage_return = || typed.carriage_return.then_some(Doubt::CarriageReturn);
    mark().or_else(recovery_key).or_else(carriage_return)
}

/// Why it is no recovery key, where it looks like one: about as long, and in groups or of its
/// characters only.
fn no_recovery_key(typed: &str) -> Option<RecoveryKeyError> {
    if let Err(error @ RecoveryKeyError::Checksum) = RecoveryKey::parse(typed) {
        return Some(error);
    }
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

/// Opens a file that holds a secret; warns where others can read or change it.
fn open_secret(path: &Path, what: &str, output: Output) -> Result<File, Failure> {
    let file = trusted_file::open(path).map_err(|error| {
        let failure = unreadable(what, &error);
        match error.kind() {
            std::io::ErrorKind::InvalidInput => failure.with_hint(
                "give a regular file; use --passphrase-command for what a program prints",
            ),
            _ => failure,
        }
    })?;
    let about = file.metadata().map_err(|error| unreadable(what, &error))?;
    if about.mode() & 0o077 != 0 {
        output.warning(&format!(
            "{what} can be read by others (mode {:04o}): chmod 600 it",
            about.mode() & 0o7777
        ));
    }
    if let Ok(Some(why)) = trusted_file::writable_by_others(path) {
        output.warning(&format!(
            "{what} can be replaced by others: {why}. Let only root and its user write there"
        ));
    }
    Ok(file)
}

/// Reads a key file; empty ones are refused.
fn read_key_file(path: &Path, output: Output) -> Result<Vec<u8>, Failure> {
    let what = format!("the key file {}", path.display());
    let file = open_secret(path, &what, output)?;
    let mut bytes = read_bounded(file, Secret::LEN_MAX, &what)?;
    if bytes.is_empty() {
        return Err(Failure::usage(format!("{what} is empty")));
    }
    Ok(std::mem::take(&mut *bytes))
}

/// Reads at most `bytes_max` bytes. No copy of a part of them is left in freed memory.
pub(crate) fn read_bounded(
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
    // Written under another name, which nobody else uses: a half-written key file must never look like
    // a whole one.
    let made = (|| {
        let mut file = tempfile::Builder::new()
            .prefix(".")
            .suffix(".part")
            .tempfile_in(folder)?;
        file.write_all(&*key)?;
        file.as_file().sync_all()?;
        file.persist_noclobber(path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    })();
    match made {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(cannot(&error)),
    }
}

/// The SHA-256 of a key, which the recovery sheet shows so that a copy of it can be checked.
pub(crate) fn sha256_hex(secret: &Secret) -> String {
    hex(&openssl::sha::sha256(secret.expose()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_recovery_key_and_is_none_says_why() {
        let key = RecoveryKey::generate().unwrap().text().to_owned();
        assert_eq!(no_recovery_key(&key), None);
        let lost = &key[1..];
        assert_eq!(
            no_recovery_key(lost),
            Some(RecoveryKeyError::Length { found: 39 })
        );
        let one_more = format!("{key}a");
        let found = Some(RecoveryKeyError::Length { found: 41 });
        assert_eq!(no_recovery_key(&one_more), found);
        let zero = format!("{}0{}", &key[..5], &key[6..]);
        let group = Some(RecoveryKeyError::Character { group: 2 });
        assert_eq!(no_recovery_key(&zero), group);
        assert_eq!(no_recovery_key(&zero.replace('-', " ")), group);
        for passphrase in [
            "correct horse battery staple",
            "a passphrase of forty characters and more",
            &"z".repeat(40),
        ] {
            assert_eq!(no_recovery_key(passphrase), None, "{passphrase}");
        }
    }

    #[test]
    fn forty_letters_of_the_alphabet_are_a_passphrase_with_a_doubt() {
        let typed = "a".repeat(40);
        assert_eq!(passphrase_secret(&typed).expose(), typed.as_bytes());
        assert_eq!(no_recovery_key(&typed), Some(RecoveryKeyError::Checksum));
    }
}
