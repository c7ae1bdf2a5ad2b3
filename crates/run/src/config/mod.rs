//! The config file: containers and jobs. All of it is checked before anything starts.

mod reader;

use std::ffi::OsString;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use reader::{Mistake, Reader, Table, Text};
use sprat_session::Failure;
use sprat_session::address::{Target, is_name};
use sprat_session::trusted_file;
use sprat_snapshot::{JobName, SnapshotSpec};

use crate::suggest::near_miss;

/// A longer file is not a config.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

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

impl ConfigPlaces {
    /// Makes a path of the config absolute: `~/…` is expanded; `None` for a relative path.
    fn absolute(&self, path: &str) -> Option<PathBuf> {
        if let Some(rest) = path.strip_prefix("~/") {
            return self.home.as_ref().map(|home| home.join(rest));
        }
        Path::new(path).is_absolute().then(|| PathBuf::from(path))
    }
}

/// The content of the config.
#[derive(Debug, Default)]
pub struct Config {
    /// The file; `None`: there is no config.
    pub path: Option<PathBuf>,
    /// `ssh_command` at the top: for every container without its own.
    pub ssh_command: Option<Vec<OsString>>,
    /// `[container.NAME]`, in the order of the file.
    pub containers: Vec<Container>,
    /// `[job.NAME]`, in the order of the file.
    pub jobs: Vec<Job>,
}

/// `[container.NAME]`.
#[derive(Debug, Clone)]
pub struct Container {
    /// NAME.
    pub name: String,
    /// Its location.
    pub target: Target,
    /// `key_file`.
    pub key_file: Option<PathBuf>,
    /// `passphrase_file`.
    pub passphrase_file: Option<PathBuf>,
    /// `passphrase_command`, in words.
    pub passphrase_command: Option<Vec<OsString>>,
    /// `ssh_command`, in words.
    pub ssh_command: Option<Vec<OsString>>,
    /// `allow_no_fsync`.
    pub allow_no_fsync: bool,
}

/// `[job.NAME]`.
#[derive(Debug, Clone)]
pub struct Job {
    /// NAME.
    pub name: JobName,
    /// The name of the container that it backs up to.
    pub container: String,
    /// What is backed up, absolute.
    pub sources: Vec<PathBuf>,
    /// rsync's patterns.
    pub exclude: Vec<String>,
    /// Files of such patterns, absolute.
    pub exclude_from: Vec<PathBuf>,
    /// Stay on each source's file system.
    pub one_file_system: bool,
    /// Accept empty sources.
    pub allow_empty: bool,
}

impl Job {
    /// What a run of the job backs up.
    pub fn spec(&self) -> SnapshotSpec {
        let mut spec = SnapshotSpec::new(self.name.clone(), self.sources.clone());
        spec.excludes.clone_from(&self.exclude);
        spec.exclude_from.clone_from(&self.exclude_from);
        spec.one_file_system = self.one_file_system;
        spec.allow_empty = self.allow_empty;
        spec
    }
}

impl Config {
    /// The names of a container's jobs.
    pub fn jobs_of(&self, container: &str) -> Vec<String> {
        let jobs = self.jobs.iter().filter(|job| job.container == container);
        jobs.map(|job| job.name.to_string()).collect()
    }

    /// Whether the container has a job of that name.
    pub fn has_job(&self, container: &str, job: &str) -> bool {
        self.jobs_of(container).iter().any(|known| known == job)
    }

