//! Files of a snapshot that come from no source: output of a job's command, and the state of the system.
//!
//! Their content is written to the volume before the run, into a folder of its own. The run moves the files
//! into its tree after rsync has ended. So an interrupted run has no part of them, and nothing is ever
//! linked to a file whose command failed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use openssl::sha::Sha256;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::{DELETING, Folder, JobFolder, RunFolder, STATE_FOLDER, on_volume};
use crate::long_path::{lstat, open_regular};
use crate::name::JobName;
use crate::record::{RunRecord, RunStats, Warning};
use crate::reflink;
use crate::rsync::volume_full_or;
use crate::staged_file::StagedFile;
use crate::suspects::Suspects;
use crate::text::escape_path;
use crate::walk::{open_folder_at, remove_content};

/// Where the content waits, in the state folder. With this prefix the next run removes what was not used.
const WAITING: &str = "staged";
/// What is read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// How often a request to stop is looked for while no content comes.
const POLL: Duration = Duration::from_millis(100);
/// A file with more names gets no further one. The limit of ext4 is 65,000.
const LINKS_MAX: u64 = 60_000;

pub(crate) fn waiting_name() -> String {
    format!("{DELETING}{WAITING}")
}

/// Writes a file's content, up to the end of `from`, where it waits for the job's next run. With `first`,
/// removes what waits there first: it is of an earlier run.
///
/// # Errors
/// The volume failed or is full, the job is in use, or `cancel` was set. What was written does not count.
pub fn stage(
    volume_root: &Path,
    job: &JobName,
    path: &Path,
    first: bool,
    from: OwnedFd,
    cancel: &Cancel,
) -> Result<StagedFile, SnapshotError> {
    let staged = write_waiting(volume_root, job, path, first, from, cancel);
    staged.map_err(|error| volume_full_or(error, volume_root))
}

/// Removes what waits for the job's next run.
///
/// # Errors
/// The volume failed, or the job is in use.
pub fn unstage(volume_root: &Path, job: &JobName) -> Result<(), SnapshotError> {
    clear(&JobFolder::open_for_run(volume_root, job)?)
}

fn write_waiting(
    volume_root: &Path,
    job: &JobName,
    path: &Path,
    first: bool,
    from: OwnedFd,
    cancel: &Cancel,
) -> Result<StagedFile, SnapshotError> {
    check_path(path)?;
    let folder = JobFolder::open_for_run(volume_root, job)?;
    if first {
        clear(&folder)?;
    }
    let name = escape_path(path);
    let failed = |op| on_volume(op, &name);
    let waiting = waiting(&folder).join(path);
    make_folders(waiting.parent().unwrap_or(&waiting)).map_err(failed("make the folder of"))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let to = openat(CWD, &waiting, flags, Mode::from(0o600));
    let mut to = File::from(to.map_err(|errno| failed("create")(errno.into()))?);
    let mut from = File::from(from);
    let mut hash = Sha256::new();
    let mut bytes = 0;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = match read(&mut from, &mut buffer, cancel) {
            Ok(Some(0)) => break,
            Ok(Some(count)) => count,
            Ok(None) => return Err(SnapshotError::Cancelled),
            Err(source) => {
                let op = "read what a command wrote";
                return Err(SnapshotError::System { op, source });
            }
        };
        hash.update(&buffer[..count]);
        to.write_all(&buffer[..count]).map_err(failed("write"))?;
        bytes += count as u64;
    }
    Ok(StagedFile {
        path: path.to_owned(),
        bytes,
        sha256: hash
            .finish()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    })
}

/// `None`: cancelled.
fn read(from: &mut File, buffer: &mut [u8], cancel: &Cancel) -> io::Result<Option<usize>> {
    loop {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        let mut wanted = [PollFd::new(from, PollFlags::IN)];
        let patience = Timespec::try_from(POLL).ok();
        match poll(&mut wanted, patience.as_ref()) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(Some),
        }
    }
}

fn check_path(path: &Path) -> Result<(), SnapshotError> {
    let mut parts = path.components();
    let is_own =
        |part| matches!(part, Component::Normal(name) if name.as_encoded_bytes().starts_with(b"@"));
    let first = parts.next().is_some_and(is_own);
    let rest: Vec<Component<'_>> = parts.collect();
    let is_name = |part: &Component<'_>| matches!(part, Component::Normal(_));
    if first && !rest.is_empty() && rest.iter().all(is_name) {
        return Ok(());
    }
    Err(SnapshotError::PathRefused {
        path: escape_path(path),
        why: "can't be the place of a file that comes from no source",
    })
}

fn waiting(folder: &RunFolder) -> PathBuf {
    folder.job.path.join(STATE_FOLDER).join(waiting_name())
}

