//! What a session does, while it does it: one line on a terminal, plain lines elsewhere.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;
use sprat_session::state::reserved_names;
use sprat_session::{NotCompared, Notice, Observer, Phase, SessionProgress, text};

use super::{Output, write_stderr};

/// Between two changes of the line on a terminal.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
/// Between two events for a program that shows them.
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// Between two plain lines: rare enough for a log that is kept.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);

/// Tells the user what a session does.
#[derive(Debug)]
pub(crate) struct Reporter {
    output: Output,
    /// Put in front of each line, such as the job's name.
    subject: String,
    phase: Option<Phase>,
    shown_at: Option<Instant>,
    /// The terminal's present line, which the next output replaces.
    line_shown: bool,
    /// The server told of little room.
    server_low: bool,
}

impl Reporter {
    /// A reporter for `subject`, such as `home: `.
    pub(crate) fn new(output: Output, subject: impl Into<String>) -> Self {
        Self {
            output,
            subject: subject.into(),
            phase: None,
            // A run that is over in seconds needs no line in a log.
            shown_at: (!output.terminal).then(Instant::now),
            line_shown: false,
            server_low: false,
        }
    }

    /// Whether the session told that the server has little room left, or gave up the reserve for it.
    pub(crate) fn server_is_low(&self) -> bool {
        self.server_low
    }

    /// Says whom the next lines are about.
    pub(crate) fn about(&mut self, subject: impl Into<String>) {
        self.subject = subject.into();
    }

    /// Takes the progress line off the terminal, so that a result can be printed.
    pub(crate) fn clear(&mut self) {
        if self.line_shown {
            write_stderr("\r\x1b[K");
            self.line_shown = false;
        }
    }

    /// Whether people or programs want to hear of progress again.
    fn is_due(&self) -> bool {
        let usual = if self.output.json {
            JSON_INTERVAL
        } else if self.output.terminal {
            TERMINAL_INTERVAL
        } else {
            PLAIN_INTERVAL
        };
        let interval = self.output.progress_interval.unwrap_or(usual);
        !self.output.quiet && self.shown_at.is_none_or(|at| at.elapsed() >= interval)
    }

    /// Shows progress of another kind than a session's, where it is due: a line, or for programs
    /// an event.
    pub(crate) fn other_progress(&mut self, line: &str, event: &serde_json::Value) {
        if !self.is_due() {
            return;
        }
        if self.output.json {
            self.shown_at = Some(Instant::now());
            self.output.event(event);
        } else {
            self.show(&format!("{}{line}", self.subject));
        }
    }

    /// Tells that something begins, where every step is told.
    pub(crate) fn step(&mut self, line: &str, event: &serde_json::Value) {
        if self.output.quiet {
            return;
        }
        if self.output.json {
            self.output.event(event);
        } else if self.output.terminal || self.output.verbose {
            self.show(&format!("{}{line}", self.subject));
        }
    }

    /// Tells something beside the progress.
    pub(crate) fn tell(&mut self, line: &str, matters: bool) {
        self.clear();
        if matters {
            self.output.warning(line);
        } else {
            self.output.note(line);
        }
    }

