//! What a run does with a container beside its copies, outside of all hooks of jobs: a slice of the check
//! each day, a drill when it is due, and a trim where it frees much. Each has a session of its own.

use std::time::Duration;

use jiff::Timestamp;
use sprat_session::check::Checked;
use sprat_session::drill::Drilled;
use sprat_session::status::{ContainerStatus, LocalStatus};
use sprat_session::{Exit, Failure, TrimReport, TrimRoute, VolumeRoom, Worthwhile, text};
use sprat_snapshot::NameList;

use super::checks::while_allowed;
use super::named_files::naming;
use super::source_slice::{SourceSlice, sources_text};
use super::{ContainerWork, Front, Runner};
use crate::config::Container;
use crate::copy_state::{ContainerState, container_file};
use crate::drill_text;
use crate::due::add_less_slack;
use crate::notify::By;
use crate::run_history::RunHistory;
use crate::times::is_ahead;

pub(super) const DAY: Duration = Duration::from_secs(86_400);
/// After a failure, a slice or a drill waits for so long.
pub(super) const RETRY: Duration = Duration::from_secs(3600);
/// A container is trimmed once in this time, at most.
const TRIM_INTERVAL: Duration = Duration::from_secs(7 * 86_400);
/// From when on a trim is worth its session.
const WORTHWHILE: Worthwhile = Worthwhile {
    bytes: 10 << 30,
    percent: 10,
};
/// How often it is checked that the connection is not metered.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// A part of a check of all data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// As [`sprat_snapshot::CheckSpec::bytes_max`].
    pub bytes_max: u64,
    /// As [`sprat_snapshot::CheckSpec::duration_max`].
    pub duration_max: Duration,
    /// The structures of the file system are checked, too: once in `check_every`.
    pub file_system: bool,
}

/// What was done beside the copies.
#[derive(Debug, Default)]
pub struct Upkeep {
    /// The slice that was read.
    pub slice: Option<SliceDone>,
    /// The drill that was done.
    pub drill: Option<Drilled>,
    /// Source files that were read again, of each job.
    pub sources: Vec<SourceSlice>,
    /// What a trim released, in bytes.
    pub released_bytes: Option<u64>,
    /// What failed, or what the check or the drill found.
    pub failures: Vec<Failure>,
}

/// A slice that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceDone {
    /// Its files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Everything is read: the next slice begins again.
    pub finished: bool,
    /// [`Exit::Done`] or [`Exit::Damaged`].
    pub exit: Exit,
}

/// What was done beside the copies, as text.
#[must_use]
pub fn upkeep_text(name: &str, done: &Upkeep) -> String {
    let mut said = String::new();
    if let Some(slice) = &done.slice {
        said.push_str(&format!(
            "{name}: checked {} ({}){}\n",
            text::counted(slice.files, "file", "files"),
            text::bytes(slice.bytes),
            match slice.finished {
                true => "; now all data is checked, and the next check begins",
                false => "; the next slice of the check goes on there",
            }
        ));
    }
    if let Some(drilled) = &done.drill {
        said.push_str(&drill_text::summary(name, drilled));
    }
    if let Some(released) = done.released_bytes {
        said.push_str(&format!(
            "{name}: {} released by a trim\n",
            text::bytes(released)
        ));
    }
    said.push_str(&sources_text(&done.sources));
    said
}

impl Upkeep {
    /// The exit codes of all that was done.
    pub(super) fn exits(&self) -> impl Iterator<Item = Exit> {
        let failures = self.failures.iter().map(|failure| failure.exit);
        let drill = self.drill.as_ref().map(Drilled::exit);
        failures
            .chain(self.slice.map(|slice| slice.exit))
            .chain(drill)
    }
}

