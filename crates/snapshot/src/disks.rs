//! The disks of a job, as its finished snapshots recorded them: which file systems there were, which
//! snapshots have them, and which of them are missing today.
//!
//! The newest snapshot that has all of a file system is kept as long as the newest complete snapshot
//! lacks it. That ends when the user declares the disk gone, or when the job excludes its mount point. A
//! missing mount point alone proves nothing.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::SnapshotError;
use crate::file_system::FileSystem;
use crate::job::JobFolder;
use crate::keep::is_future;
use crate::name::SnapshotName;
use crate::paths::plain_path;
use crate::record::{GoneDisk, ONE_FILE_SYSTEM, RunRecord, Warning};
use crate::spec::SnapshotSpec;
use crate::text::{path_texts, unescape_path};
use crate::wrong_dates::{finished_records, misdated};

/// What one finished snapshot has.
#[derive(Debug, Clone)]
pub(crate) struct Holder {
    pub(crate) name: SnapshotName,
    good: bool,
    file_systems: Vec<FileSystem>,
    gone: Vec<GoneDisk>,
    /// What the job asked for.
    sources: Vec<PathBuf>,
    /// What of it was there.
    had: Vec<PathBuf>,
    /// What it has that comes from no folder of this machine: see [`JobSources::parts`].
    parts: Vec<Part>,
    one_file_system: bool,
    /// Mount points of missing disks that the job's patterns excluded.
    left_out: Vec<String>,
    /// How many files and folders it has.
    files: u64,
}

/// A file system that is in finished snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Its identity, and its newest mount point.
    pub(crate) file_system: FileSystem,
    /// The snapshots that have it, oldest first, and whether each has all of it.
    holders: Vec<(SnapshotName, bool)>,
}

/// Whether a file system is mounted today.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Presence {
    Present,
    /// Nothing is mounted at its place.
    Missing,
    /// Another file system is mounted at its place.
    Replaced(FileSystem),
}

/// A file system that is missing or replaced.
#[derive(Debug, Clone)]
pub(crate) struct MissingDisk {
    pub(crate) disk: Disk,
    pub(crate) warning: Warning,
}

/// The disks of a job at the time of a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disks {
    pub(crate) missing: Vec<MissingDisk>,
    /// What the user declared gone, now or earlier.
    pub(crate) gone: Vec<GoneDisk>,
    /// Mount points of missing disks that the job's patterns exclude, escaped.
    pub(crate) left_out: Vec<String>,
    /// How many files and folders the newest snapshot has.
    pub(crate) files_before: Option<u64>,
}

/// What a snapshot has that comes from no folder of this machine, relative to it.
#[derive(Debug, Clone)]
struct Part {
    path: PathBuf,
    full: bool,
    /// All of the path was asked for. Otherwise it is a file of what was.
    pulled: bool,
}

impl Part {
    fn has(&self, path: &Path) -> bool {
        match self.pulled {
            true => path.starts_with(&self.path),
            false => self.path.starts_with(path),
        }
    }
}

fn parts(record: &RunRecord) -> Vec<Part> {
    let staged = record.staged.iter().map(|file| Part {
        path: file.path.clone(),
        full: true,
        pulled: false,
    });
    let pulled = record.pulled.iter().map(|part| Part {
        path: part.source.place(),
        full: part.full,
        pulled: true,
    });
    staged.chain(pulled).collect()
}

impl Holder {
    fn new(record: RunRecord) -> Self {
        let parts = parts(&record);
        // The job includes it, although the snapshot lacks it.
        let left_out: Vec<String> = record.left_out_here().cloned().collect();
        let file_systems = if record.file_systems.is_empty() {
            // The records of older versions have only the places.
            let known = record.mounts.iter().map(|place| FileSystem {
                full: record.complete,
                ..FileSystem::unknown_at(place)
            });
            known.collect()
        } else {
            record.file_systems
        };
        Self {
            name: record.name,
            good: record.complete,
            file_systems,
            sources: record
                .sources
                .iter()
                .chain(&left_out)
                .map(|path| unescape_path(path))
                .collect(),
            parts,
            gone: record.disks_gone,
            had: record
                .sources
                .iter()
                .map(|path| unescape_path(path))
                .collect(),
            one_file_system: record
                .rsync_arguments
                .iter()
                .any(|one| one == ONE_FILE_SYSTEM),
            left_out: record.disks_left_out,
            files: record.stats.files,
        }
    }

