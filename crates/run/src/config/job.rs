//! `[job.NAME]` and `[job_defaults]`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_snapshot::{JobName, JobSources, KeepRules, PulledSource, ScanRules, SnapshotSpec};
use toml::de::DeValue;

use super::ConfigPlaces;
use super::keep::{check_keep, keep};
use super::mistake::{Stops, Wrong};
use super::reader::{Layer, Reader, Spot, Table};
use super::show::Setting;
use super::values::{self, Source, Words};
use super::{samples, schedule};
use crate::conditions::Conditions;
use crate::due::Schedule;
use crate::growth::GrowthLimit;
use crate::hooks::Hook;
use crate::notify::PrivateText;
use crate::notify::channels::check_url;
use crate::suggest::near_miss;

/// The range of times that may not be zero.
const SOME_TIME: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=super::TIME_MAX;
/// The default of `every`.
const EVERY: &str = "1 day";
/// The folder of a snapshot that has the output of a command.
const DUMP_FOLDER: &str = "@dump";
/// The folder of a snapshot that has the state of the system.
pub const SYSTEM_FOLDER: &str = "@system";
const DAY: Duration = Duration::from_secs(86_400);

/// `[job.NAME]`, with what it takes from `[job_defaults]`.
#[derive(Debug, Clone)]
pub struct Job {
    /// NAME.
    pub name: JobName,
    /// The names of the containers that it backs up to: a copy in each.
    pub containers: Vec<String>,
    /// What is backed up.
    pub sources: Vec<Source>,
    /// `rsync_path`: the command for rsync on a pulled host, in words.
    pub rsync_path: Words,
    /// `ssh_command` at the top, for pulled hosts. Empty: ssh.
    pub ssh_command: Words,
    /// `command`: a pipeline whose output becomes a file.
    pub dump: Option<Dump>,
    /// `system_state`.
    pub system_state: bool,
    /// What is left out.
    pub filters: Filters,
    /// Stay on each source's file system.
    pub one_file_system: bool,
    /// Accept empty sources.
    pub allow_empty: bool,
    /// `every` or `at`.
    pub schedule: Schedule,
    /// `spread`: `at` is later by a part of this time.
    pub spread: Duration,
    /// When a copy may be made.
    pub conditions: Conditions,
    /// What is kept; `None`: nothing is removed.
    pub keep: Option<KeepRules>,
    /// `prune_every`; zero: at each run.
    pub prune_every: Duration,
    /// `alert_after`: a copy is overdue so long after its last success; `None`: never.
    pub alert_after: Option<Duration>,
    /// What is done before an upload that is larger, or changes more, than usual.
    pub growth: GrowthRules,
    /// `source_check_every`: all unchanged source files are read again within this time; `None`: never.
    pub source_check_every: Option<Duration>,
    /// `before`: hooks before the sources are read.
    pub before: Vec<Hook>,
    /// `after`: hooks as soon as the sources have been read.
    pub after: Vec<Hook>,
    /// `failed`: hooks after a copy that failed.
    pub failed: Vec<Hook>,
    /// `finally`: hooks when the result is known.
    pub finally: Vec<Hook>,
    /// `healthchecks`: the URL that is pinged.
    pub healthchecks: Option<PrivateText>,
    /// Each key and its origin, for `config show`.
    pub settings: Vec<Setting>,
}

/// What a job leaves out.
#[derive(Debug, Clone, Default)]
pub struct Filters {
    /// rsync's patterns.
    pub exclude: Vec<String>,
    /// Files of such patterns, absolute.
    pub exclude_from: Vec<PathBuf>,
    /// Samples that ship with sprat.
    pub exclude_sample: Vec<Sample>,
    /// Folders that CACHEDIR.TAG marks.
    pub exclude_caches: bool,
    /// Folders with a file of one of these names.
    pub exclude_if_present: Vec<String>,
    /// Files larger than this, in bytes.
    pub exclude_larger_than: Option<u64>,
}