impl Runner<'_> {
    /// The slice that is due in a container now; `None`: none is, or it may not be read now.
    pub(super) fn slice_due(&self, container: &Container, now: Timestamp) -> Option<Slice> {
        let every = container.check_every?;
        let state = container_file(&self.state_dir, &container.name).read();
        if !is_time(state.sliced, DAY, now) || !is_time(state.slice_tried, RETRY, now) {
            return None;
        }
        let known = self.known(container)?;
        let room = known.history.room.as_ref()?.room;
        if self.why_not_now(container).is_some() {
            return None;
        }
        let whole = known.checks.quick.as_ref();
        let is_recent = whole
            .is_some_and(|quick| quick.exit == Exit::Done && !is_time(Some(quick.at), every, now));
        let new_bytes = state
            .sliced
            .map_or(0, |last| self.new_bytes(container, last));
        Some(Slice {
            bytes_max: slice_bytes(&room, every).saturating_add(new_bytes),
            duration_max: container.check_budget,
            file_system: !is_recent,
        })
    }

    /// Does what is due beside the copies. `opened`: the container was opened for copies, and closed in
    /// order.
    pub(super) fn upkeep(
        &self,
        work: &ContainerWork<'_>,
        opened: bool,
        front: &mut dyn Front,
    ) -> Upkeep {
        let mut done = Upkeep::default();
        let Some(container) = work.container.filter(|_| self.by == By::Run) else {
            return done;
        };
        let may = |runner: &Self| !runner.interrupt.requested();
        let is_alone = work.copies.is_empty();
        if (opened || is_alone)
            && may(self)
            && let Some(slice) = self.slice_due(container, Timestamp::now())
        {
            self.slice(container, &slice, &mut done, front);
        }
        if (opened || is_alone) && may(self) && self.is_drill_due(container, Timestamp::now()) {
            self.drill(container, &mut done, front);
        }
        if opened && may(self) && self.trim_due(container, Timestamp::now()) {
            self.trim(container, &mut done, front);
        }
        done
    }

    /// A hook of the container kept a slice from being read, or a drill from being done.
    pub(super) fn no_slice(&self, work: &ContainerWork<'_>, failure: Option<Failure>) -> Upkeep {
        let now = Timestamp::now();
        self.change_container(&work.name, |state| {
            (state.slice_tried, state.drill_tried) = (Some(now), Some(now));
        });
        Upkeep {
            failures: failure.into_iter().collect(),
            ..Upkeep::default()
        }
    }

    fn slice(
        &self,
        container: &Container,
        slice: &Slice,
        done: &mut Upkeep,
        front: &mut dyn Front,
    ) {
        let (name, now) = (&container.name, Timestamp::now());
        self.change_container(name, |state| state.slice_tried = Some(now));
        let check = || self.why_not_now(container);
        let read = while_allowed(self.interrupt, CHECK_INTERVAL, check, |interrupt| {
            front.check_slice(name, slice, interrupt)
        });
        match read.and_then(|(read, _)| read) {
            Ok(checked) => {
                self.change_container(name, |state| state.sliced = Some(now));
                done.failures.extend(damage(name, &checked));
                let report = checked.files.and_then(Result::ok).unwrap_or_default();
                done.slice = Some(SliceDone {
                    files: report.files_read,
                    bytes: report.bytes_read,
                    finished: report.finished,
                    exit: match done.failures.is_empty() {
                        true => Exit::Done,
                        false => Exit::Damaged,
                    },
                });
            }
            Err(failure) => self.failed(failure, &format!("{name}: the check"), done),
        }
    }

    fn trim_due(&self, container: &Container, now: Timestamp) -> bool {
        let state = container_file(&self.state_dir, &container.name).read();
        let free = || {
            let known = self.known(container)?;
            Some(known.history.room?.room.available_bytes)
        };
        container.trim
            && is_time(state.trimmed, TRIM_INTERVAL, now)
            // No more than what is free in the volume can come back.
            && free().is_some_and(|free| free >= WORTHWHILE.bytes)
            && self.why_not_now(container).is_none()
    }

    fn trim(&self, container: &Container, done: &mut Upkeep, front: &mut dyn Front) {
        let (name, now) = (&container.name, Timestamp::now());
        let check = || self.why_not_now(container);
        let trimmed = while_allowed(self.interrupt, CHECK_INTERVAL, check, |interrupt| {
            front.trim(name, WORTHWHILE, interrupt)
        });
        match trimmed.and_then(|(trimmed, _)| trimmed) {
            Ok(report) => {
                self.change_container(name, |state| state.trimmed = Some(now));
                done.released_bytes = released(&report);
            }
            Err(failure) => self.failed(failure, &format!("{name}: the trim"), done),
        }
    }

    /// A server that is away, and a lock, are tried again later.
    pub(super) fn failed(&self, failure: Failure, what: &str, done: &mut Upkeep) {
        tracing::info!(?failure, what, "did not end");
        let is_quiet = match failure.exit {
            Exit::Unreachable | Exit::Locked => true,
            Exit::Interrupted => !self.interrupt.requested(),
            _ => false,
        };
        if !is_quiet {
            let verb = match failure.exit {
                Exit::Interrupted => "was interrupted",
                _ => "failed",
            };
            done.failures
                .push(failure.context(format!("{what} {verb}")));
        }
    }

    /// Why a session without a copy may not begin now, or must stop.
    pub(super) fn why_not_now(&self, container: &Container) -> Option<String> {
        match container.target.local_path() {
            Some(file) => (!file.exists()).then(|| "its disk is not there".to_owned()),
            None => self.machine.not_metered().reason(),
        }
    }

    /// Bytes of new files that copies have stored since `last`. A slice reads the newest snapshot first: where
    /// a day brings more than a slice, the rest would never be read.
    fn new_bytes(&self, container: &Container, last: Timestamp) -> u64 {
        let history = RunHistory::new(&self.state_dir);
        let copies = self.config.copies();
        let of_it = copies.filter(|copy| copy.container.name == container.name);
        let lines = of_it.flat_map(|copy| history.load(&copy.name()).unwrap_or_default());
        let new = lines.filter(|line| line.ended > last && line.snapshot.is_some());
        new.filter_map(|line| line.copied_bytes).sum()
    }

    pub(super) fn known(&self, container: &Container) -> Option<LocalStatus> {
        let read = ContainerStatus::read(&self.state_dir, &container.target, Vec::new(), None);
        read.known.unwrap_or_default()
    }

    pub(super) fn change_container(&self, name: &str, change: impl FnOnce(&mut ContainerState)) {
        let mut file = container_file(&self.state_dir, name);
        file.change(change);
        self.report_problems(file.take_problems());
    }
}

