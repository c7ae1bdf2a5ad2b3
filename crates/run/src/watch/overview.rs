//! What the state folder knows of each copy and container of the config.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use sprat_session::state::checks::KeptCheck;
use sprat_session::status::{ContainerStatus, LocalStatus};
use sprat_session::{Exit, Failure};

use super::{WatchView, Watched};
use crate::config::Copy;
use crate::copy_name::CopyName;
use crate::copy_state::{self, CopyState, Place};
use crate::due::{self, Decision};
use crate::notify::{Event, Kind};
use crate::overdue::{is_overdue, overdue_at};
use crate::run_history::{RunHistory, RunLine};

/// All of it, at one time.
#[derive(Debug)]
pub struct Overview {
    /// The copies of the config, in its order.
    pub copies: Vec<CopyView>,
    /// The containers of the config, in its order.
    pub containers: Vec<ContainerView>,
    /// The watched files of the config, in its order.
    pub watches: Vec<WatchView>,
    /// The attempts at each copy; `None`: they can't be read.
    pub(super) attempts: Vec<Option<Vec<RunLine>>>,
    /// What can't be read: nothing is known of that, not even that all is well.
    pub(super) unread: Vec<String>,
}

/// One copy.
#[derive(Debug)]
pub struct CopyView {
    /// Which.
    pub copy: CopyName,
    /// What is known of it.
    pub state: CopyState,
    /// Overdue so long after its last success; `None`: never.
    pub alert_after: Option<Duration>,
    /// Whether it is overdue.
    pub is_overdue: bool,
    /// Since when, or from when on without a success.
    pub overdue_at: Option<Timestamp>,
    /// Whether it is due, and when next.
    pub decision: Decision,
    /// Why its state can't be read: what is in `state` is not known.
    pub unread: Option<String>,
}

/// One container.
#[derive(Debug)]
pub struct ContainerView {
    /// Its name in the config.
    pub name: String,
    /// What its sessions left here; `None` before the first one, or if a part of it can't be read.
    pub known: Option<LocalStatus>,
    /// Whether a part of that can't be read.
    pub is_unread: bool,
    /// `min_free`.
    pub min_free: u64,
    /// `check_every`.
    pub check_every: Option<Duration>,
}

impl Overview {
    /// Reads it.
    #[must_use]
    pub fn read(watched: &Watched<'_>, now: Timestamp) -> Self {
        let config = watched.config;
        let copies = config
            .copies()
            .map(|copy| CopyView::read(&copy, watched, now));
        let copies: Vec<CopyView> = copies.collect();
        let mut unread: Vec<String> = copies.iter().filter_map(|it| it.unread.clone()).collect();
        let containers = config.containers.iter().map(|container| {
            let jobs = config.jobs_of(&container.name);
            let status = ContainerStatus::read(&watched.state_dir, &container.target, jobs, None);
            let failure = status.failure();
            unread.extend(failure.as_ref().map(Failure::in_one_line));
            let known = status.known.ok().flatten();
            ContainerView {
                name: container.name.clone(),
                // Of the rest of it nobody may conclude that all is well.
                known: known.filter(|_| failure.is_none()),
                is_unread: failure.is_some(),
                min_free: container.min_free,
                check_every: container.check_every,
            }
        });
        let containers = containers.collect();
        let history = RunHistory::new(&watched.state_dir);
        let attempts = copies.iter().map(|view| match history.load(&view.copy) {
            Ok(lines) => Some(lines),
            Err(error) => {
                let path = history.path(&view.copy);
                unread.push(format!("can't read {}: {error}", path.display()));
                None
            }
        });
        let attempts = attempts.collect();
        Self {
            copies,
            containers,
            watches: WatchView::all(watched, now),
            attempts,
            unread,
        }
    }

    /// Whether a copy or a watched file is overdue.
    #[must_use]
    pub fn is_overdue(&self) -> bool {
        let copies = self.copies.iter().any(|copy| copy.is_overdue);
        copies || self.watches.iter().any(|watch| watch.is_overdue)
    }

    /// The code that `status` ends with, as far as this machine knows: the first that stands of 13, 4,
    /// 1, 14, 3 and 0.
    #[must_use]
    pub fn exit(&self, now: Timestamp) -> Exit {
        let copies = self.copies.iter().map(CopyView::exit);
        let containers = self.containers.iter().map(|container| container.exit(now));
        let overdue = self.is_overdue().then_some(Exit::Overdue);
        let unread = (!self.unread.is_empty()).then_some(Exit::Failed);
        worst(copies.chain(containers).chain(overdue).chain(unread))
    }
}

