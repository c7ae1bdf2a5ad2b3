//! No symbolic link on the volume leads rsync to an older file, and rsync needs no checks for that.
//!
//! An older snapshot may have a link where the source has a folder now. rsync 3.4 finds older files through it, also
//! outside of the volume, and copies their content if size and time are equal. rsync 3.5 follows only the links of
//! root and of its own user. So for each file it opens and examines each folder from `/` to the older file, three
//! times: about 110 system calls.
//!
//! The kernel can follow no link at all on the volume's mount (mount(8), `nosymfollow`, Linux 5.10). While it does
//! that, rsync gets the option `--insecure-links`, which leaves its checks out. Only its receiving process gets it
//! (`--remote-option`), which uses no path outside of the volume. The sending one still checks the folders of the
//! sources, which users can change while it reads them.

use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountFlags, mount_remount};

use super::invocation::Invocation;
use super::program::Rsync;
use crate::local_file::writable_by_others;

/// rsync's option. Releases without it don't check either.
const OPTION: &str = "--insecure-links";
/// Gives the option to the receiving process of a local run. With `--files-from` rsync would also read the list a
/// second time.
const FOR_RECEIVER: &str = "--remote-option=--insecure-links";
/// `ST_NOSYMFOLLOW` of statfs(2), which rustix lacks.
const NO_LINKS: StatVfsMountFlags = StatVfsMountFlags::from_bits_retain(0x2000);

/// While this exists, no process follows a symbolic link on the volume.
#[derive(Debug)]
pub(super) struct NoLinks {
    mount: PathBuf,
    /// The mount's flags before.
    before: MountFlags,
    /// What rsync gets for this time.
    option: Option<&'static str>,
}

impl NoLinks {
    /// `None`: rsync must check for links itself. The run can't do without links, the volume is not a separate mount,
    /// the kernel is too old, or others can put a link on the way to the volume.
    pub(super) fn begin(rsync: &Rsync, invocation: &Invocation) -> Option<Self> {
        let mount = invocation.no_links_on.as_deref()?.canonicalize().ok()?;
        // Another host could name a path outside of the volume, also without a link.
        if invocation.remote || writable_by_others(mount.parent()?).ok()?.is_some() {
            return None;
        }
        let before = flags_of(&mount)?;
        mount_remount(
            &mount,
            MountFlags::BIND | before | MountFlags::NOSYMFOLLOW,
            "",
        )
        .ok()?;
        let mut this = Self {
            mount,
            before,
            option: None,
        };
        // An older kernel ignores the flag.
        if !flags_of(&this.mount)?.contains(MountFlags::NOSYMFOLLOW) {
            return None;
        }
        this.option = rsync.accepts(OPTION).then_some(FOR_RECEIVER);
        Some(this)
    }

    pub(super) fn option(&self) -> Option<&'static str> {
        self.option
    }
}

impl Drop for NoLinks {
    fn drop(&mut self) {
        if let Err(error) = mount_remount(&self.mount, MountFlags::BIND | self.before, "") {
            tracing::warn!(%error, "symbolic links on the volume are still not followed");
        }
    }
}

/// Those flags of a mount that a remount must repeat. The kernel keeps the one for access times.
fn flags_of(mount: &Path) -> Option<MountFlags> {
    let has = statvfs(mount).ok()?.f_flag;
    let all = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (NO_LINKS, MountFlags::NOSYMFOLLOW),
    ];
    let set = all.into_iter().filter(|(is, _)| has.contains(*is));
    Some(set.map(|(_, flag)| flag).collect())
}
