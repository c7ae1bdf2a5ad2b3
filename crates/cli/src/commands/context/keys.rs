//! Which key opens a container, and what is said of a key that does not.

use std::path::Path;

use sprat_luks::Secret;
use sprat_run::config::Container;
use sprat_session::closed_container::check_exists;

use super::{Context, Resolved, split};
use crate::secrets::SecretSource;
use crate::{Exit, Failure, terminal};

impl Context {
    /// The source of the key that the command line names.
    pub(crate) fn named_source(&self) -> Result<Option<SecretSource>, Failure> {
        let global = &self.global;
        if let Some(path) = &global.key_file {
            return Ok(Some(SecretSource::KeyFile(self.environment.absolute(path))));
        }
        if let Some(path) = &global.passphrase_file {
            let path = self.environment.absolute(path);
            return Ok(Some(SecretSource::PassphraseFile(path)));
        }
        let Some(text) = &global.passphrase_command else {
            return Ok(None);
        };
        let words = split(text, "--passphrase-command")?;
        Ok(Some(SecretSource::PassphraseCommand(words)))
    }

    /// Fetches a key. What may be wrong with it is reported if it opens nothing.
    pub(crate) fn fetch(&self, source: &SecretSource) -> Result<Secret, Failure> {
        let (secret, hint) = source.fetch(self.output, &self.interrupt)?;
        if let Some(hint) = hint {
            let _ = self.key_hint.set(hint);
        }
        Ok(secret)
    }

    /// Adds to the failure of a wrong key what may be wrong with the key.
    pub(crate) fn with_key_hint(&self, failure: Failure) -> Failure {
        match self.key_hint.get() {
            Some(hint) if failure.exit == Exit::WrongKey => {
                let (cause, hint) = hint.render();
                failure.because(cause).with_more_hint(hint)
            }
            _ => failure,
        }
    }

    /// Fetches the key of a container.
    pub(crate) fn secret(&self, resolved: &Resolved) -> Result<Secret, Failure> {
        if resolved.secret == SecretSource::Terminal {
            check_exists(&self.state_dir(), &resolved.target, &resolved.ssh)?;
            if let Some(path) = &resolved.default_key_file
                && !terminal::is_there()
            {
                return Err(no_key_file(path));
            }
        }
        self.fetch(&resolved.secret)
    }

    /// Adds to the failure of a wrong key where the key is from: the user may not have named it.
    pub(crate) fn explain_key(&self, resolved: &Resolved, failure: Failure) -> Failure {
        if failure.exit != Exit::WrongKey {
            return failure;
        }
        match &resolved.secret {
            SecretSource::KeyFile(path) if resolved.default_key_file.as_ref() == Some(path) => {
                failure.because(format!("the default key file {} was tried", path.display()))
            }
            SecretSource::KeyFile(path) => {
                failure.because(format!("the key file {} was tried", path.display()))
            }
            SecretSource::PassphraseFile(path) => {
                failure.because(format!("the passphrase file {} was tried", path.display()))
            }
            SecretSource::PassphraseCommand(_) | SecretSource::Terminal => failure,
        }
    }
}

/// No key was given, nobody can be asked, and the default key file is missing.
fn no_key_file(path: &Path) -> Failure {
    Failure::usage(format!("there is no key file {}", path.display())).with_hint(
        "nothing was started. Check whether its disk is mounted. Or give a key with --key-file, \
         --passphrase-file or --passphrase-command, or in the config",
    )
}

/// The source in the config, else the default key file, else the terminal.
pub(super) fn own_source(
    container: Option<&Container>,
    default_key_file: Option<&Path>,
) -> SecretSource {
    if let Some(container) = container {
        if let Some(path) = &container.key_file {
            return SecretSource::KeyFile(path.clone());
        }
        if let Some(path) = &container.passphrase_file {
            return SecretSource::PassphraseFile(path.clone());
        }
        if let Some(words) = &container.passphrase_command {
            return SecretSource::PassphraseCommand(words.clone());
        }
    }
    match default_key_file {
        Some(path) if path.exists() => SecretSource::KeyFile(path.to_owned()),
        _ => SecretSource::Terminal,
    }
}