    fn show(&mut self, line: &str) {
        if self.output.terminal {
            let width = rustix::termios::tcgetwinsize(rustix::stdio::stderr())
                .map_or(80, |size| usize::from(size.ws_col).max(20));
            let line = text::harmless_columns(line, width - 2);
            write_stderr(&format!("\r\x1b[K{line}"));
            self.line_shown = true;
        } else {
            write_stderr(&format!("sprat: {}\n", text::harmless(line)));
        }
        self.shown_at = Some(Instant::now());
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Observer for Reporter {
    fn phase(&mut self, phase: Phase) {
        let changed = self.phase.replace(phase) != Some(phase);
        if self.output.quiet || !changed {
            return;
        }
        if self.output.json {
            self.output
                .event(&json!({ "phase": phase, "about": self.subject.trim_end() }));
        } else if self.output.terminal || self.output.verbose || is_long(phase) {
            let line = format!("{}{}", self.subject, phase_text(phase));
            self.show(&line);
        }
    }

    fn progress(&mut self, progress: &SessionProgress) {
        if !self.is_due() {
            return;
        }
        if self.output.json {
            self.shown_at = Some(Instant::now());
            let event = json!({
                "progress": { "phase": self.phase, "rsync": progress.rsync, "volume": progress.volume },
                "about": self.subject.trim_end(),
            });
            self.output.event(&event);
            return;
        }
        let phase = self.phase.map_or("", phase_text);
        let line = format!("{}{}", self.subject, progress_text(phase, progress));
        self.show(&line);
    }

    fn notice(&mut self, notice: Notice) {
        self.server_low |= matches!(
            notice,
            Notice::ServerSpaceLow { .. } | Notice::ReserveGivenUp
        );
        let (text, matters) = notice_text(&notice);
        if self.output.quiet && !matters {
            return;
        }
        self.clear();
        if self.output.json {
            self.output
                .event(&json!({ "notice": notice, "about": self.subject.trim_end() }));
            return;
        }
        let text = format!("{}{text}", self.subject);
        if matters {
            self.output.warning(&text);
        } else {
            self.output.note(&text);
        }
    }
}

/// Phases worth a line in a log.
fn is_long(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::MakingFileSystem
            | Phase::Stopping
            | Phase::StoppingFull
            | Phase::Punching
            | Phase::Rewriting
            | Phase::Growing
    )
}

fn phase_text(phase: Phase) -> &'static str {
    match phase {
        Phase::Connecting => "connecting",
        Phase::Locking => "taking the lock",
        Phase::Unlocking => "opening the key slot",
        Phase::Creating => "making the container",
        Phase::MakingFileSystem => "making the file system",
        Phase::Mounting => "mounting",
        Phase::Working => "working",
        Phase::Collecting => "asking the file system what it does not need",
        Phase::Punching => "giving space back to the server",
        Phase::Rewriting => "writing the container anew on the server",
        Phase::Growing => "growing the file system",
        Phase::Stopping => "stopping in order, in 10 s at most; a second Ctrl-C ends at once",
        Phase::StoppingFull => "stopping in order: the server has no room left",
        Phase::Unmounting => "unmounting",
        Phase::Syncing => "waiting until the server has everything on its disk",
        Phase::Publishing => "giving the container its name",
    }
}

fn rsync_phase_text(phase: sprat_snapshot::Phase) -> &'static str {
    use sprat_snapshot::Phase as P;
    match phase {
        P::Checking => "looking at what is there",
        P::Recovering => "taking up the interrupted run",
        P::Copying => "copying",
        P::Syncing => "waiting until everything is written",
        P::Comparing => "comparing files",
        P::Naming => "naming the snapshot",
        P::Removing => "removing the interrupted tree",
        _ => "working",
    }
}

