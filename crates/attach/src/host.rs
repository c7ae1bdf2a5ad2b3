//! Checks whether this machine can attach volumes.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::fs::MemfdFlags;
use rustix::thread::CapabilitySet;

use crate::device_node::is_dead;
use crate::loop_name::all_ours;
use crate::mount_table::read_mounts;
use crate::text::{printable, quoted};
use crate::{AttachError, crypt_map, fuse_file, loop_device, mounts, process, program};

/// How serious a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Severity {
    /// No problem.
    Fine,
    /// Volumes can be attached, but more slowly or less safely.
    Weak,
    /// Volumes can't be attached here.
    Missing,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostFinding {
    /// What was checked, a short stable name such as `fuse`.
    pub what: &'static str,
    /// How serious it is.
    pub severity: Severity,
    /// What was found.
    pub detail: String,
    /// What to do about it, if anything.
    pub hint: Option<String>,
}

impl HostFinding {
    fn fine(what: &'static str, detail: impl Into<String>) -> Self {
        Self {
            what,
            severity: Severity::Fine,
            detail: detail.into(),
            hint: None,
        }
    }

    fn bad(what: &'static str, severity: Severity, detail: impl Into<String>, hint: &str) -> Self {
        Self {
            what,
            severity,
            detail: detail.into(),
            hint: Some(hint.into()),
        }
    }
}

/// Checks everything that attaching needs, by trying it if that does no harm. Leaves nothing behind.
/// Takes well under a second, unless a mounted volume doesn't answer (2 s each).
#[must_use]
pub fn check_host() -> Vec<HostFinding> {
    let mut findings = vec![
        kernel(),
        proc_folder(),
        admin(),
        fuse(),
        loop_devices(),
        dm_crypt(),
        mkfs(),
        namespaces(),
        io_flusher(),
        resource(),
    ];
    findings.extend(setting(
        "fuse request timeout",
        "fs/fuse/default_request_timeout",
        "the kernel aborts a volume whose connection is down for more seconds than this",
        "set fs.fuse.default_request_timeout to 0",
    ));
    findings.extend(setting(
        "hung task panic",
        "kernel/hung_task_panic",
        "the kernel panics when a program waits long for a volume whose connection is down",
        "set kernel.hung_task_panic to 0",
    ));
    findings.extend(volumes());
    findings
}

fn kernel() -> HostFinding {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next(), numbers.next());
    if version >= (Some(5), Some(8)) {
        HostFinding::fine("kernel", format!("Linux {release}"))
    } else {
        HostFinding::bad(
            "kernel",
            Severity::Missing,
            format!("Linux {release}, too old"),
            "Linux 5.8 or newer is needed (LOOP_CONFIGURE)",
        )
    }
}

fn proc_folder() -> HostFinding {
    match read_mounts() {
        Ok(_) => HostFinding::fine("proc", "/proc is mounted"),
        Err(e) => HostFinding::bad(
            "proc",
            Severity::Missing,
            with_cause(&e),
            "mount it: mount -t proc proc /proc",
        ),
    }
}

fn admin() -> HostFinding {
    if process::has_capability(CapabilitySet::SYS_ADMIN) {
        HostFinding::fine("root", "CAP_SYS_ADMIN is in effect")
    } else {
        HostFinding::bad(
            "root",
            Severity::Missing,
            "no CAP_SYS_ADMIN: nothing can be mounted",
            "run sprat as root; in a container, give it CAP_SYS_ADMIN (--privileged)",
        )
    }
}

fn fuse() -> HostFinding {
    let hint = "load the module (modprobe fuse); in a container, give it --device /dev/fuse";
    let known = fuse_file::is_known().map_err(|source| AttachError::NoFuse {
        reason: "the kernel refuses the file system type",
        source,
    });
    match fuse_file::open_fuse().and(known) {
        Ok(()) => HostFinding::fine("fuse", "/dev/fuse opens, the kernel has the file system"),
        Err(e) => HostFinding::bad("fuse", Severity::Missing, with_cause(&e), hint),
    }
}

fn loop_devices() -> HostFinding {
    let hint = "load the module (modprobe loop); in a container, give it /dev/loop-control and \
                block devices of major 7";
    match probe_loop() {
        Ok(path) => HostFinding::fine("loop", format!("{} works", path.display())),
        Err(e) => HostFinding::bad("loop", Severity::Missing, with_cause(&e), hint),
    }
}

fn probe_loop() -> Result<PathBuf, AttachError> {
    let file = rustix::fs::memfd_create("sprat-doctor", MemfdFlags::CLOEXEC)
        .map_err(|e| AttachError::io("make", "a file in memory", e))?;
    rustix::fs::ftruncate(&file, 1 << 20)
        .map_err(|e| AttachError::io("size", "a file in memory", e))?;
    loop_device::probe(file.as_fd())
}

