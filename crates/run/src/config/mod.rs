//! The config: containers, jobs, notices. All of it is checked before anything starts.
//!
//! The files are `sprat.toml` and `conf.d/*.toml` beside it. [`load`] returns what is right, and every
//! mistake with what it stops. A person's command refuses to start with any mistake; `run` does what it
//! can.

mod container;
mod files;
mod in_effect;
mod job;
mod keep;
mod mistake;
mod notify;
mod reader;
mod samples;
mod schedule;
mod show;
mod values;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::tz::TimeZone;
use sprat_session::Failure;
use sprat_session::address::Target;

pub use container::Container;
pub use files::{default_files, files_of};
pub use job::{Dump, Filters, Growth, GrowthRules, Job, SYSTEM_FOLDER, Sample, job_name};
pub use mistake::{Mistake, Stops};
pub use notify::{Digest, Notify, Watch};
pub use show::{Origin, Setting};
pub use values::{Source, UploadLimit, Words, join_words, split_words};

use crate::copy_name::CopyName;
use crate::due::{Schedule, spread_part};
use crate::suggest::near_miss;
use reader::{Reader, Table, only_table};

/// The longest time in a config: a hundred years. Sums of such times stay in the range of dates.
const TIME_MAX: Duration = Duration::from_secs(100 * 366 * 86_400);
/// Largest number of mistakes that a failure lists: a file that is not a config has very many.
const MISTAKES_MAX: usize = 20;

/// What reading a config needs to know of the machine and the user. Only the command line reads the environment.
#[derive(Debug, Clone, Default)]
pub struct ConfigPlaces {
    /// The user is root: a config that others can write to is refused.
    pub root: bool,
    /// The user's home folder, for `~/…`.
    pub home: Option<PathBuf>,
    /// The folder of `sprat.toml` and of the key files.
    pub folder: Option<PathBuf>,
}

/// The content of the config, as far as it is right.
#[derive(Debug)]
pub struct Config {
    /// The files that were read, in their order.
    pub files: Vec<PathBuf>,
    /// `time_zone`: for times of the day, days of retention and the digest.
    pub time_zone: String,
    /// `ssh_command` at the top: for every container without its own.
    pub ssh_command: Option<Words>,
    /// `public_status`.
    pub public_status: bool,
    /// `[container.NAME]`, in the order of the config.
    pub containers: Vec<Container>,
    /// `[job.NAME]`, in the order of the config.
    pub jobs: Vec<Job>,
    /// `[notify]`.
    pub notify: Notify,
    /// `[watch.NAME]`, in the order of the config.
    pub watches: Vec<Watch>,
    /// The copies that a mistake stops, as far as their names are known.
    pub stopped: Vec<CopyName>,
    /// Each key of the top and its origin, for `config show`.
    pub settings: Vec<Setting>,
    /// The warnings of a config without mistakes; [`load`] hands them out by themselves.
    pub warnings: Vec<Mistake>,
}

/// One job in one container.
#[derive(Debug, Clone, Copy)]
pub struct Copy<'c> {
    /// The job.
    pub job: &'c Job,
    /// The container.
    pub container: &'c Container,
}

impl Copy<'_> {
    /// Its name, such as `home@nas`.
    #[must_use]
    pub fn name(&self) -> CopyName {
        CopyName::new(self.job.name.as_str(), &*self.container.name)
    }

    /// When it is made: the job's schedule, with the copy's part of `spread`. `machine_id` names this
    /// machine.
    #[must_use]
    pub fn schedule(&self, machine_id: &str) -> Schedule {
        let job = self.job;
        let later = spread_part(
            job.spread,
            machine_id,
            job.name.as_str(),
            &self.container.name,
        );
        job.schedule.clone().later_by(later)
    }
}

