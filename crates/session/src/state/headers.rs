//! Headers kept in files of this machine: one of each container by itself, others where asked.

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

/// A name for a header that is not the newest. With its content in it a server that shows one
/// content after the other takes the place of no good one.
fn aside(paths: &StatePaths, what: &str, backup: &HeaderBackup) -> PathBuf {
    let hash = short_hash(&backup.content_hash());
    named(paths, &format!("{what}-{hash}"))
}

/// The header to be put back where nobody names one: that of this container, else the newest that
/// is kept of another one with its UUID, and then also where that one lies, if that is known. The
/// container may have been moved by hand, or be spelled otherwise.
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
    /// The header kept before says more or something else, and stays.
    pub aside: Option<Aside>,
}

/// A kept header that another one did not replace.
#[derive(Debug)]
pub struct Aside {
    /// Slots that the newer header does not have, or of which it says something else.
    pub gone: Vec<u32>,
    /// Slots that both have, with other bytes in their areas.
    pub differ: Vec<u32>,
    /// Where it is kept now.
    pub path: PathBuf,
}

/// Keeps a header as the newest, in the place of the one kept before. That one stays under another
/// name where it has a slot that the newer one lacks, or has otherwise: its key may be the only good
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
    // A newer one than this may be all that is left of its keys.
    if same_keys && earlier.sequence_id() <= header.sequence_id() {
        return Ok(None);
    }
    let what = format!("{DIFFERS}{}", earlier.sequence_id());
    let earlier = earlier.backup(&file)?;
    let path = aside(paths, &what, &earlier);
    write_over(&path, &earlier)?;
    Ok((!same_keys).then_some(Aside { gone, differ, path }))
}

/// The slots whose areas in `source` hold other bytes than the newest kept header has of them: their
/// keys may open nothing any more. None where no header is kept, or none that can be read.
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
            Failure::failed("what lies in the header's place can't be read").caused_by(&error)
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

/// The headers that kept ones have replaced here; those that can't be read are left out. Of every
/// place: one that was run again may spell it otherwise, and where another copy had a slot no key of
/// this one's is lost.
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

/// Writes a header into a file of the state folder, over what is there.
fn write_over(path: &Path, backup: &HeaderBackup) -> Result<(), Failure> {
    local_file::replace(path, |file| fill(file, backup)).map_err(|error| {
        Failure::failed(format!(
            "can't keep a copy of the header in {}",
            path.display()
        ))
        .caused_by(&error)
        .with_hint("nothing was changed. Make room in the state folder")
    })
}

/// Writes a header into a new file of mode 0600, which has its name only once it is whole.
pub fn write_new(path: &Path, backup: &HeaderBackup) -> Result<(), Failure> {
    local_file::create(path, |file| fill(file, backup)).map_err(|error| {
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            return Failure::failed(format!("{} exists already", path.display()))
                .with_hint("nothing is ever overwritten: name another file");
        }
        Failure::failed(format!("can't write {}", path.display())).caused_by(&error)
    })
}

fn fill(file: &File, backup: &HeaderBackup) -> std::io::Result<()> {
    // The rest stays a hole: nearly all of the 16 MiB.
    file.set_len(backup.len_bytes)?;
    for extent in &backup.extents {
        file.write_all_at(&extent.bytes, extent.offset)?;
    }
    Ok(())
}

/// Opens a file that a header is kept in.
pub fn open(path: &Path) -> Result<File, Failure> {
    let unreadable = |error: &std::io::Error| {
        Failure::usage(format!("{} can't be read", path.display())).caused_by(error)
    };
    let file = trusted_file::open(path).map_err(|error| unreadable(&error))?;
    let about = file.metadata().map_err(|error| unreadable(&error))?;
    if about.is_file() {
        return Ok(file);
    }
    Err(Failure::usage(format!("{} is no file", path.display())))
}

/// Judges the header in it as strictly as one on a server.
pub fn load(file: &File, path: &Path) -> Result<Header, Failure> {
    Header::load(file).map_err(|error| {
        let failure = Failure::usage(format!("{} holds no usable header", path.display()));
        let failure = failure.because(error.to_string());
        match error.kind() {
            LuksErrorKind::NoContainer => failure
                .with_hint("nothing was changed. Such a file is made by `sprat key header-backup`"),
            _ => failure.with_hint("nothing was changed. Use another copy of the header"),
        }
    })
}
