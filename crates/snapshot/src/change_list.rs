//! The list of what a run changed: `.sprat/NAME.changes.zst`, and a copy of it on this machine.
//!
//! It is JSON, one object in each line, compressed with zstd:
//!
//! | line | has |
//! | --- | --- |
//! | first | `format`, `job`, `snapshot`, `since`: the snapshot that was compared with; `null`: there is none; `complete`: whether the snapshot has all that was to be backed up, once it is finished; `folded`: the lists of several runs are in it; `compared`: when the snapshots were compared, if that was not at the end of the run; `written`: when the run wrote it |
//! | one for each path | `path`, escaped; `change`; `before` and `after`: the attributes; of a new file also its [`Content`]; `read_by`: the run that read that from the source |
//! | last | `finished`: false if not all paths are listed; how many are `new`, `content`, `kind`, `attributes`, `gone` |
//!
//! No snapshot relies on a list. It may be missing or torn. Checks and drills compare with its digests. In the list of an interrupted run no path is gone: the run may
//! not have come to it; it goes with its tree. The list of a removed snapshot stays until it is folded into another
//! one ([`folding`]). A run also makes the lists of older snapshots that can't be used ([`rebuilding`]).
//!
//! The copies of this machine answer what the snapshots hold, too ([`chain`]).

pub(crate) mod chain;
mod checked;
mod folding;
mod listed_files;
mod merging;
mod reading;
mod rebuilding;

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::fs::{AtFlags, unlinkat};
use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::content::Content;
use crate::error::SnapshotError;
use crate::job::{Folder, LIST_SUFFIX as SUFFIX, RunFolder, STATE_FOLDER, on_volume, replace_with};
use crate::large_files::UpToDate;
use crate::local_file;
use crate::long_path::open_regular;
use crate::name::SnapshotName;
use crate::page_cache::PageCache;
use crate::seen::{Change, Found, Kind};
use crate::shared_inodes::SharedInodes;
use crate::subvolume_ops::Subvolumes;
use crate::text::escape_path;
use crate::tree::Tree;
use crate::tree_changes::{Changed, Part, Repair, changes_repairing};

pub(crate) use checked::Checked;
use folding::Folding;
pub(crate) use listed_files::{ListedFile, listed_files};
pub(crate) use merging::order;
pub(crate) use reading::read as read_list;
use rebuilding::Older;

const FORMAT: u32 = 1;
/// The list that those of removed snapshots are folded into.
const BASE: &str = "base.changes.zst";
/// zstd's own default.
const LEVEL: i32 = 3;
/// How long an interrupted run spends on its list: a person may be waiting.
const INTERRUPTED_MAX: Duration = Duration::from_secs(5);

/// The first line.
#[derive(Debug, Serialize)]
struct First<'a> {
    format: u32,
    job: &'a str,
    snapshot: Option<SnapshotName>,
    since: Option<SnapshotName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    complete: Option<bool>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    folded: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    compared: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    written: Option<Timestamp>,
}

impl<'a> First<'a> {
    fn new(job: &'a str, snapshot: Option<SnapshotName>, since: Option<SnapshotName>) -> Self {
        Self {
            format: FORMAT,
            job,
            snapshot,
            since,
            complete: None,
            folded: false,
            compared: None,
            written: None,
        }
    }
}

/// What the list has for a path, in one line.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// `None`: the line has the digest of a file that another list has.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<Change>,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Found>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Found>,
    #[serde(flatten)]
    content: Option<Content>,
    /// The run that read the content from its source. `None`: that is not known, or it comes from an older snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    read_by: Option<SnapshotName>,
}

/// The last line.
#[derive(Debug, Default, Serialize)]
struct Last {
    finished: bool,
    new: u64,
    content: u64,
    kind: u64,
    attributes: u64,
    gone: u64,
}

/// The name of the list of a run.
fn name_of(name: SnapshotName) -> String {
    format!("{name}{SUFFIX}")
}

