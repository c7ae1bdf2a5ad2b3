//! Reads the files of a mounted volume, each inode once, and compares them with what is known.
//!
//! A disk that can't give a block back says so, and ext4's own structures have checksums. A block
//! of a file that silently became another is seen by neither: the cipher decrypts it to noise. So
//! a checksum of every file is remembered from one check to the next (a file in a snapshot never
//! changes), or the files are compared with the live source.

mod known;
mod source;

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::SnapshotError;
use crate::name::{JobName, SnapshotName};
use crate::record::NameList;
use crate::spec::{Cancel, Phase, Progress};
use crate::text::{escape_path, path_text};
use known::{Key, Known, Verdict};

/// Files that are read at a time: on a slow line most of a small file's time is waiting.
const READERS: usize = 8;
/// Files that wait to be read.
const QUEUE: usize = 64;
const BUFFER_BYTES: usize = 1 << 20;
/// How often progress is told and the wish to stop looked at.
const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSpec {
    /// All files, or the files of one job's newest snapshot beside their sources.
    pub what: CheckWhat,
    /// The file on this host that keeps checksums from one check to the next.
    #[serde(with = "path_text")]
    pub known: PathBuf,
    /// After so long nothing more is begun; the next check goes on there.
    pub duration_max: Option<Duration>,
}

/// See [`CheckSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckWhat {
    /// Every file of every snapshot, the newest first.
    Everything,
    /// The latest snapshot of this job, compared with the files it was made from.
    AgainstSource(JobName),
}

/// What was found. Names are `JOB/SNAPSHOT/path`, escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckReport {
    /// Files read by this run; one of many links counts once.
    pub files_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
    /// Files that this check's earlier runs had read.
    pub files_before: u64,
    /// Files of which a checksum was known from an earlier check.
    pub files_known: u64,
    /// Everything was looked at; else the next run goes on.
    pub finished: bool,
    /// Files and folders that can't be read.
    pub unreadable: NameList,
    /// Files whose content is not what it was at an earlier check, or not that of a source that
    /// hasn't changed since.
    pub damaged: NameList,
    /// The same damage, under each name in each snapshot.
    pub affected: NameList,
    /// Against a source: files that are the same there.
    pub same: u64,
    /// Against a source: files that have changed there since the snapshot.
    pub changed: NameList,
    /// Against a source: files that are no longer there.
    pub gone: NameList,
    /// Against a source: files that can't be read there.
    pub source_unreadable: NameList,
}

impl CheckReport {
    /// Whether anything in the volume is not as it should be.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        !self.unreadable.is_empty() || !self.damaged.is_empty()
    }
}

/// A regular file to be read.
struct Task {
    path: PathBuf,
    inode: u64,
    key: Key,
    /// Compare with this one, as the snapshot of this moment.
    source: Option<(PathBuf, SnapshotName)>,
}

/// What became of one.
enum Outcome {
    Read { bytes: u64, digest: u64 },
    Unreadable(io::Error),
    Compared { bytes: u64, is: source::Compared },
}

/// Looks at the volume mounted at `volume_root`, which nobody writes to.
pub fn check(
    volume_root: &Path,
    spec: &CheckSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<CheckReport, SnapshotError> {
    let known = Known::load(&spec.known).map_err(|source| volume("read", &spec.known, source))?;
    let (tasks_to, tasks) = mpsc::sync_channel::<Task>(QUEUE);
    let (done_to, done) = mpsc::channel();
    let tasks = Mutex::new(tasks);
    let mut run = Run {
        root: volume_root,
        report: CheckReport::default(),
        known,
        seen: HashSet::new(),
        bad_inodes: BTreeMap::new(),
        told: Instant::now(),
        until: spec.duration_max.map(|most| Instant::now() + most),
        progress,
        cancel,
    };
    let walked = std::thread::scope(|scope| {
        for _ in 0..READERS {
            let done_to = done_to.clone();
            let tasks = &tasks;
            scope.spawn(move || read_tasks(tasks, &done_to));
        }
        drop(done_to);
        let walked = match &spec.what {
            CheckWhat::Everything => run.walk_all(&tasks_to, &done),
            CheckWhat::AgainstSource(job) => run.walk_job(job, &tasks_to, &done),
        };
        drop(tasks_to);
        for (task, outcome) in &done {
            run.take(&task, outcome);
        }
        walked
    });
    let finished = walked?;
    run.report.finished = finished;
    if !run.bad_inodes.is_empty() && !cancel.is_cancelled() {
        run.name_affected();
    }
    if spec.what == CheckWhat::Everything {
        let saved = run.known.save(&spec.known, finished);
        saved.map_err(|source| volume("write", &spec.known, source))?;
    }
    if cancel.is_cancelled() {
        return Err(SnapshotError::Cancelled);
    }
    Ok(run.report)
}

fn volume(op: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::Volume {
        op,
        object: escape_path(path),
        source,
    }
}

fn read_tasks(tasks: &Mutex<Receiver<Task>>, done: &mpsc::Sender<(Task, Outcome)>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let next = tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(task) = next else { return };
        let outcome = match &task.source {
            Some((source, moment)) => source::compare(&task.path, source, *moment, &mut buffer),
            None => read_whole(&task.path, &mut buffer),
        };
        if done.send((task, outcome)).is_err() {
            return;
        }
    }
}