/// A sample of patterns that ships with sprat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sample {
    /// Caches and downloads below home folders.
    Home,
    /// What a whole system need not back up.
    System,
}

impl Sample {
    fn lines(self) -> samples::Lines {
        let folder = Path::new(samples::INSTALLED);
        match self {
            Self::Home => samples::read(folder, "home", samples::HOME),
            Self::System => samples::read(folder, "system", samples::SYSTEM),
        }
    }
}

impl Filters {
    /// The rules that need a scan of the sources.
    fn scan(&self) -> ScanRules {
        ScanRules {
            caches: self.exclude_caches,
            if_present: self.exclude_if_present.clone(),
            larger_than: self.exclude_larger_than,
        }
    }
}

/// A pipeline whose output becomes a file of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump {
    /// Its stages, in words.
    pub stages: Vec<Words>,
    /// The file's name, below `@dump/`.
    pub file: String,
    /// The user that runs it; `None`: root.
    pub user: Option<String>,
    /// A stage that runs longer makes the copy fail.
    pub timeout: Duration,
}

/// What is done before an upload that is larger, or changes more, than usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrowthRules {
    /// `growth`.
    pub growth: Growth,
    /// `growth_limit`.
    pub growth_limit: GrowthLimit,
    /// `change_limit`, in percent of the files; `None`: off.
    pub change_limit: Option<u8>,
}

/// `growth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Growth {
    /// An event; the copy is made.
    Warn,
    /// The copy waits for `accept`.
    Stop,
    /// Nothing.
    Off,
}

impl Dump {
    /// Its place in the snapshot.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DUMP_FOLDER).join(&self.file)
    }
}

impl Job {
    /// The sources on this machine.
    pub fn local_sources(&self) -> Vec<PathBuf> {
        let local = |source: &Source| match source {
            Source::Local(path) => Some(path.clone()),
            Source::Pulled { .. } => None,
        };
        self.sources.iter().filter_map(local).collect()
    }

    /// The sources on other hosts.
    pub fn pulled_sources(&self) -> Vec<PulledSource> {
        let pulled = |source: &Source| match source {
            Source::Local(_) => None,
            Source::Pulled { user, host, path } => Some(PulledSource {
                user: user.clone(),
                host: host.clone(),
                path: path.components().collect(),
            }),
        };
        self.sources.iter().filter_map(pulled).collect()
    }

    /// What a run of the job backs up.
    pub fn spec(&self) -> SnapshotSpec {
        let mut spec = SnapshotSpec::new(self.name.clone(), self.local_sources());
        spec.pulled = self.pulled_sources();
        if !self.ssh_command.is_empty() {
            let words = self.ssh_command.iter().map(|word| word.to_string_lossy());
            spec.ssh_command = words.map(std::borrow::Cow::into_owned).collect();
        }
        spec.rsync_path = values::join_words(&self.rsync_path);
        spec.excludes.clone_from(&self.filters.exclude);
        spec.exclude_from.clone_from(&self.filters.exclude_from);
        // After the job's own patterns: the first match counts.
        for sample in &self.filters.exclude_sample {
            match sample.lines() {
                samples::Lines::Patterns(patterns) => {
                    let hosts = spec.pulled.iter().map(|source| &source.host);
                    let hosts: BTreeSet<&String> = hosts.collect();
                    for pattern in patterns {
                        let of_hosts = hosts.iter().filter_map(|host| on_host(&pattern, host));
                        spec.excludes.extend(of_hosts);
                        spec.excludes.push(pattern);
                    }
                }
                // The run reports it.
                samples::Lines::Unreadable(file) => spec.exclude_from.push(file),
            }
        }
        spec.scan = self.filters.scan();
        // It must be staged before the snapshot is taken.
        spec.required.extend(self.dump.as_ref().map(Dump::path));
        spec.one_file_system = self.one_file_system;
        spec.allow_empty = self.allow_empty;
        spec
    }

