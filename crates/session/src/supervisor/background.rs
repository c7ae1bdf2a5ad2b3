//! The record of a background mount: which process serves it, whether that still runs, and how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sprat_snapshot::local_file;

use crate::address::Target;
use crate::files::short_hash;
use crate::protocol::messages::BackgroundMount;
use crate::protocol::reports::{ClosedReport, ContainerFacts};
use crate::settings::Access;
use crate::{Exit, Failure};

/// How often the volume process tries to lock its record. `umount` locks it for a moment to check
/// whether another process has the lock.
const LOCK_ATTEMPTS: u32 = 100;

/// The first line of `RUNTIME/mounts/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MountRecord {
    /// Where it is mounted.
    pub dir: OsString,
    /// The container.
    pub target: String,
    /// Reading, or reading and writing.
    pub access: Access,
    /// When it was mounted.
    pub since: SystemTime,
    /// [`sprat_attach::volume_id`]. Finds the record if the mount point has another path.
    #[serde(default)]
    pub volume: Option<String>,
    /// What the volume process found.
    #[serde(default)]
    pub facts: Option<Box<ContainerFacts>>,
}

/// How the volume process of a background mount ended; the second line of the record.
#[derive(Debug, Serialize, Deserialize)]
enum MountResult {
    Closed(ClosedReport),
    Failed(Failure),
}

/// An open record. It can be read although its name is removed. So every `umount` that began before the
/// end gets the result.
#[derive(Debug)]
pub(crate) struct OpenRecord {
    file: File,
    path: PathBuf,
    pub(crate) record: MountRecord,
}

impl OpenRecord {
    /// Opens the record at `path`. `None`: none can be read there.
    pub(crate) fn open(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        let record = serde_json::from_str(lines_of(&file).ok()?.lines().next()?).ok()?;
        Some(Self {
            file,
            path: path.to_owned(),
            record,
        })
    }

    /// Whether the volume process that holds the record has ended.
    pub(crate) fn has_ended(&self) -> bool {
        is_free(&self.file)
    }

    /// The result, after the end. Removes the record's name, unless another record has that name by now.
    pub(crate) fn take_result(&self) -> Result<ClosedReport, Failure> {
        let is_this = |named: std::fs::Metadata| {
            let ours = self.file.metadata();
            ours.is_ok_and(|ours| (ours.dev(), ours.ino()) == (named.dev(), named.ino()))
        };
        if std::fs::metadata(&self.path).is_ok_and(is_this) {
            let _ = std::fs::remove_file(&self.path);
        }
        let text = lines_of(&self.file).unwrap_or_default();
        let result = text.lines().nth(1);
        match result.and_then(|line| serde_json::from_str(line).ok()) {
            Some(MountResult::Closed(report)) => Ok(report),
            Some(MountResult::Failed(failure)) => Err(failure),
            None => Err(died()),
        }
    }
}

fn lines_of(mut file: &File) -> io::Result<String> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Whether no process has the record's lock.
fn is_free(file: &File) -> bool {
    let free = flock(file, FlockOperation::NonBlockingLockShared).is_ok();
    if free {
        let _ = flock(file, FlockOperation::Unlock);
    }
    free
}

/// The record of a mount at `dir`. One name for one folder.
pub(crate) fn record_path(runtime_dir: &Path, dir: &Path) -> PathBuf {
    let id = short_hash(dir.as_os_str().as_bytes());
    runtime_dir.join("mounts").join(format!("{id}.json"))
}

/// Finds the record of the mount at `dir`. `volume` is what is mounted there now, if anything is. If the
/// path has changed, the volume identifies the record. If the record was removed, the volume process
/// still has it open.
pub(crate) fn find(runtime_dir: &Path, dir: &Path, volume: Option<&str>) -> Option<OpenRecord> {
    let by_path = OpenRecord::open(&record_path(runtime_dir, dir));
    let Some(volume) = volume else {
        return by_path;
    };
    let is_it = |record: &OpenRecord| record.record.volume.as_deref() == Some(volume);
    by_path.filter(|record| is_it(record)).or_else(|| {
        record_files(runtime_dir)
            .into_iter()
            .chain(records_in_use())
            .filter_map(|path| OpenRecord::open(&path))
            .find(is_it)
    })
}

