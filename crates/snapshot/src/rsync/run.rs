//! Runs one rsync to its end: reads its pipes, follows its progress, and stops it on request.
//!
//! rsync gets its own process group, so that a signal reaches all of its processes. It does not outlive
//! its caller, because the worker is the first process of a pid namespace, and all processes of the
//! namespace end with it.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, waitpgid,
};

use super::ask::Asked;
use super::invocation::{Invocation, Side};
use super::lines::{ExpectPipe, Line, read_lines};
use super::listed::Listed;
use super::messages::{Message, classify, printable};
use super::met::Met;
use super::no_links::NoLinks;
use super::output::{
    Item, Named, is_change, item_name, parse_entry, parse_item, parse_progress, take_stat,
};
use super::pipe_search::PipeSearch;
use super::program::Rsync;
use super::room::{Full, room_at};
use super::stillness::Stillness;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::name_list::NameList;
use crate::progress::{Phase, Progress};
use crate::record::{RunStats, Warning};
use crate::text::{escape_name, escape_path, unescape_path};
use crate::unlinked::CopiedFiles;

/// How long rsync may take to end after SIGKILL. If it takes longer, it waits in the kernel.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long rsync's processes may take to end after they have closed their pipes.
const GROUP_PATIENCE: Duration = Duration::from_secs(5);
/// How often rsync's processes are checked for one that waits for a pipe.
const PIPE_INTERVAL: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(100);
/// How many changes of a dry run are kept.
const CHANGES_MAX: usize = 10_000;

/// Files with larger holes get a warning. rsync reads about 0.5 GB of holes in a second.
const HOLES_NAMED_BYTES: u64 = 8 << 30;
const HOLES_NAMED_MAX: usize = 10;
/// After the end of rsync: how long the source may take to report the holes of its files.
const HOLES_PATIENCE: Duration = Duration::from_secs(5);

/// How many files of a run are listed. What does not fit is counted, never mistaken for another file.
pub(crate) const ITEMS_MAX: usize = 500_000;

/// How the run ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Everything was copied.
    #[default]
    Whole,
    /// Everything but some source files that could not be read.
    WithUnread,
    /// The destination is full.
    Full(Full),
    /// The run was cancelled.
    Cancelled,
    /// A restore found a folder where a file should go. Its path below the destination.
    Conflict(String),
    /// rsync ended because of one file. The caller continues in another way.
    Because(Obstacle),
    /// Any other failure: exit code or signal as text, and the first message that explains it.
    Failed { ended: String, message: String },
}

/// A file that makes rsync end, although the others could be copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// It has more names than the volume allows for one file. Its first name below the destination.
    TooManyLinks(Vec<u8>),
    /// The volume refuses a hard link to it.
    LinkRefused,
    /// The volume refuses its content. Its escaped path on the volume.
    WriteRefused(String),
}

/// The result of a run of rsync.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) ended: Ended,
    /// `None` if a signal ended it.
    pub(crate) exit: Option<i32>,
    pub(crate) stats: RunStats,
    pub(crate) unread: NameList,
    pub(crate) vanished: NameList,
    pub(crate) messages: NameList,
    pub(crate) changes: NameList,
    pub(crate) progress: Progress,
    /// Files written without some of their attributes, because these are too large for the volume.
    /// Escaped paths on the volume.
    pub(crate) attributes_lost: NameList,
    /// Files written without some of their attributes, because the volume refuses these. Escaped paths
    /// on the volume.
    pub(crate) attributes_refused: NameList,
    /// Files that the volume refused, or whose owner, mode or times it refused. Escaped paths on the
    /// volume.
    pub(crate) unwritten: NameList,
    /// What the user should know about how the tree was made.
    pub(crate) warnings: Vec<Warning>,
    /// Whether some rsync ended without printing its counts.
    pub(crate) counts_unknown: bool,
    /// Pipes that rsync opened instead of files. It wrote empty files for them.
    pub(crate) pipes: Vec<PathBuf>,
    /// The file that did not fit, escaped, if rsync named it.
    pub(crate) did_not_fit: Option<String>,
    /// Files whose content rsync copied from an older snapshot. Escaped, relative to the root.
    pub(crate) copied_from_older: NameList,
    /// Files that were written and whose time is not older than [`Invocation::recent_from`].
    pub(crate) recent: NameList,
    /// Files that were written.
    pub(crate) copied: CopiedFiles,
    /// See [`Invocation::lists_names`].
    pub(crate) several_names: SeveralNames,
    /// See [`Invocation::scan`].
    pub(crate) met: Met,
    /// See [`Invocation::lists`].
    pub(crate) listed: Listed,
}