/// Whether `wait` has passed since `last`.
pub(super) fn is_time(last: Option<Timestamp>, wait: Duration, now: Timestamp) -> bool {
    let last = last.filter(|last| !is_ahead(*last, now));
    last.is_none_or(|last| add_less_slack(last, wait) <= now)
}

/// A day's part of the used bytes.
fn slice_bytes(room: &VolumeRoom, every: Duration) -> u64 {
    let used = room.total_bytes.saturating_sub(room.available_bytes);
    let days = (every.as_secs() / DAY.as_secs()).max(1);
    used.div_ceil(days).max(1)
}

fn released(report: &TrimReport) -> Option<u64> {
    let measure = report.measure.as_ref()?;
    (report.route != TrimRoute::NotWorthwhile).then_some(measure.given_back_bytes)
}

/// What is damaged, if anything is.
fn damage(name: &str, checked: &Checked) -> Option<Failure> {
    if !checked.is_damaged() {
        return None;
    }
    let failure = Failure::new(Exit::Damaged, format!("{name}: the check found damage"));
    let report = checked.files.as_ref().and_then(|files| files.as_ref().ok());
    let lists = report.map(|report| [&report.damaged, &report.unreadable]);
    let names = lists
        .into_iter()
        .flatten()
        .flat_map(|list: &NameList| &list.names);
    Some(naming(failure, names).with_hint(format!(
        "snapshots that are not named here are good, as far as they were checked. `sprat check {name}` \
         shows more; docs/recovery.md says what to do"
    )))
}

#[cfg(test)]
mod tests {
    use sprat_session::interrupt::Interrupt;
    use sprat_session::message_bus::{Bus, Values};
    use sprat_testkit::private_bus::PrivateBus;
    use sprat_testkit::{needs, requires};

