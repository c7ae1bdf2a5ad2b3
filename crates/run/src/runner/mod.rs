//! Makes copies: the hooks around them, one writing session for each container, and what is kept of each
//! attempt. `sprat run` makes the copies that are due, `sprat backup` those that a person names.
//!
//! Always true:
//! - A copy counts as made only after the session is closed: then it is on the server's disk.
//! - What hooks are owed is recorded before the first of them runs.
//! - Nothing is pruned while the clock is in doubt.

mod alarms;
mod around;
mod checks;
mod clock;
mod container;
mod drills;
mod named_files;
mod outcome;
mod prune;
mod record;
mod request;
mod run;
mod selection;
mod source_checks;
mod source_slice;
mod text;
mod upkeep;
mod warnings;

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use clock::RunClock;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sprat_session::address::Target;
use sprat_session::check::Checked;
use sprat_session::drill::Drilled;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Failure, Observer, Session, TrimReport, Worthwhile};
use sprat_snapshot::{FileSystem, SnapshotSpec};

use crate::conditions::Machine;
use crate::config::{Config, Container, Copy, Job};
use crate::copy_name::CopyName;
use crate::copy_state::{CopyState, Place, copy_file};
use crate::notify::By;
use crate::state_file::StateFile;

pub use alarms::file_list;
pub use around::OwedFailed;
pub use drills::drills_json;
pub use outcome::{
    ContainerDone, End, Outcome, attempts, hooks_of_containers, outcome_json, slices_json,
    with_states,
};
pub use request::{check_sources, source_path};
pub use run::{Plan, RunDone, RunReport};
pub use selection::{Selected, Selecting, inputs};
pub use source_checks::{old_content, sources_json};
pub use source_slice::SourceSlice;
pub use text::{closed_text, content_names, outcome_text, plan_table};
pub use upkeep::{Slice, SliceDone, Upkeep, upkeep_text};
pub use warnings::warning_lines;

/// What the command line does for the runner.
pub trait Front {
    /// Opens a session that writes to a container.
    ///
    /// # Errors
    /// The container can't be opened.
    fn open(&mut self, container: &str) -> Result<Session, Failure>;

    /// An attempt at a copy begins.
    fn begins(&mut self, copy: &CopyName);

    /// Reads a slice of a container's files in a session of its own, and keeps the result.
    ///
    /// # Errors
    /// It could not be checked. Damage is no error.
    fn check_slice(
        &mut self,
        container: &str,
        slice: &Slice,
        interrupt: &Interrupt,
    ) -> Result<Checked, Failure>;

    /// Restores a sample in a session of its own, and keeps the result.
    ///
    /// # Errors
    /// Nothing could be restored. Damage is no error.
    fn drill(&mut self, container: &str, interrupt: &Interrupt) -> Result<Drilled, Failure>;

    /// Releases unused space in a session of its own, if that is worth it.
    ///
    /// # Errors
    /// It failed, or no holes can be made there.
    fn trim(
        &mut self,
        container: &str,
        worthwhile: Worthwhile,
        interrupt: &Interrupt,
    ) -> Result<TrimReport, Failure>;

    /// Shows progress and notices, about `subject` from now on.
    fn observer(&mut self, subject: &str) -> &mut dyn Observer;
}

/// Makes copies on this machine.
#[derive(Debug)]
pub struct Runner<'a> {
    /// The config, as far as it is right.
    pub config: &'a Config,
    /// The state folder.
    pub state_dir: PathBuf,
    /// The runtime folder.
    pub runtime_dir: PathBuf,
    /// Asks to end in order.
    pub interrupt: &'a Interrupt,
    /// `run` or `backup`.
    pub by: By,
    /// The run's id.
    pub run: String,
    /// Where conditions are checked.
    pub machine: Machine,
    /// Identifies this machine: for `spread`.
    pub machine_id: String,
    clock: RunClock,
    /// A person asked: as if due and all conditions met.
    pub anyway: bool,
    problems: Mutex<Vec<String>>,
}

/// The copies of one session.
#[derive(Debug)]
pub struct ContainerWork<'a> {
    /// The container's name.
    pub name: String,
    /// Its location.
    pub target: Target,
    /// Its entry in the config; `None`: it has none.
    pub container: Option<&'a Container>,
    /// The copies, in their order.
    pub copies: Vec<CopyWork<'a>>,
}

/// One copy to make.
#[derive(Debug)]
pub struct CopyWork<'a> {
    /// Its name.
    pub name: CopyName,
    /// How it is called in text.
    pub shown: String,
    /// What is backed up.
    pub spec: SnapshotSpec,
    /// Its job in the config; `None`: it stands on the command line.
    pub job: Option<&'a Job>,
}

