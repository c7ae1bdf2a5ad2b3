//! Reads TOML tables key by key, and collects every mistake with its file and line.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::PathBuf;

use toml::de::{DeTable, DeValue};

use super::mistake::{Mistake, Stops, Wrong};
use super::show::{Origin, Setting, written};
use crate::suggest::near_miss;

/// A file of the config, with its text.
pub(super) struct File {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// A place in a file, and what a mistake there stops.
#[derive(Debug, Clone)]
pub(super) struct Spot {
    file: usize,
    at: usize,
    pub(super) stops: Stops,
}

impl Spot {
    /// The place at byte `at` of a file.
    pub(super) fn new(file: usize, at: usize, stops: Stops) -> Self {
        Self { file, at, stops }
    }

    /// The same place, for a mistake that stops something else.
    pub(super) fn that_stops(&self, stops: Stops) -> Self {
        Self {
            stops,
            ..self.clone()
        }
    }

    /// For the order of the config.
    pub(super) fn order(&self) -> (usize, usize) {
        (self.file, self.at)
    }
}

/// The files, and the mistakes found so far.
pub(super) struct Reader<'i> {
    files: &'i [File],
    mistakes: RefCell<Vec<(Mistake, (usize, usize))>>,
    warnings: RefCell<Vec<(Mistake, (usize, usize))>>,
}

impl<'i> Reader<'i> {
    pub(super) fn new(files: &'i [File]) -> Self {
        Self {
            files,
            mistakes: RefCell::default(),
            warnings: RefCell::default(),
        }
    }

    /// Parses each file. Of one that is not TOML the first mistake is reported, and nothing is used.
    pub(super) fn parse(&self) -> Vec<(usize, DeTable<'i>)> {
        let mut tables = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            match DeTable::parse(&file.text) {
                Ok(table) => tables.push((index, table.into_inner())),
                Err(error) => {
                    let span = error.span().unwrap_or_default();
                    let message = error.message().lines().collect::<Vec<_>>().join("; ");
                    let what = match file.text.get(span.clone()) {
                        Some(name) if message == "duplicate key" => {
                            format!("`{name}` is in this file twice")
                        }
                        _ => message,
                    };
                    self.mistake(&Spot::new(index, span.start, Stops::File), what);
                }
            }
        }
        tables
    }

    pub(super) fn origin(&self, spot: &Spot) -> Origin {
        let file = &self.files[spot.file];
        let before = &file.text.as_bytes()[..spot.at.min(file.text.len())];
        Origin {
            file: file.path.clone(),
            line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
        }
    }

    fn found(
        &self,
        spot: &Spot,
        what: String,
        likely: Option<String>,
    ) -> (Mistake, (usize, usize)) {
        let Origin { file, line } = self.origin(spot);
        let mistake = Mistake {
            file,
            line: Some(line),
            what,
            likely,
            stops: spot.stops.clone(),
        };
        (mistake, (spot.file, line))
    }

    pub(super) fn mistake(&self, spot: &Spot, what: impl Into<String>) {
        self.mistake_likely(spot, what, None);
    }

    pub(super) fn mistake_likely(
        &self,
        spot: &Spot,
        what: impl Into<String>,
        likely: Option<&str>,
    ) {
        let found = self.found(spot, what.into(), likely.map(str::to_owned));
        self.mistakes.borrow_mut().push(found);
    }

    fn wrong(&self, spot: &Spot, key: &str, wrong: &Wrong) {
        let what = format!("`{key}`{}", wrong.what);
        self.mistake_likely(spot, what, wrong.likely.as_deref());
    }

    pub(super) fn warning(&self, spot: &Spot, what: impl Into<String>) {
        let spot = spot.that_stops(Stops::Nothing);
        let found = self.found(&spot, what.into(), None);
        self.warnings.borrow_mut().push(found);
    }

    /// The number of mistakes so far.
    pub(super) fn count(&self) -> usize {
        self.mistakes.borrow().len()
    }

    /// What the mistakes so far stop.
    pub(super) fn stopped(&self) -> BTreeSet<Stops> {
        let mistakes = self.mistakes.borrow();
        mistakes.iter().map(|(one, _)| one.stops.clone()).collect()
    }

    /// Mistakes and warnings, each in the order of files and lines, and each once: what stands in
    /// `[job_defaults]` is read for every job.
    pub(super) fn into_findings(self) -> (Vec<Mistake>, Vec<Mistake>) {
        let sorted = |found: RefCell<Vec<(Mistake, (usize, usize))>>| {
            let mut found = found.into_inner();
            found.sort_by_key(|(_, place)| *place);
            let mut once: Vec<Mistake> = Vec::new();
            for (mistake, _) in found {
                if !once.contains(&mistake) {
                    once.push(mistake);
                }
            }
            once
        };
        (sorted(self.mistakes), sorted(self.warnings))
    }

    /// Finds the tables `[kind.NAME]` of all files, in the order of the config.
    pub(super) fn named_tables<'t>(
        &self,
        kind: &str,
        tops: &'t [(usize, DeTable<'i>)],
        stops: impl Fn(&str) -> Stops,
    ) -> Vec<(String, Layer<'t, 'i>)> {
        let mut found: Vec<(String, Layer<'t, 'i>)> = Vec::new();
        for (file, top) in tops {
            let Some(value) = top.get(kind) else { continue };
            let Some(tables) = value.get_ref().as_table() else {
                let spot = Spot::new(*file, value.span().start, Stops::File);
                self.mistake(&spot, format!("`{kind}` must be a table: [{kind}.NAME]"));
                continue;
            };
            let mut here = Vec::new();
            for (name, value) in tables {
                let text = name.get_ref().to_string();
                let spot = Spot::new(*file, name.span().start, stops(&text));
                let Some(entries) = value.get_ref().as_table() else {
                    let why =
                        format!("`{text}` is outside of a table: write it below [{kind}.NAME]");
                    self.mistake(&spot.that_stops(Stops::Nothing), why);
                    continue;
                };
                match found.iter().find(|(known, _)| *known == text) {
                    Some((_, first)) => self.twice(&format!("[{kind}.{text}]"), &spot, &first.spot),
                    None => here.push((text, Layer { spot, entries })),
                }
            }
            here.sort_by_key(|(_, layer)| layer.spot.order());
            found.extend(here);
        }
        found
    }

    /// Reports what stands in two files.
    fn twice(&self, what: &str, second: &Spot, first: &Spot) {
        let Origin { file, line } = self.origin(first);
        let place = format!("{}:{line}", file.display());
        self.mistake(second, format!("{what} is also in {place}"));
    }
}