    /// Whether the job includes `place` (escaped).
    fn asks_for(&self, place: &String) -> bool {
        !self.left_out.contains(place) && self.covers(&unescape_path(place))
    }

    /// Whether `place` is in the job's sources, whatever its patterns exclude.
    fn covers(&self, place: &Path) -> bool {
        let sources = self.sources.iter().map(|path| &**path);
        asks_for(sources, self.one_file_system, place)
    }
}

/// What the config says of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSources {
    /// As [`SnapshotSpec::sources`].
    #[serde(with = "path_texts")]
    pub paths: Vec<PathBuf>,
    /// What comes from no folder of this machine, relative to the snapshot: a file or a folder.
    #[serde(default, with = "path_texts")]
    pub parts: Vec<PathBuf>,
    /// As [`SnapshotSpec::one_file_system`].
    pub one_file_system: bool,
}

impl JobSources {
    /// Whether the job includes `place` (escaped). What its patterns exclude is known from the newest
    /// snapshot for which that place was asked.
    fn asks_for(&self, place: &String, holders: &[Holder]) -> bool {
        let path = unescape_path(place);
        let asked = holders.iter().rev().find(|holder| holder.covers(&path));
        asks_for(
            self.paths.iter().map(|path| &**path),
            self.one_file_system,
            &path,
        ) && !asked.is_some_and(|holder| holder.left_out.contains(place))
    }

    /// The newest snapshot of each source and part that the newest complete one lacks: one that is
    /// complete, or else any.
    fn kept(&self, good: Option<&Holder>, holders: &[Holder]) -> Vec<SnapshotName> {
        let newest = |has: &dyn Fn(&Holder) -> bool| {
            if good.is_some_and(has) {
                return None;
            }
            let having = || holders.iter().rev().filter(|one| has(one));
            let one = having().find(|one| one.good).or_else(|| having().next());
            one.map(|one| one.name)
        };
        let within = |all: &[PathBuf], path: &Path| all.iter().any(|one| path.starts_with(one));
        let sources = self.paths.iter().filter_map(|path| {
            let source = plain_path(path).unwrap_or_else(|_| path.clone());
            newest(&|holder| within(&holder.had, &source))
        });
        let parts = self.parts.iter().filter_map(|part| {
            let all = |one: &&Part| one.full && one.has(part);
            let full = newest(&|holder| holder.parts.iter().any(|one| all(&one)));
            full.or_else(|| newest(&|holder| holder.parts.iter().any(|one| one.has(part))))
        });
        sources.chain(parts).collect()
    }
}

fn asks_for<'s>(
    mut sources: impl Iterator<Item = &'s Path>,
    one_file_system: bool,
    place: &Path,
) -> bool {
    sources.any(|source| place == source || (!one_file_system && place.starts_with(source)))
}

/// Reads what the finished snapshots have, oldest first. Those whose date came from a wrong clock are
/// skipped.
pub(crate) fn holders(job: &JobFolder, now: Timestamp) -> Result<Vec<Holder>, SnapshotError> {
    let records = finished_records(job)?;
    let misdated = misdated(&records);
    let rightly =
        |record: &RunRecord| !is_future(record.name, now) && !misdated.contains(&record.name);
    Ok(records
        .into_iter()
        .filter(rightly)
        .map(Holder::new)
        .collect())
}

