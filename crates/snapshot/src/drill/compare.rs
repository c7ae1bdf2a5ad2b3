//! Compares what a drill restored.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::sample::{Job, PART_BYTES, Sampled};
use super::{DrillReport, DrillSpec, DrilledSnapshot};
use crate::cancel::Cancel;
use crate::check::{Compared, Key, Known, Source, compare_with_source, is_of_source, read_after};
use crate::content::{ContentHash, PIECE_BYTES, Sums};
use crate::error::SnapshotError;
use crate::listed::Listed;
use crate::long_path::{self, size_and_time};
use crate::suspects::Suspect;
use crate::text::escape_path;

const BUFFER_BYTES: usize = 1 << 20;

/// What is found about the restored files.
pub(super) struct Proof<'a> {
    pub(super) root: &'a Path,
    pub(super) spec: &'a DrillSpec,
    pub(super) known: &'a Known,
    pub(super) listed: &'a Listed,
    pub(super) jobs: &'a [Job],
    pub(super) report: DrillReport,
    /// Files with wrong content.
    pub(super) suspects: Vec<Suspect>,
    pub(super) cancel: &'a Cancel,
}

impl Proof<'_> {
    /// Compares files that were restored below `to`.
    pub(super) fn compare(&mut self, batch: &[Sampled], to: &Path) -> Result<(), SnapshotError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        for file in batch {
            if self.cancel.is_cancelled() {
                return Err(SnapshotError::ReadCancelled);
            }
            let restored = to.join(&file.path);
            let Ok(about) = long_path::lstat(&restored) else {
                self.explain_absence(file, &mut buffer);
                continue;
            };
            self.count(file, file.about.len());
            if attributes(&about) != attributes(&file.about) || !is_time_of(&about, &file.about) {
                self.damaged(file, "was restored with another size, time, owner or mode");
                continue;
            }
            let with_checksum = self.with_checksum(file, &restored, &mut buffer)?;
            if with_checksum == Some(false) {
                continue;
            }
            let is_proven = with_checksum == Some(true);
            let with_source = self.with_source(file, &restored, is_proven, &mut buffer)?;
            self.report.not_compared += u64::from(with_checksum.is_none() && !with_source);
        }
        Ok(())
    }

    /// Reads three parts of each large file, and compares them with the source.
    pub(super) fn read_parts(&mut self, batch: &[Sampled]) -> Result<(), SnapshotError> {
        for file in batch {
            if self.cancel.is_cancelled() {
                return Err(SnapshotError::ReadCancelled);
            }
            let source = self.source(file);
            let live = source
                .as_ref()
                .and_then(|source| open_unchanged(&file.about, &source.path));
            let mut wrong = false;
            let listed = self.listed.piece(Key::of(&file.about), self.spec.seed);
            let mut is_as_listed = None;
            let mut read = || -> io::Result<u64> {
                let kept = long_path::open_regular(&self.path(file))?;
                let mut bytes = 0;
                if let Some((number, digest)) = listed {
                    let (found, read) = piece(&kept, number, file.about.len())?;
                    is_as_listed = Some(found == digest);
                    bytes += read;
                }
                for at in parts(file.about.len(), self.spec.seed) {
                    let ours = part(&kept, at, file.about.len())?;
                    bytes += ours.len() as u64;
                    wrong |= live.as_ref().is_some_and(|live| {
                        part(live, at, file.about.len()).is_ok_and(|theirs| theirs != ours)
                    });
                }
                Ok(bytes)
            };
            match read() {
                Err(error) => self.unreadable(file, &error),
                Ok(bytes) => {
                    self.count(file, bytes);
                    self.report.in_parts += 1;
                    self.report.compared_with_checksum += u64::from(is_as_listed.is_some());
                    if is_as_listed == Some(false) {
                        self.suspect(file, true, false);
                        self.damaged(file, "differs from the checksum that its backup saved");
                        continue;
                    }
                    match (source, live.is_some()) {
                        (Some(source), true) if wrong => {
                            self.judge(file, &is_of_source(&file.about, &source));
                        }
                        (Some(source), true) => {
                            // It may have been changed while it was read.
                            let is_still = open_unchanged(&file.about, &source.path).is_some();
                            self.report.compared_with_source += u64::from(is_still);
                            self.report.not_compared +=
                                u64::from(!is_still && is_as_listed.is_none());
                        }
                        _ => self.report.not_compared += u64::from(is_as_listed.is_none()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether the content is right; `None`: there is no checksum.
    fn with_checksum(
        &mut self,
        file: &Sampled,
        restored: &Path,
        buffer: &mut [u8],
    ) -> Result<Option<bool>, SnapshotError> {
        let key = Key::of(&file.about);
        let known = self.known.checksum(key);
        if known.is_none() && self.listed.lacks(key) {
            return Ok(None);
        }
        let found = checksum(restored, buffer).map_err(|source| SnapshotError::System {
            op: "read a restored file",
            source,
        })?;
        self.report.compared_with_checksum += 1;
        let (is_right, why) = match self.listed.compare(key, &found) {
            Some(is_right) => (is_right, "differs from the checksum that its backup saved"),
            None => (
                known == Some(found.whole.short()),
                "differs from an earlier check",
            ),
        };
        if !is_right {
            self.suspect(file, true, false);
            self.damaged(file, why);
        }
        Ok(Some(is_right))
    }

    /// Returns whether the source could be compared. `is_proven`: a checksum shows that the content is what was
    /// backed up. Then the source was changed, and its times were not: through `mmap`, for example.
    fn with_source(
        &mut self,
        file: &Sampled,
        restored: &Path,
        is_proven: bool,
        buffer: &mut [u8],
    ) -> Result<bool, SnapshotError> {
        let Some(source) = self.source(file) else {
            return Ok(false);
        };
        let (_, is) = compare_with_source(restored, &source, self.cancel, buffer)
            .ok_or(SnapshotError::ReadCancelled)?;
        if let Compared::Unreadable(source) = is {
            return Err(SnapshotError::System {
                op: "read a restored file",
                source,
            });
        }
        let is = match is {
            Compared::Differs if is_proven => Compared::Missed,
            is => is,
        };
        Ok(self.judge(file, &is))
    }

    /// Returns whether the source could be compared.
    fn judge(&mut self, file: &Sampled, is: &Compared) -> bool {
        match is {
            Compared::Same => self.report.compared_with_source += 1,
            Compared::Missed => {
                self.report.compared_with_source += 1;
                self.suspect(file, false, true);
                let name = self.name(file);
                self.report.missed.push(name);
            }
            Compared::Differs => {
                self.report.compared_with_source += 1;
                self.suspect(file, true, true);
                self.damaged(file, "differs from its unchanged source");
            }
            _ => return false,
        }
        true
    }

    /// The file of this machine that it was made from.
    fn source(&self, file: &Sampled) -> Option<Source> {
        let job = &self.jobs[file.job];
        (job.is_here && !file.is_without_place).then(|| Source {
            path: Path::new("/").join(&file.path),
            read_after_s: read_after(&file.about, &job.snapshots),
        })
    }

    /// rsync restored everything else, and reported this file.
    fn explain_absence(&mut self, file: &Sampled, buffer: &mut [u8]) {
        match checksum(&self.path(file), buffer) {
            Err(error) => self.unreadable(file, &error),
            Ok(_) => self.damaged(file, "was not restored"),
        }
    }

    fn count(&mut self, file: &Sampled, bytes: u64) {
        self.report.files += 1;
        self.report.bytes += bytes;
        let job = self.jobs[file.job].name.as_str();
        let snapshot = file.snapshot.to_string();
        let mut of_it = self.report.snapshots.iter_mut();
        match of_it.find(|one| one.job == job && one.snapshot == snapshot) {
            Some(one) => {
                one.files += 1;
                one.bytes += bytes;
            }
            None => self.report.snapshots.push(DrilledSnapshot {
                job: job.to_owned(),
                snapshot,
                files: 1,
                bytes,
            }),
        }
    }

    fn damaged(&mut self, file: &Sampled, why: &str) {
        let name = self.name(file);
        self.report.damaged.push(format!("{name}: {why}"));
    }

    fn unreadable(&mut self, file: &Sampled, error: &io::Error) {
        self.suspect(file, true, false);
        let name = self.name(file);
        self.report.unreadable.push(format!("{name}: {error}"));
    }

    fn suspect(&mut self, file: &Sampled, damaged: bool, by_source: bool) {
        self.suspects.push(Suspect {
            inode: file.about.ino(),
            key: Key::of(&file.about),
            path: self.path(file),
            several: false,
            damaged,
            by_source,
        });
    }

    fn path(&self, file: &Sampled) -> PathBuf {
        let job = self.root.join(self.jobs[file.job].name.as_str());
        job.join(file.snapshot.to_string()).join(&file.path)
    }

    fn name(&self, file: &Sampled) -> String {
        let path = self.path(file);
        escape_path(path.strip_prefix(self.root).unwrap_or(&path))
    }
}

/// What a restored file must have like the snapshot's, beside its time.
fn attributes(about: &std::fs::Metadata) -> (u64, u32, u32, u32) {
    (about.len(), about.mode(), about.uid(), about.gid())
}

/// Whether a restored file has the time of the snapshot's. Some file systems have whole seconds only: ext3, and
/// ext4 with inodes of 128 bytes.
fn is_time_of(restored: &std::fs::Metadata, kept: &std::fs::Metadata) -> bool {
    restored.mtime() == kept.mtime() && [0, kept.mtime_nsec()].contains(&restored.mtime_nsec())
}

/// Opens the source of a file, if it has the same size and time.
fn open_unchanged(kept: &std::fs::Metadata, source: &Path) -> Option<File> {
    let live = long_path::open_regular(source).ok()?;
    let is_same = |about: std::fs::Metadata| size_and_time(&about) == size_and_time(kept);
    live.metadata().is_ok_and(is_same).then_some(live)
}

/// Where the parts of a large file begin: its beginning, somewhere in the middle, its end.
fn parts(bytes: u64, seed: u64) -> [u64; 3] {
    let last = bytes.saturating_sub(PART_BYTES);
    [0, seed.checked_rem(last).unwrap_or(0), last]
}

fn part(file: &File, at: u64, of: u64) -> io::Result<Vec<u8>> {
    let length = usize::try_from(of.min(PART_BYTES)).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

/// Reads a piece of a large file: its digest, and how many bytes it has.
fn piece(file: &File, number: u64, of: u64) -> io::Result<(u64, u64)> {
    let mut at = number.saturating_mul(PIECE_BYTES);
    let end = of.min(at.saturating_add(PIECE_BYTES));
    let bytes = end.saturating_sub(at);
    let mut hash = ContentHash::new(0);
    let mut buffer = vec![0; BUFFER_BYTES];
    while at < end {
        let most = usize::try_from(end - at).unwrap_or(BUFFER_BYTES);
        let some = &mut buffer[..most.min(BUFFER_BYTES)];
        file.read_exact_at(some, at)?;
        hash.update(some);
        at += some.len() as u64;
    }
    Ok((hash.finish().whole.short(), bytes))
}

fn checksum(path: &Path, buffer: &mut [u8]) -> io::Result<Sums> {
    let mut file = long_path::open_regular(path)?;
    let mut hash = ContentHash::new(file.metadata()?.len());
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(hash.finish()),
            Ok(some) => hash.update(&buffer[..some]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
