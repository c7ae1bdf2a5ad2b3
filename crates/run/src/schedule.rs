//! Installs, removes and shows what starts sprat by itself: systemd timers, or a file for cron.

mod files;
mod systemd;
pub mod text;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;
use sprat_session::{Failure, trusted_file};

use crate::timer::{self, Minute, TimerFile};
pub use files::{FileState, InstalledFile};
pub use systemd::TimerState;

/// The folders and the program that a schedule needs.
#[derive(Debug, Clone)]
pub struct Places {
    /// The admin's units: `/etc/systemd/system`.
    pub units: PathBuf,
    /// The folders with the units of packages.
    pub packaged: Vec<PathBuf>,
    /// `/etc/cron.d`.
    pub cron: PathBuf,
    /// It exists where systemd is PID 1: sd_booted(3).
    pub booted: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
    /// The files that identify this machine; the first that exists counts.
    pub machine_ids: Vec<PathBuf>,
    /// systemctl: a name, to be found in PATH, or a path.
    pub systemctl: OsString,
}

impl Places {
    /// This machine's.
    #[must_use]
    pub fn of_this_machine() -> Self {
        Self::below(Path::new("/"))
    }

    /// The same folders below another root. systemctl stays the one in PATH.
    #[must_use]
    pub fn below(root: &Path) -> Self {
        let packaged = [
            "usr/local/lib/systemd/system",
            "usr/lib/systemd/system",
            "lib/systemd/system",
        ];
        Self {
            units: root.join("etc/systemd/system"),
            packaged: packaged.map(|folder| root.join(folder)).to_vec(),
            cron: root.join("etc/cron.d"),
            booted: root.join("run/systemd/system"),
            proc: root.join("proc"),
            machine_ids: ["etc/machine-id", "var/lib/dbus/machine-id", "etc/hostname"]
                .map(|file| root.join(file))
                .to_vec(),
            systemctl: "systemctl".into(),
        }
    }

    fn has_systemd(&self) -> bool {
        self.booted.is_dir()
    }

    /// A package has brought all units.
    fn has_packaged_units(&self) -> bool {
        let names = timer::packaged_units().map(|unit| unit.name);
        let holds_all = |folder: &PathBuf| names.iter().all(|name| folder.join(name).is_file());
        self.packaged.iter().any(holds_all)
    }

    fn minute(&self) -> Minute {
        Minute::of(&self.machine_id())
    }

    /// What tells this machine from others; empty if nothing does.
    #[must_use]
    pub fn machine_id(&self) -> String {
        let read = |path: &PathBuf| std::fs::read_to_string(path).ok();
        self.machine_ids.iter().find_map(read).unwrap_or_default()
    }

    fn cron_runs(&self) -> bool {
        let Ok(processes) = std::fs::read_dir(&self.proc) else {
            return false;
        };
        let is_cron = |name: String| ["cron", "crond"].contains(&name.trim());
        processes
            .flatten()
            .filter_map(|process| std::fs::read_to_string(process.path().join("comm")).ok())
            .any(is_cron)
    }

    /// A file's path.
    fn path(&self, name: &str) -> PathBuf {
        let is_cron = name == timer::CRON_FILE;
        let folder = if is_cron { &self.cron } else { &self.units };
        folder.join(name)
    }
}

/// What starts sprat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// systemd is PID 1.
    Systemd,
    /// Any other machine.
    Cron,
}

/// What `install` or `remove` did.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Files that were written.
    pub written: Vec<PathBuf>,
    /// Files that were deleted.
    pub deleted: Vec<PathBuf>,
    /// Files that were left as they are, although sprat would have written or deleted them: somebody
    /// changed or wrote them.
    pub left: Vec<PathBuf>,
    /// The timers that were enabled and started, or disabled and stopped.
    pub timers: Vec<&'static str>,
}

impl Changes {
    /// Nothing was done.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.written.is_empty() && self.deleted.is_empty() && self.timers.is_empty()
    }
}

