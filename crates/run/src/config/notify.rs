//! `[notify]` and `[watch.NAME]`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

use super::ConfigPlaces;
use super::mistake::Wrong;
use super::reader::{Layer, Reader, Table};
use super::schedule::at_time;
use super::show::{Setting, written};
use super::values::{self, Words};
use crate::due::AtTime;
use crate::notify::channels::{Mail, MailRoute, SmtpServer, SmtpUrlError, check_url};
use crate::notify::{Channels, Kind, PrivateText};

/// `[notify]`.
#[derive(Debug, Clone)]
pub struct Notify {
    /// `on`: the kinds of events that are reported.
    pub on: Vec<Kind>,
    /// `desktop`.
    pub desktop: bool,
    /// `mail`.
    pub mail: Option<Mail>,
    /// `command`: gets one event as JSON on stdin.
    pub command: Option<Words>,
    /// `webhook`: a URL.
    pub webhook: Option<PrivateText>,
    /// `ntfy`: the URL of a topic.
    pub ntfy: Option<PrivateText>,
    /// `healthchecks`: the URL that each run pings.
    pub healthchecks: Option<PrivateText>,
    /// `remind_after`; `None`: never.
    pub remind_after: Option<Duration>,
    /// `digest`.
    pub digest: Digest,
    /// `digest_at`; of a daily digest only the time counts.
    pub digest_at: AtTime,
    /// `metrics`: a file of Prometheus' text format.
    pub metrics: Option<PathBuf>,
    /// The table as it stands in the config: a TOML file with `[notify]`, empty without it.
    pub toml: PrivateText,
    /// Each key and its origin, for `config show`.
    pub settings: Vec<Setting>,
}

impl Notify {
    /// The channels, but healthchecks.
    pub fn channels(&self) -> Channels {
        Channels {
            mail: self.mail.clone(),
            desktop: self.desktop,
            command: self.command.clone(),
            webhook: self.webhook.clone(),
            ntfy: self.ntfy.clone(),
        }
    }

    /// Whether any channel is set.
    pub fn has_channel(&self) -> bool {
        let urls = [&self.webhook, &self.ntfy, &self.healthchecks];
        let others = self.desktop || self.mail.is_some() || self.command.is_some();
        others || urls.iter().any(|url| url.is_some())
    }
}

/// How often the summary is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digest {
    /// Not at all.
    Never,
    /// Each day.
    Daily,
    /// On one day of the week.
    Weekly,
}

/// `[watch.NAME]`: a container file that other machines write into.
#[derive(Debug, Clone)]
pub struct Watch {
    /// NAME.
    pub name: String,
    /// The container file.
    pub file: PathBuf,
    /// It is overdue if it was not written to for so long.
    pub alert_after: Duration,
    /// Each key and its origin, for `config show`.
    pub settings: Vec<Setting>,
}

/// `[notify]` as a file of its own.
pub(super) fn as_toml(layer: &Layer<'_, '_>) -> String {
    let entries = layer.entries.iter();
    let entries = entries.map(|(key, value)| (key.get_ref().to_string(), written(value.get_ref())));
    let table: toml::Table = entries.collect();
    let file = toml::Table::from_iter([("notify".to_owned(), toml::Value::Table(table))]);
    file.to_string()
}

/// Reads `[notify]`; without the table all is at its default. `as_toml` is the same as text.
pub(super) fn read<'i>(
    mut table: Table<'_, '_, 'i>,
    as_toml: &str,
    places: &ConfigPlaces,
) -> Notify {
    let home = places.home.as_deref();
    let on = table.list("on", kind);
    let on: Vec<Kind> = match table.has("on") {
        true => on.into_iter().map(|(_, kind)| kind).collect(),
        false => events().collect(),
    };
    let desktop = table.flag("desktop", false);
    let mail = table.value("mail", |value| mail(value, home));
    let command = table.value("command", values::command);
    let url = |value: &DeValue<'_>| values::secret(value, home, check_url);
    let webhook = table.secret("webhook", url);
    let ntfy = table.secret("ntfy", url);
    let healthchecks = table.secret("healthchecks", url);
    let some_time = Duration::from_secs(60)..=super::TIME_MAX;
    let remind_after = table.value_or("remind_after", "7 days", |value| {
        values::duration_or_never(value, &some_time)
    });
    let has_reader = ["mail", "webhook", "ntfy"].iter().any(|key| table.has(key));
    let default = if has_reader { "weekly" } else { "never" };
    let words = [
        ("never", Digest::Never),
        ("daily", Digest::Daily),
        ("weekly", Digest::Weekly),
    ];
    let digest = table.value_or("digest", default, |value| values::one_of(value, &words));
    let digest_at = table.value_or("digest_at", "Mon 08:00", at_time);
    if digest == Digest::Weekly && digest_at.days().count() != 1 {
        let what = "`digest_at`: a weekly digest needs one day and a time, such as Mon 08:00";
        table.mistake("digest_at", what);
    }
    let metrics = table.value("metrics", |value| {
        let path = values::absolute(value, home)?;
        match path.extension().is_some_and(|end| end == "prom") {
            true => Ok(path),
            false => Err(Wrong::must("be a file that ends in .prom")),
        }
    });
    Notify {
        on,
        desktop,
        mail,
        command,
        webhook,
        ntfy,
        healthchecks,
        remind_after,
        digest,
        digest_at,
        metrics,
        toml: PrivateText::text(as_toml),
        settings: table.finish(&[], "notify"),
    }
}

