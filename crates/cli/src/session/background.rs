//! The record of a background mount: who serves it, whether it still lives, how it ended.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use openssl::sha::sha256;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::options::{Access, ClosedReport};
use super::protocol::BackgroundMount;
use crate::Failure;

/// What `RUNTIME/mounts/ID.json` says.
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
}

/// How the volume process of a background mount ended.
#[derive(Debug, Serialize, Deserialize)]
enum MountResult {
    Closed(ClosedReport),
    Failed(Failure),
}

/// The record of a mount at `dir`. One name for one folder.
pub(super) fn record_path(runtime_dir: &Path, dir: &Path) -> PathBuf {
    let id = sha256(dir.as_os_str().as_bytes())[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    runtime_dir.join("mounts").join(format!("{id}.json"))
}

fn result_path(record: &Path) -> PathBuf {
    record.with_extension("result")
}

/// Writes the record of a mount that is about to be left alone.
pub(super) fn write_record(path: &Path, record: &MountRecord) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't write {}", path.display())).caused_by(error)
    };
    if let Some(folder) = path.parent() {
        super::make_private_dir(folder)?;
    }
    match std::fs::remove_file(result_path(path)) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&error)),
    }
    let text = serde_json::to_vec(record).map_err(|error| failed(&error))?;
    std::fs::write(path, text).map_err(|error| failed(&error))
}

/// Holds the record for as long as this process lives: that is how others see that it does.
pub(super) fn hold_record(mount: &BackgroundMount) -> Result<File, Failure> {
    let path = Path::new(&mount.record);
    let failed = |error: &dyn std::error::Error| {
        Failure::failed(format!("can't hold {}", path.display())).caused_by(error)
    };
    let file = File::open(path).map_err(|error| failed(&error))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(&error))?;
    Ok(file)
}

/// Whether the volume process that holds the record has ended.
pub(super) fn has_ended(record: &Path) -> bool {
    match File::open(record) {
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockShared).is_ok(),
        Err(_) => true,
    }
}

/// Leaves word of how it ended. The record must still be held, so that nobody looks too early.
pub(super) fn report(
    mount: &BackgroundMount,
    result: &Result<ClosedReport, Failure>,
    _held: &File,
) {
    let result = match result {
        Ok(report) => MountResult::Closed(*report),
        Err(failure) => MountResult::Failed(failure.clone()),
    };
    // Whoever waits for it then says that the process died without a word.
    let _ = write_result(Path::new(&mount.record), &result);
}

/// Leaves word of a volume process that could not do so itself.
pub(super) fn report_death(mount: &BackgroundMount) {
    let record = Path::new(&mount.record);
    if !result_path(record).exists() {
        let _ = write_result(record, &MountResult::Failed(died()));
    }
}

fn write_result(record: &Path, result: &MountResult) -> io::Result<()> {
    let folder = record.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&serde_json::to_vec(result)?)?;
    file.persist(result_path(record))?;
    Ok(())
}

fn died() -> Failure {
    Failure::failed("the volume process of the mount died").with_hint(
        "what was written since the last fsync may be missing; the file system itself is intact \
         and its journal is replayed by the next run",
    )
}

/// Where a container is mounted on this machine now, as far as the records tell.
#[must_use]
pub fn mounted_at(runtime_dir: &Path, target: &str) -> Option<PathBuf> {
    let records = std::fs::read_dir(runtime_dir.join("mounts")).ok()?;
    records
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|kind| kind == "json"))
        .find_map(|path| {
            let record = read_record(&path)?;
            (record.target == target && !has_ended(&path)).then(|| PathBuf::from(record.dir))
        })
}

/// What is known of the mount at `dir`; `None` if sprat never mounted there since the last boot.
pub(super) fn read_record(record: &Path) -> Option<MountRecord> {
    serde_json::from_slice(&std::fs::read(record).ok()?).ok()
}

/// Takes the result, and with it everything that reminds of the mount.
pub(super) fn take_result(record: &Path) -> Result<ClosedReport, Failure> {
    let path = result_path(record);
    let result = std::fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let _ = std::fs::remove_file(record);
    let _ = std::fs::remove_file(path);
    match result {
        Some(MountResult::Closed(report)) => Ok(report),
        Some(MountResult::Failed(failure)) => Err(failure),
        None => Err(died()),
    }
}

/// Lets go of the terminal and of the folder that the user stood in.
pub(super) fn leave_terminal() {
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    let _ = std::env::set_current_dir("/");
}
