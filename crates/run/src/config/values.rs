//! The types of values in a config, and how each is parsed.

use std::ffi::OsString;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use jiff::civil::Time;
use sprat_session::text;
use sprat_session::upload_rates::UploadRates;
use toml::de::DeValue;

use super::mistake::Wrong;
use crate::day_part::DayPart;
use crate::hooks::Hook;
use crate::notify::PrivateText;

/// A command that runs without a shell.
pub type Words = Vec<OsString>;

/// How many bytes per second may be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadLimit {
    /// At any time, in bytes per second.
    Always(u64),
    /// In these parts of the day, in bytes per second; there is no limit outside of them.
    Times(Vec<(DayPart, u64)>),
}

impl UploadLimit {
    /// As a session needs it.
    #[must_use]
    pub fn rates(&self, time_zone: &str) -> UploadRates {
        UploadRates {
            time_zone: time_zone.to_owned(),
            parts: match self {
                Self::Always(rate) => vec![(DayPart::WHOLE, *rate)],
                Self::Times(times) => times.clone(),
            },
        }
    }
}

/// One source of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An absolute path of this machine.
    Local(PathBuf),
    /// A path of another machine, which is pulled over ssh.
    Pulled {
        /// The login, if one is named.
        user: Option<String>,
        /// The host as written.
        host: String,
        /// Absolute.
        path: PathBuf,
    },
}

impl fmt::Display for Source {
    /// As in the config.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "{}", path.display()),
            Self::Pulled { user, host, path } => {
                if let Some(user) = user {
                    write!(f, "{user}@")?;
                }
                write!(f, "{host}:{}", path.display())
            }
        }
    }
}

pub(super) fn text<'t>(value: &'t DeValue<'_>) -> Result<&'t str, Wrong> {
    let Some(text) = value.as_str() else {
        let kind = value.type_str();
        return Err(Wrong::must(format!("be text in quotes, not {kind}")));
    };
    if text.contains('\0') {
        return Err(Wrong::because("it has a NUL character in it"));
    }
    if text.is_empty() {
        return Err(Wrong::because("it is empty"));
    }
    Ok(text)
}

/// As [`text()`], owned.
pub(super) fn owned(value: &DeValue<'_>) -> Result<String, Wrong> {
    text(value).map(str::to_owned)
}

pub(super) fn flag(value: &DeValue<'_>) -> Result<bool, Wrong> {
    value.as_bool().ok_or(Wrong::must("be true or false"))
}

pub(super) fn number(value: &DeValue<'_>, range: &RangeInclusive<u32>) -> Result<u32, Wrong> {
    let digits = value.as_integer().filter(|number| number.radix() == 10);
    let number = digits.and_then(|number| number.as_str().parse::<u32>().ok());
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| {
            let (from, to) = (range.start(), range.end());
            Wrong::must(format!("be a whole number from {from} to {to}"))
        })
}