/// What is installed.
#[derive(Debug, Serialize)]
pub struct Installed {
    /// What would start sprat on this machine.
    pub scheduler: Scheduler,
    /// It is installed, and will start sprat.
    pub active: bool,
    /// sprat's files that are there.
    pub files: Vec<InstalledFile>,
    /// The timers of systemd that exist.
    pub timers: Vec<TimerState>,
    /// When cron starts `sprat run` next.
    pub cron_next: Option<Timestamp>,
    /// A cron daemon runs; null where systemd is PID 1.
    pub cron_runs: Option<bool>,
}

/// The schedule of this machine.
#[derive(Debug)]
pub struct Schedule {
    places: Places,
    scheduler: Scheduler,
}

impl Schedule {
    /// Finds out which scheduler the machine has.
    #[must_use]
    pub fn new(places: Places) -> Self {
        let scheduler = if places.has_systemd() {
            Scheduler::Systemd
        } else {
            Scheduler::Cron
        };
        Self { places, scheduler }
    }

    /// What starts sprat on this machine.
    #[must_use]
    pub fn scheduler(&self) -> Scheduler {
        self.scheduler
    }

    /// The files that `install` writes, with their texts. `program` is sprat's path.
    ///
    /// # Errors
    /// The program's path can't be written into them.
    pub fn texts(&self, program: &Path) -> Result<Vec<(PathBuf, String)>, Failure> {
        let program = timer::program_path(program).map_err(|what| refused(&what))?;
        let minute = self.places.minute();
        let files: Vec<TimerFile> = match self.scheduler {
            Scheduler::Cron => vec![timer::cron(program, minute)],
            Scheduler::Systemd if self.places.has_packaged_units() => {
                timer::minute_drop_ins(minute).into()
            }
            Scheduler::Systemd => timer::units(program, minute).into(),
        };
        let with_path = |file: &TimerFile| {
            (
                self.places.path(file.name),
                timer::signed(file.text.as_str()),
            )
        };
        Ok(files.iter().map(with_path).collect())
    }

    /// Installs the schedule, or what is missing of it.
    ///
    /// # Errors
    /// Others than root can replace the program; a file of somebody else has the name of one that must
    /// be written; writing or systemctl fails. In the first two cases nothing was changed.
    pub fn install(&self, program: &Path) -> Result<Changes, Failure> {
        refuse_replaceable(program)?;
        let texts = self.texts(program)?;
        self.refuse_other_authors(&texts)?;
        if self.scheduler == Scheduler::Cron && !self.places.cron.is_dir() {
            let folder = self.places.cron.display();
            return Err(Failure::failed(format!(
                "there is neither systemd nor a cron that reads {folder}"
            ))
            .with_hint(
                "nothing was changed. `sprat schedule install --print` prints the two commands: call \
                 them as root every 15 minutes and every hour",
            ));
        }
        let mut changes = Changes::default();
        // A file of the other scheduler, or a unit that hides the one of a package.
        let is_wanted = |path: &PathBuf| texts.iter().any(|(wanted, _)| wanted == path);
        for path in self.known_paths() {
            if !is_wanted(&path) {
                files::delete(&path, &mut changes)?;
            }
        }
        for (path, text) in &texts {
            files::write(path, text, &mut changes)?;
        }
        if self.scheduler == Scheduler::Systemd {
            self.reload_after(&changes)?;
            let systemctl = self.systemctl();
            let states = systemctl.timers()?;
            if !states.iter().all(|timer| timer.enabled && timer.active) {
                systemctl.enable(&timer::TIMERS)?;
                changes.timers = timer::TIMERS.to_vec();
            }
        }
        Ok(changes)
    }

    /// Removes what `install` installed.
    ///
    /// # Errors
    /// Deleting or systemctl fails.
    pub fn remove(&self) -> Result<Changes, Failure> {
        let mut changes = Changes::default();
        if self.scheduler == Scheduler::Systemd {
            let systemctl = self.systemctl();
            let states = systemctl.timers()?;
            let is_on = |timer: &&TimerState| timer.enabled || timer.active;
            let on = states.iter().filter(is_on).map(|timer| timer.unit);
            // A unit with this name that somebody else wrote may do something else.
            let ours: Vec<&'static str> = on.filter(|unit| !self.is_foreign(unit)).collect();
            if !ours.is_empty() {
                systemctl.disable(&ours)?;
            }
            changes.timers = ours;
        }
        for path in self.known_paths() {
            files::delete(&path, &mut changes)?;
        }
        if self.scheduler == Scheduler::Systemd {
            self.reload_after(&changes)?;
        }
        Ok(changes)
    }

