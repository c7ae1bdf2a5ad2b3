//! A small file system of its own, below a [`TestFolder`]: it goes when the test is killed, too.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::program::system;
use crate::test_folder::{TestFolder, assert_cleaned};

/// A mounted tmpfs; unmounted on drop.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one of `megabytes` on `folder`.
    ///
    /// # Panics
    /// When that fails, or `folder` is not below a `TestFolder`.
    #[must_use]
    #[track_caller]
    pub fn mount(folder: &Path, megabytes: u32) -> Self {
        Self::mount_with(folder, &format!("size={megabytes}m"))
    }

    #[track_caller]
    fn mount_with(folder: &Path, options: &str) -> Self {
        assert_cleaned(folder);
        let words: [&OsStr; 5] = ["-t", "tmpfs", "-o", options, "tmpfs"].map(AsRef::as_ref);
        system("mount", &[&words[..], &[folder.as_os_str()]].concat());
        Self(folder.to_owned())
    }

    /// Changes its mount options.
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        system(
            "mount",
            &["-o".as_ref(), options.as_ref(), self.0.as_os_str()],
        );
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// A tmpfs in a folder of its own.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
    // Unmounted before the folder is removed.
    disk: Tmpfs,
    _folder: TestFolder,
}

impl SmallDisk {
    /// One with these mount options, such as `size=1m`.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn new(options: &str) -> Self {
        let folder = TestFolder::new("sprat-small-disk-");
        let path = folder.path().join("disk");
        std::fs::create_dir(&path).expect("a new folder");
        Self {
            disk: Tmpfs::mount_with(&path, options),
            path,
            _folder: folder,
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes its mount options.
    pub fn remount(&self, options: &str) {
        self.disk.remount(options);
    }
}

/// A mounted ext4, without blocks that are kept for root; unmounted on drop. It needs mkfs.ext4 and loop
/// devices.
#[derive(Debug)]
pub struct LoopDisk(PathBuf);

impl LoopDisk {
    /// Makes one in `image`, and mounts it on `folder`.
    ///
    /// # Panics
    /// When that fails, or `folder` is not below a `TestFolder`.
    #[must_use]
    #[track_caller]
    pub fn mount(image: &Path, folder: &Path, megabytes: u64) -> Self {
        Self::mount_with(image, folder, megabytes, &[])
    }

    /// The same with options of mkfs.ext4.
    ///
    /// # Panics
    /// Likewise.
    #[must_use]
    #[track_caller]
    pub fn mount_with(image: &Path, folder: &Path, megabytes: u64, options: &[&str]) -> Self {
        assert_cleaned(folder);
        let file = File::create(image).expect("a new image");
        file.set_len(megabytes << 20).expect("a sparse image");
        let words = [&["-q", "-F", "-m", "0"], options].concat();
        let words = words.into_iter().map(AsRef::as_ref);
        let words: Vec<&OsStr> = words.chain([image.as_os_str()]).collect();
        system("mkfs.ext4", &words);
        let at: [&OsStr; 4] = [
            "-o".as_ref(),
            "loop".as_ref(),
            image.as_ref(),
            folder.as_ref(),
        ];
        system("mount", &at);
        Self(folder.to_owned())
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

fn unmount(folder: &Path) {
    let mut umount = std::process::Command::new("umount");
    let _ = umount.arg("-l").arg(folder).status();
}

/// Uses all free space of a file system, for a file of its own in `folder`.
///
/// # Panics
/// When space is left.
pub fn fill(folder: &Path) {
    let mut file = File::create(folder.join("somebody-else's")).expect("a new file");
    for piece in [1 << 20, 4096, 512] {
        let bytes = vec![7; piece];
        while file.write_all(&bytes).is_ok() {}
    }
    drop(file);
    // ext4 reports a last block that nobody can use.
    let about = rustix::fs::statvfs(folder).expect("a file system");
    assert!(about.f_bavail <= 1, "{} blocks are left", about.f_bavail);
}
