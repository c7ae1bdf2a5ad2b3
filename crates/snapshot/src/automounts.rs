//! Automount points (autofs): what lies on one is mounted on first use, so a run uses it first, and
//! sees then what is there.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use crate::mounts::Mount;
use crate::spec::SnapshotSpec;

/// How long all automount points together may take. systemd waits 90 s for a device that is missing.
const PATIENCE: Duration = Duration::from_secs(100);

/// Uses the automount points of `table` that `is_needed` names, so that what belongs there is
/// mounted. Returns whether there was one; the table is another one then.
pub(crate) fn mount_all(table: &[Mount], is_needed: &dyn Fn(&Path) -> bool) -> bool {
    let waiting = table.iter().filter(|mount| mount.empty_automount);
    let places: Vec<_> = waiting
        .map(|mount| mount.at.clone())
        .filter(|at| is_needed(at))
        .collect();
    let (answer, answered) = mpsc::channel();
    let mut asked = 0;
    for place in places {
        let answer = answer.clone();
        // Each waits for a daemon, which may wait for a device or a server; one whose daemon is gone
        // may wait for ever, and its thread is left behind.
        let thread = std::thread::Builder::new().spawn(move || {
            use_once(&place);
            let _ = answer.send(());
        });
        asked += usize::from(thread.is_ok());
    }
    let until = std::time::Instant::now() + PATIENCE;
    for _ in 0..asked {
        let left = until.saturating_duration_since(std::time::Instant::now());
        if answered.recv_timeout(left).is_err() {
            break;
        }
    }
    asked > 0
}

/// Opens the folder as a walk does: only asking for its attributes mounts nothing.
pub(crate) fn use_once(place: &Path) {
    // What fails here stays an empty automount point, and is reported as such.
    let _ = std::fs::read_dir(place);
}

/// Whether a pattern of the job's own plainly leaves `place` out: then nothing is woken for it. Other
/// patterns that do cost only that.
pub(crate) fn is_plainly_left_out(spec: &SnapshotSpec, place: &Path) -> bool {
    let names = |pattern: &str, folder: &Path| {
        let pattern = pattern.strip_suffix("/***").unwrap_or(pattern);
        let pattern = pattern.strip_suffix('/').unwrap_or(pattern);
        let by_path = pattern.starts_with('/') && Path::new(pattern) == folder;
        let by_name = !pattern.contains('/') && folder.file_name().is_some_and(|n| n == pattern);
        by_path || by_name
    };
    spec.excludes
        .iter()
        .any(|pattern| place.ancestors().any(|folder| names(pattern, folder)))
}