/// All names that rsync found of each source file with several names, by device and inode. Absolute
/// paths.
pub(crate) type SeveralNames = BTreeMap<(u64, u64), Vec<PathBuf>>;

impl Outcome {
    /// Adds the result of a later run into the same tree.
    pub(crate) fn add(&mut self, later: Self) {
        // A file that could not be read the first time is still missing.
        if later.ended != Ended::Whole {
            self.ended = later.ended;
        }
        if later.exit != Some(0) {
            self.exit = later.exit;
        }
        self.stats.created += later.stats.created;
        self.stats.add_copied(&later.stats);
        self.unread.append_within(&later.unread, ITEMS_MAX);
        self.vanished.append(&later.vanished);
        self.messages.append(&later.messages);
        self.attributes_lost.append(&later.attributes_lost);
        self.attributes_refused.append(&later.attributes_refused);
        self.unwritten.append_within(&later.unwritten, ITEMS_MAX);
        self.warnings.extend(later.warnings);
        self.counts_unknown |= later.counts_unknown;
        self.recent.append_within(&later.recent, ITEMS_MAX);
        self.did_not_fit = self.did_not_fit.take().or(later.did_not_fit);
    }
}

impl Rsync {
    /// Runs rsync to its end. Fails only if rsync could not be run at all.
    pub(crate) fn run(
        &self,
        invocation: &Invocation,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Outcome, SnapshotError> {
        let system = |op| move |source| SnapshotError::System { op, source };
        let mut command = self.command();
        if invocation.remote
            && let Some(agent) = std::env::var_os("SSH_AUTH_SOCK")
        {
            command.env("SSH_AUTH_SOCK", agent);
        }
        let stdin = invocation.stdin();
        let no_links = NoLinks::begin(self, invocation);
        let mut child = command
            .args(no_links.as_ref().and_then(NoLinks::option))
            .args(&invocation.arguments)
            .current_dir(&invocation.folder)
            .stdin(stdin.map_err(system("make a file in memory"))?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(system("start rsync"))?;
        tracing::debug!(program = "rsync", pid = child.id(), "started");
        let mut running = Running::new(invocation, cancel);
        let followed = running.follow(&mut child, progress);
        if followed.is_err() {
            signal_group(&child, Signal::KILL);
        }
        let status = match running.not_killed {
            // It can't be waited for.
            true => ExitStatus::from_raw(Signal::KILL.as_raw()),
            false => child.wait().map_err(system("wait for rsync"))?,
        };
        wait_for_group(&child);
        followed.map_err(system("read rsync's output"))?;
        if let Some(stood_still) = running
            .stood_still
            .take()
            .filter(|_| !cancel.is_cancelled())
        {
            return Err(stood_still);
        }
        Ok(running.conclude(status))
    }
}

fn signal_group(child: &Child, signal: Signal) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // ESRCH means that it is gone, as intended.
        let _ = kill_process_group(pid, signal);
    }
}

