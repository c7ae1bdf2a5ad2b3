//! Pins snapshots: a pinned one is removed by nobody until it is unpinned.
//!
//! A pin is the file `.sprat/NAME.pin` of the job, and its content is the reason. A person may make or
//! remove such a file in a mounted volume, too.

use std::path::Path;

use rustix::fs::{AtFlags, unlinkat};
use serde::{Deserialize, Serialize};

use crate::choice::{self, SnapshotChoice};
use crate::error::SnapshotError;
use crate::job::{JobFolder, on_volume, replace_file};
use crate::name::{JobName, SnapshotName};

/// The longest reason in bytes.
pub const PIN_REASON_BYTES_MAX: usize = 1000;

/// What to pin or unpin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinSpec {
    /// The job.
    pub job: JobName,
    /// The snapshot. The beginning of several names means the newest of them.
    pub snapshot: SnapshotChoice,
    /// Why it is pinned: one line of at most [`PIN_REASON_BYTES_MAX`]. `None`: it is unpinned.
    pub reason: Option<String>,
}

/// What was pinned or unpinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinReport {
    /// The snapshot.
    pub name: SnapshotName,
    /// Why it was pinned before; `None`: it was not.
    pub before: Option<String>,
}

/// Checks a reason.
///
/// # Errors
/// Says what is wrong with it.
pub fn check_pin_reason(reason: &str) -> Result<(), &'static str> {
    if reason.trim().is_empty() {
        Err("is empty")
    } else if reason.len() > PIN_REASON_BYTES_MAX {
        Err("is longer than 1000 bytes")
    } else if reason.chars().any(char::is_control) {
        Err("has a control character in it; it must be one line of text")
    } else {
        Ok(())
    }
}

/// Pins or unpins a snapshot on the volume mounted at `volume_root`. The change is durable after the end
/// of the session.
///
/// # Errors
/// There is no such finished snapshot.
pub fn pin(volume_root: &Path, spec: &PinSpec) -> Result<PinReport, SnapshotError> {
    // A job that does not exist must not be created.
    let job = JobFolder::open(volume_root, Path::new(spec.job.as_str()))?;
    let name = match spec.reason {
        Some(_) => {
            let found = choice::matching(&job, &spec.snapshot)?.pop();
            found.ok_or_else(|| choice::no_such(&job, &spec.snapshot))?
        }
        // What takes a protection away must not guess.
        None => choice::exactly(&job, &spec.snapshot)?,
    };
    let run = JobFolder::open_for_run(volume_root, &spec.job)?;
    let before = run.job.pin(name);
    let file = JobFolder::pin_name(name);
    match &spec.reason {
        Some(reason) if before.as_ref() != Some(reason) => {
            replace_file(&run.state, &file, format!("{reason}\n").as_bytes())
                .map_err(on_volume("write", &file))?;
        }
        None if before.is_some() => {
            unlinkat(&run.state, &file, AtFlags::empty())
                .map_err(|error| on_volume("remove", &file)(error.into()))?;
        }
        _ => {}
    }
    Ok(PinReport { name, before })
}
