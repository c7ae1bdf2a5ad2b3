//! Shared by the attach tests: requirements, folders, images, and the search for leftovers.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::print_stderr)]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sprat_testkit::leftovers::{contains, loops_of, mounts_of};
use tempfile::TempDir;

/// Far longer than a killed session takes to disappear on an idle machine.
const GONE_MAX: Duration = Duration::from_secs(60);

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
    assert!(
        !sprat_testkit::needs::nothing_may_be_missing(),
        "CI lacks: {reason}"
    );
    eprintln!("skipped: {reason}");
    false
}

fn installed(tool: &str) -> bool {
    ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(tool).exists())
}

/// A folder with a sparse image and a mount point. The image has a unique length, which distinguishes
/// its loop device from all others.
pub struct Place {
    pub folder: TempDir,
    pub image: PathBuf,
    pub dir: PathBuf,
    pub len_bytes: u64,
}

impl Place {
    pub fn new(mib: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let serial = u64::from(std::process::id()) * 4 + COUNT.fetch_add(1, Ordering::Relaxed);
        let len_bytes = (mib << 20) + (serial % 8192) * 4096;
        let folder = tempfile::Builder::new()
            .prefix("sprat-attach-")
            .tempdir()
            .unwrap();
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
        let tag = self.folder.path().as_os_str().as_bytes();
        let mut remains = loops_of(self.len_bytes);
        remains.extend(mounts_of(tag));
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|b| b.is_ascii_digit()) || pid == std::process::id().to_string() {
                continue;
            }
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if contains(&command, tag) {
                let status = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                let state = status.rsplit(") ").next().unwrap_or("?").chars().next();
                remains.push(format!("process {pid} in state {state:?}"));
            }
        }
        remains
    }

    /// Fails unless everything disappears by itself. A busy machine may need time for that. What does
    /// not disappear still exists after [`GONE_MAX`].
    pub fn assert_nothing_remains(&self, what: &str) {
        let begun = Instant::now();
        loop {
            let remains = self.remains();
            if remains.is_empty() {
                return;
            }
            assert!(
                begun.elapsed() < GONE_MAX,
                "{what}: after {GONE_MAX:?} there is still {remains:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
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
