//! Files with a secret: read with warnings for unsafe modes, created with safe ones.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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
