//! `[container.NAME]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_session::address::{Target, is_name};

use super::reader::{Layer, Reader, Table};
use super::show::Setting;
use super::values::{self, UploadLimit, Words};
use super::{ConfigPlaces, TIME_MAX};
use crate::hooks::Hook;

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
    pub passphrase_command: Option<Words>,
    /// `ssh_command`, in words.
    pub ssh_command: Option<Words>,
    /// `allow_no_fsync`.
    pub allow_no_fsync: bool,
    /// `connections`: how many ssh connections are opened at most, 1 to 8.
    pub connections: usize,
    /// `upload_limit`.
    pub upload_limit: Option<UploadLimit>,
    /// `min_free`, in bytes: no copy begins with less room on the server.
    pub min_free: u64,
    /// `lock_wait`: how long `run` waits for the lease of another session.
    pub lock_wait: Duration,
    /// `before`: hooks before all that `run` does with the container.
    pub before: Vec<Hook>,
    /// `finally`: hooks after all that.
    pub finally: Vec<Hook>,
    /// `check_every`: all data is read within this time; `None`: never.
    pub check_every: Option<Duration>,
    /// `check_budget`: how long a day's slice of the check takes at most.
    pub check_budget: Duration,
    /// `drill_every`; `None`: never.
    pub drill_every: Option<Duration>,
    /// `trim`: trim when it is worth it.
    pub trim: bool,
    /// Each key and its origin, for `config show`.
    pub settings: Vec<Setting>,
}

/// Reads one table. `None` without a target.
pub(super) fn read<'i>(
    name: String,
    layer: Layer<'_, 'i>,
    reader: &Reader<'i>,
    places: &ConfigPlaces,
) -> Option<Container> {
    let title = format!("[container.{name}]");
    let mut table = Table::new(reader, &title, layer, None);
    if !is_name(&name) || name.ends_with(".luks") {
        let why = format!(
            "{name:?} can't be the name of a container: use at most 64 letters, digits, `.`, `_` and `-`, \
             no `.` or `-` in front, and no .luks at the end"
        );
        reader.mistake(&table.spot, why);
    }
    let home = places.home.as_deref();
    let target = table.value("target", |value| target(values::text(value)?, home));
    if !table.has("target") {
        table.missing("target");
    }
    let path = |value: &_| values::absolute(value, home);
    let key_file = table.value("key_file", path);
    let passphrase_file = table.value("passphrase_file", path);
    let passphrase_command = table.value("passphrase_command", values::command);
    let ways = ["key_file", "passphrase_file", "passphrase_command"];
    if ways.iter().filter(|way| table.has(way)).count() > 1 {
        let what = format!("{}: only one of {}", table.title, ways.join(", "));
        reader.mistake(&table.spot, what);
    }
    if let (Some(folder), false) = (&places.folder, ways.iter().any(|way| table.has(way))) {
        let default = folder.join("keys").join(format!("{name}.key"));
        table.default("key_file", default.display().to_string().into());
    }
    let ssh_command = table.value("ssh_command", values::command);
    let allowed = table.old_flag("insist_without_fsync", "allow_no_fsync");
    let allow_no_fsync = table.flag("allow_no_fsync", allowed.unwrap_or(false));
    let connections = table.number("connections", 4, 1..=8);
    let upload_limit = table.value("upload_limit", values::upload_limit);
    if upload_limit.is_some() && target.as_ref().is_some_and(|target| target.ssh().is_none()) {
        table.warn(
            "upload_limit",
            "`upload_limit` limits ssh only, and this container is local",
        );
    }
    let second = Duration::from_secs(1);
    let from_zero = Duration::ZERO..=TIME_MAX;
    let some_time = second..=TIME_MAX;
    let min_free = table.value_or("min_free", "1 GiB", values::size);
    let lock_wait = table.value_or("lock_wait", "10 min", |v| values::duration(v, &from_zero));
    let hook_timeout = table.value_or("hook_timeout", "10 min", |v| {
        values::duration(v, &some_time)
    });
    let mut hooks = |key| {
        let hooks = table.list(key, |value| values::hook(value, hook_timeout));
        hooks.into_iter().map(|(_, hook)| hook).collect()
    };
    let (before, finally) = (hooks("before"), hooks("finally"));
    let day = Duration::from_secs(86_400)..=TIME_MAX;
    let check_every = table.value_or("check_every", "90 days", |v| {
        values::duration_or_never(v, &day)
    });
    let check_budget = table.value_or("check_budget", "30 min", |v| {
        values::duration(v, &some_time)
    });
    let drill_every = table.value_or("drill_every", "30 days", |v| {
        values::duration_or_never(v, &day)
    });
    let trim = table.value_or("trim", "auto", |value| {
        values::one_of(value, &[("auto", true), ("never", false)])
    });
    let settings = table.finish(&["insist_without_fsync"], "container");
    Some(Container {
        name,
        target: target?,
        key_file,
        passphrase_file,
        passphrase_command,
        ssh_command,
        allow_no_fsync,
        connections: connections as usize,
        upload_limit,
        min_free,
        lock_wait,
        before,
        finally,
        check_every,
        check_budget,
        drill_every,
        trim,
        settings,
    })
}

fn target(text: &str, home: Option<&Path>) -> Result<Target, super::mistake::Wrong> {
    use super::mistake::Wrong;
    let expanded = match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => format!("{}/{rest}", home.display()),
        _ => text.to_owned(),
    };
    let parsed = Target::parse(&expanded, Path::new("")).map_err(Wrong::because)?;
    if parsed.local_folder().is_some_and(Path::is_relative) {
        return Err(Wrong::because(format!(
            "{text:?} must be ssh://…, host:path or an absolute path"
        )));
    }
    Ok(parsed)
}