/// A word of a list.
pub(super) fn one_of<T: Copy>(
    value: &DeValue<'_>,
    words: &[(&'static str, T)],
) -> Result<T, Wrong> {
    let text = text(value)?;
    let found = words.iter().find(|(word, _)| *word == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        Wrong::not_one_of(text, &words)
    })
}

/// A time of a range. `m` alone is refused: it could be a minute or a month.
pub(super) fn duration(
    value: &DeValue<'_>,
    range: &RangeInclusive<Duration>,
) -> Result<Duration, Wrong> {
    let shown = text(value)?;
    let wrong = |why: &str| Wrong::because(format!("{shown:?}: {why}"));
    let number = shown.trim_end_matches('m').trim_end();
    if number.len() < shown.len() && number.ends_with(|c: char| c.is_ascii_digit()) {
        let mut wrong = wrong("`m` could be minutes or months");
        wrong.likely = Some(format!("{number} min"));
        return Err(wrong);
    }
    let time = text::parse_time(shown, "smhdw").map_err(|_| {
        let why = "write a whole number and a unit: s, min, h, days or weeks";
        match shown.contains("month") || shown.contains("year") {
            true => wrong("months and years have no fixed length; write days or weeks"),
            false => wrong(why),
        }
    })?;
    if time < *range.start() {
        let from = duration_text(*range.start());
        return Err(wrong(&format!("it must be at least {from}")));
    }
    if time > *range.end() {
        let to = duration_text(*range.end());
        return Err(wrong(&format!("it must be at most {to}")));
    }
    Ok(time)
}

/// A time as a config has it, in the largest unit that needs no fraction.
pub(super) fn duration_text(time: Duration) -> String {
    let seconds = time.as_secs();
    let units = [(86_400, "days"), (3600, "h"), (60, "min")];
    let unit = units
        .into_iter()
        .find(|(unit, _)| seconds > 0 && seconds.is_multiple_of(*unit));
    match unit {
        Some((86_400, _)) if seconds == 86_400 => "1 day".to_owned(),
        Some((unit, name)) => format!("{} {name}", seconds / unit),
        None => format!("{seconds} s"),
    }
}

/// A time, or `"never"`, which is `None`.
pub(super) fn duration_or_never(
    value: &DeValue<'_>,
    range: &RangeInclusive<Duration>,
) -> Result<Option<Duration>, Wrong> {
    match value.as_str() {
        Some("never") => Ok(None),
        _ => duration(value, range).map(Some),
    }
}

/// A size in bytes.
pub(super) fn size(value: &DeValue<'_>) -> Result<u64, Wrong> {
    let shown = text(value)?;
    let wrong = |why: &str| Wrong::because(format!("{shown:?}: {why}"));
    if shown.ends_with(|c: char| c.is_ascii_digit()) {
        return Err(wrong("a unit is missing, such as MiB or GiB"));
    }
    text::parse_size(shown).map_err(|why| wrong(&why))
}

/// A size in bytes, at least one.
pub(super) fn some_size(value: &DeValue<'_>) -> Result<u64, Wrong> {
    match size(value)? {
        0 => Err(Wrong::because(format!(
            "{:?}: it must be at least 1 B",
            text(value)?
        ))),
        bytes => Ok(bytes),
    }
}

/// A rate in bytes per second.
pub(super) fn rate(value: &DeValue<'_>) -> Result<u64, Wrong> {
    let shown = text(value)?;
    let wrong = |why: &str| Wrong::because(format!("{shown:?}: {why}"));
    let units = "write a rate like 20 Mbit/s (kbit/s, Mbit/s, Gbit/s) or 2 MiB/s";
    let Some(amount) = shown.strip_suffix("/s") else {
        return Err(wrong(units));
    };
    let bits = [("kbit", 1000), ("Mbit", 1_000_000), ("Gbit", 1_000_000_000)];
    let rate = match bits.iter().find_map(|(unit, factor)| {
        let number = amount.strip_suffix(unit)?.trim_end();
        Some((number, *factor))
    }) {
        Some((number, factor)) => {
            let number: Option<u64> = number.parse().ok();
            let bits = number.and_then(|number| number.checked_mul(factor));
            bits.ok_or_else(|| wrong(units))? / 8
        }
        None if amount.ends_with("bit") => return Err(wrong(units)),
        None => text::parse_size(amount).map_err(|_| wrong(units))?,
    };
    match rate {
        // Slower than that, no answer of the server arrives in time.
        0..1000 => Err(wrong("it must be at least 1 kB/s")),
        rate => Ok(rate),
    }
}

/// Splits a command into words as a shell does; nothing in it is expanded, and no shell runs it.
///
/// # Errors
/// It holds no command, or a quote is not closed, or a character outside of quotes that only a shell
/// understands.
pub fn split_words(text: &str) -> Result<Words, String> {
    if let Some(found) = shell_character(text) {
        return Err(format!(
            "sprat runs it without a shell, so {found:?} has no meaning; quote it, or write sh -c '…'"
        ));
    }
    match shlex::split(text) {
        Some(words) if !words.is_empty() && !words[0].is_empty() => {
            Ok(words.into_iter().map(OsString::from).collect())
        }
        Some(_) => Err("it has no command in it".to_owned()),
        None => Err("a quote is not closed".to_owned()),
    }
}

/// One text that [`split_words`] splits into these words again.
#[must_use]
pub fn join_words(words: &[OsString]) -> String {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    // Only a NUL byte can't be quoted, and no argument has one.
    shlex::try_join(words.iter().map(|word| &**word)).unwrap_or_default()
}

/// The first character outside of quotes that asks for a shell.
fn shell_character(text: &str) -> Option<&str> {
    let mut quote = None;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match (quote, c) {
            (Some('\''), c) if c != '\'' => {}
            (_, '\\') => {
                chars.next();
            }
            (Some(open), c) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, '|' | '>' | '<' | '&' | ';' | '`') => return Some(&text[at..=at]),
            (None, '$') if chars.peek().is_some_and(|(_, next)| *next == '(') => {
                return Some(&text[at..at + 2]);
            }
            _ => {}
        }
    }
    None
}