    /// For a prune: what must not lose its last copy.
    pub fn kept_sources(&self) -> JobSources {
        let dump = self.dump.as_ref().map(Dump::path);
        let system = self.system_state.then(|| PathBuf::from(SYSTEM_FOLDER));
        JobSources {
            paths: self.local_sources(),
            parts: dump
                .into_iter()
                .chain(system)
                .chain(self.pulled_sources().iter().map(PulledSource::place))
                .collect(),
            one_file_system: self.one_file_system,
        }
    }

    /// Whether it backs up to a container.
    pub fn is_in(&self, container: &str) -> bool {
        self.containers.iter().any(|name| name == container)
    }
}

/// Checks a job's name. It has no colon, because in `restore` a colon begins the path.
///
/// # Errors
/// It can't name a job; the text says why.
pub fn job_name(text: &str) -> Result<JobName, String> {
    if text.contains(':') {
        return Err(format!(
            "{text:?} can't be the name of a job: it has a colon in it"
        ));
    }
    JobName::new(text).map_err(|error| error.to_string())
}

/// A job's table as it is read.
pub(super) struct ReadJob {
    /// As its title has it.
    pub(super) name: String,
    /// What it names of the containers that the config has.
    pub(super) containers: Vec<String>,
    /// `None`: it can't be used.
    pub(super) job: Option<Job>,
}

/// Checks `[job_defaults]` alone.
pub(super) fn check_defaults<'i>(
    layer: &Layer<'_, 'i>,
    reader: &Reader<'i>,
    places: &ConfigPlaces,
) {
    let mut table = Table::new(reader, "[job_defaults]", layer.clone(), None);
    for key in ["container", "sources", "command", "file"] {
        table.knows(key);
        if table.has(key) {
            let why = format!("`{key}` belongs in each [job.NAME], not in [job_defaults]");
            table.mistake(key, why);
        }
    }
    schedule::read(&mut table);
    table.value("alert_after", schedule::alert_time);
    Keys::read(&mut table, places);
    table.finish(&[], "job");
}

/// Reads one table.
pub(super) fn read<'i>(
    name: &str,
    layer: Layer<'_, 'i>,
    defaults: Option<&Layer<'_, 'i>>,
    reader: &Reader<'i>,
    places: &ConfigPlaces,
    known_containers: &[String],
) -> ReadJob {
    let mut table = Table::new(reader, &format!("[job.{name}]"), layer, defaults);
    let job_name = job_name(name)
        .map_err(|what| reader.mistake(&table.spot, what))
        .ok();
    if name.contains('@') {
        let what = "`@` in a job's name: JOB@CONTAINER names a copy, so choose another name";
        reader.warning(&table.spot, what);
    }
    let containers = containers(&mut table, known_containers);
    let home = places.home.as_deref();
    let sources = table.list("sources", |value| values::source(value, home));
    check_hosts(&table, &sources);
    let sources: Vec<Source> = sources.into_iter().map(|(_, source)| source).collect();
    let stages = table.list("command", values::command);
    let file = table.value("file", values::file_name);
    let schedule = schedule::read(&mut table);
    let keys = Keys::read(&mut table, places);
    let has_any = |table: &Table<'_, '_, '_>| table.has("sources") || table.has("command");
    if !has_any(&table) && !keys.system_state {
        table.missing("sources");
    }
    for key in ["sources", "command"] {
        let empty = |value: &DeValue<'_>| value.as_array().is_some_and(|list| list.is_empty());
        if table.find(key).is_some_and(|(_, value)| empty(value)) {
            let what = format!("{}: `{key}` is empty", table.title);
            reader.mistake(&table.spot, what);
        }
    }
    warn_of_unused(&table, &sources);
    warn_of_patterns(&table, &keys, &sources);
    // Where the keys of several tables meet, only this job is stopped.
    let this = Stops::Job(name.to_owned());
    let alert_after = schedule::alert_after(&mut table, &schedule, &this);
    schedule::check_window(&table, &schedule, keys.conditions.window, &this);
    check_keep(&table, keys.keep, &this);
    let dump = (!stages.is_empty()).then(|| Dump {
        stages: stages.into_iter().map(|(_, stage)| stage).collect(),
        file: file.unwrap_or_else(|| "dump".to_owned()),
        user: keys.user.clone(),
        timeout: keys.command_timeout,
    });
    let settings = table.finish(&[], "job");
    let job = job_name.map(|name| Job {
        name,
        containers: containers.clone(),
        sources,
        rsync_path: keys.rsync_path,
        ssh_command: Words::new(),
        dump,
        system_state: keys.system_state,
        filters: keys.filters,
        one_file_system: keys.one_file_system,
        allow_empty: keys.allow_empty,
        schedule,
        spread: keys.spread,
        conditions: keys.conditions,
        keep: keys.keep,
        prune_every: keys.prune_every,
        alert_after,
        growth: keys.growth,
        source_check_every: keys.source_check_every,
        before: keys.before,
        after: keys.after,
        failed: keys.failed,
        finally: keys.finally,
        healthchecks: keys.healthchecks,
        settings,
    });
    ReadJob {
        name: name.to_owned(),
        containers,
        job,
    }
}