fn dm_crypt() -> HostFinding {
    let detail = match crypt_map::kernel_mode_works() {
        Ok(()) => "kernel mode works".to_owned(),
        Err(e) => format!("user mode is used: {}", with_cause(&e)),
    };
    HostFinding::fine("dm-crypt", detail)
}

fn mkfs() -> HostFinding {
    let hint = "install e2fsprogs";
    let output = match program::command("mkfs.ext4") {
        Ok(mut command) => command.arg("-V").stdin(Stdio::null()).output(),
        Err(e) => return HostFinding::bad("mkfs.ext4", Severity::Missing, e.to_string(), hint),
    };
    match output {
        Ok(output) if output.status.success() => {
            let text = printable(&output.stderr);
            let version = text.split(';').next().unwrap_or_default();
            HostFinding::fine("mkfs.ext4", version)
        }
        Ok(output) => HostFinding::bad(
            "mkfs.ext4",
            Severity::Missing,
            format!("mkfs.ext4 -V: {}", output.status),
            hint,
        ),
        Err(e) => HostFinding::bad("mkfs.ext4", Severity::Missing, e.to_string(), hint),
    }
}

fn namespaces() -> HostFinding {
    match process::probe_namespaces() {
        Ok(()) => HostFinding::fine("namespaces", "mount and pid namespaces can be made"),
        Err(e @ AttachError::RootNotMounted) => HostFinding::bad(
            "namespaces",
            Severity::Missing,
            e.to_string(),
            "make the chroot directory a mount point first: mount --bind FOLDER FOLDER",
        ),
        Err(e) => HostFinding::bad(
            "namespaces",
            Severity::Missing,
            with_cause(&e),
            "run sprat as root; in a container, allow the unshare system call",
        ),
    }
}

fn io_flusher() -> HostFinding {
    match process::probe_io_flusher() {
        Ok(()) => HostFinding::fine("io flusher", "PR_SET_IO_FLUSHER is allowed"),
        Err(e) => HostFinding::bad(
            "io flusher",
            Severity::Weak,
            format!("PR_SET_IO_FLUSHER: {e}; a session can stall when memory is very low"),
            "give sprat CAP_SYS_RESOURCE",
        ),
    }
}

/// Whether this process may grow a mounted ext4. `ext4_resize_begin` in fs/ext4/resize.c requires
/// `CAP_SYS_RESOURCE`, which containers often lack.
#[must_use]
pub fn may_grow() -> bool {
    process::has_capability(CapabilitySet::SYS_RESOURCE)
}

fn resource() -> HostFinding {
    if may_grow() {
        HostFinding::fine("resource", "CAP_SYS_RESOURCE is in effect")
    } else {
        HostFinding::bad(
            "resource",
            Severity::Weak,
            "no CAP_SYS_RESOURCE: a mounted volume can't be grown here",
            "give sprat CAP_SYS_RESOURCE",
        )
    }
}

/// Checks a kernel setting that must be 0 or missing.
fn setting(what: &'static str, name: &str, consequence: &str, hint: &str) -> Option<HostFinding> {
    let text = std::fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
    let value = text.trim();
    Some(if value == "0" {
        HostFinding::fine(what, "off")
    } else {
        HostFinding::bad(
            what,
            Severity::Weak,
            format!("{value}: {consequence}"),
            hint,
        )
    })
}

fn volumes() -> Vec<HostFinding> {
    let what = "mounted volumes";
    let mounted = match mounts::mounted_volumes() {
        Ok(mounted) => mounted,
        Err(e) => {
            let hint = "sprat needs /proc";
            return vec![HostFinding::bad(what, Severity::Weak, with_cause(&e), hint)];
        }
    };
    let strays = all_ours()
        .into_iter()
        .filter(|device| mounted.iter().all(|volume| volume.device != *device))
        .filter(|device| is_dead(device))
        .map(|device| {
            let detail = format!("{} is left from a session that died", device.display());
            let hint = "something still uses it: another mount namespace, or a program that has \
                        the device open";
            HostFinding::bad("loop devices", Severity::Weak, detail, hint)
        });
    mounted
        .iter()
        .map(|volume| {
            let dir = volume.mount_point.display();
            if is_dead(&volume.device) {
                let detail = format!("{dir}: its volume process is gone");
                let hint = format!("sprat umount {}", quoted(&volume.mount_point));
                HostFinding::bad(what, Severity::Weak, detail, &hint)
            } else {
                HostFinding::fine(what, format!("{dir} on {}", volume.device.display()))
            }
        })
        .chain(strays)
        .collect()
}

fn with_cause(error: &AttachError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
