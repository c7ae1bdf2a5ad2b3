//! Files with a secret: read with warnings for unsafe modes, created with safe ones.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sprat_luks::Secret;
use sprat_session::{Failure, trusted_file};
use sprat_snapshot::local_file;
use zeroize::Zeroizing;

/// Bytes of a key file that sprat creates. So many random bytes need no slow derivation.
const KEY_BYTES: usize = 4096;
/// Longest passphrase, from a file or a command: 8 KiB is more than anybody types.
pub const PASSPHRASE_BYTES_MAX: usize = 8192;

fn unreadable(what: &str, error: &std::io::Error) -> Failure {
    let failure = Failure::usage(format!("{what} can't be read")).caused_by(error);
    if error.kind() == std::io::ErrorKind::NotFound {
        return failure.with_hint("check the path, and whether its disk is mounted");
    }
    failure
}

/// Opens a file with a secret, and warns if others can read or replace it.
///
/// # Errors
/// It can't be opened, or is no regular file.
pub fn open_secret(path: &Path, what: &str, warn: &dyn Fn(&str)) -> Result<File, Failure> {
    let file = trusted_file::open(path).map_err(|error| {
        let failure = unreadable(what, &error);
        match error.kind() {
            std::io::ErrorKind::InvalidInput => failure.with_hint(
                "give a regular file. For the output of a program use --passphrase-command",
            ),
            _ => failure,
        }
    })?;
    let about = file.metadata().map_err(|error| unreadable(what, &error))?;
    if about.mode() & 0o077 != 0 {
        warn(&format!(
            "{what} can be read by other users (mode {:04o}). Run chmod 600 on the file",
            about.mode() & 0o7777
        ));
    }
    if let Ok(Some(why)) = trusted_file::writable_by_others(path) {
        warn(&format!(
            "{what} can be replaced by other users: {why}. Make the folder writable only for root or \
             its owner"
        ));
    }
    Ok(file)
}

/// Reads a key file.
///
/// # Errors
/// It can't be read, is empty, or is too long.
pub fn read_key_file(path: &Path, warn: &dyn Fn(&str)) -> Result<Vec<u8>, Failure> {
    let what = format!("the key file {}", path.display());
    let file = open_secret(path, &what, warn)?;
    let mut bytes = read_bounded(file, Secret::LEN_MAX, &what)?;
    if bytes.is_empty() {
        return Err(Failure::usage(format!("{what} is empty")));
    }
    Ok(std::mem::take(&mut *bytes))
}

/// Reads at most `bytes_max` bytes. No part of them stays in freed memory.
///
/// # Errors
/// It can't be read, or is longer.
pub fn read_bounded(
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

/// Creates a key file of random bytes, mode 0600, durable before it is used, and its folder (0700) if it is
/// missing. `false`: the file exists already, and was not changed.
///
/// # Errors
/// It can't be written.
pub fn make_key_file(path: &Path) -> Result<bool, Failure> {
    let cannot = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't create the key file {}", path.display())).caused_by(error)
    };
    if let Some(folder) = path.parent() {
        local_file::make_private_folder(folder).map_err(|error| cannot(&error))?;
    }
    let mut key = Zeroizing::new([0u8; KEY_BYTES]);
    openssl::rand::rand_priv_bytes(&mut *key).map_err(|error| cannot(&error))?;
    // A half-written key file must never look like a complete one.
    match local_file::create(path, |file| file.write_all(&*key)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(cannot(&error)),
    }
}

/// A key file that `sprat key add` adds. While the container may not have its key yet, a new one is beside its path:
/// a file at the path itself may be the default key file, and opens nothing before its key is added.
#[derive(Debug)]
pub struct NewKeyFile {
    path: PathBuf,
    /// Where it is until [`Self::finish`], if it is new.
    beside: Option<PathBuf>,
}

impl NewKeyFile {
    /// Uses the file at `path`. If it is missing: uses the one that an interrupted command left beside it, or makes
    /// one there.
    ///
    /// # Errors
    /// It can't be written.
    pub fn begin(path: &Path) -> Result<Self, Failure> {
        let mut beside = None;
        if path.symlink_metadata().is_err() {
            let mut name = path.as_os_str().to_owned();
            name.push(".new");
            let new = PathBuf::from(name);
            make_key_file(&new)?;
            beside = Some(new);
        }
        Ok(Self {
            path: path.to_owned(),
            beside,
        })
    }

    /// The path of the finished file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the key is now.
    #[must_use]
    pub fn present(&self) -> &Path {
        self.beside.as_deref().unwrap_or(&self.path)
    }

    /// The file that is beside its path, if it is a new one.
    #[must_use]
    pub fn beside(&self) -> Option<&Path> {
        self.beside.as_deref()
    }

    /// Gives a new file its name. Its key must open the container. `true`: it is a new file.
    ///
    /// # Errors
    /// It keeps its name beside the path.
    pub fn finish(&self) -> Result<bool, Failure> {
        let Some(beside) = &self.beside else {
            return Ok(false);
        };
        local_file::rename_new(beside, &self.path).map_err(|error| {
            Failure::failed(format!(
                "the key was added, but its file {} can't be renamed to {}",
                beside.display(),
                self.path.display()
            ))
            .caused_by(&error)
            .with_hint("don't delete the file: it opens the container. Rename it yourself")
        })?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_new_key_file_gets_its_name_at_the_end_and_replaces_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/x.key");
        let interrupted = NewKeyFile::begin(&path).unwrap();
        assert!(!path.exists());
        let key = fs::read(interrupted.present()).unwrap();
        // The key of the interrupted command may be in a slot already: it must not be lost.
        let again = NewKeyFile::begin(&path).unwrap();
        assert_eq!(fs::read(again.present()).unwrap(), key);
        assert!(again.finish().unwrap());
        assert_eq!(fs::read(&path).unwrap(), key);
        assert!(again.beside().is_some_and(|beside| !beside.exists()));
        let there = NewKeyFile::begin(&path).unwrap();
        assert_eq!((there.present(), there.beside()), (&*path, None));
        assert!(!there.finish().unwrap());
        // Somebody else has put a file there meanwhile.
        fs::remove_file(&path).unwrap();
        let late = NewKeyFile::begin(&path).unwrap();
        fs::write(&path, "of somebody else").unwrap();
        late.finish().unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"of somebody else");
        assert!(late.present().exists());
    }
}