/// An anchored pattern of this machine as it is for a pulled host.
fn on_host(pattern: &str, host: &str) -> Option<String> {
    let (prefix, path) = match pattern.split_at_checked(2) {
        Some((prefix @ ("+ " | "- "), path)) => (prefix, path),
        _ => ("", pattern),
    };
    let below = path.strip_prefix('/')?;
    Some(format!("{prefix}/@{host}/{below}"))
}

/// The containers of a job that the config has, each once.
fn containers(table: &mut Table<'_, '_, '_>, known: &[String]) -> Vec<String> {
    let reader = table.reader;
    let named = table.list("container", values::owned);
    let mut containers: Vec<String> = Vec::new();
    for (spot, name) in named {
        if containers.contains(&name) {
            reader.mistake(&spot, format!("`container`: {name:?} is named twice"));
        } else if known.contains(&name) {
            containers.push(name);
        } else {
            let near = near_miss(&name, known.iter().map(String::as_str));
            reader.mistake_likely(&spot, format!("there is no [container.{name}]"), near);
        }
    }
    match table.find("container") {
        None => table.missing("container"),
        Some((_, DeValue::Array(list))) if list.is_empty() => {
            table.mistake(
                "container",
                format!("{}: `container` is empty", table.title),
            );
        }
        Some(_) => {}
    }
    containers
}

/// Refuses hosts that a snapshot can't hold side by side.
fn check_hosts(table: &Table<'_, '_, '_>, sources: &[(Spot, Source)]) {
    let mut logins: Vec<(&str, Option<&str>)> = Vec::new();
    for (spot, source) in sources {
        let Source::Pulled { user, host, .. } = source else {
            continue;
        };
        let folder = format!("@{host}");
        if folder == DUMP_FOLDER || folder == SYSTEM_FOLDER {
            let what = format!(
                "`sources`: {folder} is the folder of what comes from no host. Give the host another name \
                 in ssh's configuration"
            );
            table.reader.mistake(spot, what);
        }
        let user = user.as_deref();
        if logins
            .iter()
            .any(|(one, other)| one == host && *other != user)
        {
            let what = format!(
                "`sources`: {host} is named with two users. Use one user, or one job for each"
            );
            table.reader.mistake(spot, what);
        }
        logins.push((host, user));
    }
}

fn warn_of_unused(table: &Table<'_, '_, '_>, sources: &[Source]) {
    let is_pulled = |source: &Source| matches!(source, Source::Pulled { .. });
    if table.has_own("rsync_path") && !sources.iter().any(is_pulled) {
        let what = "`rsync_path` has no effect without a source on another host";
        table.warn("rsync_path", what.to_owned());
    }
    for key in ["file", "user", "command_timeout"] {
        if table.has_own(key) && !table.has("command") {
            table.warn(key, format!("`{key}` has no effect without `command`"));
        }
    }
    let mut hosts: Vec<&str> = Vec::new();
    let mut local = false;
    for source in sources {
        match source {
            Source::Pulled { host, .. } if !hosts.contains(&host.as_str()) => hosts.push(host),
            Source::Pulled { .. } => {}
            Source::Local(_) => local = true,
        }
    }
    if hosts.len() + usize::from(local) > 1 {
        let what = "`sources`: use one job for each pulled host. A host that is not reached makes every \
                    snapshot of this job incomplete";
        table.warn("sources", what);
    }
}

