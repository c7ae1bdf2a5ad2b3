//! Copies of headers in files of this machine: one for each container, and others on request.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sprat_luks::{Extent, Header, HeaderBackup, HeaderRead, LuksErrorKind};

use sprat_snapshot::local_file;

use crate::files::short_hash;
use crate::state::paths::{Elsewhere, HEADERS, StatePaths};
use crate::{Failure, trusted_file};

/// Most of what is kept of bytes that are no LUKS2 header: all of LUKS1 with eight slots and a
/// 512-bit key is 2 MiB.
const FOREIGN_BYTES_MAX: u64 = 4 << 20;

/// Where the newest header of the container is kept.
pub fn newest(paths: &StatePaths) -> PathBuf {
    named(paths, "")
}

fn named(paths: &StatePaths, what: &str) -> PathBuf {
    paths.file(HEADERS, &format!("{what}.luks"))
}

/// A name for a header that is not the newest. The name depends on the content. So a server that shows
/// one content after the other replaces no good copy.
fn aside(paths: &StatePaths, what: &str, backup: &HeaderBackup) -> PathBuf {
    let hash = short_hash(&backup.content_hash());
    named(paths, &format!("{what}-{hash}"))
}

/// The header to restore if the user names none: that of this container, else the newest kept one of
/// another container with its UUID, with the target of that container, if it is known. The container may
/// have been moved by hand, or have another spelling.
pub fn to_put_back(paths: &StatePaths) -> (PathBuf, Option<Elsewhere>) {
    let own = newest(paths);
    if own.symlink_metadata().is_ok() {
        return (own, None);
    }
    let others = paths.of_others(HEADERS, ".luks").into_iter();
    let usable = others.filter_map(|other| {
        let header = load(&open(&other.path).ok()?, &other.path).ok()?;
        Some((header.sequence_id(), other))
    });
    match usable.max_by_key(|(sequence, _)| *sequence) {
        Some((_, other)) => (other.path.clone(), Some(other)),
        None => (own, None),
    }
}

/// A header that was kept as the newest.
#[derive(Debug)]
pub struct Kept {
    /// The file.
    pub path: PathBuf,
    /// The previous copy has other key slots, and stays.
    pub aside: Option<Aside>,
}

/// A kept header that another one did not replace.
#[derive(Debug)]
pub struct Aside {
    /// Slots that the newer header lacks or describes differently.
    pub gone: Vec<u32>,
    /// Slots that both have, with other bytes in their areas.
    pub differ: Vec<u32>,
    /// Where it is kept now.
    pub path: PathBuf,
}

/// Keeps a header as the newest, in the place of the previous copy. If the previous copy has a slot that
/// the newer header lacks or has differently, it stays under another name: its key may be the only good
/// one. The slot `going` does not count: this machine removes it.
pub fn keep_newest(
    paths: &StatePaths,
    header: &Header,
    source: &dyn HeaderRead,
    going: Option<u32>,
) -> Result<Kept, Failure> {
    let path = newest(paths);
    let backup = header.backup(source)?;
    let aside = set_aside(paths, header, &backup, &path, going)?;
    write_over(&path, &backup)?;
    Ok(Kept { path, aside })
}

/// A header that is newer than the kept one, or the first one: what [`keep_newer`] needs of it. `None`: there is
/// nothing to keep, or the areas of slots differ from those of the kept header. Then that may be the only good copy.
pub fn newer(
    paths: &StatePaths,
    header: &Header,
    source: &dyn HeaderRead,
) -> Result<Option<HeaderBackup>, Failure> {
    if !header.copies().both_good() {
        return Ok(None);
    }
    let path = newest(paths);
    let kept = open(&path).and_then(|file| {
        let kept = load(&file, &path)?;
        Ok((file, kept))
    });
    match kept {
        Ok((_, kept)) if kept.sequence_id() >= header.sequence_id() => Ok(None),
        Ok((file, kept)) => {
            let backup = header.backup(source)?;
            let differ = header.slots_that_differ(&backup, &kept, &file)?;
            Ok(differ.is_empty().then_some(backup))
        }
        Err(_) => Ok(Some(header.backup(source)?)),
    }
}

/// Keeps a header that [`newer`] has found, unless a newer one is kept meanwhile.
pub fn keep_newer(
    paths: &StatePaths,
    header: &Header,
    backup: &HeaderBackup,
) -> Result<Option<Kept>, Failure> {
    let path = newest(paths);
    let kept = open(&path).and_then(|file| load(&file, &path));
    if kept.is_ok_and(|kept| kept.sequence_id() >= header.sequence_id()) {
        return Ok(None);
    }
    let aside = set_aside(paths, header, backup, &path, None)?;
    write_over(&path, backup)?;
    Ok(Some(Kept { path, aside }))
}

fn set_aside(
    paths: &StatePaths,
    header: &Header,
    backup: &HeaderBackup,
    path: &Path,
    going: Option<u32>,
) -> Result<Option<Aside>, Failure> {
    // What can't be read is worth nothing.
    let Ok((file, earlier)) = open(path).and_then(|file| {
        let earlier = load(&file, path)?;
        Ok((file, earlier))
    }) else {
        return Ok(None);
    };
    let mut differ = header.slots_that_differ(backup, &earlier, &file)?;
    let mut gone = header.slots_missing_of(&earlier);
    for slots in [&mut differ, &mut gone] {
        slots.retain(|slot| going != Some(*slot));
    }
    let same_keys = differ.is_empty() && gone.is_empty();
    // A newer header than this may be the only copy of its keys.
    if same_keys && earlier.sequence_id() <= header.sequence_id() {
        return Ok(None);
    }
    let what = format!("{DIFFERS}{}", earlier.sequence_id());
    let earlier = earlier.backup(&file)?;
    let path = aside(paths, &what, &earlier);
    write_over(&path, &earlier)?;
    Ok((!same_keys).then_some(Aside { gone, differ, path }))
}