/// One line: phase, percent, bytes, rate, time left, files, what waits to be durable, the line.
fn progress_text(phase: &str, progress: &SessionProgress) -> String {
    let mut parts = Vec::new();
    match &progress.rsync {
        Some(rsync) => {
            parts.push(rsync_phase_text(rsync.phase).to_owned());
            let expected = rsync.files_expected.filter(|files| *files > 0);
            match (rsync.percent, expected) {
                (Some(percent), _) if rsync.all_found => parts.push(format!("{percent}%")),
                // rsync finds files while it goes on; the snapshot before says about how many.
                (_, Some(expected)) if rsync.phase == sprat_snapshot::Phase::Copying => {
                    let percent = u128::from(rsync.files_done) * 100 / u128::from(expected);
                    parts.push(format!("about {}%", percent.min(99)));
                }
                _ => {}
            }
            if rsync.bytes_done > 0 {
                parts.push(text::bytes(rsync.bytes_done));
            }
            if let Some(rate) = rsync.bytes_per_s.filter(|rate| *rate > 0) {
                parts.push(format!("{}/s", text::bytes(rate)));
            }
            if let Some(left) = time_left(rsync) {
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
                parts.push(format!(
                    "rsync has neither said nor moved anything for {still}"
                ));
            }
        }
        None => {
            parts.push(phase.to_owned());
            if progress.volume.written_bytes > 0 {
                parts.push(format!(
                    "{} sent",
                    text::bytes(progress.volume.written_bytes)
                ));
            }
        }
    }
    let volume = &progress.volume;
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

/// From rsync's own percent and rate, once it has found all there is.
fn time_left(rsync: &sprat_snapshot::Progress) -> Option<Duration> {
    let percent = u128::from(rsync.percent.filter(|percent| (1..100).contains(percent))?);
    let rate = u128::from(rsync.bytes_per_s.filter(|rate| *rate > 0)?);
    if !rsync.all_found {
        return None;
    }
    let left = u128::from(rsync.bytes_done) * (100 - percent) / percent / rate;
    u64::try_from(left).ok().map(Duration::from_secs)
}

/// The words for a notice, and whether `-q` shows it too.
fn notice_text(notice: &Notice) -> (String, bool) {
    match notice {
        Notice::HeaderCopyDamaged { copy } => (
            format!(
                "one of the two copies of the LUKS2 header is damaged ({copy}); the other one was \
                 used. The data is whole, but repair it soon: `cryptsetup repair` on the \
                 container file"
            ),
            true,
        ),
        Notice::TrustedOnce { fingerprint } => (
            format!(
                "this machine didn't know this container: its header is trusted and pinned from \
                 now on. Compare with the recovery sheet: fingerprint {fingerprint}"
            ),
            true,
        ),
        Notice::TookOverDeadSession => (
            "took over the lock of a session that died on this machine".to_owned(),
            false,
        ),
        Notice::Suspects { bytes } => (
            format!(
                "a session that died had {} on the wire: waiting until its server can't write any \
                 more; all is read back before success",
                text::bytes(*bytes)
            ),
            false,
        ),
        Notice::DeadSessionLeftLock => (
            "a session that was writing died on this machine; its journal is replayed locally, \
             nothing is written to the server"
                .to_owned(),
            false,
        ),
        Notice::LockLeft { reason } => (
            format!(
                "the lock could not be given back ({reason}). Everything is on the server's disk; \
                 the next run of this machine takes the lock over, other machines need `sprat \
                 unlock`"
            ),
            true,
        ),
        Notice::LockIgnored { holder } => (
            format!(
                "{holder} is ignored; if that session still writes, what is read now may be a \
                 mixture of two states: don't rely on it"
            ),
            true,
        ),
        Notice::CacheOutdated => (
            "the container was changed since this machine's last session (by stock tools, another \
             machine, or a change of keys): the local cache is outdated and not used, all is read \
             anew"
                .to_owned(),
            false,
        ),
        Notice::WrittenElsewhere => (
            "the container was written to since this machine's last session, by another machine or \
             by stock tools"
                .to_owned(),
            false,
        ),
        Notice::OlderStateAccepted => (
            "the container is older than this machine knew it; this state is accepted from now on"
                .to_owned(),
            true,
        ),
        Notice::NotCompared(note) => (not_compared(note), true),
        Notice::NotListed { reason } => (
            format!(
                "this session can't leave the list of its writes beside the container: {reason}. \
                 The container is in order; but nobody can tell whether a session that it was taken \
                 over from overwrites something later"
            ),
            true,
        ),
        Notice::Overwritten { blocks, files } => (overwritten(*blocks, files), true),
        Notice::NotNoted { reason } => (
            format!(
                "{reason}. The container is in order; but an older state of it may not be noticed"
            ),
            true,
        ),
        Notice::ServerSpaceLow { available_bytes } => (
            format!(
                "only {} are left on the server",
                text::bytes(*available_bytes)
            ),
            true,
        ),
        Notice::MoreThanServerHas {
            available_bytes,
            size_bytes,
        } => (
            format!(
                "the container may grow to {}, and {} are free on the server: it is sparse and takes \
                 only what is written, and a backup stops in order before that disk is full",
                text::bytes(*size_bytes),
                text::bytes(*available_bytes)
            ),
            false,
        ),
        Notice::VolumeSpaceLow {
            available_bytes,
            inodes,
        } => (
            format!(
                "the volume is nearly full: room for {} and {} is left. `sprat prune` makes room, \
                 `sprat grow` makes the container larger",
                text::bytes(*available_bytes),
                text::counted(*inodes, "file", "files")
            ),
            true,
        ),
        Notice::ReserveGivenUp => (
            "the server's disk is full: the reserve beside the container was given up to go on; it \
             is made again once there is room"
                .to_owned(),
            true,
        ),
        Notice::NoDurableFlush => (
            "this server can't fsync: if it crashes, the container may be lost".to_owned(),
            false,
        ),
        Notice::NoFolderFlush => (
            "this server can't make a rename durable at once; a crash of the server in the next \
             seconds may undo it"
                .to_owned(),
            false,
        ),
        Notice::NothingRemoved => (
            format!(
                "this account may not remove files on the server: {}",
                reserved_names::WITHOUT_REMOVING
            ),
            false,
        ),
        Notice::HolesFilled { size_bytes } => (
            format!(
                "the server's file system has no sparse files (exFAT, FAT): the container takes its \
                 whole size of {} there from now on",
                text::bytes(*size_bytes)
            ),
            true,
        ),
        Notice::NotHardened { reason } => (format!("not hardened: {reason}"), false),
        Notice::HeaderNotKept { reason } => (
            format!(
                "{reason}; the container is whole all the same. `sprat key header-backup` keeps its \
                 header where there is room"
            ),
            true,
        ),
        Notice::SlotsDiffer {
            gone,
            slots,
            kept,
            newest,
        } => (slots_differ(gone, slots, kept, newest), true),
        Notice::SlotAreasDiffer { slots } => (areas_differ(slots), true),
        Notice::TrimRoutePassed { reason } => (reason.clone(), false),
        Notice::Settling {
            done_bytes,
            whole_bytes,
        } => (
            format!(
                "settling what the dead session had under way: {} of {}",
                text::bytes(*done_bytes),
                text::bytes(*whole_bytes)
            ),
            false,
        ),
        Notice::LateWrites { wait_s } => (
            format!(
                "the server may still carry out what was under way on the lost connection: what \
                 replaces it waits, and so does the end of this run, for {wait_s} s at most"
            ),
            false,
        ),
        Notice::LineLost { reason } => (
            format!("connection lost, reconnecting: {reason}"),
            false,
        ),
        Notice::LineBack { away_s } => (
            format!(
                "line back after {}",
                text::duration(Duration::from_secs(*away_s))
            ),
            false,
        ),
    }
}

fn numbers(slots: &[u32]) -> String {
    let slots: Vec<String> = slots.iter().map(u32::to_string).collect();
    slots.join(", ")
}

fn areas_differ(slots: &[u32]) -> String {
    let which = match slots {
        [one] => format!("the area of key slot {one} holds"),
        more => format!("the areas of key slots {} hold", numbers(more)),
    };
    format!(
        "{which} other bytes than in the header that this machine keeps: the key of that slot may open \
         nothing any more. All data is there for the other keys"
    )
}

fn slots_differ(gone: &[u32], differ: &[u32], kept: &Path, newest: &Path) -> String {
    let mut parts = Vec::new();
    match gone {
        [] => {}
        [one] => parts.push(format!("key slot {one} is gone or was changed")),
        more => parts.push(format!(
            "key slots {} are gone or were changed",
            numbers(more)
        )),
    }
    match differ {
        [] => {}
        [one] => parts.push(format!("the area of key slot {one} holds other bytes")),
        more => parts.push(format!(
            "the areas of key slots {} hold other bytes",
            numbers(more)
        )),
    }
    format!(
        "compared with the header that this machine had kept, {}: a key may open nothing any \
         more. Both headers are kept: the present one in {}, the one of before in {}. See whether \
         your keys open; where they don't, put it back with `sprat key header-restore TARGET {2}`. Where the \
         change was wanted, remove that file: removed keys still open what it holds",
        parts.join(", and "),
        newest.display(),
        kept.display()
    )
}

/// Names of files that are said.
const FILES_SAID: usize = 10;

fn not_compared(note: &NotCompared) -> String {
    let since = i64::try_from(note.since_s).ok();
    let since = since.and_then(|since| jiff::Timestamp::from_second(since).ok());
    let since = since.map_or_else(|| "an unknown time".to_owned(), |since| since.to_string());
    let host = match note.host.is_empty() {
        true => "several machines".to_owned(),
        false => format!("host {}", text::harmless(&note.host)),
    };
    format!(
        "what {host} wrote after it took the container over ({since}) has not been compared yet, and \
         its list is missing: that session did not end in order. Whether the session before \
         overwrote something of it later is not known. Run `sprat check --read-data`, and then \
         `sprat unlock --forget-watch`"
    )
}

fn overwritten(blocks: u64, files: &[String]) -> String {
    let mut said = format!(
        "{} were overwritten by a session that the container was taken over from",
        text::counted(blocks, "block", "blocks")
    );
    match files.len() {
        0 => said.push_str("; no file has content there"),
        more => {
            let names: Vec<&str> = files.iter().take(FILES_SAID).map(String::as_str).collect();
            said.push_str("; damaged: ");
            said.push_str(&names.join(", "));
            if more > FILES_SAID {
                said.push_str(", …; `sprat check` names all");
            }
        }
    }
    said
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

    #[test]
    fn time_left_is_unknown_while_rsync_still_finds_files() {
        let mut rsync = sprat_snapshot::Progress::begin(sprat_snapshot::Phase::Copying);
        rsync.percent = Some(50);
        rsync.bytes_per_s = Some(1);
        rsync.bytes_done = 10;
        assert_eq!(time_left(&rsync), None);
        rsync.all_found = true;
        assert_eq!(time_left(&rsync), Some(Duration::from_secs(10)));
    }
}
