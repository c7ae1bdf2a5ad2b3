//! Where keys and passphrases come from: files, commands, the terminal.

use std::ffi::OsString;
use std::path::PathBuf;

use sprat_luks::{RecoveryKey, RecoveryKeyError, Secret, SlotKind};
use sprat_run::passphrase_command;
pub(crate) use sprat_run::secret_file::{NewKeyFile, make_key_file};
use sprat_run::secret_file::{PASSPHRASE_BYTES_MAX, open_secret, read_bounded, read_key_file};
use sprat_session::interrupt::Interrupt;
use sprat_session::state::key_notes::KeyKind;
use sprat_store::hex;
use zeroize::Zeroizing;

use crate::output::Output;
use crate::{Failure, terminal};

/// Shortest key file that `init` accepts: 256 bits.
const KEY_BYTES_MIN: usize = 32;
/// A shorter key file is treated as a passphrase (argon2id): it may have been typed by a person.
const CHEAP_KDF_BYTES_MIN: usize = 512;
/// Longest new passphrase: cryptsetup's prompt accepts no more (lib/utils_crypt.h,
/// `MAX_PASSPHRASE_LENGTH`), and the sheet's commands must open what sprat makes.
const NEW_PASSPHRASE_BYTES_MAX: usize = 512;
/// Shortest passphrase that `init` accepts, in bytes.
const PASSPHRASE_BYTES_MIN: usize = 12;
/// What some editors put before UTF-8 text.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// What may be wrong with a secret that opens nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeyHint {
    /// It looks like a recovery key, but is not one.
    RecoveryKey(RecoveryKeyError),
    /// Its line ended in a carriage return, which was dropped.
    CarriageReturn,
    /// It begins with a byte order mark, as some editors write.
    ByteOrderMark,
}

impl KeyHint {
    /// The words for it: a cause, and what to do.
    pub(crate) fn render(&self) -> (String, &'static str) {
        match self {
            Self::RecoveryKey(error) => (
                format!("if it is meant to be a recovery key: {error}"),
                "Compare each group with the sheet",
            ),
            Self::CarriageReturn => (
                "the passphrase's line ends in a carriage return (CR LF), which was dropped"
                    .to_owned(),
                "If the carriage return is a part of the passphrase, give the file with --key-file, \
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

/// The source of a secret.
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
    /// Fetches a secret to open a container with, and what may be wrong with it if it opens nothing.
    pub(crate) fn fetch(
        &self,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<(Secret, Option<KeyHint>), Failure> {
        match self {
            Self::KeyFile(path) => Ok((
                Secret::key_file(read_key_file(path, &|text| output.warning(text))?),
                None,
            )),
            Self::PassphraseFile(_) | Self::PassphraseCommand(_) | Self::Terminal => {
                let typed = self.passphrase("Passphrase or recovery key: ", output, interrupt)?;
                Ok((passphrase_secret(&typed.text), key_hint(&typed)))
            }
        }
    }

    /// Fetches the secret of a new key, and how its slot is derived.
    pub(crate) fn fetch_for_new(
        &self,
        output: Output,
        interrupt: &Interrupt,
    ) -> Result<(Secret, SlotKind), Failure> {
        if let Self::KeyFile(path) = self {
            let bytes = read_key_file(path, &|text| output.warning(text))?;
            if bytes.len() < KEY_BYTES_MIN {
                return Err(Failure::usage(format!(
                    "the key file {} is too short: {} bytes, at least {KEY_BYTES_MIN} needed",
                    path.display(),
                    bytes.len()
                ))
                .with_hint(
                    "give a file that does not exist: sprat creates a good key file there",
                ));
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
            let again = terminal::ask("Repeat the passphrase: ", interrupt)?;
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
            .with_hint(
                "nothing was changed. The server can try passphrases without limit: use a long \
                        one",
            ));
        }
        let untypable = if typed.len() > NEW_PASSPHRASE_BYTES_MAX {
            format!("is too long: at most {NEW_PASSPHRASE_BYTES_MAX} bytes can be typed")
        } else if carriage_return {
            "ends in a carriage return (CR LF): cryptsetup would treat that as a part of the passphrase"
                .to_owned()
        } else if typed.contains(['\n', '\r']) {
            "has more than one line: it can't be typed".to_owned()
        } else if typed.starts_with(BYTE_ORDER_MARK) {
            "begins with a byte order mark (U+FEFF): it can't be typed".to_owned()
        } else if typed.chars().any(|c| c.is_control() && c != '\t') {
            "has a control character: it can't be typed".to_owned()
        } else {
            return Ok((passphrase_secret(&typed), SlotKind::Passphrase));
        };
        Err(
            Failure::usage(format!("the new passphrase {untypable}")).with_hint(
                "nothing was changed. Give one line of plain text. For random bytes use a key file",
            ),
        )
    }

    /// The kind of a new key from this source.
    pub(crate) fn key_kind(&self) -> KeyKind {
        match self {
            Self::KeyFile(_) => KeyKind::KeyFile,
            _ => KeyKind::Passphrase,
        }
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
                    open_secret(path, &what, &|text| output.warning(text))?,
                    PASSPHRASE_BYTES_MAX,
                    &what,
                )?
            }
            Self::PassphraseCommand(words) => {
                passphrase_command::run(words, terminal::is_there(), interrupt)?
            }
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

/// Brings a typed recovery key into its printed form. Everything else stays unchanged: what only looks like
/// a recovery key may be a passphrase that was set with cryptsetup.
fn passphrase_secret(typed: &str) -> Secret {
    match RecoveryKey::parse(typed) {
        Ok(key) => key.secret(),
        Err(_) => Secret::passphrase(typed.to_owned()),
    }
}

fn key_hint(typed: &Typed) -> Option<KeyHint> {
    let text = &typed.text;
    let recovery_key = || no_recovery_key(text).map(KeyHint::RecoveryKey);
    let mark = || {
        text.starts_with(BYTE_ORDER_MARK)
            .then_some(KeyHint::ByteOrderMark)
    };
    let carriage_return = || typed.carriage_return.then_some(KeyHint::CarriageReturn);
    mark().or_else(recovery_key).or_else(carriage_return)
}

/// Why a text that looks like a recovery key is not one. It looks like one if it is about as long, and in
/// groups or of the same characters.
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
    // Each group has four characters. One too many, one missing or a missing dash is a typing error.
    let grouped = lengths.len() >= 8 && lengths.iter().all(|len| *len <= 9);
    let about_as_long = CHARACTERS.contains(&lengths.iter().sum());
    (grouped && about_as_long)
        .then(|| RecoveryKey::parse(typed).err())
        .flatten()
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
