//! Checks the sources before and after a run: a backup of the wrong place, or of nothing, is refused.

use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::automounts;
use crate::census::Walk;
use crate::disks::Disks;
use crate::error::{SnapshotError, SnapshotErrorKind};
use crate::file_system::FileSystem;
use crate::found::Found;
use crate::mounts::{Mount, holding, mounts, pattern_for};
use crate::mounts_inside::{MountChange, MountInside, Place, changes, mounts_inside};
use crate::own_places::OwnPlaces;
use crate::paths::{joined, plain_path, real_path};
use crate::patterns;
use crate::pulled::Reached;
use crate::pulled_source::{PulledSource, host_folder};
use crate::record::{ONE_FILE_SYSTEM, Warning};
use crate::spec::SnapshotSpec;
use crate::subvolumes;
use crate::text::escape_path;
use crate::walk::{holds_a_file, open_folder_at};

/// How many folders are searched for a file. A tree with more folders counts as not empty.
const EMPTY_FOLDERS_MAX: usize = 10_000;

/// A source that was checked.
#[derive(Debug)]
pub(crate) struct Source {
    /// Absolute, without `.`, `..`, doubled or trailing slashes.
    pub(crate) path: PathBuf,
    device: u64,
    inode: u64,
    pub(crate) folder: bool,
    /// The file system, if it lies on an automount point. It may have been unmounted since, because it
    /// was idle.
    on_automount: Option<FileSystem>,
}

/// All sources of a run.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) list: Vec<Source>,
    /// The sources on other hosts that are there.
    pub(crate) pulled: Reached,
    /// The folders of all hosts of the job in a snapshot, absolute.
    host_folders: Vec<PathBuf>,
    /// Patterns of what is always excluded.
    pub(crate) left_out: Vec<OsString>,
    /// What the rules of [`SnapshotSpec::scan`] exclude.
    pub(crate) found: Found,
    /// What the scan counted, if that was asked for.
    pub(crate) walk: Option<Walk>,
    /// The scan could not read everything.
    pub(crate) walked_partly: bool,
    pub(crate) warnings: Vec<Warning>,
    /// Sources that are skipped because they are missing, empty or unreadable. Escaped.
    pub(crate) missing: Vec<String>,
    /// The mounts inside the sources that belong to them.
    pub(crate) mounts: Vec<MountInside>,
    /// The file systems of the sources, and those mounted inside them.
    pub(crate) file_systems: Vec<FileSystem>,
    /// Real paths in which a changed mount is no loss.
    no_mounts_in: Vec<PathBuf>,
    one_file_system: bool,
}

impl Sources {
    /// Checks the sources of `spec`, and finds what lies in them and must be excluded.
    pub(crate) fn check(spec: &SnapshotSpec, volume_root: &Path) -> Result<Self, SnapshotError> {
        Self::check_beside(spec, volume_root, Reached::default())
    }