fn record_files(runtime_dir: &Path) -> Vec<PathBuf> {
    let records = std::fs::read_dir(runtime_dir.join("mounts"));
    records
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|kind| kind == "json"))
        .collect()
}

/// Records that volume processes have open, as paths in `/proc`. These open a removed file, too.
fn records_in_use() -> Vec<PathBuf> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let volume_processes = processes.map(|entry| entry.path()).filter(|process| {
        let arguments = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let mut arguments = arguments.split(|&byte| byte == 0);
        arguments.any(|argument| argument == b"volume-process")
    });
    let open = volume_processes.flat_map(|process| {
        let files = std::fs::read_dir(process.join("fd"));
        files.into_iter().flatten().flatten()
    });
    open.map(|file| file.path())
        .filter(|file| {
            std::fs::read_link(file).is_ok_and(|name| {
                let name = name.to_string_lossy();
                name.contains("/mounts/") && name.trim_end_matches(" (deleted)").ends_with(".json")
            })
        })
        .collect()
}

/// Writes the record of a mount that is about to go on in the background. Replaces an old record and
/// does not change it: an `umount` may be waiting for its result.
pub(crate) fn write_record(path: &Path, record: &MountRecord) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't write {}", path.display())).caused_by(error)
    };
    let mut text = serde_json::to_vec(record).map_err(|error| failed(&error))?;
    text.push(b'\n');
    local_file::replace(path, |file| file.write_all(&text)).map_err(|error| failed(&error))
}

/// Locks the record until this process ends. The lock shows others that it runs.
pub(crate) fn hold_record(mount: &BackgroundMount) -> Result<File, Failure> {
    let path = Path::new(&mount.record);
    let failed = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't hold {}", path.display())).caused_by(error)
    };
    let file = File::options()
        .read(true)
        .append(true)
        .open(path)
        .map_err(|error| failed(&error))?;
    for _ in 1..LOCK_ATTEMPTS {
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(file);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(&error))?;
    Ok(file)
}

/// Writes the result into the record. The record stays locked until this process has ended.
pub(crate) fn report(mut held: &File, result: &Result<ClosedReport, Failure>) {
    let result = match result {
        Ok(report) => MountResult::Closed(*report),
        Err(failure) => MountResult::Failed(failure.clone()),
    };
    // Without it, `umount` reports that the process died.
    if let Ok(mut line) = serde_json::to_vec(&result) {
        line.push(b'\n');
        let _ = held.write_all(&line);
    }
}

pub(crate) fn died() -> Failure {
    Failure::failed("the volume process of the mount died").with_hint(
        "data that was written since the last fsync may be missing. The file system is intact; the next \
         run replays its journal",
    )
}

/// The mounts on this machine now, by the records.
pub(crate) fn mounts(runtime_dir: &Path) -> Vec<MountRecord> {
    record_files(runtime_dir)
        .iter()
        .filter_map(|path| OpenRecord::open(path))
        .filter(|open| !open.has_ended())
        .map(|open| open.record)
        .collect()
}

/// The mount of a container.
pub(crate) fn mount_of(runtime_dir: &Path, target: &str) -> Option<MountRecord> {
    let mut mounts = mounts(runtime_dir).into_iter();
    mounts.find(|mount| mount.target == target)
}

/// Where a container is mounted on this machine now, by the records.
#[must_use]
pub fn mounted_at(runtime_dir: &Path, target: &str) -> Option<PathBuf> {
    mount_of(runtime_dir, target).map(|mount| PathBuf::from(mount.dir))
}

/// Adds to a failure to acquire the lock that the container is mounted on this machine, if it is.
#[must_use]
pub fn explain_lock(runtime_dir: &Path, target: &Target, failure: Failure) -> Failure {
    if failure.exit != Exit::Locked {
        return failure;
    }
    match mounted_at(runtime_dir, &target.to_string()) {
        Some(dir) => {
            let dir = dir.display();
            failure.with_hint(format!(
                "nothing was changed. The container is mounted at {dir}. Browse it there, or run `sprat \
                 umount {dir}` first"
            ))
        }
        None => failure,
    }
}

/// Releases the terminal and the user's working directory.
pub(crate) fn leave_terminal() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    let _ = std::env::set_current_dir("/");
}