/// The kinds that `on` may name.
fn events() -> impl Iterator<Item = Kind> {
    Kind::ALL.into_iter().filter(|kind| *kind != Kind::Digest)
}

fn kind(value: &DeValue<'_>) -> Result<Kind, Wrong> {
    let text = values::text(value)?;
    if text == Kind::Digest.name() {
        return Err(Wrong::because("\"digest\" has its own setting: `digest`"));
    }
    let found = events().find(|kind| kind.name() == text);
    found.ok_or_else(|| {
        let names: Vec<&str> = events().map(Kind::name).collect();
        Wrong::not_one_of(text, &names)
    })
}

fn mail(value: &DeValue<'_>, home: Option<&Path>) -> Result<Mail, Wrong> {
    let known = ["to", "from", "smtp", "password_file", "password_command"];
    let table = values::entries(value, &known, "be like { to = \"root@example.org\" }")?;
    let get = |key: &str| table.get(key).map(toml::Spanned::get_ref);
    let within = |key: &'static str| move |wrong| values::inside(key, wrong);
    let to = match get("to") {
        None => return Err(Wrong::because("there is no `to` in it")),
        Some(DeValue::Array(list)) if list.is_empty() => {
            return Err(Wrong::because("`to` is empty"));
        }
        Some(DeValue::Array(list)) => {
            let addresses = list.iter().map(|value| address(value.get_ref()));
            addresses.collect::<Result<Vec<_>, _>>()
        }
        Some(value) => address(value).map(|address| vec![address]),
    };
    let from = get("from").map(address).transpose();
    let smtp = get("smtp").map(smtp).transpose().map_err(within("smtp"))?;
    let file = get("password_file").map(|value| values::absolute(value, home));
    let file = file.transpose().map_err(within("password_file"))?;
    let command = get("password_command").map(values::command);
    let command = command.transpose().map_err(within("password_command"))?;
    let password = match (file, command) {
        (Some(_), Some(_)) => {
            return Err(Wrong::because(
                "only one of `password_file` and `password_command`",
            ));
        }
        (Some(path), None) => Some(PrivateText::File(path)),
        (None, command) => command.map(PrivateText::Command),
    };
    let has_user = smtp.as_ref().is_some_and(|server| server.user.is_some());
    match (has_user, &password) {
        (false, Some(_)) => Err(Wrong::because(
            "a password is of use only with a user in `smtp`: smtps://user@host",
        )),
        (true, None) => Err(Wrong::because(
            "the user in `smtp` needs `password_file` or `password_command`",
        )),
        _ => Ok(Mail {
            to: to.map_err(within("to"))?,
            from: from.map_err(within("from"))?,
            route: match smtp {
                Some(server) => MailRoute::Smtp { server, password },
                None => MailRoute::Sendmail,
            },
        }),
    }
}

/// An address, or a local name. It must add neither a header nor an option of sendmail.
fn address(value: &DeValue<'_>) -> Result<String, Wrong> {
    let shown = values::text(value)?;
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || ",;<>()\"".contains(c);
    if shown.starts_with('-') || shown.contains(is_odd) {
        return Err(Wrong::because(format!("{shown:?} is not a mail address")));
    }
    Ok(shown.to_owned())
}

fn smtp(value: &DeValue<'_>) -> Result<SmtpServer, Wrong> {
    values::text(value)?.parse().map_err(|why| match why {
        SmtpUrlError::Password => Wrong::because(why),
        SmtpUrlError::Scheme | SmtpUrlError::Form => {
            Wrong::must("be like smtps://user@host or smtp://user@host:port")
        }
    })
}

/// Reads `[watch.NAME]`. `None`: it lacks a key.
pub(super) fn read_watch<'i>(
    name: String,
    layer: Layer<'_, 'i>,
    reader: &Reader<'i>,
    places: &ConfigPlaces,
) -> Option<Watch> {
    let mut table = Table::new(reader, &format!("[watch.{name}]"), layer, None);
    if !sprat_session::address::is_name(&name) {
        let what = format!(
            "{name:?} can't be the name of a watch: use at most 64 letters, digits, `.`, `_` and `-`, and no \
             `.` or `-` in front"
        );
        reader.mistake(&table.spot, what);
    }
    let home = places.home.as_deref();
    let range = Duration::from_secs(60)..=super::TIME_MAX;
    let file = table.value("file", |value| values::absolute(value, home));
    let alert_after = table.value("alert_after", |value| values::duration(value, &range));
    for key in ["file", "alert_after"] {
        if !table.has(key) {
            table.missing(key);
        }
    }
    let settings = table.finish(&[], "watch");
    Some(Watch {
        name,
        file: file?,
        alert_after: alert_after?,
        settings,
    })
}
