//! Tells a disk that is away from a container file that is gone.
//!
//! A copy whose disk is away is skipped and becomes overdue. A container file that is not there while
//! its disk is, is a failure at once.

use std::path::Path;

use sprat_snapshot::FileSystem;

/// What lies at the path of a local container file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalTarget {
    /// Something; opening it shows what.
    There,
    /// Nothing, and the file system that was there at the last success is not mounted.
    DiskAbsent {
        /// Its type and name.
        disk: String,
    },
    /// Nothing, although the file system is there, or nothing is known of one.
    NoContainer,
}

/// Checks the path of a container file. `seen` is the file system that the last success saw there.
#[must_use]
pub fn find(container_file: &Path, seen: Option<&FileSystem>) -> LocalTarget {
    if container_file.symlink_metadata().is_ok() {
        return LocalTarget::There;
    }
    match seen {
        Some(seen) if !seen.is_mounted() => LocalTarget::DiskAbsent { disk: seen.text() },
        _ => LocalTarget::NoContainer,
    }
}

#[cfg(test)]
mod tests {
    use sprat_testkit::test_folder::TestFolder;
    use sprat_testkit::tmpfs::Tmpfs;
    use sprat_testkit::{needs, requires};

    use super::*;

    #[test]
    fn a_disk_that_is_away_differs_from_a_file_that_is_gone() {
        requires!(needs::root());
        let folder = TestFolder::new("sprat-disk-");
        let at = &folder.path().join("disk");
        std::fs::create_dir(at).unwrap();
        let file = at.join("below/x.luks");
        let disk = Tmpfs::mount(at, 1);
        std::fs::create_dir(at.join("below")).unwrap();
        std::fs::write(&file, "x").unwrap();
        let seen = FileSystem::holding(&file);
        assert!(seen.as_ref().is_some_and(|seen| seen.kind == "tmpfs"));
        assert_eq!(find(&file, seen.as_ref()), LocalTarget::There);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(find(&file, seen.as_ref()), LocalTarget::NoContainer);
        std::fs::remove_dir(at.join("below")).unwrap();
        assert_eq!(find(&file, seen.as_ref()), LocalTarget::NoContainer);
        // It is mounted elsewhere: the file is not where it was.
        let there = &folder.path().join("elsewhere");
        std::fs::create_dir(there).unwrap();
        sprat_testkit::program::system(
            "mount",
            &["--bind".as_ref(), at.as_os_str(), there.as_os_str()],
        );
        drop(disk);
        assert_eq!(find(&file, seen.as_ref()), LocalTarget::NoContainer);
        sprat_testkit::program::system("umount", &[there.as_os_str()]);
        let absent = |found| matches!(found, LocalTarget::DiskAbsent { .. });
        assert!(absent(find(&file, seen.as_ref())));
        let other = Tmpfs::mount(at, 1);
        assert!(absent(find(&file, seen.as_ref())));
        drop(other);
        // Nothing is known of a disk: the target may be wrong.
        assert_eq!(find(&file, None), LocalTarget::NoContainer);
    }
}
