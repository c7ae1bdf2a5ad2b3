//! Headers kept in files of this machine: one of each container by itself, others where asked.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sprat_luks::{Header, HeaderBackup, HeaderRead, LuksErrorKind};

use crate::Failure;

/// Which of a container's headers is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// The newest one.
    Newest,
    /// The one that lay there before a kept one was put back.
    BeforeRestore,
}

/// Where a header of the container is kept.
pub(crate) fn path(state_dir: &Path, uuid: &str, which: Which) -> PathBuf {
    state_dir.join("headers").join(match which {
        Which::Newest => format!("{uuid}.luks"),
        Which::BeforeRestore => format!("{uuid}.before-restore.luks"),
    })
}

/// Keeps a header in the state folder, in the place of the one kept before.
pub(crate) fn keep(
    state_dir: &Path,
    header: &Header,
    source: &dyn HeaderRead,
    which: Which,
) -> Result<PathBuf, Failure> {
    // A header's UUID was parsed as one, so it can name a file.
    let path = path(state_dir, header.uuid(), which);
    let backup = header.backup(source)?;
    let kept = (|| {
        let folder = path.parent().unwrap_or(state_dir);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let part = tempfile::NamedTempFile::new_in(folder)?;
        fill(part.as_file(), &backup)?;
        part.persist(&path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()
    })();
    kept.map_err(|error: std::io::Error| {
        Failure::failed(format!(
            "can't keep a copy of the header in {}",
            path.display()
        ))
        .caused_by(&error)
        .with_hint("nothing was changed. Make room in the state folder")
    })?;
    Ok(path)
}

/// Writes a header into a new file of mode 0600.
pub(crate) fn write_new(path: &Path, backup: &HeaderBackup) -> Result<(), Failure> {
    let written = (|| {
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        if let Err(error) = fill(&file, backup) {
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        let folder = path.parent().filter(|folder| *folder != Path::new(""));
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    })();
    written.map_err(|error: std::io::Error| {
        let failure = Failure::failed(format!("can't write {}", path.display())).caused_by(&error);
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            return failure.with_hint("nothing is ever overwritten: name another file");
        }
        failure
    })
}

fn fill(file: &File, backup: &HeaderBackup) -> std::io::Result<()> {
    // The rest stays a hole: nearly all of the 16 MiB.
    file.set_len(backup.len_bytes)?;
    for extent in &backup.extents {
        file.write_all_at(&extent.bytes, extent.offset)?;
    }
    file.sync_all()
}

/// Opens a file that a header is kept in.
pub(crate) fn open(path: &Path) -> Result<File, Failure> {
    let unreadable = |error: &std::io::Error| {
        Failure::usage(format!("{} can't be read", path.display())).caused_by(error)
    };
    let file = File::open(path).map_err(|error| unreadable(&error))?;
    let about = file.metadata().map_err(|error| unreadable(&error))?;
    if about.is_file() {
        return Ok(file);
    }
    Err(Failure::usage(format!("{} is no file", path.display())))
}

/// Judges the header in it as strictly as one on a server.
pub(crate) fn load(file: &File, path: &Path) -> Result<Header, Failure> {
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
