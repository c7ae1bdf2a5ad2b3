//! The words for phases and progress.

use std::time::Duration;

use sprat_session::{Phase, SessionProgress, progress, text};

/// Phases worth a line in a log.
#[must_use]
pub fn is_long(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::MakingFileSystem
            | Phase::Stopping
            | Phase::StoppingFull
            | Phase::Punching
            | Phase::Rewriting
            | Phase::Growing
            | Phase::Shrinking
    )
}

/// What a session does now.
#[must_use]
pub fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Connecting => "connecting",
        Phase::Locking => "acquiring the lock",
        Phase::Unlocking => "opening the key slot",
        Phase::Creating => "creating the container",
        Phase::MakingFileSystem => "creating the file system",
        Phase::Mounting => "mounting",
        Phase::Working => "working",
        Phase::Collecting => "asking the file system which blocks are unused",
        Phase::Punching => "releasing space to the server",
        Phase::Rewriting => "rewriting the container on the server",
        Phase::Growing => "growing the file system",
        Phase::Shrinking => "shrinking the file system",
        Phase::Stopping => "stopping safely, within 10 s; a second Ctrl-C stops at once",
        Phase::StoppingFull => "stopping safely: the server has no space left",
        Phase::Unmounting => "unmounting",
        Phase::Syncing => "waiting until the server has all data on its disk",
        Phase::Publishing => "renaming the container to its final name",
    }
}

fn rsync_phase_text(phase: sprat_snapshot::Phase) -> &'static str {
    use sprat_snapshot::Phase as P;
    match phase {
        P::Checking => "checking the volume",
        P::Recovering => "recovering the interrupted run",
        P::Copying => "copying",
        P::Syncing => "waiting until everything is written",
        P::Comparing => "comparing files",
        P::Naming => "naming the snapshot",
        P::Removing => "removing the interrupted snapshot",
        _ => "working",
    }
}

/// One line: phase, percentage, bytes, rate, time left, files, unsent and unsynced bytes, connection.
#[must_use]
pub fn progress_text(phase: &str, now: &SessionProgress) -> String {
    let mut parts = Vec::new();
    match &now.rsync {
        Some(rsync) => {
            parts.push(rsync_phase_text(rsync.phase).to_owned());
            match progress::percent(rsync) {
                Some((percent, true)) => parts.push(format!("about {percent}%")),
                Some((percent, false)) => parts.push(format!("{percent}%")),
                None => {}
            }
            if rsync.bytes_done > 0 {
                parts.push(text::bytes(rsync.bytes_done));
            }
            if let Some(rate) = rsync.bytes_per_s.filter(|rate| *rate > 0) {
                parts.push(format!("{}/s", text::bytes(rate)));
            }
            if let Some(left) = progress::time_left_of_rsync(rsync) {
                parts.push(format!("{} left", text::duration(left)));
            }
            parts.push(if rsync.all_found {
                format!(
                    "{}/{} files",
                    text::count(rsync.files_done),
                    text::count(rsync.files_found)
                )
            } else {
                text::counted(rsync.files_done, "file", "files")
            });
            if let Some(still) = rsync.still_s {
                let still = text::duration(Duration::from_secs(still));
                parts.push(format!("rsync has been silent and idle for {still}"));
            }
        }
        None => {
            parts.push(phase.to_owned());
            if now.volume.written_bytes > 0 {
                parts.push(format!("{} sent", text::bytes(now.volume.written_bytes)));
            }
        }
    }
    let volume = &now.volume;
    if volume.dirty_bytes > 0 {
        parts.push(format!("{} buffered", text::bytes(volume.dirty_bytes)));
    }
    if volume.unsynced_bytes > 0 {
        parts.push(format!("{} unsynced", text::bytes(volume.unsynced_bytes)));
    }
    if let Some(ms) = volume.reconnecting_ms {
        let away = text::duration(Duration::from_millis(ms));
        parts.push(format!("connection lost, reconnecting for {away}"));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use sprat_session::VolumeStats;

    #[test]
    fn progress_line_tells_rate_time_left_and_what_is_not_durable() {
        let mut rsync = sprat_snapshot::Progress::begin(sprat_snapshot::Phase::Copying);
        rsync.bytes_done = 300 << 20;
        rsync.percent = Some(30);
        rsync.bytes_per_s = Some(10 << 20);
        rsync.files_done = 1200;
        rsync.files_found = 4000;
        rsync.all_found = true;
        let volume = VolumeStats {
            dirty_bytes: 5 << 20,
            unsynced_bytes: 20 << 20,
            reconnecting_ms: Some(12_400),
            ..VolumeStats::default()
        };
        let progress = SessionProgress {
            rsync: Some(rsync),
            volume,
        };
        insta::assert_snapshot!(progress_text("working", &progress), @"copying, 30%, 300 MiB, 10.0 MiB/s, 1 min 10 s left, 1,200/4,000 files, 5.0 MiB buffered, 20.0 MiB unsynced, connection lost, reconnecting for 12 s");
    }

    #[test]
    fn an_unchanged_run_has_a_percentage_by_the_snapshot_before() {
        let mut rsync = sprat_snapshot::Progress::begin(sprat_snapshot::Phase::Copying);
        (rsync.files_done, rsync.files_found) = (943_805, 944_000);
        (rsync.percent, rsync.bytes_per_s) = (Some(0), Some(0));
        rsync.files_expected = Some(1_000_000);
        let mut progress = SessionProgress {
            rsync: Some(rsync),
            ..SessionProgress::default()
        };
        let line = progress_text("working", &progress);
        assert_eq!(line, "copying, about 94%, 943,805 files");
        // More than before, and all found: rsync's own.
        rsync.files_done = 1_200_000;
        progress.rsync = Some(rsync);
        assert!(progress_text("working", &progress).contains("about 99%"));
        (rsync.all_found, rsync.percent) = (true, Some(100));
        progress.rsync = Some(rsync);
        assert!(progress_text("working", &progress).starts_with("copying, 100%"));
    }
}