/// All file systems of `holders` (oldest first), except for those that were declared gone.
pub(crate) fn known(holders: &[Holder]) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for (number, holder) in holders.iter().enumerate() {
        for met in &holder.file_systems {
            let at = same_at_its_place(&disks, met)
                .or_else(|| moved_here(&disks, met, holder, &holders[..number]));
            let Some(at) = at else {
                disks.push(Disk {
                    file_system: met.clone(),
                    holders: vec![(holder.name, met.full)],
                });
                continue;
            };
            let disk = &mut disks[at];
            disk.file_system = met.clone();
            disk.holders.push((holder.name, met.full));
        }
    }
    for gone in holders.iter().flat_map(|holder| &holder.gone) {
        for disk in &mut disks {
            if gone.is_about(&disk.file_system) {
                disk.holders
                    .retain(|(name, _)| !gone.snapshots.contains(name));
            }
        }
    }
    disks.retain(|disk| !disk.holders.is_empty());
    disks
}

fn same_at_its_place(disks: &[Disk], met: &FileSystem) -> Option<usize> {
    let at_place = |disk: &Disk| disk.file_system.place == met.place;
    let certain = |disk: &Disk| at_place(disk) && disk.file_system.is_same(met) == Some(true);
    let possible = |disk: &Disk| at_place(disk) && disk.file_system.is_continued_by(met);
    let certain = disks.iter().position(certain);
    certain.or_else(|| disks.iter().rposition(possible))
}

/// The disk that `met` is, if it was at another place before and is no longer there. A disk that is
/// visible at both places (a bind mount, a clone with the same UUID) has not moved.
fn moved_here(
    disks: &[Disk],
    met: &FileSystem,
    holder: &Holder,
    before: &[Holder],
) -> Option<usize> {
    disks.iter().position(|disk| {
        let old = &disk.file_system;
        old.is_same(met) == Some(true)
            && !holder
                .file_systems
                .iter()
                .any(|now| is_at_place_of(now, old))
            && !disk.newest_had(met, before)
    })
}

fn is_at_place_of(now: &FileSystem, old: &FileSystem) -> bool {
    now.place == old.place && old.is_continued_by(now)
}

impl Disk {
    /// The snapshot that is kept for it: the newest that has all of it, or else the newest that has some
    /// of it.
    pub(crate) fn kept_in(&self) -> Option<SnapshotName> {
        let full = self.holders.iter().rev().find(|(_, full)| *full);
        full.or(self.holders.last()).map(|(name, _)| *name)
    }

    /// Whether the newest snapshot of this disk has the same disk at the place of `other`, too.
    fn newest_had(&self, other: &FileSystem, holders: &[Holder]) -> bool {
        let newest = self.holders.last().map(|(name, _)| *name);
        let newest = holders.iter().find(|holder| Some(holder.name) == newest);
        newest.is_some_and(|newest| {
            newest
                .file_systems
                .iter()
                .any(|had| had.place == other.place && self.file_system.is_same(had) == Some(true))
        })
    }

    /// Whether it is among the file systems in `present`.
    pub(crate) fn presence(&self, present: &[FileSystem], holders: &[Holder]) -> Presence {
        let old = &self.file_system;
        let at_place = present.iter().find(|now| now.place == old.place);
        if at_place.is_some_and(|now| old.is_continued_by(now)) {
            return Presence::Present;
        }
        let moved = |now: &&FileSystem| {
            now.place != old.place
                && old.is_same(now) == Some(true)
                && !self.newest_had(now, holders)
        };
        if present.iter().any(|now| moved(&now)) {
            return Presence::Present;
        }
        match at_place {
            // The source was a mount point before and is a plain folder today.
            Some(now) if !old.mounted_here || now.mounted_here => Presence::Replaced(now.clone()),
            _ => Presence::Missing,
        }
    }

    /// A folder of a file system that is mounted: if it is missing, that is a missing source, not a missing disk.
    fn is_reachable_folder(&self) -> bool {
        !self.file_system.mounted_here && self.file_system.is_reachable()
    }