fn read_whole(path: &Path, buffer: &mut [u8]) -> Outcome {
    let mut read = || -> io::Result<(u64, u64)> {
        let mut file = File::open(path)?;
        let mut hash = known::Hash::new();
        let mut bytes = 0;
        loop {
            match file.read(buffer) {
                Ok(0) => return Ok((bytes, hash.finish())),
                Ok(some) => {
                    bytes += some as u64;
                    hash.update(&buffer[..some]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    };
    match read() {
        Ok((bytes, digest)) => Outcome::Read { bytes, digest },
        Err(error) => Outcome::Unreadable(error),
    }
}

/// One check, on the thread that walks.
struct Run<'a> {
    root: &'a Path,
    report: CheckReport,
    known: Known,
    /// Inodes with several names that were met by this run.
    seen: HashSet<u64>,
    /// What is damaged.
    bad_inodes: BTreeMap<u64, PathBuf>,
    told: Instant,
    until: Option<Instant>,
    progress: &'a mut dyn FnMut(Progress),
    cancel: &'a Cancel,
}

type Done = Receiver<(Task, Outcome)>;

impl Run<'_> {
    /// Job by job, in each the newest snapshot first. False if it was stopped before the end.
    fn walk_all(&mut self, tasks: &SyncSender<Task>, done: &Done) -> Result<bool, SnapshotError> {
        let root = self.root.to_owned();
        let mut jobs = self.names(&root);
        jobs.retain(|name| name != "lost+found");
        for job in jobs {
            let mut folders = self.names(&root.join(&job));
            folders.reverse();
            for folder in folders {
                if !self.walk(&root.join(&job).join(folder), None, tasks, done) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn walk_job(
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
        let latest = fs::read_link(folder.join("latest")).ok();
        let latest = latest.as_ref().and_then(|name| name.to_str());
        let names = self.names(&folder);
        let newest = names.iter().rev().filter_map(|name| name.to_str());
        let mut found = latest.into_iter().chain(newest);
        let Some(moment) = found.find_map(|name| SnapshotName::parse(name).ok()) else {
            return Err(SnapshotError::NoSuchSnapshot {
                job: job.as_str().to_owned(),
                snapshot: "latest".to_owned(),
            });
        };
        let snapshot = folder.join(moment.to_string());
        Ok(self.walk(&snapshot, Some(moment), tasks, done))
    }

    /// Everything below `top`. False if it was stopped before the end.
    fn walk(
        &mut self,
        top: &Path,
        moment: Option<SnapshotName>,
        tasks: &SyncSender<Task>,
        done: &Done,
    ) -> bool {
        let mut left = vec![top.to_owned()];
        while let Some(path) = left.pop() {
            let over = self.until.is_some_and(|until| Instant::now() >= until);
            if over || self.cancel.is_cancelled() {
                return false;
            }
            let stat = match fs::symlink_metadata(&path) {
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
            if stat.is_symlink() {
                if let Err(error) = fs::read_link(&path) {
                    self.unreadable(&path, &error);
                }
                continue;
            }
            if !stat.is_file() || (stat.nlink() > 1 && !self.seen.insert(stat.ino())) {
                continue;
            }
            let key = Key::of(&stat);
            if moment.is_none() && self.known.was_read(key) {
                self.report.files_before += 1;
                continue;
            }
            let source = moment.and_then(|moment| {
                let inside = path.strip_prefix(top).ok()?;
                Some((Path::new("/").join(inside), moment))
            });
            self.hand_over(
                Task {
                    path,
                    inode: stat.ino(),
                    key,
                    source,
                },
                tasks,
                done,
            );
        }
        true
    }

    /// Sorted; none of a folder that can't be read, which is reported.
    fn names(&mut self, folder: &Path) -> Vec<OsString> {
        let read = || -> io::Result<Vec<OsString>> {
            fs::read_dir(folder)?
                .map(|entry| Ok(entry?.file_name()))
                .collect()
        };
        match read() {
            Ok(mut names) => {
                names.sort();
                names
            }
            // Beside the job's folders there may be files: they are walked to as such.
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => Vec::new(),
            Err(error) => {
                self.unreadable(folder, &error);
                Vec::new()
            }
        }
    }

    /// Waits until somebody is free, and takes what is finished meanwhile.
    fn hand_over(&mut self, task: Task, tasks: &SyncSender<Task>, done: &Done) {
        let mut task = task;
        loop {
            while let Ok((task, outcome)) = done.try_recv() {
                self.take(&task, outcome);
            }
            match tasks.try_send(task) {
                Ok(()) => return,
                Err(TrySendError::Full(back)) => task = back,
                Err(TrySendError::Disconnected(_)) => return,
            }
            if let Ok((task, outcome)) = done.recv_timeout(TELL_INTERVAL) {
                self.take(&task, outcome);
            }
        }
    }

    fn take(&mut self, task: &Task, outcome: Outcome) {
        match outcome {
            Outcome::Read { bytes, digest } => {
                self.report.files_read += 1;
                self.report.bytes_read += bytes;
                match self.known.put(task.key, digest) {
                    Verdict::New => {}
                    Verdict::Same => self.report.files_known += 1,
                    Verdict::Differs => {
                        self.report.files_known += 1;
                        self.damaged(task, "is not what it was at an earlier check");
                    }
                }
            }
            Outcome::Unreadable(error) => {
                self.bad_inodes.insert(task.inode, task.path.clone());
                self.unreadable(&task.path, &error);
            }
            Outcome::Compared { bytes, is } => {
                self.report.files_read += 1;
                self.report.bytes_read += bytes;
                self.compared(task, is);
            }
        }
        if self.told.elapsed() >= TELL_INTERVAL {
            self.told = Instant::now();
            let mut progress = Progress::begin(Phase::Checking);
            progress.bytes_done = self.report.bytes_read;
            progress.files_done = self.report.files_read;
            (self.progress)(progress);
        }
    }

    fn compared(&mut self, task: &Task, is: source::Compared) {
        use source::Compared as C;
        let name = self.name(&task.path);
        match is {
            C::Same => self.report.same += 1,
            C::Changed => self.report.changed.push(name),
            C::Gone => self.report.gone.push(name),
            C::SourceUnreadable(error) => {
                self.report
                    .source_unreadable
                    .push(format!("{name}: {error}"));
            }
            C::Unreadable(error) => {
                self.bad_inodes.insert(task.inode, task.path.clone());
                self.unreadable(&task.path, &error);
            }
            C::Differs => self.damaged(task, "is not what its unchanged source is"),
        }
    }

    fn damaged(&mut self, task: &Task, why: &str) {
        self.bad_inodes.insert(task.inode, task.path.clone());
        let name = self.name(&task.path);
        self.report.damaged.push(format!("{name}: {why}"));
    }

    fn unreadable(&mut self, path: &Path, error: &io::Error) {
        let name = self.name(path);
        self.report.unreadable.push(format!("{name}: {error}"));
    }

    fn name(&self, path: &Path) -> String {
        escape_path(path.strip_prefix(self.root).unwrap_or(path))
    }

    /// Finds every name of what is damaged: a file stands in each snapshot that links it.
    fn name_affected(&mut self) {
        let mut left = vec![self.root.to_owned()];
        let mut affected = NameList::default();
        while let Some(path) = left.pop() {
            let Ok(stat) = fs::symlink_metadata(&path) else {
                continue;
            };
            if stat.is_dir() {
                let names = fs::read_dir(&path).into_iter().flatten().flatten();
                left.extend(names.map(|entry| entry.path()));
            } else if self.bad_inodes.contains_key(&stat.ino()) {
                affected.push(self.name(&path));
            }
            if self.cancel.is_cancelled() {
                break;
            }
        }
        affected.names.sort();
        self.report.affected = affected;
    }
}