    /// Reads the config: `named` (absolute, and must exist), else the default one if there is one.
    ///
    /// # Errors
    /// It can't be read, or has mistakes: all of them are named, each with its line.
    pub fn load(named: Option<&Path>, places: &ConfigPlaces) -> Result<Self, Failure> {
        let path = match (named, &places.folder) {
            (Some(path), _) => path.to_owned(),
            (None, Some(folder)) => folder.join("sprat.toml"),
            (None, None) => return Ok(Self::default()),
        };
        let text = match read(&path, places) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(
                    Failure::usage(format!("the config {} can't be used", path.display()))
                        .caused_by(&error),
                );
            }
        };
        let mut config = Self::parse(&text, places).map_err(|mistakes| wrong(&path, &mistakes))?;
        config.path = Some(path);
        Ok(config)
    }

    /// Adds to a failure which config was read, or that there is none.
    pub fn placed(&self, failure: Failure) -> Failure {
        match &self.path {
            Some(path) => failure.because(format!("the config is {}", path.display())),
            None => failure.because("there is no config"),
        }
    }

    /// The container called `name`.
    ///
    /// # Errors
    /// There is none; the hint names the likely one.
    pub fn container(&self, name: &str) -> Result<&Container, Failure> {
        let found = self
            .containers
            .iter()
            .find(|container| container.name == name);
        found.ok_or_else(|| {
            let failure = Failure::usage(format!("no container {name:?} in the config"));
            let failure = self.placed(failure);
            match near_miss(name, self.containers.iter().map(|c| c.name.as_str())) {
                Some(near) => failure.with_hint(format!("did you mean {near:?}?")),
                None => failure.with_hint(
                    "name it as [container.NAME] in the config, or give its place: \
                     ssh://user@host/path/x.luks, host:path/x.luks or /path/x.luks",
                ),
            }
        })
    }

    /// The job called `name`.
    ///
    /// # Errors
    /// There is none; the hint names the likely one.
    pub fn job(&self, name: &str) -> Result<&Job, Failure> {
        let found = self.jobs.iter().find(|job| job.name.as_str() == name);
        found.ok_or_else(|| {
            let failure = Failure::usage(format!("no job {name:?} in the config"));
            let failure = self.placed(failure);
            match near_miss(name, self.jobs.iter().map(|job| job.name.as_str())) {
                Some(near) => failure.with_hint(format!("did you mean {near:?}?")),
                None => {
                    failure.with_hint("without a config: sprat backup TARGET --name JOB SOURCE…")
                }
            }
        })
    }

    fn parse(text: &str, places: &ConfigPlaces) -> Result<Self, Vec<Mistake>> {
        let mut reader = Reader::new(text);
        let mut config = Self::default();
        if let Some(entries) = reader.parse() {
            let mut top = Table::top(&entries);
            config.ssh_command = command(&mut top, &mut reader, "ssh_command");
            if let Some(value) = top.value("container") {
                for (name, table) in reader.named_tables("container", value) {
                    config
                        .containers
                        .extend(container(name, table, &mut reader, places));
                }
            }
            let containers: Vec<String> = top.value("container").map_or_else(Vec::new, |value| {
                let tables = value.get_ref().as_table();
                tables.map_or_else(Vec::new, |t| {
                    t.keys().map(|k| k.get_ref().to_string()).collect()
                })
            });
            if let Some(value) = top.value("job") {
                for (name, table) in reader.named_tables("job", value) {
                    config
                        .jobs
                        .extend(job(&name, table, &mut reader, places, &containers));
                }
            }
            top.finish(&mut reader);
        }
        let mistakes = reader.into_mistakes();
        if mistakes.is_empty() {
            Ok(config)
        } else {
            Err(mistakes)
        }
    }
}

fn wrong(path: &Path, mistakes: &[Mistake]) -> Failure {
    let mut failure = Failure::usage(format!("the config {} is wrong", path.display()));
    for mistake in mistakes {
        failure = failure.because(format!(
            "{}:{}: {}",
            path.display(),
            mistake.line,
            mistake.what
        ));
    }
    failure.with_hint("nothing was started. docs/config.md lists every key")
}

/// Reads the file. If others can write to it or replace it, it is refused for root: it names commands that
/// root runs (`ssh_command`).
fn read(path: &Path, places: &ConfigPlaces) -> std::io::Result<String> {
    let file = trusted_file::open(path)?;
    let refuse = |why: &str| Err(std::io::Error::other(why.to_owned()));
    if places.root
        && let Some(why) = trusted_file::writable_by_others(path)?
    {
        return refuse(&format!(
            "others than root can write to it or replace it, and it names commands that root runs: \
             {why} (chown root, chmod go-w)"
        ));
    }
    let mut text = String::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        return refuse("longer than 1 MiB");
    }
    Ok(text)
}

fn container<'i>(
    name: String,
    mut table: Table<'_, 'i>,
    reader: &mut Reader<'i>,
    places: &ConfigPlaces,
) -> Option<Container> {
    if !is_name(&name) || name.ends_with(".luks") {
        reader.mistake(
            table.span.clone(),
            format!(
                "{name:?} can't name a container: letters, digits, `.`, `_` and `-`, \
                 not ending in .luks"
            ),
        );
    }
    let mut target = None;
    match table.text(reader, "target") {
        Some(text) => match parse_target(&text.value, places) {
            Ok(parsed) => target = Some(parsed),
            Err(what) => reader.mistake(text.span, what),
        },
        None if table.value("target").is_none() => table.missing(reader, "target"),
        None => {}
    }
    let key_file = path(&mut table, reader, places, "key_file");
    let passphrase_file = path(&mut table, reader, places, "passphrase_file");
    let passphrase_command = command(&mut table, reader, "passphrase_command");
    let ways = [
        table.value("key_file").is_some(),
        table.value("passphrase_file").is_some(),
        table.value("passphrase_command").is_some(),
    ];
    if ways.iter().filter(|way| **way).count() > 1 {
        reader.mistake(
            table.span.clone(),
            format!(
                "{}: only one of key_file, passphrase_file and passphrase_command",
                table.title
            ),
        );
    }
    let ssh_command = command(&mut table, reader, "ssh_command");
    let allow_no_fsync =
        table.flag(reader, "allow_no_fsync") | table.old_flag(reader, "insist_without_fsync");
    table.finish(reader);
    Some(Container {
        name,
        target: target?,
        key_file,
        passphrase_file,
        passphrase_command,
        ssh_command,
        allow_no_fsync,
    })
}