pub(super) fn command(value: &DeValue<'_>) -> Result<Words, Wrong> {
    split_words(text(value)?).map_err(Wrong::because)
}

/// The entries of an inline table, none of which has another key than those of `known`.
pub(super) fn entries<'t, 'i>(
    value: &'t DeValue<'i>,
    known: &[&str],
    must: &str,
) -> Result<&'t toml::de::DeTable<'i>, Wrong> {
    let Some(table) = value.as_table() else {
        return Err(Wrong::must(must));
    };
    for key in table.keys() {
        let key: &str = key.get_ref();
        if !known.contains(&key) {
            return Err(Wrong::not_one_of(key, known));
        }
    }
    Ok(table)
}

/// Adds the inner key to what is wrong with its value.
pub(super) fn inside(key: &str, wrong: Wrong) -> Wrong {
    Wrong {
        what: format!(": `{key}`{}", wrong.what),
        likely: wrong.likely,
    }
}

/// A command, or `{ run = COMMAND, timeout = TIME, user = NAME }`.
pub(super) fn hook(value: &DeValue<'_>, timeout: Duration) -> Result<Hook, Wrong> {
    if value.as_str().is_some() {
        let words = command(value)?;
        let user = None;
        return Ok(Hook {
            words,
            timeout,
            user,
        });
    }
    let must = "be a command, or { run = COMMAND, timeout = TIME, user = NAME }";
    let table = entries(value, &["run", "timeout", "user"], must)?;
    let get = |key: &str| table.get(key).map(toml::Spanned::get_ref);
    let run = get("run").ok_or_else(|| Wrong::because("there is no `run` in it"))?;
    let range = Duration::from_secs(1)..=super::TIME_MAX;
    let timeout = match get("timeout") {
        Some(value) => duration(value, &range).map_err(|wrong| inside("timeout", wrong))?,
        None => timeout,
    };
    let user = get("user").map(user_name).transpose();
    Ok(Hook {
        words: command(run).map_err(|wrong| inside("run", wrong))?,
        timeout,
        user: user.map_err(|wrong| inside("user", wrong))?,
    })
}

/// The name of a user of this machine.
pub(super) fn user_name(value: &DeValue<'_>) -> Result<String, Wrong> {
    let name = text(value)?;
    let is_odd = |c: char| c.is_whitespace() || c.is_control() || ":/@".contains(c);
    if name.starts_with('-') || name.contains(is_odd) {
        return Err(Wrong::because(format!("{name:?} is not a user name")));
    }
    Ok(name.to_owned())
}