/// Removes the list of a run whose tree is gone.
pub(crate) fn forget(state: &OwnedFd, name: SnapshotName) {
    for name in [name_of(name), new_name(name)] {
        // A list without a snapshot does no harm.
        let _ = unlinkat(state, name, AtFlags::empty());
    }
}

/// While it is written.
fn new_name(name: SnapshotName) -> String {
    format!("{}.new", name_of(name))
}

/// What a run lists.
pub(crate) struct ChangeList<'a> {
    pub(crate) volume_root: &'a Path,
    pub(crate) folder: &'a RunFolder,
    /// The tree that the run has filled.
    pub(crate) tree: Folder,
    /// The last snapshot before it.
    pub(crate) since: Option<Folder>,
    /// The tree lacks what the run did not come to.
    pub(crate) interrupted: bool,
    /// Nothing of the sources was left unread.
    pub(crate) complete: bool,
    /// The digests are computed from what it has.
    pub(crate) page_cache: PageCache,
    /// Gets the content of large files. `None`: on a volume that needs no indexes of them.
    pub(crate) large: Option<&'a UpToDate>,
    /// Where this machine keeps its copies of the lists of this job.
    pub(crate) local: Option<&'a Path>,
    /// The trees are subvolumes.
    pub(crate) subvolumes: Option<&'a dyn Subvolumes>,
    /// See [`crate::Lists::edited`].
    pub(crate) edited: Option<Timestamp>,
}

