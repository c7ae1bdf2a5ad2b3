//! Checks at the end of a session whether the container still has its name. Writes go into the open
//! file, even if somebody has removed or renamed it.

use std::os::unix::fs::MetadataExt;

use sprat_store::StoreErrorKind;

use crate::address::Target;
use crate::volume_process::lease::ContainerLease;
use crate::{Exit, Failure};

/// The file that has the container's name, if the system reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inode(u64, u64);

impl Inode {
    /// For a local container. SFTP does not report it.
    pub(crate) fn of(target: &Target) -> Option<Self> {
        let about = std::fs::symlink_metadata(target.local_path()?).ok()?;
        Some(Self(about.dev(), about.ino()))
    }
}

/// The container as it was when it was opened.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    pub target: Target,
    pub inode: Option<Inode>,
    pub file_bytes: u64,
}

/// Checks once. A question that the server does not answer is no reason for doubt.
pub(crate) fn check(opened: &Opened, lease: &ContainerLease) -> Result<(), Failure> {
    let lost = |why: String| {
        Err(Failure::new(
            Exit::Damaged,
            format!(
                "{} is no longer the file that this session wrote to",
                opened.target
            ),
        )
        .because(why)
        .with_hint(
            "this run wrote to the file that had that name. If that file was removed, these writes are \
             lost. If it was moved, move it back and run the command again. Otherwise run the command \
             again with the present file, or create a new container with `sprat init`",
        ))
    };
    match lease.store().stat(lease.container()) {
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            return lost("there is no file: it was removed or moved in the meantime".to_owned());
        }
        Ok(stat) if stat.len != opened.file_bytes => {
            return lost(format!(
                "there is a file of {} bytes, but the opened one had {}",
                stat.len, opened.file_bytes
            ));
        }
        _ => {}
    }
    let now = Inode::of(&opened.target);
    if opened.inode.is_some() && now.is_some() && now != opened.inode {
        return lost("there is another file of the same length".to_owned());
    }
    Ok(())
}
