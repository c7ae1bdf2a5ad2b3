//! The walk of a check over the volume: selects the files to read, and evaluates the results.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError};
use std::time::{Duration, Instant};

use super::affected;
use super::known::{ChecksumMatch, Key, Known};
use super::read::{Outcome, Task};
use super::source::{self, Source};
use super::{CheckReport, CheckSpec, CheckWhat};
use crate::cancel::Cancel;
use crate::change_list::Checked;
use crate::content::{Content, ContentHash, Sums};
use crate::error::SnapshotError;
use crate::job::JobFolder;
use crate::listed::Listed;
use crate::long_path;
use crate::name::{JobName, SnapshotName};
use crate::progress::{Phase, Progress};
use crate::subvolumes;
use crate::suspects::{Suspect, Suspects};
use crate::text::escape_path;
use crate::without_place;

/// How often progress is reported and a cancel is checked.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);
/// How much longer than the writing of the checksums the interval between two writings must be.
const NOTE_INTERVAL_TIMES: u32 = 20;
/// The shortest target of a symbolic link that does not fit into its inode on ext4.
const LONG_TARGET_BYTES: u64 = 60;
/// In a comparison with the source no checksum is kept, only the fact that a file was compared.
const COMPARED: u64 = 1;

/// One check, on the thread that walks.
pub(super) struct Run<'a> {
    pub(super) root: &'a Path,
    pub(super) spec: &'a CheckSpec,
    /// The snapshot that is compared with its source.
    pub(super) snapshot: Option<SnapshotName>,
    /// Folders of that snapshot that come from no source.
    without_source: Vec<PathBuf>,
    pub(super) report: CheckReport,
    pub(super) known: Known,
    /// The digests in the lists of changes.
    listed: Listed,
    /// The digests that the lists lack.
    computed: BTreeMap<JobName, Vec<Content>>,
    /// Some file was not read.
    pub(super) left_any: bool,
    /// Files with several names that this run has found.
    seen: HashSet<Key>,
    /// Each snapshot has its own inode numbers, and the number of links counts the names in it alone.
    by_subvolumes: bool,
    /// The damaged files, each with one of its names.
    pub(super) bad: BTreeMap<Key, PathBuf>,
    /// The list of suspects, of this check and earlier ones.
    suspects: Suspects,
    /// Keys of suspects that this check has found.
    met: HashSet<Key>,
    /// New suspects of this check.
    found: Vec<Suspect>,
    /// Symbolic links.
    found_links: Vec<Suspect>,
    reported: Instant,
    /// When the checksums were last written.
    note_from: Instant,
    note_interval: Duration,
    until: Option<Instant>,
    /// Whether any file was begun.
    begun: bool,
    /// Bytes of the files that were begun.
    bytes_begun: u64,
    pub(super) progress: &'a mut dyn FnMut(Progress),
    pub(super) cancel: &'a Cancel,
}

type Done = Receiver<(Task, Outcome)>;

impl<'a> Run<'a> {
    pub(super) fn begin(
        root: &'a Path,
        spec: &'a CheckSpec,
        known: Known,
        progress: &'a mut dyn FnMut(Progress),
        cancel: &'a Cancel,
    ) -> Self {
        let now = Instant::now();
        Self {
            root,
            spec,
            snapshot: None,
            without_source: Vec::new(),
            report: CheckReport::default(),
            known,
            listed: match spec.what {
                CheckWhat::Everything => Listed::load(root, spec.change_lists.as_deref()),
                // Few files are compared with them, if any.
                CheckWhat::AgainstSource(_) => Listed::default(),
            },
            computed: BTreeMap::new(),
            left_any: false,
            seen: HashSet::new(),
            by_subvolumes: subvolumes::is_btrfs(root),
            bad: BTreeMap::new(),
            suspects: Suspects::load(&spec.suspects),
            met: HashSet::new(),
            found: Vec::new(),
            found_links: Vec::new(),
            reported: now,
            note_from: now,
            note_interval: spec.note_interval,
            // A time limit too large for the clock is no limit.
            until: spec
                .duration_max
                .and_then(|most| now.checked_add(most.saturating_sub(spec.duration_over))),
            begun: false,
            bytes_begun: 0,
            progress,
            cancel,
        }
    }

