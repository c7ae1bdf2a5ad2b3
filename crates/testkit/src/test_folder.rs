//! A folder of one test. What runs with its name, or is mounted below it, ends with the test, even when
//! the test is killed.

#![allow(clippy::unwrap_used, reason = "a failing test kit panics")]

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use tempfile::TempDir;

/// Reads the folder's name and waits. Without the word `done` the test did not end in order: a mount that
/// does not answer would block other tests of this machine. The name is no argument: the search for
/// leftovers must not find this shell.
const CLEANER: &str = "read -r folder; read -r done && exit
for process in /proc/[0-9]*; do
  grep -aqsF -e \"$folder\" $process/environ $process/cmdline && kill -9 ${process#/proc/}
done
while read -r _ _ _ _ point _; do
  case $point in \"$folder\"/*) umount -l \"$point\";; esac
done < /proc/self/mountinfo
rm -rf --one-file-system -- \"$folder\"";

/// The folders of this process that have a cleaner.
static CLEANED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Checks that a mount on `point` goes when the test is killed.
///
/// # Panics
/// When it would stay.
#[track_caller]
pub(crate) fn assert_cleaned(point: &Path) {
    let cleaned = CLEANED.lock().unwrap();
    let is_below = |folder: &PathBuf| point != folder && point.starts_with(folder);
    assert!(
        cleaned.iter().any(is_below),
        "{} is not below a TestFolder: a killed test would leave the mount",
        point.display()
    );
}

/// A temporary folder, mode 0700; removed on drop.
#[derive(Debug)]
pub struct TestFolder {
    dir: TempDir,
    cleaner: Child,
}

impl TestFolder {
    /// A new folder whose name begins with `prefix`.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(prefix)
            // A mount shows files to every user who can enter the folder.
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .unwrap();
        let cleaner = Command::new("/bin/sh")
            .args(["-c", CLEANER])
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            // What kills a test kills its process group.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut name = dir.path().as_os_str().as_bytes().to_vec();
        name.push(b'\n');
        cleaner.stdin.as_ref().unwrap().write_all(&name).unwrap();
        CLEANED.lock().unwrap().push(dir.path().to_owned());
        Self { dir, cleaner }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for TestFolder {
    /// After a failed test the cleaner does its work before other tests go on.
    fn drop(&mut self) {
        if let Some(mut word) = self.cleaner.stdin.take()
            && !std::thread::panicking()
        {
            let _ = word.write_all(b"done\n");
        }
        let _ = self.cleaner.wait();
        // No unwrap: a second panic would abort.
        if let Ok(mut cleaned) = CLEANED.lock() {
            cleaned.retain(|folder| folder != self.dir.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tmpfs::{LoopDisk, Tmpfs};
    use crate::{leftovers, needs};

    /// What is left of a folder: processes, mounts and the folder itself.
    fn left(folder: &Path) -> Vec<String> {
        let mut left = leftovers::of(&[folder.as_os_str().as_bytes()], 0);
        left.extend(folder.exists().then(|| "the folder".to_owned()));
        left
    }

    /// A folder with two mounts, and a program that does not end by itself.
    fn used() -> TestFolder {
        let folder = TestFolder::new("sprat-folder-");
        let [mounted, disk] = ["mounted", "disk"].map(|name| folder.path().join(name));
        std::fs::create_dir(&mounted).unwrap();
        std::fs::create_dir(&disk).unwrap();
        // A killed process drops nothing.
        std::mem::forget(Tmpfs::mount(&mounted, 1));
        std::fs::write(mounted.join("file"), "").unwrap();
        let image = folder.path().join("image");
        std::mem::forget(LoopDisk::mount(&image, &disk, 8));
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "sleep 1000 > /dev/null 2>&1 &"]);
        shell.env("FOLDER", folder.path()).process_group(0);
        assert!(shell.status().unwrap().success());
        assert!(left(folder.path()).len() > 3);
        folder
    }

    #[test]
    fn failed_test_leaves_no_process_and_no_mount() {
        crate::requires!(needs::root(), needs::program("mkfs.ext4"));
        let folder = Mutex::new(None);
        let failed = std::thread::scope(|scope| {
            let test = scope.spawn(|| {
                let used = used();
                *folder.lock().unwrap() = Some(used.path().to_owned());
                panic!("as a test that fails");
            });
            test.join().is_err()
        });
        let folder = folder.into_inner().unwrap().unwrap();
        assert!(failed);
        assert_eq!(left(&folder), Vec::<String>::new());
    }

    #[test]
    fn killed_test_leaves_no_process_and_no_mount() {
        crate::requires!(needs::root(), needs::program("mkfs.ext4"));
        let mut folder = used();
        let path = folder.path().to_owned();
        // The kernel closes the pipe of a killed process in the same way.
        drop(folder.cleaner.stdin.take());
        leftovers::assert_gone(|| left(&path));
    }

    #[test]
    #[should_panic(expected = "a killed test would leave the mount")]
    fn mount_that_a_killed_test_would_leave_is_refused() {
        let folder = TempDir::new().unwrap();
        let _disk = Tmpfs::mount(folder.path(), 1);
    }
}
