//! A small file system of its own.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::program::system;

/// A mounted tmpfs; unmounted on drop.
#[derive(Debug)]
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one of `megabytes` on `folder`.
    #[must_use]
    pub fn mount(folder: &Path, megabytes: u32) -> Self {
        let size = format!("size={megabytes}m");
        let words: [&OsStr; 5] = ["-t", "tmpfs", "-o", &size, "tmpfs"].map(AsRef::as_ref);
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
        let mut umount = std::process::Command::new("umount");
        let _ = umount.arg("-l").arg(&self.0).status();
    }
}