/// Warns of patterns that are valid and match nothing of this job.
fn warn_of_patterns(table: &Table<'_, '_, '_>, keys: &Keys, sources: &[Source]) {
    for (spot, pattern) in &keys.exclude {
        if pattern.ends_with(' ') {
            let what = format!(
                "`exclude`: {pattern:?} ends with a space, and the pattern matches only \
                                names with this space"
            );
            table.reader.warning(spot, what);
        }
        if pattern.starts_with('/') && !sources.is_empty() && !can_match(pattern, sources) {
            let what = format!("`exclude`: {pattern:?} is outside of all sources");
            table.reader.warning(spot, what);
        }
    }
}

/// Whether an anchored pattern can match in, at or above a source.
fn can_match(pattern: &str, sources: &[Source]) -> bool {
    let plain = |name: &&str| !name.contains(['*', '?', '[', '\\']);
    let names: Vec<&str> = pattern.split('/').take_while(plain).collect();
    let plain = PathBuf::from(match names.join("/") {
        text if text.is_empty() => "/".to_owned(),
        text => text,
    });
    sources.iter().any(|source| match source {
        Source::Local(path) => path.starts_with(&plain) || plain.starts_with(path),
        // It lies below @HOST.
        Source::Pulled { host, .. } => {
            let host = Path::new("/").join(format!("@{host}"));
            host.starts_with(&plain) || plain.starts_with(&host)
        }
    })
}

/// The keys that a job may take from `[job_defaults]`, but those of the schedule.
struct Keys {
    rsync_path: Words,
    user: Option<String>,
    command_timeout: Duration,
    system_state: bool,
    exclude: Vec<(Spot, String)>,
    filters: Filters,
    one_file_system: bool,
    allow_empty: bool,
    spread: Duration,
    conditions: Conditions,
    keep: Option<KeepRules>,
    prune_every: Duration,
    growth: GrowthRules,
    source_check_every: Option<Duration>,
    before: Vec<Hook>,
    after: Vec<Hook>,
    failed: Vec<Hook>,
    finally: Vec<Hook>,
    healthchecks: Option<PrivateText>,
}

impl Keys {
    fn read(table: &mut Table<'_, '_, '_>, places: &ConfigPlaces) -> Self {
        let home = places.home.as_deref();
        let rsync_path = table.value_or("rsync_path", "rsync", values::command);
        let user = table.value("user", values::user_name);
        let command_timeout = table.value_or("command_timeout", "2 h", |v| {
            values::duration(v, &SOME_TIME)
        });
        let system_state = table.flag("system_state", false);
        let exclude = exclude(table);
        let filters = filters(table, &exclude, home);
        let one_file_system = table.flag("one_file_system", false);
        let allow_empty = table.flag("allow_empty", false);
        let spread_range = Duration::ZERO..=DAY / 2;
        let spread = table.value_or("spread", "0 s", |v| values::duration(v, &spread_range));
        let conditions = conditions(table);
        let keep = keep(table);
        let any_time = Duration::ZERO..=super::TIME_MAX;
        let prune_every = table.value_or("prune_every", EVERY, |v| values::duration(v, &any_time));
        let growth = growth(table);
        let source_check_every = table.value_or("source_check_every", "100 days", |v| {
            values::duration_or_never(v, &(DAY..=super::TIME_MAX))
        });
        let timeout = table.value_or("hook_timeout", "10 min", |v| {
            values::duration(v, &SOME_TIME)
        });
        let mut hooks = |key| {
            let hooks = table.list(key, |value| values::hook(value, timeout));
            hooks.into_iter().map(|(_, hook)| hook).collect()
        };
        Self {
            before: hooks("before"),
            after: hooks("after"),
            failed: hooks("failed"),
            finally: hooks("finally"),
            rsync_path,
            user,
            command_timeout,
            system_state,
            exclude,
            filters,
            one_file_system,
            allow_empty,
            spread,
            conditions,
            keep,
            prune_every,
            growth,
            source_check_every,
            healthchecks: table.secret("healthchecks", |value| {
                values::secret(value, home, check_url)
            }),
        }
    }
}