    /// The same for a run that pulls sources from other hosts, too.
    pub(crate) fn check_beside(
        spec: &SnapshotSpec,
        volume_root: &Path,
        pulled: Reached,
    ) -> Result<Self, SnapshotError> {
        patterns::check(spec)?;
        if spec.sources.is_empty() && spec.staged.is_empty() && spec.pulled.is_empty() {
            return Err(SnapshotError::NoSources {
                job: spec.job.to_string(),
            });
        }
        let table = use_automounts(spec)?;
        let mut list: Vec<Source> = Vec::new();
        let mut missing: Vec<(String, SnapshotError)> = Vec::new();
        for path in &spec.sources {
            let path = plain_path(path).map_err(|why| refused(path, why.to_owned()))?;
            // A source that is listed twice is used once. Nested sources stay: with patterns or
            // `one_file_system` they add what the outer one excludes.
            if !list.iter().any(|source| source.path == path) {
                match check_one(path.clone(), spec.allow_empty) {
                    Ok(source) => list.push(source),
                    // The other sources are backed up without it.
                    Err(error) if error.kind() == SnapshotErrorKind::Source => {
                        missing.push((escape_path(&path), error));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if list.is_empty() && pulled.hosts.is_empty() {
            if let Some((_, error)) = missing.pop() {
                return Err(error);
            }
            if let Some(error) = pulled.error() {
                return Err(error);
            }
        }
        let hosts = spec.pulled.iter().map(|source| &source.host);
        let host_folders = hosts.map(|host| Path::new("/").join(host_folder(host)));
        let mut this = Self {
            list,
            pulled,
            host_folders: host_folders.collect(),
            left_out: Vec::new(),
            found: Found::default(),
            walk: None,
            walked_partly: false,
            warnings: Vec::new(),
            missing: missing.iter().map(|(path, _)| path.clone()).collect(),
            mounts: Vec::new(),
            file_systems: Vec::new(),
            no_mounts_in: Vec::new(),
            one_file_system: spec.one_file_system,
        };
        this.leave_out(spec, volume_root, &table)?;
        if spec.one_file_system {
            // rsync enters no mount then.
            this.no_mounts_in.push("/".into());
        }
        this.mounts = this.mounts_in(&table);
        this.leave_out_empty_automounts();
        this.file_systems = this.file_systems_in(&table);
        let left_out = missing.into_iter().map(|(path, error)| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            let why = error.to_string();
            let why = why
                .strip_prefix(&format!("source {path}: "))
                .unwrap_or(&why);
            Warning::SourceLeftOut {
                why: format!("{why}{}", cause.unwrap_or_default()),
                path,
            }
        });
        this.warnings.extend(left_out);
        for one in std::mem::take(&mut this.pulled.missing) {
            this.skip_pulled(&one.source, &one.why);
        }
        Ok(this)
    }

    /// Notes a source on another host that the run does without.
    pub(crate) fn skip_pulled(&mut self, source: &PulledSource, why: &str) {
        let place = Path::new("/").join(source.place());
        self.missing.push(escape_path(&place));
        self.warnings.push(Warning::SourceLeftOut {
            path: source.to_string(),
            why: why.to_owned(),
        });
    }

    /// Whether an absolute path of the snapshot is of another host.
    pub(crate) fn is_pulled(&self, path: &Path) -> bool {
        self.host_folders.iter().any(|host| path.starts_with(host))
    }

    /// rsync's input, which belongs to [`Sources::arguments`].
    pub(crate) fn input(&self) -> Option<Vec<u8>> {
        let lines = &self.found.lines;
        (!lines.is_empty()).then(|| lines.clone())
    }

    /// rsync's arguments for sources and exclusions. The destination follows them.
    pub(crate) fn arguments(&self, spec: &SnapshotSpec) -> Vec<OsString> {
        let mut arguments = Vec::new();
        if spec.one_file_system {
            arguments.push(ONE_FILE_SYSTEM.into());
        }
        // The first match wins, so our patterns come first. A `!`, which would clear them, is refused.
        let ours = self.left_out.iter();
        arguments.extend(ours.map(|pattern| argument("--exclude=", pattern)));
        arguments.extend(self.found.options.iter().cloned());
        if !self.found.lines.is_empty() {
            arguments.push("--exclude-from=-".into());
        }
        let own_patterns = spec.excludes.iter();
        arguments.extend(own_patterns.map(|pattern| format!("--exclude={pattern}").into()));
        let files = spec.exclude_from.iter();
        arguments.extend(files.map(|file| argument("--exclude-from=", file.as_os_str())));
        arguments.push("--".into());
        arguments.extend(
            self.list
                .iter()
                .map(|one| one.path.clone().into_os_string()),
        );
        arguments
    }

    /// Finds the volume's own mounts and the kernel's file systems inside the sources.
    fn leave_out(
        &mut self,
        spec: &SnapshotSpec,
        volume_root: &Path,
        mounts: &[Mount],
    ) -> Result<(), SnapshotError> {
        let volume =
            std::fs::canonicalize(volume_root).map_err(|source| SnapshotError::Volume {
                op: "resolve",
                object: escape_path(volume_root),
                source,
            })?;
        // Wherever the volume is mounted, it is the same volume.
        let own_mount = mounts.iter().rfind(|mount| mount.at == volume);
        let own: Vec<PathBuf> = std::iter::once(volume.clone())
            .chain(
                mounts
                    .iter()
                    .filter(|mount| own_mount.is_some_and(|own| own.device == mount.device))
                    .map(|mount| mount.at.clone()),
            )
            .collect();
        let kernels = mounts.iter().filter(|mount| mount.kernel);
        let sprats = OwnPlaces::find(&spec.never_enter, &spec.containers, mounts);
        self.no_mounts_in = own
            .iter()
            .cloned()
            .chain(kernels.map(|mount| mount.at.clone()))
            .chain(sprats.paths().map(Path::to_owned))
            .collect();
        let real = self.real_paths();
        for (source, real) in self.list.iter().zip(&real) {
            if own.iter().any(|own| real.starts_with(own)) {
                return Err(refused(
                    &source.path,
                    "is in the volume that would contain the snapshot".to_owned(),
                ));
            }
            for own in own.iter().filter(|own| own.starts_with(real)) {
                let path = path_in_source(own, real, &source.path);
                self.left_out.push(pattern_for(&path, false));
                self.warnings.push(Warning::OwnVolumeLeftOut {
                    path: escape_path(&path),
                });
            }
            let inside = |at: &Path| at.starts_with(real) && at != real;
            for mount in mounts.iter().filter(|m| m.kernel && inside(&m.at)) {
                let path = path_in_source(&mount.at, real, &source.path);
                self.left_out.push(pattern_for(&path, true));
                self.warnings.push(Warning::KernelFileSystemLeftOut {
                    path: escape_path(&path),
                });
            }
            self.left_out.extend(sprats.patterns_in(real, &source.path));
        }
        self.left_out.sort();
        self.left_out.dedup();
        let mut seen = Vec::new();
        self.warnings.retain(|warning| {
            let new = !seen.contains(warning);
            seen.push(warning.clone());
            new
        });
        Ok(())
    }

    fn real_paths(&self) -> Vec<PathBuf> {
        let sources = self.list.iter();
        sources.map(|source| real_path(&source.path)).collect()
    }

    fn mounts_in(&self, table: &[Mount]) -> Vec<MountInside> {
        let real = self.real_paths();
        let places: Vec<Place<'_>> = real
            .iter()
            .zip(&self.list)
            .map(|(real, source)| Place {
                real,
                named: &source.path,
            })
            .collect();
        mounts_inside(table, &places, &self.no_mounts_in)
    }

    /// Checks after the run which mounts inside the sources came or went. `in_tree` returns whether a
    /// path of a source is in the tree that the run made.
    pub(crate) fn mount_changes(
        &self,
        in_tree: &dyn Fn(&Path) -> bool,
    ) -> Result<Vec<MountChange>, SnapshotError> {
        let now = self.mounts_in(&table()?);
        Ok(changes(&self.mounts, &now, in_tree))
    }

    /// Excludes them, because a walk would try to mount them again, and fail.
    fn leave_out_empty_automounts(&mut self) {
        for mount in self.mounts.iter().filter(|mount| mount.is_empty_automount) {
            self.left_out.push(pattern_for(&mount.path, true));
            self.warnings.push(Warning::AutomountEmpty {
                path: escape_path(&mount.path),
            });
        }
    }

    fn file_systems_in(&mut self, table: &[Mount]) -> Vec<FileSystem> {
        let real = self.real_paths();
        let mut all = Vec::new();
        for (source, real) in self.list.iter_mut().zip(&real) {
            let Some(mount) = holding(table, real) else {
                continue;
            };
            let file_system = FileSystem::at(mount, &source.path, real);
            source.on_automount = mount.on_automount.then(|| file_system.clone());
            all.push(file_system);
        }
        for mount in self.mounts.iter().filter(|mount| !mount.is_empty_automount) {
            let is_source = |had: &FileSystem| had.place == mount.file_system.place;
            if !all.iter().any(is_source) {
                all.push(mount.file_system.clone());
            }
        }
        all
    }

    /// Checks after the run that each source is still the same file or folder.
    pub(crate) fn check_again(&self) -> Result<(), SnapshotError> {
        for source in &self.list {
            if let Some(before) = &source.on_automount {
                automounts::use_once(&source.path);
                let real = real_path(&source.path);
                let table = table()?;
                let now = holding(&table, &real).map(|m| FileSystem::at(m, &source.path, &real));
                if now.is_some_and(|now| before.is_same(&now) == Some(true)) {
                    continue;
                }
            }
            let same = std::fs::symlink_metadata(&source.path).is_ok_and(|now| {
                // A file may be replaced by a new version of itself. If a folder is replaced, a disk was
                // mounted or unmounted, or the folder was removed.
                now.is_dir() == source.folder
                    && now.dev() == source.device
                    && (!source.folder || now.ino() == source.inode)
            });
            if !same {
                return Err(SnapshotError::SourceChanged {
                    path: escape_path(&source.path),
                });
            }
        }
        Ok(())
    }
}

impl Sources {
    /// btrfs subvolumes inside the sources that are excluded because the job stays on one file system,
    /// see [`subvolumes::inside`].
    pub(crate) fn subvolumes_left_out(
        &self,
        in_tree: &dyn Fn(&Path) -> bool,
    ) -> Result<Vec<PathBuf>, SnapshotError> {
        if !self.one_file_system {
            return Ok(Vec::new());
        }
        let mounted: Vec<PathBuf> = table()?.into_iter().map(|mount| mount.at).collect();
        let folders = self.list.iter().filter(|source| source.folder);
        let mut found: Vec<PathBuf> = folders
            .flat_map(|source| subvolumes::inside(&source.path, &mounted, in_tree))
            .filter(|path| !self.list.iter().any(|source| source.path == *path))
            .collect();
        found.sort();
        found.dedup();
        Ok(found)
    }
}

/// An option of rsync with its value.
pub(crate) fn argument(option: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(option);
    argument.push(value);
    argument
}

/// Mounts what belongs on the automount points in the sources, and on those above them.
fn use_automounts(spec: &SnapshotSpec) -> Result<Vec<Mount>, SnapshotError> {
    let sources: Vec<PathBuf> = spec.sources.iter().map(|path| real_path(path)).collect();
    let is_needed = |at: &Path| {
        let inside = |source: &PathBuf| !spec.one_file_system && at.starts_with(source);
        let needed = sources
            .iter()
            .any(|source| source.starts_with(at) || inside(source));
        needed && !automounts::is_clearly_excluded(spec, at)
    };
    let before = table()?;
    if automounts::mount_all(&before, &is_needed) {
        return table();
    }
    Ok(before)
}

/// Drops the warning for an automount point if a missing disk at that place is reported anyway.
pub(crate) fn forget_known_automounts(warnings: &mut Vec<Warning>, disks: &Disks) {
    let is_known = |path: &String| {
        let mut missing = disks.missing.iter();
        missing.any(|one| one.disk.file_system.place == *path)
    };
    warnings.retain(|warning| match warning {
        Warning::AutomountEmpty { path } => !is_known(path),
        _ => true,
    });
}

fn table() -> Result<Vec<Mount>, SnapshotError> {
    mounts().map_err(|source| SnapshotError::System {
        op: "read /proc/self/mountinfo",
        source,
    })
}

fn refused(path: &Path, why: String) -> SnapshotError {
    SnapshotError::SourceRefused {
        path: escape_path(path),
        why,
    }
}

fn check_one(path: PathBuf, allow_empty: bool) -> Result<Source, SnapshotError> {
    let text = escape_path(&path);
    let metadata = match std::fs::symlink_metadata(&path) {
        Ok(metadata) => metadata,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Err(SnapshotError::SourceMissing { path: text });
        }
        Err(source) => return Err(SnapshotError::SourceUnreadable { path: text, source }),
    };
    if metadata.is_symlink() {
        return Err(is_link(&path));
    }
    if !metadata.is_dir() && !metadata.is_file() {
        // rsync would copy it without any content, and report success.
        return Err(refused(
            &path,
            "is a pipe, socket or device, and has no content to save; give a file or folder"
                .to_owned(),
        ));
    }
    if metadata.is_dir() && !allow_empty && has_no_file(&path) {
        return Err(SnapshotError::SourceEmpty { path: text });
    }
    Ok(new_source(path, &metadata))
}

/// Checks whether a source can be backed up now: it exists, has content that can be stored, and is not
/// an empty folder, unless that is allowed.
pub fn check_source(path: &Path, allow_empty: bool) -> Result<(), SnapshotError> {
    check_one(path.to_owned(), allow_empty).map(drop)
}

/// rsync would copy only the link, and the user would believe that the folder is saved.
fn is_link(path: &Path) -> SnapshotError {
    let target = std::fs::read_link(path).map_or_else(|_| String::new(), |t| escape_path(&t));
    refused(
        path,
        format!("is a symbolic link to {target}; give the folder that it points to"),
    )
}

fn new_source(path: PathBuf, metadata: &Metadata) -> Source {
    Source {
        device: metadata.dev(),
        inode: metadata.ino(),
        folder: metadata.is_dir(),
        path,
        on_automount: None,
    }
}

/// Whether a folder is known to contain no file. rsync reports what can't be read.
pub(crate) fn has_no_file(path: &Path) -> bool {
    open_folder_at(path)
        .and_then(|folder| holds_a_file(&folder, EMPTY_FOLDERS_MAX))
        .is_ok_and(|holds| !holds)
}

/// The path of `inside` (below `real`) as a walk of the source `named` sees it.
fn path_in_source(inside: &Path, real: &Path, named: &Path) -> PathBuf {
    match inside.strip_prefix(real) {
        Ok(rest) => joined(named, rest),
        Err(_) => inside.to_owned(),
    }
}

/// All mistakes in the definition of a job that don't depend on what is mounted: invalid paths and
/// patterns, and symbolic links, which a snapshot would have without their targets.
#[must_use]
pub fn mistakes(spec: &SnapshotSpec) -> Vec<SnapshotError> {
    let sources = spec
        .sources
        .iter()
        .filter_map(|path| match plain_path(path) {
            Ok(path) if path.is_symlink() => Some(is_link(&path)),
            Ok(_) => None,
            Err(why) => Some(refused(path, why.to_owned())),
        });
    sources
        .chain(patterns::refused(spec))
        .chain(patterns::refused_lines(spec))
        .collect()
}