/// Text, or `{ file = PATH }`.
pub(super) fn secret(
    value: &DeValue<'_>,
    home: Option<&Path>,
    check: impl FnOnce(&str) -> Result<(), String>,
) -> Result<PrivateText, Wrong> {
    if value.as_str().is_some() {
        let text = text(value)?;
        check(text).map_err(Wrong::because)?;
        return Ok(PrivateText::text(text));
    }
    let table = entries(value, &["file"], "be text in quotes, or { file = PATH }")?;
    let file = table.get("file").map(toml::Spanned::get_ref);
    let file = file.ok_or_else(|| Wrong::because("there is no `file` in it"))?;
    let path = absolute(file, home).map_err(|wrong| inside("file", wrong))?;
    Ok(PrivateText::File(path))
}

/// A path that begins with `/` or `~/`.
pub(super) fn absolute(value: &DeValue<'_>, home: Option<&Path>) -> Result<PathBuf, Wrong> {
    let shown = text(value)?;
    match (shown.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Ok(home.join(rest)),
        (Some(_), None) => Err(Wrong::because(format!(
            "{shown:?} begins with ~/, but HOME is not set (a system service has none): write the full \
             path"
        ))),
        (None, _) if Path::new(shown).is_absolute() => Ok(PathBuf::from(shown)),
        (None, _) => Err(Wrong::because(format!("{shown:?} must begin with / or ~/"))),
    }
}

/// A local path, or `[user@]host:/path`.
pub(super) fn source(value: &DeValue<'_>, home: Option<&Path>) -> Result<Source, Wrong> {
    let shown = text(value)?;
    let host_part = shown.split('/').next().unwrap_or_default();
    let source = match host_part.split_once(':') {
        // A target may have this form.
        Some(("ssh" | "sftp" | "rsync", "")) if shown[host_part.len()..].starts_with("//") => {
            return Err(Wrong::because(format!(
                "{shown:?}: write [user@]host:/path. Set a port in ssh's configuration"
            )));
        }
        Some((login, "")) => {
            let path = PathBuf::from(&shown[host_part.len()..]);
            pulled(login, path).ok_or_else(|| {
                Wrong::because(format!("{shown:?} must be a path or [user@]host:/path"))
            })?
        }
        Some(_) => {
            return Err(Wrong::because(format!(
                "{shown:?}: the path on the host must begin with /"
            )));
        }
        None => Source::Local(absolute(value, home)?),
    };
    let (Source::Local(path) | Source::Pulled { path, .. }) = &source;
    // Snapshots contain the whole path of a source, so it must be the same in each run.
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Wrong::because(format!(
            "{shown:?} must not have `..` in it"
        )));
    }
    Ok(source)
}

/// ssh must not take a part of the login for an option, nor a shell for more than a name. The host is
/// also the name of a folder.
fn pulled(login: &str, path: PathBuf) -> Option<Source> {
    let (user, host) = match login.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, login),
    };
    let is_word = |text: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !text.is_empty() && !text.starts_with(['-', '.']) && text.chars().all(is_plain)
    };
    let is_right = is_word(host) && user.is_none_or(is_word) && path.is_absolute();
    is_right.then(|| Source::Pulled {
        user: user.map(str::to_owned),
        host: host.to_owned(),
        path,
    })
}

/// `HH:MM`, from 00:00 to 23:59.
pub(super) fn time_of_day(text: &str) -> Option<Time> {
    let (hour, minute) = text.split_once(':')?;
    let two_digits = |part: &str| -> Option<i8> {
        let is_right = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_digit());
        is_right.then(|| part.parse().ok()).flatten()
    };
    Time::new(two_digits(hour)?, two_digits(minute)?, 0, 0).ok()
}