/// The entries of one table in one file.
#[derive(Clone)]
pub(super) struct Layer<'t, 'i> {
    /// Where its name stands.
    pub(super) spot: Spot,
    pub(super) entries: &'t DeTable<'i>,
}

/// What is known of one table: its entries in all layers. Every known key must be read before
/// [`Table::finish`].
pub(super) struct Table<'r, 't, 'i> {
    pub(super) reader: &'r Reader<'i>,
    /// Such as `[job.home]`.
    pub(super) title: String,
    pub(super) spot: Spot,
    /// The first one that has a key counts.
    layers: Vec<Layer<'t, 'i>>,
    /// The layers that this table alone has: in the others, an unknown key is reported elsewhere.
    own: usize,
    /// A key may stand in one layer only.
    once: bool,
    known: BTreeSet<&'static str>,
    settings: Vec<Setting>,
}

impl<'r, 't, 'i> Table<'r, 't, 'i> {
    /// A table in one file. Keys that it lacks come from `defaults`.
    pub(super) fn new(
        reader: &'r Reader<'i>,
        title: &str,
        layer: Layer<'t, 'i>,
        defaults: Option<&Layer<'t, 'i>>,
    ) -> Self {
        let mut table = Self::of_layer(reader, title, Some(layer));
        table.layers.extend(defaults.cloned());
        table
    }

    /// A table that may be missing.
    pub(super) fn of_layer(
        reader: &'r Reader<'i>,
        title: &str,
        layer: Option<Layer<'t, 'i>>,
    ) -> Self {
        let spot = layer.as_ref().map(|layer| layer.spot.clone());
        Self {
            reader,
            title: title.to_owned(),
            spot: spot.unwrap_or_else(|| Spot::new(0, 0, Stops::Nothing)),
            layers: layer.into_iter().collect(),
            own: 1,
            once: false,
            known: BTreeSet::new(),
            settings: Vec::new(),
        }
    }