impl ChangeList<'_> {
    /// Writes the list into the state folder of the job, and then the copy of this machine. The list is durable
    /// with the snapshot. Returns whether it is finished: all of the tree was compared, and `repair` was called for all of it.
    pub(crate) fn write(
        &self,
        repair: &Repair<'_>,
        cancel: &Cancel,
    ) -> Result<bool, SnapshotError> {
        let name = name_of(self.tree.name());
        let checked = self.checked();
        let since = self.since.map(Folder::name);
        let first = First {
            complete: (!self.interrupted).then_some(self.complete),
            written: Some(Timestamp::now()),
            ..First::new(&self.folder.job.job, Some(self.tree.name()), since)
        };
        let mut digests = Digests::Written(
            Contents::new(self.page_cache, self.large, self.tree.name()),
            checked.contents.clone(),
        );
        let mut finished = false;
        let fill = |file: &mut File| {
            finished = self
                .fill(file, &first, &mut digests, repair, cancel)?
                .finished;
            Ok(())
        };
        let failed = |error| on_volume("write", &name)(error);
        let mut file = replace_with(&self.folder.state, &name, fill, failed)?;
        if let Some(local) = self.local
            && let Err(error) = self.keep(local, &name, &mut file, checked)
        {
            tracing::warn!(%error, "this machine can't keep its copy of the list of changes");
        }
        if !self.interrupted
            && let Err(error) = self.fold()
        {
            tracing::warn!(%error, "the lists of removed snapshots stay as they are");
        }
        if let Some(local) = self.local.filter(|_| !self.interrupted)
            && let Err(error) = self.rebuild(local, cancel)
        {
            tracing::warn!(%error, "the changes of older snapshots can't be listed again");
        }
        Ok(finished)
    }

    /// Notes in the written list that the snapshot is incomplete.
    pub(crate) fn set_incomplete(&self) -> Result<(), SnapshotError> {
        let name = name_of(self.tree.name());
        let failed = |error| on_volume("write", &name)(error);
        let path = self.folder.job.path.join(STATE_FOLDER).join(&name);
        let list = open_regular(&path).map_err(failed)?;
        let fill = |to: &mut File| set_incomplete(&list, to).map_err(failed);
        let mut file = replace_with(&self.folder.state, &name, fill, failed)?;
        match self.local {
            Some(local) => copy_to(local, &name, &mut file).map_err(failed),
            None => Ok(()),
        }
    }

    /// The digests that a check computed, and that no list has. An interrupted run has no time for them.
    fn checked(&self) -> Checked {
        let folder = self.local.filter(|_| !self.interrupted);
        let exists = |name| {
            self.folder
                .job
                .is_folder(Path::new(&Folder::Named(name).to_string()))
        };
        folder.map_or_else(Checked::default, |folder| Checked::load(folder, exists))
    }

    fn fill(
        &self,
        file: &mut File,
        first: &First<'_>,
        digests: &mut Digests<'_>,
        repair: &Repair<'_>,
        cancel: &Cancel,
    ) -> Result<Last, SnapshotError> {
        let name = name_of(self.tree.name());
        let failed = |error| on_volume("write", &name)(error);
        let part = |folder| Part {
            tree: Tree::of_job(self.volume_root, &self.folder.job, folder),
            path: PathBuf::from("/"),
        };
        let (before, after) = (self.since.map(part), part(self.tree));
        let shared = self.shared_inodes(cancel);
        let mut lines = Lines::begin(file).map_err(failed)?;
        lines.write(first).map_err(failed)?;
        let begun = Instant::now();
        let mut last = Last::default();
        let is_late = || self.interrupted && begun.elapsed() > INTERRUPTED_MAX;
        let go_on = || match !self.interrupted && cancel.is_cancelled() || is_late() {
            true => Err(SnapshotError::ReadCancelled),
            false => Ok(()),
        };
        let mut listed = |one: Changed<'_>| {
            if self.interrupted && one.change == Change::Gone {
                return Ok(());
            }
            last.count(one.change);
            let known = digests.of(&one, &|| go_on().is_err());
            let (content, read_by) = known.map_err(failed)?.unzip();
            let line = Line {
                path: Some(escape_path(&one.path)),
                change: Some(one.change),
                content,
                before: one.before,
                after: one.after,
                read_by: read_by.flatten(),
            };
            lines.write(&line).map_err(failed)
        };
        let compared = changes_repairing(
            before.as_ref(),
            &after,
            shared.as_ref(),
            &go_on,
            repair,
            &mut listed,
        );
        last.finished = match compared {
            Ok(()) => true,
            Err(SnapshotError::ReadCancelled) => false,
            Err(error) => return Err(error),
        };
        for content in digests.without_path().map_err(failed)? {
            lines.write(&Line::of(content)).map_err(failed)?;
        }
        lines.write(&last).map_err(failed)?;
        lines.end().map_err(failed)?;
        Ok(last)
    }

    /// Those of the last snapshot. Without them more files are examined. An interrupted run has no time for them.
    fn shared_inodes(&self, cancel: &Cancel) -> Option<SharedInodes> {
        let (subvolumes, since) = (self.subvolumes.filter(|_| !self.interrupted)?, self.since?);
        let path = self.folder.job.path.join(since.to_string());
        match SharedInodes::read(subvolumes, &path, cancel) {
            Ok(shared) => Some(shared),
            Err(error) => {
                tracing::debug!(%error, "the inodes of the last snapshot can't be listed");
                None
            }
        }
    }

    /// Folds the lists of removed snapshots, on the volume and on this machine.
    fn fold(&self) -> io::Result<()> {
        let folding = Folding {
            folder: self.folder,
            newest: self.tree.name(),
            local: self.local,
        };
        let (lists, replaced) = folding.run()?;
        match self.local {
            Some(local) => folding::mirror(self.folder, local, &lists, &replaced),
            None => Ok(()),
        }
    }

    /// Copies the list to this machine.
    fn keep(&self, local: &Path, name: &str, list: &mut File, checked: Checked) -> io::Result<()> {
        copy_to(local, name, list)?;
        if !self.interrupted {
            checked.sent(local, &self.folder.job.job, self.tree.name())?;
        }
        Ok(())
    }
}

/// Copies a list to this machine.
fn copy_to(local: &Path, name: &str, list: &mut File) -> io::Result<()> {
    io::Seek::rewind(list)?;
    local_file::replace(&local.join(name), |copy| io::copy(list, copy).map(drop))
}

/// Writes `list` into `to`, with `complete` set to false.
fn set_incomplete(list: &File, to: &mut File) -> io::Result<()> {
    let mut lines = BufReader::new(zstd::Decoder::new(list)?);
    let mut first = Vec::new();
    lines.read_until(b'\n', &mut first)?;
    let mut first: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&first)?;
    first.insert("complete".to_owned(), false.into());
    let mut new = Lines::begin(to)?;
    new.write(&first)?;
    io::copy(&mut lines, &mut new.out)?;
    new.end()
}