    /// Walks the newest snapshots of all jobs, then everything else. False if it was stopped before the
    /// end.
    pub(super) fn walk_all(
        &mut self,
        tasks: &SyncSender<Task>,
        done: &Done,
    ) -> Result<bool, SnapshotError> {
        let root = self.root.to_owned();
        let (mut snapshots, mut others) = (Vec::new(), Vec::new());
        for name in self.names(&root) {
            let path = root.join(name);
            if !fs::symlink_metadata(&path).is_ok_and(|stat| stat.is_dir()) {
                others.push(path);
                continue;
            }
            for folder in self.names(&path) {
                let inside = path.join(&folder);
                match folder.to_str().map(SnapshotName::parse) {
                    Some(Ok(moment)) => snapshots.push((moment, inside)),
                    _ => others.push(inside),
                }
            }
        }
        snapshots.sort_by_key(|(moment, _)| std::cmp::Reverse(*moment));
        let snapshots = snapshots.into_iter().map(|(_, path)| path);
        for top in snapshots.chain(others) {
            if !self.walk(&top, None, tasks, done) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Walks the job's latest snapshot, and compares it with its source.
    pub(super) fn walk_job(
        &mut self,
        job: &JobName,
        tasks: &SyncSender<Task>,
        done: &Done,
    ) -> Result<bool, SnapshotError> {
        let folder = self.root.join(job.as_str());
        if !folder.is_dir() {
            return Err(SnapshotError::NoSuchJob {
                job: job.as_str().to_owned(),
            });
        }
        let names = self.names(&folder);
        let names = names.iter().filter_map(|name| name.to_str());
        let moments: Vec<_> = names
            .filter_map(|name| SnapshotName::parse(name).ok())
            .collect();
        let latest = JobFolder::open(self.root, Path::new(job.as_str()))?.latest();
        let Some(moment) = latest.or(moments.last().copied()) else {
            return Err(SnapshotError::NoSuchSnapshot {
                job: job.as_str().to_owned(),
                snapshot: "latest".to_owned(),
            });
        };
        self.snapshot = Some(moment);
        let snapshot = folder.join(moment.to_string());
        let record = JobFolder::open(self.root, Path::new(job.as_str()))?.record(moment);
        for top in record.map_or_else(|_| Vec::new(), |record| without_place::tops(&record)) {
            self.without_source.push(snapshot.join(top));
        }
        if !self.walk(&snapshot, Some(&moments), tasks, done) {
            return Ok(false);
        }
        if !self.without_source.is_empty() {
            self.listed = Listed::load(self.root, self.spec.change_lists.as_deref());
        }
        for top in self.without_source.clone() {
            if !self.walk(&top, None, tasks, done) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Walks everything below `top`, a file or a folder. With `moments`, the job's snapshots, compares
    /// it with the source. False if it was stopped before the end.
    fn walk(
        &mut self,
        top: &Path,
        moments: Option<&[SnapshotName]>,
        tasks: &SyncSender<Task>,
        done: &Done,
    ) -> bool {
        let mut left = vec![top.to_owned()];
        while let Some(path) = left.pop() {
            if self.cancel.is_cancelled() || (self.begun && self.is_enough()) {
                return false;
            }
            self.report_progress();
            if moments.is_some() && self.without_source.contains(&path) {
                continue;
            }
            let stat = match long_path::lstat(&path) {
                Ok(stat) => stat,
                Err(error) => {
                    self.unreadable(&path, &error);
                    continue;
                }
            };
            if stat.is_dir() {
                let names = self.names(&path);
                left.extend(names.into_iter().rev().map(|name| path.join(name)));
                continue;
            }
            let of_source = || {
                let (moments, inside) = (moments?, path.strip_prefix(top).ok()?);
                Some(Source {
                    path: Path::new("/").join(inside),
                    read_after_s: source::read_after(&stat, moments),
                })
            };
            if stat.is_symlink() {
                let source = of_source();
                self.walk_link(path, &stat, source);
                continue;
            }
            if !stat.is_file() {
                continue;
            }
            let key = Key::of(&stat);
            if (stat.nlink() > 1 || self.by_subvolumes) && !self.seen.insert(key) {
                continue;
            }
            let is_suspect = self.suspects.find(&stat).is_some();
            if is_suspect {
                self.met.insert(key);
            }
            if self.known.was_read(key) {
                self.report.files_before += 1;
                continue;
            }
            if !is_suspect {
                self.bytes_begun = self.bytes_begun.saturating_add(stat.len());
            }
            let source = of_source();
            let task = Task {
                path,
                inode: stat.ino(),
                key,
                is_link: false,
                source,
                until: self.begin_one(),
            };
            self.hand_over(task, tasks, done);
        }
        true
    }

    /// Reads the target of a symbolic link. If it is long, ext4 keeps it in a block without a checksum, like the content
    /// of a file. So it is checked like one.
    fn walk_link(&mut self, path: PathBuf, stat: &fs::Metadata, source: Option<Source>) {
        let target = match long_path::read_link(&path) {
            Ok(target) => target.into_os_string().into_vec(),
            Err(error) => return self.unreadable(&path, &error),
        };
        // By the length that the inode has: a damaged target may end earlier.
        if stat.len() < LONG_TARGET_BYTES || self.by_subvolumes {
            return;
        }
        let key = Key::of(stat);
        if stat.nlink() > 1 && !self.seen.insert(key) {
            return;
        }
        if self.suspects.get(key).is_some() {
            self.met.insert(key);
        }
        if self.known.was_read(key) {
            self.report.files_before += 1;
            return;
        }
        let bytes = target.len() as u64;
        let task = Task {
            path,
            inode: stat.ino(),
            key,
            is_link: true,
            source,
            until: None,
        };
        let outcome = match &task.source {
            None => {
                let mut hash = ContentHash::new(bytes);
                hash.update(&target);
                let sums = hash.finish();
                Outcome::Read { bytes, sums }
            }
            Some(source) => match source::is_same_link(stat, &target, source) {
                Some(false) => {
                    let is = source::Compared::Differs;
                    Outcome::Compared { bytes, is }
                }
                Some(true) => return self.healthy(&task),
                // rsync compares the targets of all links, too.
                None => return,
            },
        };
        self.handle(&task, outcome);
    }

    /// No further file is begun.
    fn is_enough(&self) -> bool {
        let most = self.spec.bytes_max;
        self.is_late() || most.is_some_and(|most| self.bytes_begun >= most)
    }

    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    /// After which time the next file must not be begun. The first one is always begun.
    fn begin_one(&mut self) -> Option<Instant> {
        if self.begun {
            return self.until;
        }
        self.begun = true;
        if let (Some(until), Some(most)) = (self.until, self.spec.duration_max) {
            // Opening, and skipping what was read already, may have taken all the time.
            self.until = Instant::now().checked_add(most / 10).max(Some(until));
        }
        None
    }

    /// The sorted names in a folder. None for a folder that can't be read, which is reported.
    fn names(&mut self, folder: &Path) -> Vec<OsString> {
        match long_path::names(folder) {
            Ok(mut names) => {
                names.sort();
                names
            }
            // There may be files beside the jobs' folders. They are checked as such.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Vec::new(),
            Err(error) => {
                self.unreadable(folder, &error);
                Vec::new()
            }
        }
    }

    /// Hands a file to a free reader. While it waits, it handles finished files.
    fn hand_over(&mut self, task: Task, tasks: &SyncSender<Task>, done: &Done) {
        let mut task = task;
        loop {
            while let Ok((task, outcome)) = done.try_recv() {
                self.handle(&task, outcome);
            }
            match tasks.try_send(task) {
                Ok(()) => return,
                Err(TrySendError::Full(back)) => task = back,
                Err(TrySendError::Disconnected(_)) => return,
            }
            if let Ok((task, outcome)) = done.recv_timeout(REPORT_INTERVAL) {
                self.handle(&task, outcome);
            }
        }
    }

    pub(super) fn handle(&mut self, task: &Task, outcome: Outcome) {
        match outcome {
            Outcome::Left => self.left_any = true,
            Outcome::Read { bytes, sums } => {
                self.report.files_read += 1;
                self.report.bytes_read += bytes;
                self.was_read(task, &sums);
            }
            Outcome::Unreadable(error) => self.unreadable_file(task, &error),
            Outcome::Compared { bytes, is } => {
                self.report.files_read += 1;
                self.report.bytes_read += bytes;
                self.compared(task, is);
            }
        }
        self.report_progress();
        if self.note_from.elapsed() >= self.note_interval {
            let begun = Instant::now();
            // A failure is reported by the last save.
            let _ = self.known.save(&self.spec.known, false);
            let _ = self.save_computed();
            let least = begun.elapsed() * NOTE_INTERVAL_TIMES;
            self.note_interval = self.spec.note_interval.max(least);
            self.note_from = Instant::now();
        }
    }

    /// Compares the content of a file with its digest in the lists, and with what an earlier check read.
    fn was_read(&mut self, task: &Task, sums: &Sums) {
        let digest = sums.whole.short();
        let is_listed = self.listed.compare(task.key, sums);
        self.report.files_listed += u64::from(is_listed.is_some());
        if is_listed == Some(false) {
            self.known.keep(task.key);
            self.damaged(task, "differs from the checksum that its backup saved");
            return;
        }
        let known = self.known.put(task.key, digest);
        self.report.files_known += u64::from(known != ChecksumMatch::New);
        match (known, is_listed) {
            (ChecksumMatch::Differs, Some(true)) => {
                // The earlier check has read damaged content.
                self.known.correct(task.key, digest);
                self.healthy(task);
            }
            (ChecksumMatch::Differs, _) => {
                self.damaged(task, "differs from an earlier check");
                return;
            }
            (ChecksumMatch::New, None | Some(false)) => {}
            (ChecksumMatch::New, Some(true)) | (ChecksumMatch::Same, _) => self.healthy(task),
        }
        if self.spec.change_lists.is_some()
            && self.listed.lacks(task.key)
            && let Some(job) = self.job_of(&task.path)
        {
            let content = Content::read(task.key, sums);
            self.computed.entry(job).or_default().push(content);
        }
    }

    /// The job, if the file is in a snapshot.
    fn job_of(&self, path: &Path) -> Option<JobName> {
        let mut steps = path.strip_prefix(self.root).ok()?.components();
        let job = JobName::new(steps.next()?.as_os_str().to_str()?).ok()?;
        let snapshot = SnapshotName::parse(steps.next()?.as_os_str().to_str()?);
        snapshot.is_ok().then_some(job)
    }

    /// Keeps the digests that the lists lack on this machine. The next backups add them to their lists.
    pub(super) fn save_computed(&mut self) -> io::Result<()> {
        let Some(lists) = &self.spec.change_lists else {
            return Ok(());
        };
        // What can't be saved now is saved later.
        while let Some(computed) = self.computed.first_entry() {
            let job = computed.key();
            let folder = lists.join(job.as_str());
            let exists = |name: SnapshotName| {
                let snapshot = self.root.join(job.as_str()).join(name.to_string());
                long_path::lstat(&snapshot).is_ok_and(|about| about.is_dir())
            };
            let mut checked = Checked::load(&folder, exists);
            checked.extend(computed.get().clone());
            checked.save(&folder, job.as_str())?;
            computed.remove();
        }
        Ok(())
    }

    fn report_progress(&mut self) {
        if self.reported.elapsed() >= REPORT_INTERVAL {
            self.reported = Instant::now();
            let so_far = self.so_far();
            (self.progress)(so_far);
        }
    }

    pub(super) fn so_far(&self) -> Progress {
        let mut progress = Progress::begin(Phase::Checking);
        progress.bytes_done = self.report.bytes_read;
        progress.files_done = self.report.files_read;
        progress
    }

    fn compared(&mut self, task: &Task, is: source::Compared) {
        use source::Compared as C;
        let name = self.name(&task.path);
        match is {
            C::Same => {
                self.report.same += 1;
                self.healthy(task);
            }
            C::Changed => self.report.changed.push(name),
            C::Missed => {
                self.suspect(task, false);
                self.report.missed.push(name);
            }
            C::Gone => self.report.gone.push(name),
            C::SourceUnreadable(error) => {
                self.report
                    .source_unreadable
                    .push(format!("{name}: {error}"));
            }
            C::Unreadable(error) => {
                self.unreadable_file(task, &error);
                return;
            }
            C::Differs => {
                self.damaged(task, "differs from its unchanged source");
                return;
            }
        }
        // The next run of this check skips it, unless it is damaged.
        let _ = self.known.put(task.key, COMPARED);
    }

    fn suspect(&mut self, task: &Task, damaged: bool) {
        let suspect = Suspect {
            inode: task.inode,
            key: task.key,
            path: task.path.clone(),
            several: false,
            damaged,
            by_source: task.source.is_some(),
        };
        match task.is_link {
            true => self.found_links.push(suspect),
            false => self.found.push(suspect),
        }
    }

    /// Its content is right. A matching checksum does not prove that if a comparison with the source
    /// found it wrong.
    fn healthy(&mut self, task: &Task) {
        let suspect = self.suspects.get(task.key);
        let is_it = suspect.is_some_and(|suspect| task.source.is_some() || !suspect.by_source);
        if is_it {
            self.suspects.remove(task.key);
        }
    }

    /// Writes the list of suspects.
    pub(super) fn save_suspects(&mut self) -> io::Result<()> {
        if self.report.finished && matches!(self.spec.what, CheckWhat::Everything) {
            // Suspects that were not found no longer exist.
            let met = &self.met;
            let Suspects { files, links } = &mut self.suspects;
            files.retain(|key, _| met.contains(key));
            links.retain(|key, _| met.contains(key));
        }
        for suspect in std::mem::take(&mut self.found) {
            self.suspects.note(self.root, suspect);
        }
        for suspect in std::mem::take(&mut self.found_links) {
            self.suspects.note_link(self.root, suspect);
        }
        self.suspects.save(&self.spec.suspects)
    }

    fn damaged(&mut self, task: &Task, why: &str) {
        self.bad.insert(task.key, task.path.clone());
        self.suspect(task, true);
        let name = self.name(&task.path);
        self.report.damaged.push(format!("{name}: {why}"));
    }

    fn unreadable_file(&mut self, task: &Task, error: &io::Error) {
        self.bad.insert(task.key, task.path.clone());
        self.suspect(task, true);
        self.known.keep(task.key);
        self.unreadable(&task.path, error);
    }

    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let name = self.name(path);
        self.report.unreadable.push(format!("{name}: {error}"));
    }

    fn name(&self, path: &Path) -> String {
        escape_path(path.strip_prefix(self.root).unwrap_or(path))
    }

    /// Reports every name of the damaged files, as far as time allows.
    pub(super) fn report_affected(&mut self) {
        if self.bad.is_empty() {
            return;
        }
        let stop = || self.is_late() || self.cancel.is_cancelled();
        let found = affected::find(self.root, &self.bad, &stop);
        self.report.affected = found.names;
        self.report.affected_left = found.links_left;
    }
}