    /// The top of all files.
    pub(super) fn top(reader: &'r Reader<'i>, tops: &'t [(usize, DeTable<'i>)]) -> Self {
        let layer = |(file, entries): &'t (usize, DeTable<'i>)| Layer {
            spot: Spot::new(*file, 0, Stops::Nothing),
            entries,
        };
        let mut table = Self::of_layer(reader, "the top of the file", None);
        table.layers.extend(tops.iter().map(layer));
        table.own = tops.len();
        table.once = true;
        table
    }

    /// Declares a key that somebody else reads.
    pub(super) fn knows(&mut self, key: &'static str) {
        self.known.insert(key);
    }

    /// Whether the table itself has the key, and not only its defaults.
    pub(super) fn has_own(&self, key: &str) -> bool {
        let mut own = self.layers.iter().take(self.own);
        own.any(|layer| layer.entries.contains_key(key))
    }

    /// Whether the key stands anywhere.
    pub(super) fn has(&self, key: &str) -> bool {
        self.layers
            .iter()
            .any(|layer| layer.entries.contains_key(key))
    }

    /// Where a key stands.
    pub(super) fn spot_of(&self, key: &str) -> Option<Spot> {
        self.layers.iter().find_map(|layer| {
            let (_, value) = layer.entries.get_key_value(key)?;
            Some(Spot::new(
                layer.spot.file,
                value.span().start,
                layer.spot.stops.clone(),
            ))
        })
    }

    /// Any value, and where it stands.
    pub(super) fn find(&mut self, key: &'static str) -> Option<(Spot, &'t DeValue<'i>)> {
        self.known.insert(key);
        self.find_unlisted(key)
    }

    fn find_unlisted(&self, key: &str) -> Option<(Spot, &'t DeValue<'i>)> {
        let mut holders = self.layers.iter().filter_map(|layer| {
            let value = layer.entries.get(key)?;
            let spot = Spot::new(
                layer.spot.file,
                value.span().start,
                layer.spot.stops.clone(),
            );
            Some((spot, value.get_ref()))
        });
        let first = holders.next()?;
        if let (true, Some((second, _))) = (self.once, holders.next()) {
            let stops = match key {
                "job_defaults" => Stops::EveryJob,
                "notify" => Stops::Notices,
                _ => Stops::Nothing,
            };
            let shown = match key {
                "job_defaults" | "notify" => format!("[{key}]"),
                _ => format!("`{key}`"),
            };
            self.reader
                .twice(&shown, &second.that_stops(stops), &first.0);
            return None;
        }
        Some(first)
    }

    /// The value of a key, parsed. A mistake is reported, and `None` returned.
    pub(super) fn value<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'i>) -> Result<T, Wrong>,
    ) -> Option<T> {
        let (spot, value) = self.find(key)?;
        self.note(key, value, &spot);
        self.parsed(key, &spot, value, parse)
    }

    /// As [`Self::value`], for a key that must not be shown.
    pub(super) fn secret<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&DeValue<'i>) -> Result<T, Wrong>,
    ) -> Option<T> {
        let (spot, value) = self.find(key)?;
        let hidden = match value {
            // `{ file = "…" }` names only a path.
            DeValue::Table(_) => written(value),
            _ => toml::Value::from("***"),
        };
        self.settings.push(Setting {
            key,
            value: hidden,
            origin: Some(self.reader.origin(&spot)),
            in_effect: true,
        });
        self.parsed(key, &spot, value, parse)
    }

    fn parsed<T>(
        &self,
        key: &str,
        spot: &Spot,
        value: &DeValue<'i>,
        parse: impl FnOnce(&DeValue<'i>) -> Result<T, Wrong>,
    ) -> Option<T> {
        parse(value)
            .map_err(|wrong| self.reader.wrong(spot, key, &wrong))
            .ok()
    }

    /// The value of a key, else its default, which is written as in a file.
    pub(super) fn value_or<T>(
        &mut self,
        key: &'static str,
        default: &str,
        parse: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> T {
        let set = self.value(key, &parse);
        self.or_default(key, default, set, parse)
    }

    /// As [`Self::value_or`], where the value is parsed already.
    pub(super) fn or_default<T>(
        &mut self,
        key: &'static str,
        default: &str,
        set: Option<T>,
        parse: impl Fn(&DeValue<'_>) -> Result<T, Wrong>,
    ) -> T {
        if let Some(value) = set {
            return value;
        }
        let default = DeValue::String(default.into());
        if !self.has(key) {
            self.default(key, written(&default));
        }
        match parse(&default) {
            Ok(value) => value,
            Err(wrong) => unreachable!("the default of `{key}`{}", wrong.what),
        }
    }

    /// Notes for `config show` the default of a key that is not set.
    pub(super) fn default(&mut self, key: &'static str, value: toml::Value) {
        self.settings.push(Setting {
            key,
            value,
            origin: None,
            in_effect: true,
        });
    }

    fn note(&mut self, key: &'static str, value: &DeValue<'_>, spot: &Spot) {
        self.settings.push(Setting {
            key,
            value: written(value),
            origin: Some(self.reader.origin(spot)),
            in_effect: true,
        });
    }

    /// A list, each with its place; one value alone counts as a list of one.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&DeValue<'i>) -> Result<T, Wrong>,
    ) -> Vec<(Spot, T)> {
        let Some((spot, value)) = self.find(key) else {
            return Vec::new();
        };
        self.note(key, value, &spot);
        let mut found = Vec::new();
        match value {
            DeValue::Array(values) => {
                for value in values {
                    let spot = Spot::new(spot.file, value.span().start, spot.stops.clone());
                    let parsed = self.parsed(key, &spot, value.get_ref(), &parse);
                    found.extend(parsed.map(|parsed| (spot, parsed)));
                }
            }
            value => {
                let parsed = self.parsed(key, &spot, value, &parse);
                found.extend(parsed.map(|parsed| (spot, parsed)));
            }
        }
        found
    }

    /// `true` or `false`.
    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let set = self.value(key, super::values::flag);
        if !self.has(key) {
            self.default(key, default.into());
        }
        set.unwrap_or(default)
    }

    /// As [`Self::flag`], under an old name that is still accepted: with a warning.
    pub(super) fn old_flag(&mut self, old: &'static str, new: &str) -> Option<bool> {
        let (spot, value) = self.find_unlisted(old)?;
        let what = format!("`{old}` is the old name of `{new}`: write `{new}`");
        self.reader.warning(&spot, what);
        self.note(old, value, &spot);
        self.parsed(old, &spot, value, super::values::flag)
    }

    /// A whole number of a range.
    pub(super) fn number(
        &mut self,
        key: &'static str,
        default: u32,
        range: std::ops::RangeInclusive<u32>,
    ) -> u32 {
        let set = self.value(key, |value| super::values::number(value, &range));
        if !self.has(key) {
            self.default(key, i64::from(default).into());
        }
        set.unwrap_or(default)
    }

    /// Reports that a key is missing.
    pub(super) fn missing(&self, key: &str) {
        let what = format!("{} has no `{key}`", self.title);
        self.reader.mistake(&self.spot, what);
    }

    /// Reports a mistake that concerns a key, or the table if the key is not set.
    pub(super) fn mistake(&self, key: &str, what: impl Into<String>) {
        let spot = self.spot_of(key).unwrap_or_else(|| self.spot.clone());
        self.reader.mistake(&spot, what);
    }

    /// As [`Self::mistake`], a warning.
    pub(super) fn warn(&self, key: &str, what: impl Into<String>) {
        let spot = self.spot_of(key).unwrap_or_else(|| self.spot.clone());
        self.reader.warning(&spot, what);
    }

    /// Reports every unknown key, and warns of those without effect; returns the settings.
    pub(super) fn finish(self, old: &[&str], kind: &str) -> Vec<Setting> {
        let in_table = match self.title.starts_with('[') {
            true => format!("in {}", self.title),
            false => format!("at {}", self.title),
        };
        for layer in self.layers.iter().take(self.own) {
            for key in layer.entries.keys() {
                let name: &str = key.get_ref();
                let spot = Spot::new(layer.spot.file, key.span().start, layer.spot.stops.clone());
                if self.known.contains(name) {
                    if super::in_effect::is_without_effect(kind, name) {
                        self.reader.warning(
                            &spot,
                            format!("{}: `{name}` {in_table}", super::in_effect::NOT_YET),
                        );
                    }
                    continue;
                }
                if old.contains(&name) {
                    continue;
                }
                let near = near_miss(name, self.known.iter().copied());
                let what = match near {
                    Some(_) => format!("unknown setting `{name}` {in_table}"),
                    None => {
                        let known: Vec<&str> = self.known.iter().copied().collect();
                        format!(
                            "unknown setting `{name}` {in_table}; known are {}",
                            known.join(", ")
                        )
                    }
                };
                self.reader.mistake_likely(&spot, what, near);
            }
        }
        let mut settings = self.settings;
        for setting in &mut settings {
            setting.in_effect = !super::in_effect::is_without_effect(kind, setting.key);
        }
        settings
    }
}

/// Reads `[name]` of the top, which stands in one file at most.
pub(super) fn only_table<'t, 'i>(
    top: &mut Table<'_, 't, 'i>,
    name: &'static str,
    stops: Stops,
) -> Option<Layer<'t, 'i>> {
    let (spot, value) = top.find(name)?;
    let spot = spot.that_stops(stops);
    match value.as_table() {
        Some(entries) => Some(Layer { spot, entries }),
        None => {
            let what = format!("`{name}` must be a table: [{name}]");
            top.reader.mistake(&spot, what);
            None
        }
    }
}
