//! Finds out where the source holds data, as precisely as its store allows.

use std::thread::Builder;
use std::time::{Duration, Instant};

use sprat_store::copy::DataMap;
use sprat_store::{FileStat, ReadClass, StoreError, StoreFile};

use crate::connect::remote_data_map;
use crate::copy::used_blocks::UsedBlocks;
use crate::copy::{CopyObserver, HolesBy, used_blocks};
use crate::{SessionSettings, text};

/// How long the server's shell may take to answer.
const SHELL_LIMIT: Duration = Duration::from_secs(120);
/// The header's two copies. Every container has data there.
const HEADER_BYTES: u64 = 32 << 10;
/// How many of the reported holes are read.
const HOLES_READ: u64 = 16;
/// Below this size a full read is not reported.
const REPORT_BYTES_MIN: u64 = 1 << 30;
/// The advice that follows.
const KEY_HINT: &str = ". With the source's key (--key-file, --passphrase-file) sprat reads only the \
                        used blocks: press Ctrl-C and run the same command with the key; it continues \
                        from here";
/// How much is read to measure the speed of the connection.
const RATE_BYTES: usize = 8 << 20;

/// The map. `None`: all of the source must be read.
pub(super) fn find(
    options: &SessionSettings,
    file: &dyn StoreFile,
    stat: &FileStat,
    opened: Option<&used_blocks::UnlockedSource<'_>>,
    observer: &mut dyn CopyObserver,
) -> Result<(Option<DataMap>, HolesBy), StoreError> {
    if let Ok(map) = DataMap::of(file)
        && (options.target.ssh().is_none() || is_plausible(file, &map)?)
    {
        return Ok((Some(map), HolesBy::Allocation));
    }
    let limit = options.ssh.answer_timeout.unwrap_or(SHELL_LIMIT);
    let why = match remote_data_map(&options.target, &options.ssh, stat, limit) {
        None => "its file system can't distinguish holes from data".to_owned(),
        Some(Ok(map)) if is_plausible(file, &map)? => {
            return Ok((Some(map), HolesBy::ServerShell));
        }
        Some(Ok(_)) => "the server's shell reports holes where there is data".to_owned(),
        Some(Err(why)) => why,
    };
    let (why, offer) = match opened {
        Some(opened) => match used_blocks::read(opened, file)? {
            UsedBlocks::Known(map) => return Ok((Some(map), HolesBy::FileSystem)),
            UsedBlocks::Unknown(reason) => (
                format!(
                    "{why}; the file system in the container does not show it, either: {reason}"
                ),
                "",
            ),
        },
        None => (why, KEY_HINT),
    };
    if stat.len > REPORT_BYTES_MIN {
        let rate = measure_rate(file, stat.len)?;
        let seconds = stat.len / rate.max(1);
        observer.tell(
            &format!(
                "sprat does not know which blocks of the source are used ({why}), so it reads all {}. \
                 It does not send blocks of zeros. At the current rate this takes about {}{offer}",
                text::bytes(stat.len),
                text::duration(Duration::from_secs(seconds)),
            ),
            false,
        );
    }
    Ok((None, HolesBy::Zeros))
}

/// Checks the shell's answer where this is cheap: the header must be data, and some of the holes
/// must read as zeros.
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
            // If no thread can be started, the holes are read one after the other.
            Err(_) => is_hole(at),
        });
        looks.collect()
    });
    looks
        .into_iter()
        .try_fold(true, |all, look| Ok(all && look?))
}

/// Bytes per second.
fn measure_rate(file: &dyn StoreFile, len: u64) -> Result<u64, StoreError> {
    let mut bytes = vec![0; RATE_BYTES.min(usize::try_from(len).unwrap_or(RATE_BYTES))];
    let begun = Instant::now();
    file.read_at(0, &mut bytes, ReadClass::Ahead)?;
    let rate = bytes.len() as u128 * 1000 / begun.elapsed().as_millis().max(1);
    Ok(u64::try_from(rate).unwrap_or(u64::MAX))
}