    /// What is installed now.
    ///
    /// # Errors
    /// systemctl can't be run.
    pub fn installed(&self, now: Timestamp) -> Result<Installed, Failure> {
        let paths = self.known_paths();
        let files: Vec<InstalledFile> = paths.iter().filter_map(files::installed).collect();
        let mut installed = Installed {
            scheduler: self.scheduler,
            active: false,
            files,
            timers: Vec::new(),
            cron_next: None,
            cron_runs: None,
        };
        match self.scheduler {
            Scheduler::Systemd => {
                let timers = self.systemctl().timers()?;
                installed.active = timers.iter().all(|timer| timer.enabled && timer.active);
                installed.timers = timers.into_iter().filter(|timer| timer.exists).collect();
            }
            Scheduler::Cron => {
                let path = self.places.cron.join(timer::CRON_FILE);
                let runs = self.places.cron_runs();
                let minutes = timer::cron_minutes(&files::read(&path).unwrap_or_default());
                installed.cron_next = minutes.and_then(|minutes| next_of(&minutes, now));
                installed.cron_runs = Some(runs);
                installed.active = runs && installed.cron_next.is_some();
            }
        }
        Ok(installed)
    }

    fn systemctl(&self) -> systemd::Systemctl<'_> {
        systemd::Systemctl(&self.places.systemctl)
    }

    /// Every file that `install` could have written.
    fn known_paths(&self) -> Vec<PathBuf> {
        let names = timer::FILE_NAMES.iter();
        names.map(|name| self.places.path(name)).collect()
    }

    fn is_foreign(&self, unit: &str) -> bool {
        let path = self.places.units.join(unit);
        files::installed(&path).is_some_and(|file| file.state == FileState::Foreign)
    }

    fn refuse_other_authors(&self, texts: &[(PathBuf, String)]) -> Result<(), Failure> {
        let foreign = texts.iter().filter_map(|(path, _)| files::installed(path));
        let foreign: Vec<String> = foreign
            .filter(|file| file.state == FileState::Foreign)
            .map(|file| file.path.display().to_string())
            .collect();
        if foreign.is_empty() {
            return Ok(());
        }
        Err(Failure::failed(format!(
            "there are files that `sprat schedule install` did not write: {}",
            foreign.join(", ")
        ))
        .with_hint(
            "nothing was changed. If you don't need them, disable what they start, delete them, and run \
             the command again",
        ))
    }

    fn reload_after(&self, changes: &Changes) -> Result<(), Failure> {
        let is_unit = |path: &PathBuf| path.starts_with(&self.places.units);
        if changes.written.iter().chain(&changes.deleted).any(is_unit) {
            return self.systemctl().reload();
        }
        Ok(())
    }
}

/// Refuses a program that root must not start by itself.
///
/// # Errors
/// Others than root can replace it.
pub fn refuse_replaceable(program: &Path) -> Result<(), Failure> {
    let why = match trusted_file::writable_by_others(program) {
        Ok(None) => return Ok(()),
        Ok(Some(why)) => why,
        Err(error) => error.to_string(),
    };
    Err(refused(&format!(
        "others than root could replace {}: {why}",
        program.display()
    )))
}

fn refused(what: &str) -> Failure {
    Failure::usage(format!("this sprat can't be started by a timer: {what}")).with_hint(
        "nothing was changed. Install sprat as root, for example as /usr/local/bin/sprat, and run that",
    )
}

/// The next of these minutes of an hour after `now`. Every time zone differs from UTC by a multiple of
/// 15 minutes, and so do the runs.
fn next_of(minutes: &[u8], now: Timestamp) -> Option<Timestamp> {
    let minute_s = 60;
    let start = now.as_second().div_euclid(minute_s) + 1;
    let is_run = |minute: &i64| {
        let of_hour = minute.rem_euclid(60);
        minutes.iter().any(|run| i64::from(*run) == of_hour)
    };
    let next = (start..start + 60).find(is_run)?;
    Timestamp::from_second(next * minute_s).ok()
}

#[cfg(test)]
mod tests;