/// What a word names where a container or a copy may stand.
#[derive(Debug)]
pub enum Named<'c> {
    /// A container.
    Container(&'c Container),
    /// The copies of a job, or one copy.
    Copies(Vec<Copy<'c>>),
}

/// Warns that nobody would learn of a failure.
const NO_CHANNEL: &str =
    "no channel in [notify]: failures and overdue copies are reported to nobody";

/// What to do about it.
pub const CHANNEL_HINT: &str =
    "[notify] in the config needs a channel, such as: mail = { to = \"root@example.org\" }";

/// A config that was read.
#[derive(Debug)]
pub struct Loaded {
    /// What is right.
    pub config: Config,
    /// The mistakes, in the order of files and lines.
    pub mistakes: Vec<Mistake>,
    /// The warnings, in the same order.
    pub warnings: Vec<Mistake>,
}

impl Loaded {
    /// The config, if it has no mistake.
    ///
    /// # Errors
    /// All mistakes, each with its place.
    pub fn without_mistakes(self) -> Result<Config, Failure> {
        if self.mistakes.is_empty() {
            let mut config = self.config;
            config.warnings = self.warnings;
            return Ok(config);
        }
        Err(refusal(&self.mistakes))
    }
}

/// Names these mistakes, each with its place.
#[must_use]
pub fn refusal(mistakes: &[Mistake]) -> Failure {
    let mut names: Vec<String> = Vec::new();
    for mistake in mistakes {
        let name = mistake.file.display().to_string();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let unread = mistakes.iter().all(|mistake| mistake.line.is_none());
    let what = if unread { "can't be used" } else { "is wrong" };
    let mut failure = Failure::usage(format!("the config {} {what}", names.join(", ")));
    for mistake in mistakes.iter().take(MISTAKES_MAX) {
        failure = failure.because(match (unread, names.len()) {
            (true, 1) => mistake.what.clone(),
            _ => mistake.to_string(),
        });
    }
    let more = mistakes.len().saturating_sub(MISTAKES_MAX);
    if more > 0 {
        failure = failure.because(format!("and {more} more mistakes"));
    }
    match unread {
        true => failure,
        false => failure.with_hint(
            "nothing was started. Correct the config. `sprat config check` shows all mistakes",
        ),
    }
}

/// Reads these files as one config.
pub fn load(files: &[PathBuf], places: &ConfigPlaces) -> Loaded {
    let (read, unread) = files::read(files, places);
    let reader = Reader::new(&read);
    let tops = reader.parse();
    let config = read_all(&reader, &tops, places, files);
    let (mistakes, warnings) = reader.into_findings();
    Loaded {
        config,
        mistakes: unread.into_iter().chain(mistakes).collect(),
        warnings,
    }
}

fn read_all<'i>(
    reader: &Reader<'i>,
    tops: &[(usize, toml::de::DeTable<'i>)],
    places: &ConfigPlaces,
    files: &[PathBuf],
) -> Config {
    let mut top = Table::top(reader, tops);
    let time_zone = top.value_or("time_zone", "local", |value| {
        let name = values::owned(value)?;
        match sprat_snapshot::time_zone(&name) {
            Ok(_) => Ok(name),
            Err(unknown) => Err(mistake::Wrong::because(unknown.to_string())),
        }
    });
    let ssh_command = top.value("ssh_command", values::command);
    let public_status = top.flag("public_status", true);
    for kind in ["container", "job", "watch"] {
        top.knows(kind);
    }
    let tables = reader.named_tables("container", tops, |name| Stops::Container(name.to_owned()));
    let names: Vec<String> = tables.iter().map(|(name, _)| name.clone()).collect();
    let mut containers: Vec<(Container, reader::Spot)> = Vec::new();
    for (name, layer) in tables {
        let spot = layer.spot.clone();
        let Some(read) = container::read(name, layer, reader, places) else {
            continue;
        };
        if let Some((other, _)) = containers.iter().find(|(one, _)| one.target == read.target) {
            let what = format!(
                "[container.{}] has the target of [container.{}]",
                read.name, other.name
            );
            reader.mistake(&spot, what);
        }
        containers.push((read, spot));
    }
    let defaults = only_table(&mut top, "job_defaults", Stops::EveryJob);
    if let Some(layer) = &defaults {
        job::check_defaults(layer, reader, places);
    }
    let mut jobs = Vec::new();
    for (name, layer) in reader.named_tables("job", tops, |name| Stops::Job(name.to_owned())) {
        let mut read = job::read(&name, layer, defaults.as_ref(), reader, places, &names);
        if let (Some(job), Some(words)) = (&mut read.job, &ssh_command) {
            job.ssh_command.clone_from(words);
        }
        jobs.push(read);
    }
    let mut watches = Vec::new();
    for (name, layer) in reader.named_tables("watch", tops, |_| Stops::Nothing) {
        watches.extend(notify::read_watch(name, layer, reader, places));
    }
    let notify = only_table(&mut top, "notify", Stops::Notices);
    let as_toml = notify.as_ref().map_or_else(String::new, notify::as_toml);
    let table = Table::of_layer(reader, "[notify]", notify);
    let notify = notify::read(table, &as_toml, places);
    let settings = top.finish(&[], "top");
    let stopped = reader.stopped();
    let is_right = |name: &str| !stopped.contains(&Stops::Container(name.to_owned()));
    let containers = containers.into_iter().map(|(container, _)| container);
    let containers: Vec<Container> = containers.filter(|one| is_right(&one.name)).collect();
    let (jobs, stopped) = sort_out(jobs, &containers, &stopped);
    Config {
        files: files.to_owned(),
        time_zone,
        ssh_command,
        public_status,
        containers,
        jobs,
        notify,
        watches,
        stopped,
        settings,
        warnings: Vec::new(),
    }
}

/// The jobs that are right, and the copies that a mistake stops.
fn sort_out(
    read: Vec<job::ReadJob>,
    containers: &[Container],
    stops: &BTreeSet<Stops>,
) -> (Vec<Job>, Vec<CopyName>) {
    let (mut jobs, mut stopped) = (Vec::new(), Vec::new());
    for read in read {
        let is_stopped = stops.contains(&Stops::EveryJob)
            || stops.contains(&Stops::Job(read.name.clone()))
            || read.job.is_none();
        for container in &read.containers {
            let is_there = containers.iter().any(|known| known.name == *container);
            if is_stopped || !is_there {
                stopped.push(CopyName::new(&*read.name, &**container));
            }
        }
        jobs.extend(read.job.filter(|_| !is_stopped));
    }
    (jobs, stopped)
}

impl Config {
    /// Reads the config as a person's command needs it: `named` (absolute, and must exist) alone, else the
    /// default one if there is one.
    ///
    /// # Errors
    /// It can't be read, or has mistakes: all of them are named, each with its line.
    pub fn load(named: Option<&Path>, places: &ConfigPlaces) -> Result<Self, Failure> {
        load(&files_of(named, places), places).without_mistakes()
    }

    /// `time_zone` with its rules.
    #[must_use]
    pub fn zone(&self) -> TimeZone {
        let zone = sprat_snapshot::time_zone(&self.time_zone);
        let zone = zone.or_else(|_| sprat_snapshot::time_zone(sprat_snapshot::LOCAL_ZONE));
        zone.unwrap_or(TimeZone::UTC)
    }

    /// The warnings about keys that have no effect yet.
    pub fn without_effect(&self) -> impl Iterator<Item = &Mistake> {
        let is_one = |warning: &&Mistake| warning.what.starts_with(in_effect::NOT_YET);
        self.warnings.iter().filter(is_one)
    }

    /// All copies, by containers in the order of the config, and in each by jobs.
    pub fn copies(&self) -> impl Iterator<Item = Copy<'_>> {
        self.containers.iter().flat_map(|container| {
            let jobs = self.jobs.iter();
            let jobs = jobs.filter(|job| job.is_in(&container.name));
            jobs.map(move |job| Copy { job, container })
        })
    }

    /// The copies that a word names: `JOB` in each of its containers, or `JOB@CONTAINER`.
    ///
    /// # Errors
    /// There is no such job, or it does not back up to that container; the hint names the likely one.
    pub fn copies_of(&self, word: &str) -> Result<Vec<Copy<'_>>, Failure> {
        let of = |job: &str, container: Option<&str>| -> Vec<Copy<'_>> {
            let copies = self.copies().filter(|copy| copy.job.name.as_str() == job);
            copies
                .filter(|copy| container.is_none_or(|name| copy.container.name == name))
                .collect()
        };
        let whole = of(word, None);
        let Some((job, container)) = word.rsplit_once('@').filter(|_| whole.is_empty()) else {
            self.job(word)?;
            return Ok(whole);
        };
        let found = of(job, Some(container));
        if !found.is_empty() {
            return Ok(found);
        }
        let job = self.job(job)?;
        let failure = Failure::usage(format!(
            "job {} does not back up to {container:?}",
            job.name
        ));
        let near = near_miss(container, job.containers.iter().map(String::as_str));
        Err(self.placed(failure).with_hint(match near {
            Some(near) => format!("did you mean {}@{near}?", job.name),
            None => format!("it backs up to {}", job.containers.join(", ")),
        }))
    }

    /// The copies that these words name, or all if there is no word.
    ///
    /// # Errors
    /// As [`Self::copies_of`], or a copy is named twice.
    pub fn copies_of_all(&self, words: &[impl AsRef<str>]) -> Result<Vec<Copy<'_>>, Failure> {
        if words.is_empty() {
            return Ok(self.copies().collect());
        }
        let mut copies: Vec<Copy<'_>> = Vec::new();
        for word in words {
            for copy in self.copies_of(word.as_ref())? {
                let name = copy.name();
                if copies.iter().any(|earlier| earlier.name() == name) {
                    let what = match copy.job.containers.len() {
                        1 => format!("job {} is named twice", name.job),
                        _ => format!("{name} is named twice"),
                    };
                    return Err(Failure::usage(what));
                }
                copies.push(copy);
            }
        }
        Ok(copies)
    }

    /// What a word names: a container, a job (`JOB`) or a copy (`JOB@CONTAINER`); `None`: the word is a
    /// location.
    ///
    /// # Errors
    /// There is nothing of this name, or a container and a job.
    pub fn named(&self, word: &str) -> Result<Option<Named<'_>>, Failure> {
        let container = self.containers.iter().find(|known| known.name == word);
        let is_job = self.jobs.iter().any(|job| job.name.as_str() == word);
        match (container, is_job) {
            (Some(container), true) => Err(self.ambiguous(word, container)),
            (Some(container), false) => Ok(Some(Named::Container(container))),
            (None, true) => self
                .copies_of(word)
                .map(|copies| Some(Named::Copies(copies))),
            (None, false) if Target::is_config_name(word) => self
                .container(word)
                .map(|found| Some(Named::Container(found))),
            // `user@host:path` and `folder/a@b.luks` are locations.
            (None, false) if word.contains('@') && !word.contains(['/', ':']) => self
                .copies_of(word)
                .map(|copies| Some(Named::Copies(copies))),
            (None, false) => Ok(None),
        }
    }

    fn ambiguous(&self, word: &str, container: &Container) -> Failure {
        let copies = self.copies().filter(|copy| copy.job.name.as_str() == word);
        let copies: Vec<String> = copies.map(|copy| copy.name().to_string()).collect();
        Failure::usage(format!("{word:?} is a container and a job")).with_hint(format!(
            "nothing was done. Write {} for the job, and {} for the container",
            copies.join(" or "),
            container.target
        ))
    }

    /// The names of a container's jobs.
    pub fn jobs_of(&self, container: &str) -> Vec<String> {
        let jobs = self.jobs.iter().filter(|job| job.is_in(container));
        jobs.map(|job| job.name.to_string()).collect()
    }

    /// Whether the container has a job of that name.
    pub fn has_job(&self, container: &str, job: &str) -> bool {
        self.jobs_of(container).iter().any(|known| known == job)
    }

    /// Warns if nobody learns of a failure.
    pub fn no_channel(&self) -> Option<Mistake> {
        let file = self.files.first()?;
        let is_watched = self.jobs.is_empty() || self.notify.has_channel();
        (!is_watched).then(|| Mistake {
            file: file.clone(),
            line: None,
            what: NO_CHANNEL.to_owned(),
            likely: None,
            stops: Stops::Nothing,
        })
    }

    /// Warns of each key file and passphrase file that other users can read.
    pub fn exposed_keys(&self, places: &ConfigPlaces) -> Vec<Mistake> {
        let exposed = self.containers.iter().filter_map(|container| {
            let named = container
                .key_file
                .as_ref()
                .or(container.passphrase_file.as_ref());
            let default = places.folder.as_ref();
            let default = default.map(|folder| folder.join(format!("keys/{}.key", container.name)));
            let path = named.cloned().or(default)?;
            let mode = path.metadata().ok()?.permissions().mode();
            let keys = ["key_file", "passphrase_file"];
            let mut settings = container.settings.iter();
            let origin = settings.find(|one| keys.contains(&one.key))?.origin.clone();
            (mode & 0o077 != 0).then(|| Mistake {
                file: origin
                    .as_ref()
                    .map_or(path.clone(), |origin| origin.file.clone()),
                line: origin.map(|origin| origin.line),
                what: format!(
                    "other users can read {} (mode {:04o}): chmod 600",
                    path.display(),
                    mode & 0o7777
                ),
                likely: None,
                stops: Stops::Nothing,
            })
        });
        exposed.collect()
    }

    /// The files in words; `None`: there is no config.
    pub fn files_in_words(&self) -> Option<String> {
        let files = self.files.iter().map(|file| file.display().to_string());
        let files: Vec<String> = files.collect();
        (!files.is_empty()).then(|| files.join(", "))
    }

    /// Adds to a failure which config was read, or that there is none.
    pub fn placed(&self, failure: Failure) -> Failure {
        match self.files_in_words() {
            Some(files) => failure.because(format!("the config is {files}")),
            None => failure.because("there is no config"),
        }
    }

    /// The container called `name`.
    ///
    /// # Errors
    /// There is none; the hint names the likely one.
    pub fn container(&self, name: &str) -> Result<&Container, Failure> {
        let mut containers = self.containers.iter();
        if let Some(found) = containers.find(|container| container.name == name) {
            return Ok(found);
        }
        let failure = self.placed(Failure::usage(format!(
            "no container {name:?} in the config"
        )));
        let names = self.containers.iter().map(|known| known.name.as_str());
        Err(failure.with_hint(match near_miss(name, names) {
            Some(near) => format!("did you mean {near:?}?"),
            None => "name it as [container.NAME] in the config, or give its place: \
                     ssh://user@host/path/x.luks, host:path/x.luks or /path/x.luks"
                .to_owned(),
        }))
    }

    /// The job called `name`.
    ///
    /// # Errors
    /// There is none; the hint names the likely one.
    pub fn job(&self, name: &str) -> Result<&Job, Failure> {
        if let Some(found) = self.jobs.iter().find(|job| job.name.as_str() == name) {
            return Ok(found);
        }
        let failure = self.placed(Failure::usage(format!("no job {name:?} in the config")));
        let names = self.jobs.iter().map(|job| job.name.as_str());
        Err(failure.with_hint(match near_miss(name, names) {
            Some(near) => format!("did you mean {near:?}?"),
            None => "without a config: sprat backup TARGET --name JOB SOURCE…".to_owned(),
        }))
    }
}
