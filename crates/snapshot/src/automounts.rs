//! Automount points (autofs). What belongs on one is mounted on first use. So a run uses them first, and
//! then checks what is mounted.

use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use crate::mounts::Mount;
use crate::spec::SnapshotSpec;

/// How long all automount points together may take. systemd waits 90 s for a device that is missing.
const PATIENCE: Duration = Duration::from_secs(100);

/// Uses the automount points of `table` that `is_needed` accepts, so that their file systems are
/// mounted. Returns whether there were any. Then the table must be read again.
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
        // Each use waits for a daemon, which may wait for a device or a server. If the daemon is gone,
        // it may wait for ever: then its thread is left behind.
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

/// Lists the folder, as a walk does. Asking for its attributes would mount nothing.
pub(crate) fn use_once(place: &Path) {
    // If this fails, the automount point stays empty, and that is reported.
    let _ = std::fs::read_dir(place);
}

/// Whether one of the job's patterns clearly excludes `place`, so that nothing need be mounted there. If
/// a more complex pattern excludes it, it is only mounted in vain.
pub(crate) fn is_clearly_excluded(spec: &SnapshotSpec, place: &Path) -> bool {
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