fn job<'i>(
    name: &str,
    mut table: Table<'_, 'i>,
    reader: &mut Reader<'i>,
    places: &ConfigPlaces,
    containers: &[String],
) -> Option<Job> {
    let job_name = job_name(name)
        .map_err(|what| reader.mistake(table.span.clone(), what))
        .ok();
    let container = table.text(reader, "container");
    match &container {
        Some(text) if !containers.contains(&text.value) => {
            let near = near_miss(&text.value, containers.iter().map(String::as_str));
            let near = near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
            reader.mistake(
                text.span.clone(),
                format!("there is no [container.{}]{near}", text.value),
            );
        }
        None if table.value("container").is_none() => table.missing(reader, "container"),
        Some(_) | None => {}
    }
    let mistakes_before = reader.count();
    let sources = paths(&mut table, reader, places, "sources");
    if table.value("sources").is_none() {
        table.missing(reader, "sources");
    } else if sources.is_empty() && reader.count() == mistakes_before {
        reader.mistake(
            table.span.clone(),
            format!("{}: `sources` is empty", table.title),
        );
    }
    let exclude = table.texts(reader, "exclude");
    for pattern in &exclude {
        if let Some(why) = sprat_snapshot::pattern_mistake(&pattern.value) {
            reader.mistake(
                pattern.span.clone(),
                format!("`exclude`: {:?}: {why}", pattern.value),
            );
        }
    }
    let exclude_from = paths(&mut table, reader, places, "exclude_from");
    let one_file_system = table.flag(reader, "one_file_system");
    let allow_empty = table.flag(reader, "allow_empty");
    table.finish(reader);
    Some(Job {
        name: job_name?,
        container: container?.value,
        sources,
        exclude: exclude.into_iter().map(|text| text.value).collect(),
        exclude_from,
        one_file_system,
        allow_empty,
    })
}

/// Checks a job's name. It has no colon, because in `restore` a colon begins the path.
///
/// # Errors
/// It can't name a job; the text says why.
pub fn job_name(text: &str) -> Result<JobName, String> {
    if text.contains(':') {
        return Err(format!("{text:?} can't name a job: it holds a colon"));
    }
    JobName::new(text).map_err(|error| error.to_string())
}

fn parse_target(text: &str, places: &ConfigPlaces) -> Result<Target, String> {
    let text = match (text.strip_prefix("~/"), &places.home) {
        (Some(rest), Some(home)) => format!("{}/{rest}", home.display()),
        _ => text.to_owned(),
    };
    let parsed = Target::parse(&text, Path::new("")).map_err(|error| error.to_string())?;
    if parsed.local_folder().is_some_and(Path::is_relative) {
        return Err(format!(
            "`target` {text:?} must be ssh://…, host:path or an absolute path"
        ));
    }
    Ok(parsed)
}

fn command<'i>(
    table: &mut Table<'_, 'i>,
    reader: &mut Reader<'i>,
    key: &'static str,
) -> Option<Vec<OsString>> {
    let text = table.text(reader, key)?;
    match split_words(&text.value) {
        Ok(words) => Some(words),
        Err(what) => {
            reader.mistake(text.span, format!("`{key}`: {what}"));
            None
        }
    }
}

/// Splits a command into words as a shell does; nothing in it is expanded.
///
/// # Errors
/// It holds no command, or a quote is not closed.
pub fn split_words(text: &str) -> Result<Vec<OsString>, String> {
    match shlex::split(text) {
        Some(words) if !words.is_empty() && !words[0].is_empty() => {
            Ok(words.into_iter().map(OsString::from).collect())
        }
        Some(_) => Err("no command in it".to_owned()),
        None => Err("a quote is not closed".to_owned()),
    }
}

fn path<'i>(
    table: &mut Table<'_, 'i>,
    reader: &mut Reader<'i>,
    places: &ConfigPlaces,
    key: &'static str,
) -> Option<PathBuf> {
    let text = table.text(reader, key)?;
    absolute(&text, reader, places, key)
}

fn paths<'i>(
    table: &mut Table<'_, 'i>,
    reader: &mut Reader<'i>,
    places: &ConfigPlaces,
    key: &'static str,
) -> Vec<PathBuf> {
    let texts = table.texts(reader, key);
    let mut paths = Vec::new();
    for text in &texts {
        let Some(path) = absolute(text, reader, places, key) else {
            continue;
        };
        // Snapshots contain the whole path of a source, so it must be the same in each run.
        if key == "sources" && path.components().any(|part| part == Component::ParentDir) {
            reader.mistake(
                text.span.clone(),
                format!("`{key}`: {:?} must not have `..` in it", text.value),
            );
        }
        paths.push(path);
    }
    paths
}

fn absolute(
    text: &Text,
    reader: &mut Reader<'_>,
    places: &ConfigPlaces,
    key: &str,
) -> Option<PathBuf> {
    let path = places.absolute(&text.value);
    if path.is_none() {
        let what = if text.value.starts_with("~/") {
            "begins with ~/, and HOME is not set (a system service has none): write the whole path"
        } else {
            "must begin with / or ~/"
        };
        reader.mistake(
            text.span.clone(),
            format!("`{key}`: {:?} {what}", text.value),
        );
    }
    path
}