fn exclude(table: &mut Table<'_, '_, '_>) -> Vec<(Spot, String)> {
    table.list("exclude", |value| {
        let pattern = values::text(value)?;
        match sprat_snapshot::pattern_mistake(pattern) {
            Some(why) => Err(Wrong::because(format!("{pattern:?}: {why}"))),
            None => Ok(pattern.to_owned()),
        }
    })
}

fn filters(
    table: &mut Table<'_, '_, '_>,
    exclude: &[(Spot, String)],
    home: Option<&Path>,
) -> Filters {
    let samples = [("home", Sample::Home), ("system", Sample::System)];
    let files = table.list("exclude_from", |value| values::absolute(value, home));
    let sample = table.list("exclude_sample", |value| values::one_of(value, &samples));
    let exclude_caches = table.flag("exclude_caches", false);
    let markers = table.list("exclude_if_present", values::file_name);
    Filters {
        exclude: exclude.iter().map(|(_, text)| text.clone()).collect(),
        exclude_from: files.into_iter().map(|(_, path)| path).collect(),
        exclude_sample: sample.into_iter().map(|(_, sample)| sample).collect(),
        exclude_caches,
        exclude_if_present: markers.into_iter().map(|(_, name)| name).collect(),
        exclude_larger_than: table.value("exclude_larger_than", values::some_size),
    }
}

fn conditions(table: &mut Table<'_, '_, '_>) -> Conditions {
    let interfaces = table.list("only_if_interface", values::interface);
    let addresses = table.list("only_if_gateway_mac", values::mac_address);
    Conditions {
        only_on_ac: table.flag("only_on_ac", false),
        skip_on_metered: table.flag("skip_on_metered", true),
        interfaces: interfaces.into_iter().map(|(_, name)| name).collect(),
        gateway_macs: addresses.into_iter().map(|(_, mac)| mac).collect(),
        window: table.value("window", values::window),
    }
}

fn growth(table: &mut Table<'_, '_, '_>) -> GrowthRules {
    let words = [
        ("warn", Growth::Warn),
        ("stop", Growth::Stop),
        ("off", Growth::Off),
    ];
    GrowthRules {
        growth: table.value_or("growth", "warn", |value| values::one_of(value, &words)),
        growth_limit: table.value_or("growth_limit", "10x", growth_limit),
        change_limit: table.value_or("change_limit", "30 %", change_limit),
    }
}

fn growth_limit(value: &DeValue<'_>) -> Result<GrowthLimit, Wrong> {
    let text = values::text(value)?;
    let Some(times) = text.strip_suffix(['x', 'X']) else {
        return values::some_size(value).map(GrowthLimit::Bytes);
    };
    let times = times.trim_end().parse().ok().filter(|times| *times > 0);
    times
        .map(GrowthLimit::Times)
        .ok_or_else(|| Wrong::because(format!("{text:?}: write a size, or a factor such as 10x")))
}

fn change_limit(value: &DeValue<'_>) -> Result<Option<u8>, Wrong> {
    let text = values::text(value)?;
    if text == "off" {
        return Ok(None);
    }
    let percent = text.strip_suffix('%').map(str::trim_end);
    let percent = percent.and_then(|number| number.parse::<u8>().ok());
    let percent = percent.filter(|percent| (1..=100).contains(percent));
    percent
        .map(Some)
        .ok_or_else(|| Wrong::because(format!("{text:?}: write 1 % to 100 %, or off")))
}