impl<'a> ContainerWork<'a> {
    /// The copies that the config has.
    pub fn of_config(&self) -> impl Iterator<Item = Copy<'a>> {
        let container = self.container;
        let copies = self.copies.iter();
        copies.filter_map(move |copy| {
            Some(Copy {
                job: copy.job?,
                container: container?,
            })
        })
    }
}

impl<'a> CopyWork<'a> {
    /// A copy of the config.
    #[must_use]
    pub fn of(copy: Copy<'a>) -> Self {
        let name = copy.name();
        let shown = match copy.job.containers.len() {
            0 | 1 => name.job.clone(),
            _ => name.to_string(),
        };
        Self {
            name,
            shown,
            spec: copy.job.spec(),
            job: Some(copy.job),
        }
    }
}

impl<'a> Runner<'a> {
    /// A runner with an id of its own.
    #[must_use]
    pub fn new(
        config: &'a Config,
        state_dir: PathBuf,
        runtime_dir: PathBuf,
        interrupt: &'a Interrupt,
        by: By,
    ) -> Self {
        Self {
            config,
            state_dir,
            runtime_dir,
            interrupt,
            by,
            run: uuid::Uuid::new_v4().to_string(),
            machine: Machine::default(),
            machine_id: crate::schedule::Places::of_this_machine().machine_id(),
            clock: RunClock::default(),
            anyway: false,
            problems: Mutex::default(),
        }
    }

    /// Runs the hooks that a run owes which was killed, for these copies and their containers. Returns what
    /// failed.
    #[must_use]
    pub fn pay_owed_hooks(&self, copies: &[Copy<'_>]) -> Vec<OwedFailed> {
        let mut containers: Vec<&Container> = Vec::new();
        for copy in copies {
            if !containers
                .iter()
                .any(|known| known.name == copy.container.name)
            {
                containers.push(copy.container);
            }
        }
        let copies: Vec<_> = copies.iter().map(|copy| (copy.job, copy.name())).collect();
        around::pay(self, &copies, &containers)
    }

    /// Runs the hooks that a run owes which was killed, for all copies and containers of the config. Returns what
    /// failed.
    #[must_use]
    pub fn pay_all_owed_hooks(&self) -> Vec<OwedFailed> {
        let containers: Vec<&Container> = self.config.containers.iter().collect();
        let copies = self.config.copies();
        let copies: Vec<_> = copies.map(|copy| (copy.job, copy.name())).collect();
        around::pay(self, &copies, &containers)
    }

    /// Reports, once each, the hooks that a killed run owes for jobs and containers that are not in the config.
    /// For a config without mistakes: with one, a job may only seem to be gone.
    #[must_use]
    pub fn report_unknown_hooks(&self) -> Vec<OwedFailed> {
        around::report_unknown(self)
    }

    /// What could not be read or written in the state folder, each once.
    #[must_use]
    pub fn take_problems(&self) -> Vec<String> {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut problems)
    }

    fn selecting<'s>(&'s self, zone: &'s TimeZone, anyway: bool, now: Timestamp) -> Selecting<'s> {
        Selecting {
            zone,
            machine_id: &self.machine_id,
            machine: &self.machine,
            anyway,
            now,
        }
    }

    /// The file system on which a local container lay at the last success of any of its copies.
    fn disk_seen(&self, container: &str) -> Option<FileSystem> {
        let copies = self.config.copies();
        let of_it = copies.filter(|copy| copy.container.name == container);
        let states = of_it.map(|copy| self.state_of(&copy));
        let seen = states.filter(|state| state.file_system.is_some());
        seen.max_by_key(|state| state.last_success)?.file_system
    }

    fn state(&self, copy: &CopyName) -> CopyState {
        let mut file = copy_file(&self.state_dir, copy);
        let state = file.read();
        self.report_problems(problems_of(&mut file));
        state
    }

    /// What is known of a copy in the container that the config has now.
    fn state_of(&self, copy: &Copy<'_>) -> CopyState {
        let mut state = self.state(&copy.name());
        let place = Place::of(&self.state_dir, &copy.container.target);
        state.is_at(place, Timestamp::now());
        state
    }

    /// What is known of a copy, and the disk on which any copy last saw its container.
    fn state_with_disk(&self, copy: &Copy<'_>) -> CopyState {
        let mut state = self.state_of(copy);
        if copy.container.target.local_path().is_some() {
            state.file_system = self.disk_seen(&copy.container.name);
        }
        state
    }

    fn change(&self, copy: &CopyName, change: impl FnOnce(&mut CopyState)) {
        let mut file = copy_file(&self.state_dir, copy);
        file.change(change);
        self.report_problems(problems_of(&mut file));
    }

    fn report_problems(&self, more: Vec<String>) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        for problem in more {
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
    }
}

/// What could not be read or written of a state file.
fn problems_of<T>(file: &mut StateFile<T>) -> Vec<String>
where
    T: Default + Clone + PartialEq + Serialize + DeserializeOwned,
{
    file.take_problems()
}
