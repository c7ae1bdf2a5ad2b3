//! Checks whether a folder is fit to be mounted on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::Failure;
use crate::address::Target;

/// Whether other users than root and this one can enter `dir`. The mode of `dir` itself does not count: the
/// mount hides it, and what is mounted has the modes of the backup.
#[must_use]
pub fn others_can_enter(dir: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    let real = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    !real.ancestors().skip(1).any(|above| {
        above.metadata().is_ok_and(|about| {
            // With an ACL the bits of the group are its mask, the most that it gives.
            about.mode() & 0o011 == 0 && (about.uid() == 0 || about.uid() == me)
        })
    })
}

/// Refuses a mount point that would hide what the session and its `umount` need: `own` folders of sprat,
/// each with its name, the container, or processes and devices.
pub fn check_hides_nothing(
    dir: &Path,
    target: &Target,
    own: Vec<(PathBuf, &'static str)>,
) -> Result<(), Failure> {
    let dir = canonical(dir);
    let mut places = own;
    places.extend([
        (PathBuf::from("/proc"), "processes of this machine"),
        (PathBuf::from("/dev"), "devices of this machine"),
        (PathBuf::from("/sys"), "devices of this machine"),
    ]);
    if let Some(folder) = target.local_folder() {
        places.push((folder.to_owned(), "container's folder"));
    }
    for (place, what) in places {
        let place = canonical(&place);
        if place.starts_with(&dir) {
            return Err(Failure::usage(format!(
                "can't mount at {}: that would hide the {what} ({})",
                dir.display(),
                place.display()
            ))
            .with_hint("nothing was started. Mount it at an empty folder"));
        }
    }
    Ok(())
}

/// The path as the kernel names it. Parts that don't exist yet stay as they are.
fn canonical(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => canonical(parent).join(name),
        _ => path.to_owned(),
    })
}