    use super::*;
    use crate::config::{ConfigPlaces, load};

    #[test]
    fn only_a_container_on_a_server_waits_for_a_connection_that_is_not_metered() {
        requires!(needs::program("dbus-daemon"));
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let text = format!(
            "[container.nas]\ntarget = \"host:x.luks\"\n[container.usb]\ntarget = \"{}/x.luks\"\n",
            at.display()
        );
        std::fs::write(at.join("sprat.toml"), text).unwrap();
        let loaded = load(&[at.join("sprat.toml")], &ConfigPlaces::default());
        let config = loaded.without_mistakes().unwrap();
        let (nas, usb) = (&config.containers[0], &config.containers[1]);
        let interrupt = Interrupt::never().unwrap();
        let (state, run) = (at.join("state"), at.join("run"));
        let mut runner = Runner::new(&config, state, run, &interrupt, By::Run);
        let daemon = PrivateBus::start();
        runner.machine.bus = Some(daemon.socket());
        assert!(runner.why_not_now(usb).unwrap().contains("disk"));
        std::fs::write(at.join("x.luks"), "").unwrap();
        assert_eq!(runner.why_not_now(usb), None);

        let mut service = Bus::at(&daemon.socket()).unwrap();
        let name = "org.freedesktop.NetworkManager";
        service.request_name(name).unwrap();
        for (metered, stops) in [(1, true), (2, false)] {
            let why = std::thread::scope(|scope| {
                let asked = scope.spawn(|| runner.why_not_now(nas));
                let call = loop {
                    let call = service.next(Duration::from_secs(10)).unwrap();
                    let call = call.expect("nobody asks");
                    if call.member == "Get" {
                        break call;
                    }
                };
                let mut values = Values::default();
                values.signature("u");
                values.number(metered);
                service.answer(&call, ("v", values), None).unwrap();
                asked.join().unwrap()
            });
            assert_eq!(why.is_some(), stops, "{metered}: {why:?}");
        }
    }

    #[test]
    fn slice_of_each_day_reads_everything_within_the_period() {
        let room = |used: u64| VolumeRoom {
            total_bytes: 1 << 40,
            available_bytes: (1 << 40) - used,
            inodes: 1,
            free_inodes: 1,
            metadata: None,
        };
        let days = |number: u32| DAY * number;
        for (used, period, bytes) in [
            (90_000, days(90), 1000),
            (90_001, days(90), 1001),
            (5, days(90), 1),
            (0, days(90), 1),
            (1000, days(1), 1000),
        ] {
            assert_eq!(slice_bytes(&room(used), period), bytes, "{used}");
            assert!(bytes * (period.as_secs() / DAY.as_secs()) >= used);
        }
    }

    #[test]
    fn slice_is_due_once_a_day_and_after_a_failure_once_an_hour() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let now = at("2026-11-28T09:00Z");
        assert!(is_time(None, DAY, now));
        for (last, wait, is) in [
            ("2026-11-28T08:45Z", RETRY, false),
            ("2026-11-28T08:00Z", RETRY, true),
            ("2026-11-27T09:30Z", DAY, false),
            ("2026-11-27T09:05Z", DAY, true),
            // The clock was wrong.
            ("2027-11-27T09:05Z", DAY, true),
        ] {
            assert_eq!(is_time(Some(at(last)), wait, now), is, "{last}");
        }
    }

    #[test]
    fn trim_is_worth_10_gib_and_10_percent() {
        const GIB: u64 = 1 << 30;
        for (allocated, needed, is) in [
            (100 * GIB, 90 * GIB, true),
            (101 * GIB, 91 * GIB, false),
            (20 * GIB, 11 * GIB, false),
            (20 * GIB, 10 * GIB, true),
            (10 * GIB, 20 * GIB, false),
            (1000 * GIB, 900 * GIB, true),
            (1000 * GIB, 901 * GIB, false),
        ] {
            let worth = WORTHWHILE.is_reached(allocated, needed);
            assert_eq!(worth, is, "{allocated} {needed}");
        }
    }
}