/// Where the digests of a list come from.
enum Digests<'a> {
    /// From what the run has just written. Some more have no path in it.
    Written(Contents<'a>, Vec<Content>),
    /// From other lists.
    Listed(Older),
}

impl Digests<'_> {
    fn of(&mut self, one: &Changed<'_>, is_over: &dyn Fn() -> bool) -> io::Result<Option<Known>> {
        match self {
            Self::Written(contents, _) => Ok(contents.of(one, is_over)),
            Self::Listed(older) => older.of(&one.path, one.after.as_ref()),
        }
    }

    fn without_path(&mut self) -> io::Result<Vec<Content>> {
        match self {
            Self::Written(_, others) => Ok(std::mem::take(others)),
            Self::Listed(older) => older.rest(),
        }
    }
}

/// The contents of the files that a list names.
struct Contents<'a> {
    page_cache: PageCache,
    large: Option<&'a UpToDate>,
    run: SnapshotName,
    /// Those of files with several names, which are read once.
    several: HashMap<u64, Known>,
}

/// The content of a file, and the run that read it from its source.
type Known = (Content, Option<SnapshotName>);

impl<'a> Contents<'a> {
    fn new(page_cache: PageCache, large: Option<&'a UpToDate>, run: SnapshotName) -> Self {
        Self {
            page_cache,
            large,
            run,
            several: HashMap::new(),
        }
    }

    /// The content of a changed file. `None`: there is none, or the file can't be read.
    fn of(&mut self, one: &Changed<'_>, is_over: &dyn Fn() -> bool) -> Option<Known> {
        let is_file = one
            .after
            .as_ref()
            .is_some_and(|after| after.kind == Kind::File);
        let (folder, name) = one.place.filter(|_| is_file)?;
        let file = folder.open(name).ok()?;
        let about = file.metadata().ok()?;
        if let Some(known) = self.several.get(&about.ino()) {
            return Some(known.clone());
        }
        let mut index = self
            .large
            .and_then(|large| large.begin_index(&one.path, &about));
        let mut each = |at: u64, bytes: &[u8]| {
            if let Some(index) = &mut index {
                index.push(at, bytes);
            }
        };
        let content = Content::cached(&file, &about, self.page_cache, is_over, &mut each).ok()?;
        if let (Some(large), Some(index)) = (self.large, index) {
            large.end_index(index, &file);
        }
        let known = (content, self.read_by(one.change, &about));
        if about.nlink() > 1 {
            self.several.insert(about.ino(), known.clone());
        }
        Some(known)
    }

    /// An older file was copied by an interrupted run, or is shared with an older snapshot. A file with other
    /// attributes may be rsync's copy of the one in the older snapshot.
    fn read_by(&self, change: Change, about: &Metadata) -> Option<SnapshotName> {
        let born = Timestamp::try_from(about.created().ok()?).ok()?;
        let is_new = change != Change::Attributes && born >= self.run.moment();
        is_new.then_some(self.run)
    }
}

impl Last {
    fn count(&mut self, change: Change) {
        let count = match change {
            Change::New => &mut self.new,
            Change::Gone => &mut self.gone,
            Change::Content => &mut self.content,
            Change::Attributes => &mut self.attributes,
            Change::Kind => &mut self.kind,
        };
        *count += 1;
    }
}

/// The lines of a list.
struct Lines<'f> {
    out: zstd::Encoder<'static, &'f mut File>,
}

impl<'f> Lines<'f> {
    fn begin(file: &'f mut File) -> io::Result<Self> {
        let mut out = zstd::Encoder::new(file, LEVEL)?;
        out.include_checksum(true)?;
        Ok(Self { out })
    }

    fn write(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(line)?;
        line.push(b'\n');
        self.out.write_all(&line)
    }

    fn end(self) -> io::Result<()> {
        self.out.finish().map(drop)
    }
}
