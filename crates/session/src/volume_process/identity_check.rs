//! Whether the container still lies under its name when a session ends: what was written goes into the
//! open file, also when somebody has removed that or moved it away.

use std::os::unix::fs::MetadataExt;

use sprat_store::StoreErrorKind;

use crate::address::{Location, Target};
use crate::volume_process::lease::ContainerLease;
use crate::{Exit, Failure};

/// Which file lies under the container's name, where the system tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inode(u64, u64);

impl Inode {
    /// Of a local container; SFTP doesn't tell.
    pub(crate) fn of(target: &Target) -> Option<Self> {
        let Location::Local { folder } = &target.place else {
            return None;
        };
        let about = std::fs::symlink_metadata(folder.join(target.name.as_str())).ok()?;
        Some(Self(about.dev(), about.ino()))
    }
}

/// The container as it was opened.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub target: Target,
    pub inode: Option<Inode>,
    pub file_bytes: u64,
}

/// Asks once. What the server doesn't answer is no reason to doubt.
pub(crate) fn check(opened: &Opened, lease: &ContainerLease) -> Result<(), Failure> {
    let lost =
        |why: String| {
            Err(Failure::new(
            Exit::Damaged,
            format!("{} is no longer the file that this session wrote to", opened.target),
        )
        .because(why)
        .with_hint(
            "what this run wrote went into the file that had that name, and is lost with it where \
             that was removed. If it was moved, move it back and run again; else run again with \
             what lies there now, or make a new container with `sprat init`",
        ))
        };
    match lease.store().stat(lease.container()) {
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            return lost("nothing lies there: it was removed or moved away meanwhile".to_owned());
        }
        Ok(stat) if stat.len != opened.file_bytes => {
            return lost(format!(
                "a file of {} bytes lies there, and {} were opened",
                stat.len, opened.file_bytes
            ));
        }
        _ => {}
    }
    let now = Inode::of(&opened.target);
    if opened.inode.is_some() && now.is_some() && now != opened.inode {
        return lost("another file of the same length lies there".to_owned());
    }
    Ok(())
}
