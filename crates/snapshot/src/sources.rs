//! Checks the sources before a run and after it: a backup of the wrong place, or of none, is
//! refused instead of made.

use std::ffi::OsString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use crate::error::SnapshotError;
use crate::mounts::{mounts, pattern_for};
use crate::record::Warning;
use crate::spec::SnapshotSpec;
use crate::text::{escape_name, escape_path};
use crate::walk::{holds_a_file, open_folder_at};

/// A tree of only folders is called empty; looked for in so many folders, then taken for filled.
const EMPTY_FOLDERS_MAX: usize = 10_000;

/// A source that was looked at.
#[derive(Debug)]
pub(crate) struct Source {
    /// Absolute, without `.`, `..`, doubled or trailing slashes.
    pub(crate) path: PathBuf,
    device: u64,
    inode: u64,
    pub(crate) folder: bool,
}

/// All sources of a run.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) list: Vec<Source>,
    /// Patterns of what is left out in any case.
    pub(crate) left_out: Vec<OsString>,
    pub(crate) warnings: Vec<Warning>,
}

/// Brings a path into the one form that is used from here on.
pub(crate) fn plain_path(path: &Path) -> Result<PathBuf, &'static str> {
    if !path.is_absolute() {
        return Err("the path must be absolute");
    }
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => plain.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                return Err("the path must not have '..' in it");
            }
        }
    }
    Ok(plain)
}

impl Sources {
    /// Looks at the sources of `spec`, and for what lies in them and must stay out.
    pub(crate) fn look(spec: &SnapshotSpec, volume_root: &Path) -> Result<Self, SnapshotError> {
        check_patterns(spec)?;
        if spec.sources.is_empty() {
            return Err(SnapshotError::NoSources {
                job: spec.job.to_string(),
            });
        }
        let mut list: Vec<Source> = Vec::new();
        for path in &spec.sources {
            let path = plain_path(path).map_err(|why| refused(path, why.to_owned()))?;
            // Named twice is the same as named once. Nested ones stay: with patterns or
            // `one_file_system` they add what the outer one leaves out.
            if !list.iter().any(|source| source.path == path) {
                list.push(look_at(path, spec.allow_empty)?);
            }
        }
        let mut this = Self {
            list,
            left_out: Vec::new(),
            warnings: Vec::new(),
        };
        this.leave_out(spec, volume_root)?;
        Ok(this)
    }

    /// Finds the volume's own mounts and the kernel's file systems inside the sources.
    fn leave_out(&mut self, spec: &SnapshotSpec, volume_root: &Path) -> Result<(), SnapshotError> {
        let volume =
            std::fs::canonicalize(volume_root).map_err(|source| SnapshotError::Volume {
                op: "resolve",
                object: escape_path(volume_root),
                source,
            })?;
        let mounts = mounts().map_err(|source| SnapshotError::System {
            op: "read /proc/self/mountinfo",
            source,
        })?;
        // Wherever else the volume is mounted, it is the same volume.
        let own_mount = mounts.iter().rfind(|mount| mount.at == volume);
        let own: Vec<PathBuf> = std::iter::once(volume.clone())
            .chain(
                mounts
                    .iter()
                    .filter(|mount| own_mount.is_some_and(|own| own.device == mount.device))
                    .map(|mount| mount.at.clone()),
            )
            .collect();
        let real: Vec<PathBuf> = self
            .list
            .iter()
            .map(|source| real_path(&source.path))
            .collect();
        for (source, real) in self.list.iter().zip(&real) {
            if own.iter().any(|own| real.starts_with(own)) {
                return Err(refused(
                    &source.path,
                    "lies in the volume that the snapshot would go to".to_owned(),
                ));
            }
            for own in own.iter().filter(|own| own.starts_with(real)) {
                let path = seen_through(own, real, &source.path);
                self.left_out.push(pattern_for(&path, false));
                self.warnings.push(Warning::OwnVolumeLeftOut {
                    path: escape_path(&path),
                });
            }
            let inside = |at: &Path| at.starts_with(real) && at != real;
            for mount in mounts.iter().filter(|m| m.kernel && inside(&m.at)) {
                let path = seen_through(&mount.at, real, &source.path);
                self.left_out.push(pattern_for(&path, true));
                self.warnings.push(Warning::KernelFileSystemLeftOut {
                    path: escape_path(&path),
                });
            }
            for path in &spec.never_enter {
                let path = real_path(path);
                if path.starts_with(real) {
                    let path = seen_through(&path, real, &source.path);
                    self.left_out.push(pattern_for(&path, false));
                }
            }
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

    /// Checks after the run that each source is still the one that the run began with.
    pub(crate) fn check_again(&self) -> Result<(), SnapshotError> {
        for source in &self.list {
            let same = std::fs::symlink_metadata(&source.path).is_ok_and(|now| {
                // A file may be replaced by a new version of itself; a folder that is another one
                // was mounted, unmounted or removed.
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

fn refused(path: &Path, why: String) -> SnapshotError {
    SnapshotError::SourceRefused {
        path: escape_path(path),
        why,
    }
}

fn look_at(path: PathBuf, allow_empty: bool) -> Result<Source, SnapshotError> {
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
        let target = std::fs::read_link(&path).map_or_else(|_| String::new(), |t| escape_path(&t));
        // rsync would copy the link alone, and the owner would believe that the folder is safe.
        return Err(refused(
            &path,
            format!("is a symbolic link to {target}; name the folder it points to"),
        ));
    }
    if metadata.is_dir() && !allow_empty && is_empty(&path) {
        return Err(SnapshotError::SourceEmpty { path: text });
    }
    Ok(new_source(path, &metadata))
}

fn new_source(path: PathBuf, metadata: &Metadata) -> Source {
    Source {
        device: metadata.dev(),
        inode: metadata.ino(),
        folder: metadata.is_dir(),
        path,
    }
}

/// Whether a folder surely holds no file. What can't be looked into is rsync's to report.
fn is_empty(path: &Path) -> bool {
    open_folder_at(path)
        .and_then(|folder| holds_a_file(&folder, EMPTY_FOLDERS_MAX))
        .is_ok_and(|holds| !holds)
}

fn real_path(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// The path by which `inside` (below `real`) is met when `real` is walked under the name `named`.
fn seen_through(inside: &Path, real: &Path, named: &Path) -> PathBuf {
    match inside.strip_prefix(real) {
        Ok(rest) if rest.as_os_str().is_empty() => named.to_owned(),
        Ok(rest) => named.join(rest),
        Err(_) => inside.to_owned(),
    }
}

fn check_patterns(spec: &SnapshotSpec) -> Result<(), SnapshotError> {
    for pattern in &spec.excludes {
        let why = if pattern.is_empty() {
            "it is empty"
        } else if pattern == "!" {
            "it would clear the list of patterns"
        } else if pattern.contains(['\n', '\0']) {
            "it has a newline or NUL in it"
        } else {
            continue;
        };
        return Err(SnapshotError::PatternRefused {
            pattern: escape_name(pattern.as_bytes()),
            why,
        });
    }
    for file in &spec.exclude_from {
        if !file.is_absolute() {
            return Err(refused(file, "the path must be absolute".to_owned()));
        }
        std::fs::File::open(file)
            .and_then(|file| file.metadata())
            .map_err(|source| SnapshotError::SourceUnreadable {
                path: escape_path(file),
                source,
            })?;
    }
    Ok(())
}
