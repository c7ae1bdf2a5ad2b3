//! Finds out where the source holds data, as well as its store allows.

use std::thread::Builder;
use std::time::{Duration, Instant};

use sprat_store::copy::{DataMap, read_remote_map};
use sprat_store::{FileStat, ReadClass, SshTarget, StoreError, StoreFile};

use crate::address::Location;
use crate::copy::{CopyObserver, HolesBy, in_use};
use crate::{SessionOptions, patience, text};

/// How long the server's shell may think about it.
const SHELL_LIMIT: Duration = Duration::from_secs(120);
/// The header's two copies: data in every container.
const HEADER_BYTES: u64 = 32 << 10;
/// So many alleged holes are read.
const HOLES_READ: u64 = 16;
/// Below this, reading all of it is not worth a word.
const WORTH_A_WORD_BYTES: u64 = 1 << 30;
/// What to do about it.
const OFFER: &str = ". With the source's key (--key-file, --passphrase-file) only what the file system inside \
     uses is read: Ctrl-C, and the same command with the key goes on from here";
/// What is read to tell how fast the line is.
const TRIAL_BYTES: usize = 8 << 20;

/// The map, or `None` where all of the source must be read.
pub(super) fn find(
    options: &SessionOptions,
    file: &dyn StoreFile,
    stat: &FileStat,
    opened: Option<&in_use::Opened<'_>>,
    observer: &mut dyn CopyObserver,
) -> Result<(Option<DataMap>, HolesBy), StoreError> {
    if let Ok(map) = DataMap::of(file) {
        return Ok((Some(map), HolesBy::Allocation));
    }
    let why = match &options.target.place {
        Location::Local { .. } => "its file system can't tell holes from data".to_owned(),
        Location::Ssh {
            user,
            host,
            port,
            folder,
        } => {
            let ssh = SshTarget::new(user.as_deref(), host, *port)?;
            let path = format!("{folder}/{}", options.target.name);
            let argv = ssh.shell_argv(&options.ssh_command);
            let limit = patience::answer_timeout().unwrap_or(SHELL_LIMIT);
            match read_remote_map(&argv, &path, stat.len, stat.modified_s, limit) {
                Ok(map) if is_plausible(file, &map)? => {
                    return Ok((Some(map), HolesBy::ServerShell));
                }
                Ok(_) => "the server's shell tells holes where there is data".to_owned(),
                Err(error) => error.to_string(),
            }
        }
    };
    let (why, offer) = match opened {
        Some(opened) => match in_use::map(opened, file)? {
            Ok(map) => return Ok((Some(map), HolesBy::FileSystem)),
            Err(reason) => (
                format!("{why}; by the file system inside neither: {reason}"),
                "",
            ),
        },
        None => (why, OFFER),
    };
    if stat.len > WORTH_A_WORD_BYTES {
        let rate = trial(file, stat.len)?;
        let seconds = stat.len / rate.max(1);
        observer.tell(
            &format!(
                "it can't be told which parts of the source are in use ({why}), so all {} are \
                 read; blocks of zeros are not sent on. At present that takes about {}{offer}",
                text::bytes(stat.len),
                text::duration(Duration::from_secs(seconds)),
            ),
            false,
        );
    }
    Ok((None, HolesBy::Zeros))
}

/// The shell's word is checked where that is cheap: the header is data, and some of the holes are.
fn is_plausible(file: &dyn StoreFile, map: &DataMap) -> Result<bool, StoreError> {
    if !map.holds_any(0..HEADER_BYTES) {
        return Ok(false);
    }
    let holes = map.some_holes(HOLES_READ);
    let is_hole = |at: &u64| -> Result<bool, StoreError> {
        let mut block = [0; 4096];
        file.read_at(*at, &mut block, ReadClass::Ahead)?;
        Ok(block.iter().all(|byte| *byte == 0))
    };
    let looks: Vec<Result<bool, StoreError>> = std::thread::scope(|scope| {
        let started: Vec<_> = holes
            .iter()
            .map(|at| (at, Builder::new().spawn_scoped(scope, || is_hole(at))))
            .collect();
        let looks = started.into_iter().map(|(at, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or(Ok(false)),
            // Where no thread can be made, one after the other.
            Err(_) => is_hole(at),
        });
        looks.collect()
    });
    looks
        .into_iter()
        .try_fold(true, |all, look| Ok(all && look?))
}

/// Bytes per second.
fn trial(file: &dyn StoreFile, len: u64) -> Result<u64, StoreError> {
    let mut bytes = vec![0; TRIAL_BYTES.min(usize::try_from(len).unwrap_or(TRIAL_BYTES))];
    let begun = Instant::now();
    file.read_at(0, &mut bytes, ReadClass::Ahead)?;
    let rate = bytes.len() as u128 * 1000 / begun.elapsed().as_millis().max(1);
    Ok(u64::try_from(rate).unwrap_or(u64::MAX))
}