/// The slots whose areas in `source` differ from the newest kept header: their keys may open nothing any
/// more. Empty if no readable header is kept.
pub fn differing_slots(
    paths: &StatePaths,
    header: &Header,
    source: &dyn HeaderRead,
) -> Result<Vec<u32>, Failure> {
    let path = newest(paths);
    let Ok((file, kept)) = open(&path).and_then(|file| {
        let kept = load(&file, &path)?;
        Ok((file, kept))
    }) else {
        return Ok(Vec::new());
    };
    Ok(header.slots_that_differ(&header.backup(source)?, &kept, &file)?)
}

/// Kept headers of the container that a newer one did not replace, in the order of their names.
pub fn others(paths: &StatePaths) -> Vec<PathBuf> {
    let Ok(all) = paths.all(HEADERS) else {
        return Vec::new();
    };
    let mut others: Vec<PathBuf> = all
        .into_iter()
        .filter(|(_, what)| what.starts_with(DIFFERS))
        .map(|(path, _)| path)
        .collect();
    others.sort();
    others
}

/// Begins the endings of those.
const DIFFERS: &str = ".differs-";

/// Keeps the header that a kept one is about to replace.
pub fn keep_replaced(
    paths: &StatePaths,
    header: &Header,
    source: &dyn HeaderRead,
) -> Result<PathBuf, Failure> {
    let what = format!("{BEFORE_RESTORE}{}", header.sequence_id());
    let backup = header.backup(source)?;
    let path = aside(paths, &what, &backup);
    write_over(&path, &backup)?;
    Ok(path)
}

/// Keeps the bytes that lie where the container had its header, whatever they are.
pub fn keep_foreign(paths: &StatePaths, source: &dyn HeaderRead) -> Result<PathBuf, Failure> {
    // A foreign header may name areas that are not there.
    let backup = match Header::load(source).and_then(|header| header.backup(source)) {
        Ok(backup) => backup,
        Err(_) => beginning(source).map_err(|error| {
            Failure::failed("the bytes in the place of the header can't be read").caused_by(&error)
        })?,
    };
    let path = aside(paths, &format!("{BEFORE_RESTORE}foreign"), &backup);
    write_over(&path, &backup)?;
    Ok(path)
}

fn beginning(source: &dyn HeaderRead) -> std::io::Result<HeaderBackup> {
    let len_bytes = source.len()?.min(FOREIGN_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len_bytes).unwrap_or(0)];
    source.read_at(0, &mut bytes)?;
    Ok(HeaderBackup {
        extents: vec![Extent { offset: 0, bytes }],
        len_bytes,
    })
}

const BEFORE_RESTORE: &str = ".before-restore-";

/// The headers that `header-restore` has replaced here, without unreadable ones. Those of every spelling
/// of the target: a repeated command may spell it differently.
pub fn replaced(state_dir: &Path, uuid: &str) -> Vec<Header> {
    let is_one = |name: &str| name.starts_with(uuid) && name.contains(BEFORE_RESTORE);
    let Ok(entries) = std::fs::read_dir(state_dir.join(HEADERS)) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| is_one(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| load(&open(&entry.path()).ok()?, &entry.path()).ok())
        .filter(|header| header.uuid() == uuid)
        .collect()
}

/// Writes a header into a file of the state folder. Replaces what is there.
fn write_over(path: &Path, backup: &HeaderBackup) -> Result<(), Failure> {
    local_file::replace(path, |file| fill(file, backup)).map_err(|error| {
        Failure::failed(format!(
            "can't save a copy of the header in {}",
            path.display()
        ))
        .caused_by(&error)
        .with_hint("nothing was changed. Free space on the disk of the state folder")
    })
}

/// Writes a header into a new file of mode 0600. It gets its name when it is complete.
pub fn write_new(path: &Path, backup: &HeaderBackup) -> Result<(), Failure> {
    local_file::create(path, |file| fill(file, backup)).map_err(|error| {
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            return Failure::failed(format!("{} exists already", path.display()))
                .with_hint("sprat overwrites no file: give the name of a new file");
        }
        Failure::failed(format!("can't write {}", path.display())).caused_by(&error)
    })
}

fn fill(file: &File, backup: &HeaderBackup) -> std::io::Result<()> {
    // The rest, nearly all of the 16 MiB, stays a hole.
    file.set_len(backup.len_bytes)?;
    for extent in &backup.extents {
        file.write_all_at(&extent.bytes, extent.offset)?;
    }
    Ok(())
}

/// Opens a file with a kept header.
pub fn open(path: &Path) -> Result<File, Failure> {
    let unreadable = |error: &std::io::Error| {
        Failure::usage(format!("{} can't be read", path.display())).caused_by(error)
    };
    let file = trusted_file::open(path).map_err(|error| unreadable(&error))?;
    let about = file.metadata().map_err(|error| unreadable(&error))?;
    if about.is_file() {
        return Ok(file);
    }
    Err(Failure::usage(format!("{} is not a file", path.display())))
}

/// Reads the header in it, with the same checks as for one on a server.
pub fn load(file: &File, path: &Path) -> Result<Header, Failure> {
    Header::load(file).map_err(|error| {
        let failure = Failure::usage(format!("{} has no usable header in it", path.display()));
        let failure = failure.because(error.to_string());
        match error.kind() {
            LuksErrorKind::NoContainer => failure
                .with_hint("nothing was changed. Give a file that `sprat key header-backup` made"),
            _ => failure.with_hint("nothing was changed. Use another copy of the header"),
        }
    })
}