/// A part of the day of two times, which are not the same.
pub(super) fn day_part(from: &str, to: &str) -> Result<DayPart, Wrong> {
    let time = |text: &str| {
        let why = format!("{text:?} is not a time of the day, 00:00 to 23:59");
        time_of_day(text).ok_or_else(|| Wrong::because(why))
    };
    let (from, to) = (time(from)?, time(to)?);
    if from == to {
        return Err(Wrong::because("it begins and ends at the same time"));
    }
    Ok(DayPart { from, to })
}

/// `HH:MM-HH:MM`.
pub(super) fn window(value: &DeValue<'_>) -> Result<DayPart, Wrong> {
    let shown = text(value)?;
    let (from, to) = shown
        .split_once('-')
        .ok_or_else(|| Wrong::must("be like 22:00-06:00"))?;
    day_part(from.trim(), to.trim())
}

/// A rate, or a list of `{ from, to, rate }` that do not overlap.
pub(super) fn upload_limit(value: &DeValue<'_>) -> Result<UploadLimit, Wrong> {
    let Some(values) = value.as_array() else {
        return match value.as_table() {
            Some(_) => Ok(UploadLimit::Times(vec![limited_time(value)?])),
            None => rate(value).map(UploadLimit::Always),
        };
    };
    let mut times: Vec<(DayPart, u64)> = Vec::new();
    for value in values {
        let (part, rate) = limited_time(value.get_ref())?;
        if let Some((other, _)) = times.iter().find(|(other, _)| other.overlaps(&part)) {
            return Err(Wrong::because(format!(
                "the times from {} and from {} overlap",
                other.from.strftime("%H:%M"),
                part.from.strftime("%H:%M")
            )));
        }
        times.push((part, rate));
    }
    match times.is_empty() {
        true => Err(Wrong::because("the list is empty")),
        false => Ok(UploadLimit::Times(times)),
    }
}

fn limited_time(value: &DeValue<'_>) -> Result<(DayPart, u64), Wrong> {
    let must = "be a rate, or a list of { from = \"HH:MM\", to = \"HH:MM\", rate = RATE }";
    let table = entries(value, &["from", "to", "rate"], must)?;
    let get = |key: &str| {
        let value = table.get(key).map(toml::Spanned::get_ref);
        value.ok_or_else(|| Wrong::because(format!("there is no `{key}` in it")))
    };
    let (from, to) = (text(get("from")?)?, text(get("to")?)?);
    let rate = rate(get("rate")?).map_err(|wrong| inside("rate", wrong))?;
    Ok((day_part(from, to)?, rate))
}

/// The address of a network card, such as `aa:bb:cc:dd:ee:ff`, in lower case.
pub(super) fn mac_address(value: &DeValue<'_>) -> Result<String, Wrong> {
    let shown = text(value)?;
    let is_byte = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    if shown.split(':').count() != 6 || !shown.split(':').all(is_byte) {
        let why = format!("{shown:?} is not a MAC address such as aa:bb:cc:dd:ee:ff");
        return Err(Wrong::because(why));
    }
    Ok(shown.to_ascii_lowercase())
}

/// The name of a network interface.
pub(super) fn interface(value: &DeValue<'_>) -> Result<String, Wrong> {
    let shown = text(value)?;
    // dev_valid_name in net/core/dev.c: IFNAMSIZ is 16, with the zero at its end.
    let is_odd = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if shown.len() > 15 || shown == "." || shown == ".." || shown.contains(is_odd) {
        return Err(Wrong::because(format!(
            "{shown:?} is not the name of an interface"
        )));
    }
    Ok(shown.to_owned())
}

/// The name of one file, without a folder.
pub(super) fn file_name(value: &DeValue<'_>) -> Result<String, Wrong> {
    let shown = text(value)?;
    let is_odd = |c: char| c == '/' || c.is_control();
    if shown == "." || shown == ".." || shown.len() > 255 || shown.contains(is_odd) {
        let why = format!("{shown:?} is not the name of a file, without its folder");
        return Err(Wrong::because(why));
    }
    Ok(shown.to_owned())
}