fn make_folders(path: &Path) -> io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(path)
}

fn clear(folder: &RunFolder) -> Result<(), SnapshotError> {
    let path = waiting(folder);
    let name = waiting_name();
    let failed = || on_volume("remove", &name);
    let root = match open_folder_at(&path) {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed()(error)),
    };
    remove_content(root.as_fd(), &Cancel::new()).map_err(failed())?;
    std::fs::remove_dir(&path).map_err(failed())
}

/// Puts the files of a run into its tree.
pub(crate) struct Placing<'a> {
    pub(crate) folder: &'a RunFolder,
    /// The absolute path of the tree.
    pub(crate) tree: &'a Path,
    pub(crate) files: &'a [StagedFile],
    /// The newest snapshot, and its record.
    pub(crate) before: Option<(Folder, &'a RunRecord)>,
    pub(crate) suspects: Suspects,
}

/// What was put into the tree.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    pub(crate) warnings: Vec<Warning>,
    /// Whether any file is new content, which needs a sync before the snapshot gets its name.
    pub(crate) wrote: bool,
}

impl Placing<'_> {
    /// Moves the files into the tree, or links those whose content the newest snapshot has. Counts them.
    pub(crate) fn carry_out(&self, stats: &mut RunStats) -> Result<Placed, SnapshotError> {
        let mut placed = Placed::default();
        for top in tops(self.files) {
            if lstat(&self.tree.join(&top)).is_ok() {
                return Err(SnapshotError::SourceRefused {
                    path: escape_path(&Path::new("/").join(&top)),
                    why:
                        "is where the snapshot has what comes from no source. Exclude or rename it"
                            .to_owned(),
                });
            }
        }
        for file in self.files {
            let to = self.tree.join(&file.path);
            let name = escape_path(&file.path);
            let failed = |op| on_volume(op, &name);
            make_folders(to.parent().unwrap_or(self.tree)).map_err(failed("make the folder of"))?;
            let is_this = |one: &&StagedFile| one.path == file.path;
            let old = self
                .before
                .and_then(|(_, record)| record.staged.iter().find(is_this));
            stats.files += 1;
            stats.regular_files += 1;
            stats.bytes_total += file.bytes;
            if !(old == Some(file) && self.link(file, &to)) {
                let from = waiting(self.folder).join(&file.path);
                move_file(&from, &to).map_err(failed("rename"))?;
                placed.wrote = true;
                stats.created += 1;
                stats.transferred += 1;
                stats.bytes_transferred += file.bytes;
                stats.bytes_literal += file.bytes;
            }
            let shrank = old.filter(|old| file.bytes < old.bytes / 2);
            placed
                .warnings
                .extend(shrank.map(|old| Warning::DumpShrank {
                    path: escape_path(&file.path),
                    bytes: file.bytes,
                    before_bytes: old.bytes,
                }));
        }
        // What is left is removed by the next run at the latest.
        let _ = clear(self.folder);
        Ok(placed)
    }

    /// Links the same file of the newest snapshot. False if that is not possible.
    fn link(&self, file: &StagedFile, to: &Path) -> bool {
        let Some((folder, _)) = self.before else {
            return false;
        };
        let old = self
            .folder
            .job
            .path
            .join(folder.to_string())
            .join(&file.path);
        let fits = lstat(&old).is_ok_and(|about| {
            about.is_file()
                && about.len() == file.bytes
                && about.nlink() < LINKS_MAX
                && self.suspects.find(&about).is_none()
        });
        fits && match linkat(CWD, &old, CWD, to, AtFlags::empty()) {
            Ok(()) => true,
            Err(Errno::XDEV) => share(&old, to).is_ok(),
            Err(_) => false,
        }
    }
}

/// Moves a file into the tree of the run.
fn move_file(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::rename(from, to) {
        // The tree is another subvolume. What stays is removed with all that waits.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => share(from, to),
        other => other,
    }
}

/// Makes `to` a file with the content of `from`, which is in another subvolume.
fn share(from: &Path, to: &Path) -> io::Result<()> {
    let (folder, name) = reflink::in_folder(to)?;
    reflink::file(&open_regular(from)?, folder.as_fd(), name)
}

/// The folders at the top of a snapshot that these files are in.
pub(crate) fn tops(files: &[StagedFile]) -> Vec<PathBuf> {
    let first = |file: &StagedFile| {
        file.path
            .components()
            .next()
            .map(|part| part.as_os_str().into())
    };
    let mut tops: Vec<PathBuf> = files.iter().filter_map(first).collect();
    tops.sort();
    tops.dedup();
    tops
}