/// Waits until rsync's other processes have ended, too, so that the file systems that they use can be
/// unmounted. They close their pipes shortly before they leave their folders. What goes on is killed. If the
/// caller is the first process of its pid namespace, they are its children now, and it must reap them.
fn wait_for_group(child: &Child) {
    let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return;
    };
    let until = Instant::now() + GROUP_PATIENCE;
    while Instant::now() < until {
        while let Ok(Some(_)) = waitpgid(group, WaitOptions::NOHANG) {}
        let reaper = rustix::process::getpid() == Pid::INIT;
        if test_kill_process_group(group).is_err() || (!reaper && !any_alive(group)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = kill_process_group(group, Signal::KILL);
}

/// Whether a process of `group` still runs. Zombies count as ended: they have left their folders
/// (kernel/exit.c: `exit_fs` comes before `exit_notify`).
fn any_alive(group: Pid) -> bool {
    let group = group.as_raw_nonzero().to_string();
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    processes.filter_map(Result::ok).any(|process| {
        let stat = std::fs::read(process.path().join("stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        // `PID (NAME) STATE PARENT GROUP …`. The name may contain anything, even `)`.
        let mut words = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace();
        let state = words.next();
        words.nth(1) == Some(&group) && !matches!(state, Some("Z" | "X"))
    })
}

struct Running<'a> {
    invocation: &'a Invocation,
    cancel: &'a Cancel,
    stats: RunStats,
    unread: NameList,
    vanished: NameList,
    messages: NameList,
    changes: NameList,
    progress: Progress,
    first_failure: Option<String>,
    /// The first message about a link that rsync did not follow.
    not_followed: Option<String>,
    full: Option<Full>,
    conflict: Option<String>,
    attributes_lost: NameList,
    attributes_refused: NameList,
    unwritten: NameList,
    obstacle: Option<Obstacle>,
    pipes: Vec<PathBuf>,
    did_not_fit: Option<String>,
    copied_from_older: NameList,
    recent: NameList,
    copied: CopiedFiles,
    warnings: Vec<Warning>,
    several_names: SeveralNames,
    met: Met,
    listed: Listed,
    /// Files of the source that are being examined.
    asked: Asked,
    /// How many messages were about files that rsync copied all the same.
    all_copied: u64,
    asked_to_stop: Option<Instant>,
    killed: bool,
    /// It did not end after SIGKILL: it waits in the kernel.
    not_killed: bool,
    stood_still: Option<SnapshotError>,
    search: PipeSearch,
}

impl<'a> Running<'a> {
    fn new(invocation: &'a Invocation, cancel: &'a Cancel) -> Self {
        Self {
            invocation,
            cancel,
            stats: RunStats::default(),
            unread: NameList::default(),
            vanished: NameList::default(),
            messages: NameList::default(),
            changes: NameList::default(),
            progress: Progress::begin(Phase::Copying),
            first_failure: None,
            not_followed: None,
            full: None,
            conflict: None,
            attributes_lost: NameList::default(),
            attributes_refused: NameList::default(),
            unwritten: NameList::default(),
            obstacle: None,
            pipes: Vec::new(),
            did_not_fit: None,
            copied_from_older: NameList::default(),
            recent: NameList::default(),
            copied: CopiedFiles::default(),
            warnings: Vec::new(),
            several_names: SeveralNames::new(),
            met: Met {
                walk: invocation.census.clone(),
                ..Met::default()
            },
            listed: Listed::default(),
            asked: Asked::default(),
            all_copied: 0,
            asked_to_stop: None,
            killed: false,
            not_killed: false,
            stood_still: None,
            search: PipeSearch::default(),
        }
    }

    /// Handles every line until both pipes are closed, which is when all of rsync has ended.
    fn follow(&mut self, child: &mut Child, progress: &mut dyn FnMut(Progress)) -> io::Result<()> {
        let lines = {
            let (to, lines) = sync_channel(256);
            let out = child.stdout.take().expect_pipe()?;
            let err = child.stderr.take().expect_pipe()?;
            read_lines("rsync stdout", out, to.clone(), Line::Out)?;
            read_lines("rsync stderr", err, to, Line::Err)?;
            lines
        };
        self.take_lines(&lines, child, progress);
        Ok(())
    }

    fn take_lines(
        &mut self,
        lines: &Receiver<Line>,
        child: &Child,
        progress: &mut dyn FnMut(Progress),
    ) {
        let mut reported = Instant::now();
        let mut stillness = Stillness::of_children();
        let mut examined = Instant::now();
        loop {
            let next = if self.asked.is_full() {
                self.take_answers(POLL);
                Err(RecvTimeoutError::Timeout)
            } else {
                lines.recv_timeout(POLL)
            };
            match next {
                Ok(Line::Out(line)) => {
                    stillness.note_output();
                    self.take_out(&line);
                }
                Ok(Line::Err(line)) => {
                    stillness.note_output();
                    self.take_err(&line);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.invocation.side == Side::IntoVolume && examined.elapsed() >= PIPE_INTERVAL {
                examined = Instant::now();
                self.search.go_on(&stillness, &mut self.pipes);
            }
            self.progress.still_s = stillness.still_s_to_report();
            let still = stillness.still();
            if still >= self.invocation.still_max && self.stood_still.is_none() {
                self.stood_still = Some(SnapshotError::StoodStill {
                    still_s: still.as_secs(),
                    at: stillness.file_waited_for().as_deref().map(escape_path),
                });
            }
            if reported.elapsed() >= POLL {
                reported = Instant::now();
                progress(self.progress);
            }
            self.stop_if_wanted(child);
            if self.not_killed {
                break;
            }
        }
        self.search.take(Duration::from_secs(1), &mut self.pipes);
        self.await_answers();
        progress(self.progress);
    }

    /// Handles the answers about source files. If there is none yet, waits for one.
    fn take_answers(&mut self, patience: Duration) {
        let mut patience = patience;
        while let Some((path, about)) = self.asked.next(patience) {
            patience = Duration::ZERO;
            if self.invocation.lists_names {
                if about.nlink() > 1 && !about.is_dir() {
                    let names = self.several_names.entry((about.dev(), about.ino()));
                    names.or_default().push(path);
                }
            } else {
                self.take_long(&path, &about);
            }
        }
    }

    /// Waits for the remaining answers after the end of rsync. Without all names the snapshot would lack
    /// hard links. Without the holes only a warning is missing.
    fn await_answers(&mut self) {
        let patience = match self.invocation.lists_names {
            true => self.invocation.still_max,
            false => HOLES_PATIENCE,
        };
        let begun = Instant::now();
        let stopped = self.asked_to_stop.is_some();
        while !self.asked.is_empty() && !stopped && !self.cancel.is_cancelled() {
            self.take_answers(POLL);
            if begun.elapsed() < patience {
                continue;
            }
            if self.invocation.lists_names {
                self.stood_still = Some(SnapshotError::StoodStill {
                    still_s: begun.elapsed().as_secs(),
                    at: None,
                });
            }
            return;
        }
    }

    fn stop_if_wanted(&mut self, child: &Child) {
        let patience = self.invocation.term_patience;
        match self.asked_to_stop {
            // If the folder is where a hard link should go, rsync would wait for ever.
            None if self.cancel.is_cancelled()
                || self.full.is_some()
                || self.conflict.is_some()
                || self.stood_still.is_some()
                || self.link_refused() =>
            {
                signal_group(child, Signal::TERM);
                self.asked_to_stop = Some(Instant::now());
            }
            Some(since) if !self.killed && since.elapsed() >= patience => {
                signal_group(child, Signal::KILL);
                self.killed = true;
            }
            Some(since) if self.killed => {
                self.not_killed = since.elapsed() >= patience + KILL_PATIENCE;
            }
            _ => {}
        }
    }

    /// After a link that it could not make, rsync may loop for ever.
    fn link_refused(&self) -> bool {
        let obstacle = &self.obstacle;
        matches!(
            obstacle,
            Some(Obstacle::TooManyLinks(_) | Obstacle::LinkRefused)
        )
    }

    fn take_out(&mut self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        if self.invocation.lists_names
            && let Some(name) = item_name(&text)
        {
            self.asked.ask(Path::new("/").join(unescape_path(name)));
            self.take_answers(Duration::ZERO);
            return;
        }
        if let Some(rules) = &self.invocation.scan {
            if let Some(entry) = parse_entry(&text) {
                self.met.meet(rules, &entry);
            }
            return;
        }
        if let Some(lists) = &self.invocation.lists {
            self.listed.take(&text, lists);
            return;
        }
        if self.invocation.lists_changes && is_change(&text) {
            self.changes.push_within(text.into_owned(), ITEMS_MAX);
            return;
        }
        if let Some(from) = &self.invocation.recent_from
            && let Some(item) = parse_item(&text)
        {
            if let Item::Written(named) = item {
                self.take_written(named);
            }
            match item {
                Item::Written(named) | Item::Linked(named) if named.modified >= from.as_str() => {
                    self.recent.push_within(named.name.to_owned(), ITEMS_MAX);
                }
                Item::CopiedFromOlder { name } => {
                    self.copied_from_older
                        .push_within(name.to_owned(), ITEMS_MAX);
                }
                Item::Written(_) | Item::Linked(_) | Item::Other => {}
            }
            return;
        }
        if let Some(now) = parse_progress(&text, &self.progress) {
            self.progress = now;
        } else if is_change(&text) {
            self.changes.push_within(printable(line), CHANGES_MAX);
        } else {
            take_stat(&text, &mut self.stats);
        }
    }

    fn take_written(&mut self, file: Named<'_>) {
        self.invocation.listener.copied(file.name);
        self.copied.add(file.name, file.modified);
        if file.bytes >= HOLES_NAMED_BYTES && !self.invocation.remote {
            self.asked
                .ask(Path::new("/").join(unescape_path(file.name)));
        }
        self.take_answers(Duration::ZERO);
    }

    /// Handles a copied file that may have long holes.
    fn take_long(&mut self, path: &Path, about: &Metadata) {
        let data_bytes = about.blocks().saturating_mul(512);
        let hole_bytes = about.len().saturating_sub(data_bytes);
        if hole_bytes >= HOLES_NAMED_BYTES && self.warnings.len() < HOLES_NAMED_MAX {
            self.warnings.push(Warning::HolesRead {
                path: escape_path(path),
                bytes: about.len(),
                data_bytes,
            });
        }
    }

    fn take_err(&mut self, line: &[u8]) {
        let message = classify(line);
        match &message {
            Message::OlderNotRead if self.invocation.guarded => return self.all_copied += 1,
            Message::NoDefaultAcl(name) if self.invocation.is_no_folder(name) => {
                return self.all_copied += 1;
            }
            _ => {}
        }
        if message == Message::LinkNotFollowed {
            self.not_followed.get_or_insert_with(|| printable(line));
            return;
        }
        if message != Message::Harmless {
            self.messages.push(printable(line));
        }
        match message {
            Message::Harmless | Message::LinkNotFollowed => {}
            Message::Vanished(name) => self.vanished.push(escape_name(&name)),
            Message::Unread(name) | Message::NoDefaultAcl(name) => {
                self.unread.push_within(escape_name(&name), ITEMS_MAX);
            }
            Message::NoSpace(name) => {
                // Checked at once, because rsync is about to remove the file that did not fit.
                self.full = self.full.or_else(|| room_at(&self.invocation.written_to));
                self.did_not_fit = self
                    .did_not_fit
                    .take()
                    .or_else(|| name.map(|name| escape_name(&name)));
                self.first_failure.get_or_insert_with(|| printable(line));
            }
            Message::NoSpaceForAttribute(name) => {
                let room = || room_at(&self.invocation.written_to);
                self.full = self.full.or_else(|| room().filter(Full::is_certain));
                if self.full.is_some() || self.invocation.side == Side::OutOfVolume {
                    self.first_failure.get_or_insert_with(|| printable(line));
                } else {
                    self.attributes_lost
                        .push_new_within(escape_name(&name), ITEMS_MAX);
                }
            }
            // For a restore every such message is a failure.
            Message::Unwritten(_)
            | Message::AttributeRefused(_)
            | Message::TooManyLinks(_)
            | Message::LinkRefused
            | Message::WriteRefused(_)
                if self.invocation.side == Side::OutOfVolume =>
            {
                self.first_failure.get_or_insert_with(|| printable(line));
            }
            Message::Unwritten(name) => self
                .unwritten
                .push_new_within(escape_name(&name), ITEMS_MAX),
            Message::AttributeRefused(name) => {
                self.attributes_refused
                    .push_new_within(escape_name(&name), ITEMS_MAX);
            }
            Message::TooManyLinks(name) => {
                self.obstacle.get_or_insert(Obstacle::TooManyLinks(name));
            }
            Message::LinkRefused => {
                self.obstacle.get_or_insert(Obstacle::LinkRefused);
            }
            Message::WriteRefused(name) => {
                let name = escape_name(&name);
                self.obstacle.get_or_insert(Obstacle::WriteRefused(name));
            }
            Message::Conflict(name) if self.invocation.side == Side::OutOfVolume => {
                self.conflict.get_or_insert_with(|| escape_name(&name));
            }
            // ssh and the login shell of the host write there, too. ssh's exit code says what counts.
            Message::Failure if self.invocation.remote && !line.starts_with(b"rsync") => {}
            Message::Conflict(_) | Message::OlderNotRead | Message::Failure => {
                self.first_failure.get_or_insert_with(|| printable(line));
            }
        }
    }

    fn conclude(self, status: ExitStatus) -> Outcome {
        let ended = if let Some(full) = self.full {
            Ended::Full(full)
        } else if self.cancel.is_cancelled() && !status.success() {
            Ended::Cancelled
        } else if let Some(folder) = self.conflict.clone() {
            Ended::Conflict(folder)
        } else if let Some(obstacle) = self.obstacle.clone() {
            // rsync's later messages are consequences. Another failure will show up again.
            Ended::Because(obstacle)
        } else {
            self.judge_exit(status)
        };
        Outcome {
            ended,
            exit: status.code(),
            stats: self.stats,
            unread: self.unread,
            vanished: self.vanished,
            messages: self.messages,
            changes: self.changes,
            progress: self.progress,
            attributes_lost: self.attributes_lost,
            attributes_refused: self.attributes_refused,
            unwritten: self.unwritten,
            warnings: self.warnings,
            counts_unknown: false,
            pipes: self.pipes,
            did_not_fit: self.did_not_fit,
            copied_from_older: self.copied_from_older,
            recent: self.recent,
            copied: self.copied,
            several_names: self.several_names,
            met: self.met,
            listed: self.listed,
        }
    }

    /// rsync's exit codes: man page, EXIT VALUES.
    fn judge_exit(&self, status: ExitStatus) -> Ended {
        let forgiving = self.invocation.side == Side::IntoVolume;
        let none_unread = self.unread.is_empty()
            && self.unwritten.is_empty()
            && self.attributes_refused.is_empty()
            && self.attributes_lost.is_empty();
        match (status.code(), &self.first_failure) {
            (Some(0), None) if none_unread => Ended::Whole,
            (Some(24), None) if forgiving && none_unread => Ended::Whole,
            // rsync read from the source all files that it counts as not transferred.
            (Some(23), None) if none_unread && self.all_copied > 0 => Ended::Whole,
            (Some(0 | 23 | 24), None) if forgiving && !none_unread => Ended::WithUnread,
            (code, failure) => Ended::Failed {
                ended: match (code, status.signal()) {
                    (Some(code), _) => format!("exit code {code}"),
                    (None, Some(signal)) => format!("killed by signal {signal}"),
                    (None, None) => "no exit code".to_owned(),
                },
                message: failure
                    .clone()
                    .or_else(|| self.messages.names.first().cloned())
                    .or_else(|| self.not_followed.clone())
                    .unwrap_or_else(|| "it gave no reason".to_owned()),
            },
        }
    }
}