/// The code of open events: of damage that is not accepted yet, and of a hook or a prune that failed, which no attempt shows.
pub(super) fn of_events<'e>(open: impl Iterator<Item = &'e Event>) -> Exit {
    worst(open.map(|event| match event.key.kind {
        Kind::Damage => Exit::Damaged,
        Kind::Failure if event.is_of_later_step() => Exit::Failed,
        _ => Exit::Done,
    }))
}

/// Of several things: the one that `status` reports first.
pub fn worst(exits: impl Iterator<Item = Exit>) -> Exit {
    let rank = |exit: &Exit| match exit {
        Exit::Damaged => 7,
        Exit::NoContainer => 6,
        Exit::Overdue => 5,
        Exit::Unreachable => 3,
        Exit::Locked => 2,
        Exit::Unread => 1,
        Exit::Done | Exit::Interrupted => 0,
        _ => 4,
    };
    exits.max_by_key(rank).unwrap_or(Exit::Done)
}

impl CopyView {
    fn read(copy: &Copy<'_>, watched: &Watched<'_>, now: Timestamp) -> Self {
        let name = copy.name();
        let mut file = copy_state::copy_file(&watched.state_dir, &name);
        let mut state = file.read();
        let unread = file.take_problems();
        // The config may have changed since the last run.
        state.is_at(Place::of(&watched.state_dir, &copy.container.target), now);
        let alert_after = copy.job.alert_after;
        Self {
            is_overdue: is_overdue(alert_after, &state, now),
            overdue_at: overdue_at(alert_after, &state, now),
            decision: decide(copy, watched, &state, now),
            copy: name,
            state,
            alert_after,
            unread: (!unread.is_empty()).then(|| unread.join("; ")),
        }
    }

    /// The copies of the config in a container.
    #[must_use]
    pub fn in_container(watched: &Watched<'_>, container: &str, now: Timestamp) -> Vec<Self> {
        let copies = watched.config.copies();
        let copies = copies.filter(|copy| copy.container.name == container);
        copies.map(|copy| Self::read(&copy, watched, now)).collect()
    }

    /// What a monitor should report of it.
    #[must_use]
    pub fn exit(&self) -> Exit {
        if self.is_overdue {
            return Exit::Overdue;
        }
        if self.unread.is_some() {
            return Exit::Failed;
        }
        match self.state.last_attempt.as_ref().map(|last| last.exit) {
            Some(exit @ (Exit::Damaged | Exit::Unreachable | Exit::Unread)) => exit,
            // It may go on, or another session was there.
            None | Some(Exit::Done | Exit::Interrupted | Exit::Locked) => Exit::Done,
            Some(_) => Exit::Failed,
        }
    }
}

impl ContainerView {
    fn exit(&self, now: Timestamp) -> Exit {
        let Some(known) = &self.known else {
            return Exit::Done;
        };
        if known.is_damaged() {
            return Exit::Damaged;
        }
        match super::space::finding(&known.history, self.min_free, now) {
            Some(Some(_)) => Exit::Failed,
            _ => Exit::Done,
        }
    }

    /// When all data was last checked, and whether it was clean.
    #[must_use]
    pub fn check(&self) -> Option<&KeptCheck> {
        let check = self.known.as_ref()?.checks.read_data.as_ref()?;
        Some(check).filter(|check| check.finished)
    }

    /// When the last drill was, and whether it passed.
    #[must_use]
    pub fn drill(&self) -> Option<(Timestamp, bool)> {
        let drill = self.known.as_ref()?.checks.drill.as_ref()?;
        Some((drill.at, drill.exit == Exit::Done))
    }

    /// The check of all data is not through after 1.5 times its period.
    #[must_use]
    pub fn is_check_late(&self, now: Timestamp) -> bool {
        let since = self
            .known
            .as_ref()
            .and_then(|known| known.checks.read_data_since);
        // The first one may never be through.
        let from = self.check().map(|check| check.at).or(since);
        let (Some(every), Some(from)) = (self.check_every, from) else {
            return false;
        };
        let ago = now.duration_since(from);
        SignedDuration::try_from(every.saturating_mul(3) / 2).is_ok_and(|late| ago > late)
    }
}

/// When a copy is due, as if its config and its key file had not changed since its last attempt.
fn decide(copy: &Copy<'_>, watched: &Watched<'_>, state: &CopyState, now: Timestamp) -> Decision {
    let zone = watched.config.zone();
    let schedule = copy.schedule(&watched.machine_id);
    let last = state.last_attempt.as_ref();
    let inputs = last.map_or("", |last| &last.inputs);
    due::decide(&schedule, &zone, state, inputs, now)
}

/// All times in the state of the copies.
pub(super) fn times(watched: &Watched<'_>) -> Vec<Timestamp> {
    let copies = watched.config.copies();
    let states = copies.map(|copy| copy_state::copy_file(&watched.state_dir, &copy.name()).read());
    states
        .flat_map(|state| state.times().collect::<Vec<_>>())
        .collect()
}