    fn gone(&self) -> GoneDisk {
        GoneDisk {
            file_system: self.file_system.clone(),
            snapshots: self.holders.iter().map(|(name, _)| *name).collect(),
        }
    }

    /// Whether `said` (a mount point or a UUID) means this disk.
    fn is_named(&self, said: &Path) -> bool {
        let is_place =
            plain_path(said).is_ok_and(|path| path == unescape_path(&self.file_system.place));
        let identity = self.file_system.identity();
        // The caller turned a UUID into a path, too.
        is_place || said.file_name().is_some_and(|name| name == identity)
    }
}

impl Disks {
    /// Compares the known file systems with those that are `present`.
    pub(crate) fn find(
        holders: &[Holder],
        present: &[FileSystem],
        sources: &[PathBuf],
        spec: &SnapshotSpec,
    ) -> Self {
        let mut this = Self {
            files_before: holders.last().map(|newest| newest.files),
            ..Self::default()
        };
        let names: Vec<SnapshotName> = holders.iter().map(|holder| holder.name).collect();
        for gone in holders.iter().flat_map(|holder| &holder.gone) {
            let mut gone = gone.clone();
            gone.snapshots.retain(|name| names.contains(name));
            this.add_gone(gone);
        }
        for disk in known(holders) {
            let place = unescape_path(&disk.file_system.place);
            let sources = sources.iter().map(|path| &**path);
            if !asks_for(sources, spec.one_file_system, &place) {
                continue;
            }
            let presence = disk.presence(present, holders);
            let Some(before) = disk.kept_in().filter(|_| presence != Presence::Present) else {
                continue;
            };
            if spec.disks_gone.iter().any(|said| disk.is_named(said)) {
                this.add_gone(disk.gone());
                continue;
            }
            if presence == Presence::Missing && disk.is_reachable_folder() {
                continue;
            }
            let path = disk.file_system.place.clone();
            let identity = disk.file_system.identity().to_owned();
            let warning = match presence {
                Presence::Replaced(now) => Warning::OtherFileSystem {
                    path,
                    before,
                    was: disk.file_system.text(),
                    now: now.text(),
                    disk: identity,
                },
                _ => Warning::NotMounted {
                    path,
                    before,
                    disk: identity,
                },
            };
            this.missing.push(MissingDisk { disk, warning });
        }
        this
    }

    /// Drops missing disks whose place the job excludes. They are neither reported nor kept.
    pub(crate) fn leave_out(&mut self, left_out: &dyn Fn(&Path) -> bool) {
        let (out, missing) = std::mem::take(&mut self.missing)
            .into_iter()
            .partition(|one: &MissingDisk| left_out(&unescape_path(&one.disk.file_system.place)));
        self.missing = missing;
        let places = out.into_iter().map(|one| one.disk.file_system.place);
        self.left_out.extend(places);
    }

    fn add_gone(&mut self, gone: GoneDisk) {
        if gone.snapshots.is_empty() {
            return;
        }
        let same = |one: &&mut GoneDisk| {
            one.file_system.place == gone.file_system.place && one.is_about(&gone.file_system)
        };
        match self.gone.iter_mut().find(same) {
            Some(known) => {
                known.snapshots.extend(&gone.snapshots);
                known.snapshots.sort();
                known.snapshots.dedup();
            }
            None => self.gone.push(gone),
        }
    }
}

