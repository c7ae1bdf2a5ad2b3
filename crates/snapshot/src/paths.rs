//! Paths: the plain form that the rest of the crate uses, and the real path behind symbolic links.

use std::path::{Component, Path, PathBuf};

/// Converts an absolute path to the plain form: without `.`, `..`, doubled or trailing slashes. The
/// error says why that is not possible.
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

/// Why no snapshot can have an absolute path.
#[must_use]
pub fn path_mistake(path: &Path) -> Option<&'static str> {
    plain_path(path).err()
}

/// As [`Path::join`], but without a trailing slash if `below` is empty.
pub(crate) fn joined(path: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() {
        path.to_owned()
    } else {
        path.join(below)
    }
}

/// The real path of `path`. The last parts need not exist.
pub(crate) fn real_path(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let Ok(real) = std::fs::canonicalize(ancestor) {
            return path
                .strip_prefix(ancestor)
                .map_or_else(|_| real.clone(), |below| joined(&real, below));
        }
    }
    path.to_owned()
}
