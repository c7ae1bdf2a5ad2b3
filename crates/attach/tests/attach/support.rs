//! Shared by the attach tests: requirements, folders, images, and the search for leftovers.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::print_stderr)]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use sprat_testkit::leftovers;
use sprat_testkit::test_folder::TestFolder;

/// Whether the tests can run here; prints why not. With `CI` set they must.
pub fn can_attach() -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        "no /dev/fuse or /dev/loop-control"
    } else if let Some(tool) = ["mkfs.ext4", "e2fsck", "rsync"]
        .iter()
        .find(|t| !installed(t))
    {
        tool
    } else {
        return true;
    };
    !sprat_testkit::needs::skip(Some(reason.to_owned()))
}

fn installed(tool: &str) -> bool {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(tool).exists())
}

/// A folder with a sparse image and a mount point. The image has a unique length, which distinguishes
/// its loop device from all others.
pub struct Place {
    pub folder: TestFolder,
    pub image: PathBuf,
    pub dir: PathBuf,
    pub len_bytes: u64,
}

impl Place {
    pub fn new(mib: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let serial = u64::from(std::process::id()) * 4 + COUNT.fetch_add(1, Ordering::Relaxed);
        let len_bytes = (mib << 20) + (serial % 8192) * 4096;
        let folder = TestFolder::new("sprat-attach-");
        let image = folder.path().join("image");
        let dir = folder.path().join("mnt");
        fs::create_dir(&dir).unwrap();
        fs::File::create(&image)
            .unwrap()
            .set_len(len_bytes)
            .unwrap();
        Self {
            folder,
            image,
            dir,
            len_bytes,
        }
    }

    /// What still exists of this place in the kernel: processes, mounts, loop devices.
    pub fn remains(&self) -> Vec<String> {
        leftovers::of(&[self.folder.path().as_os_str().as_bytes()], self.len_bytes)
    }

    /// Fails unless everything disappears by itself.
    pub fn assert_nothing_remains(&self, what: &str) {
        println!("looks for what is left {what}");
        leftovers::assert_gone(|| self.remains());
    }

    pub fn fsck(&self) {
        let output = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(&self.image)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "e2fsck -fn: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

/// Runs a command that must succeed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