/// The snapshots to keep because each is the newest one of a file system, or of a source in the config,
/// that the newest complete snapshot lacks. `job`: what the config says, if the job is in it. A run by
/// hand under the job's name may have asked for less.
pub(crate) fn kept_for_disks(holders: &[Holder], job: Option<&JobSources>) -> Vec<SnapshotName> {
    // The newest snapshot shows what the job includes today.
    let Some(newest) = holders.last() else {
        return Vec::new();
    };
    let good = holders.iter().rev().find(|holder| holder.good);
    let asked = |place: &String| {
        newest.asks_for(place) || job.is_some_and(|job| job.asks_for(place, holders))
    };
    let mut kept: Vec<SnapshotName> = known(holders)
        .iter()
        .filter(|disk| asked(&disk.file_system.place))
        .filter(|disk| {
            let has =
                |good: &Holder| disk.presence(&good.file_systems, holders) == Presence::Present;
            !good.is_some_and(has)
        })
        .filter_map(Disk::kept_in)
        .collect();
    kept.extend(job.iter().flat_map(|job| job.kept(good, holders)));
    kept.sort();
    kept.dedup();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(day: i64) -> SnapshotName {
        SnapshotName::at(Timestamp::from_second(1_700_000_000 + day * 86_400).unwrap())
    }

    fn disk(place: &str, uuid: &str, full: bool) -> FileSystem {
        FileSystem {
            place: place.into(),
            kind: "ext4".into(),
            uuid: Some(uuid.into()),
            root: "/".into(),
            full,
            ..FileSystem::default()
        }
    }

    fn holder(day: i64, file_systems: &[FileSystem]) -> Holder {
        Holder {
            name: name(day),
            good: file_systems.iter().all(|one| one.full),
            file_systems: file_systems.to_vec(),
            gone: Vec::new(),
            sources: vec!["/s".into()],
            had: vec!["/s".into()],
            parts: Vec::new(),
            one_file_system: false,
            left_out: Vec::new(),
            files: 0,
        }
    }

    fn kept(holders: &[Holder]) -> Vec<i64> {
        let day = |name: SnapshotName| (name.moment().as_second() - 1_700_000_000) / 86_400;
        kept_for_disks(holders, None).into_iter().map(day).collect()
    }

    /// A run by hand under the job's name asks for one folder only.
    #[test]
    fn disk_of_the_config_is_kept_whatever_a_run_by_hand_asked_for() {
        let (root, a) = (disk("/s", "root", true), disk("/s/a", "A", true));
        let mut by_hand = holder(2, std::slice::from_ref(&root));
        by_hand.sources = vec!["/s/b".into()];
        by_hand.had = by_hand.sources.clone();
        let all = [holder(1, &[root.clone(), a]), by_hand];
        assert!(kept(&all).is_empty());
        let config = |paths: &[&str]| JobSources {
            paths: paths.iter().map(PathBuf::from).collect(),
            ..JobSources::default()
        };
        let kept = |holders: &[Holder], config| kept_for_disks(holders, Some(&config));
        assert_eq!(kept(&all, config(&["/s"])), [name(1)]);
        assert!(
            kept(&all, config(&["/s/b"])).is_empty(),
            "no longer in the config"
        );
        let mut excluded = holder(3, std::slice::from_ref(&root));
        excluded.left_out = vec!["/s/a".into()];
        let all = [&all[..], &[excluded]].concat();
        assert!(kept(&all, config(&["/s"])).is_empty());
        // A source that was not there since.
        let mut lacks = holder(4, &[root]);
        lacks.had = vec!["/s/b".into()];
        lacks.left_out = vec!["/s/a".into()];
        assert_eq!(
            kept(&[&all[..], &[lacks]].concat(), config(&["/s"])),
            [name(3)]
        );
    }

    /// A run by hand under the job's name runs no command.
    #[test]
    fn dump_of_the_config_is_kept_whatever_a_run_by_hand_made() {
        let root = disk("/s", "root", true);
        let dumped = |day, parts: &[&str]| {
            let parts = parts.iter().map(|path| Part {
                path: path.into(),
                full: true,
                pulled: path.starts_with("@web"),
            });
            let parts = parts.collect();
            Holder {
                parts,
                ..holder(day, std::slice::from_ref(&root))
            }
        };
        let config = |part: &str| JobSources {
            parts: vec![part.into()],
            ..JobSources::default()
        };
        let kept = |holders: &[Holder], part| kept_for_disks(holders, Some(&config(part)));
        let all = [
            dumped(1, &["@dump/all.sql", "@system/notes.txt"]),
            dumped(2, &["@dump/all.sql", "@system/notes.txt"]),
            dumped(3, &[]),
        ];
        assert_eq!(kept(&all, "@dump/all.sql"), [name(2)]);
        assert_eq!(kept(&all, "@system"), [name(2)]);
        assert!(kept(&all, "@dump/other.sql").is_empty());
        assert!(
            kept(&all[..2], "@dump/all.sql").is_empty(),
            "nothing lacks it"
        );
        // A part of a source was all that one run asked for.
        let all = [dumped(1, &["@web/srv"]), dumped(2, &["@web/srv/www"])];
        assert_eq!(kept(&all, "@web/srv"), [name(1)]);
        assert!(kept(&all, "@web/srv/www").is_empty());
    }

    #[test]
    fn the_newest_full_snapshot_of_a_missing_disk_is_kept() {
        let (root, a) = (disk("/s", "root", true), disk("/s/a", "A", true));
        let part = disk("/s/a", "A", false);
        let all = [
            holder(1, &[root.clone(), a.clone()]),
            holder(2, &[root.clone(), a.clone()]),
            holder(3, &[root.clone(), part]),
            holder(4, std::slice::from_ref(&root)),
        ];
        assert_eq!(kept(&all), [2]);
        // The disk is back, and the newest complete snapshot has it.
        let back = [&all[..], &[holder(5, &[root, a])]].concat();
        assert!(kept(&back).is_empty());
    }

    #[test]
    fn a_replaced_disk_and_a_moved_disk_are_distinguished() {
        let (a, b) = (disk("/s/p", "A", true), disk("/s/p", "B", true));
        let moved = disk("/s/q", "A", true);
        let all = [
            holder(1, std::slice::from_ref(&a)),
            holder(2, std::slice::from_ref(&b)),
        ];
        assert_eq!(kept(&all), [1]);
        let both = [&all[..], &[holder(3, &[moved.clone(), b])]].concat();
        assert!(kept(&both).is_empty());
        assert_eq!(known(&both).len(), 2);
        // A clone at a second place is not a disk that moved: the first one is missing now.
        let clones = [holder(1, &[a.clone(), moved]), holder(2, &[a])];
        assert_eq!(kept(&clones), [1]);
    }

    #[test]
    fn a_disk_declared_gone_is_kept_again_after_it_came_back() {
        let (root, a) = (disk("/s", "root", true), disk("/s/a", "A", true));
        let mut said = holder(2, std::slice::from_ref(&root));
        said.gone = vec![GoneDisk {
            file_system: a.clone(),
            snapshots: vec![name(1)],
        }];
        let all = [holder(1, &[root.clone(), a.clone()]), said];
        assert!(kept(&all).is_empty());
        let later = [holder(3, &[root.clone(), a]), holder(4, &[root])];
        assert_eq!(kept(&[&all[..], &later[..]].concat()), [3]);
    }

    #[test]
    fn a_disk_the_newest_snapshot_excludes_is_not_kept() {
        let a = disk("/s/a", "A", true);
        let mut other = holder(2, &[]);
        other.sources = vec!["/other".into()];
        assert!(kept(&[holder(1, std::slice::from_ref(&a)), other]).is_empty());
        let mut one = holder(2, &[]);
        one.one_file_system = true;
        assert!(kept(&[holder(1, std::slice::from_ref(&a)), one]).is_empty());
        let mut pattern = holder(2, &[]);
        pattern.left_out = vec!["/s/a".into()];
        let all = [holder(1, &[a]), pattern];
        assert!(kept(&all).is_empty());
        // The job includes it again.
        assert_eq!(kept(&[&all[..], &[holder(3, &[])]].concat()), [1]);
    }
}
