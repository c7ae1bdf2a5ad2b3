//! Reads TOML tables key by key, and collects every mistake with its line.

use std::collections::BTreeSet;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::suggest::near_miss;

/// A mistake in a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mistake {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

/// The text that is read, and the mistakes found so far.
pub(super) struct Reader<'i> {
    text: &'i str,
    mistakes: Vec<Mistake>,
}

/// Largest number of mistakes that are listed: a file that is not a config has very many.
const MISTAKES_MAX: usize = 20;

impl<'i> Reader<'i> {
    pub(super) fn new(text: &'i str) -> Self {
        Self {
            text,
            mistakes: Vec::new(),
        }
    }

    /// Parses the whole text. A syntax mistake is reported alone.
    pub(super) fn parse(&mut self) -> Option<DeTable<'i>> {
        match DeTable::parse(self.text) {
            Ok(table) => Some(table.into_inner()),
            Err(error) => {
                let message = error.message().lines().collect::<Vec<_>>().join("; ");
                self.mistake(error.span().unwrap_or(0..0), message);
                None
            }
        }
    }

    pub(super) fn mistake(&mut self, span: Range<usize>, what: impl Into<String>) {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.mistakes.push(Mistake {
            line,
            what: what.into(),
        });
    }

    /// Mistakes so far.
    pub(super) fn count(&self) -> usize {
        self.mistakes.len()
    }

    /// The mistakes in the order of their lines.
    pub(super) fn into_mistakes(mut self) -> Vec<Mistake> {
        self.mistakes.sort_by_key(|mistake| mistake.line);
        let more = self.mistakes.len().saturating_sub(MISTAKES_MAX);
        self.mistakes.truncate(MISTAKES_MAX);
        if let (Some(last), true) = (self.mistakes.last_mut(), more > 0) {
            last.what.push_str(&format!(" (and {more} more mistakes)"));
        }
        self.mistakes
    }

    /// Reads the sub-tables of `value` in the order of the file.
    pub(super) fn named_tables<'t>(
        &mut self,
        kind: &str,
        value: &'t Spanned<DeValue<'i>>,
    ) -> Vec<(String, Table<'t, 'i>)> {
        let Some(tables) = value.get_ref().as_table() else {
            self.mistake(
                value.span(),
                format!("`{kind}` must be a table: [{kind}.NAME]"),
            );
            return Vec::new();
        };
        let mut found = Vec::new();
        for (name, value) in tables {
            match value.get_ref().as_table() {
                Some(entries) => found.push((
                    name.get_ref().to_string(),
                    Table {
                        title: format!("[{kind}.{}]", name.get_ref()),
                        place: format!("in [{kind}.{}]", name.get_ref()),
                        span: name.span(),
                        entries,
                        known: BTreeSet::new(),
                    },
                )),
                None => self.mistake(
                    name.span(),
                    format!(
                        "`{}` stands outside of a table: write it below [{kind}.NAME]",
                        name.get_ref()
                    ),
                ),
            }
        }
        found.sort_by_key(|(_, table)| table.span.start);
        found
    }
}

/// One table. Every known key must be read before [`Table::finish`].
pub(super) struct Table<'t, 'i> {
    pub(super) title: String,
    /// The title, as it follows a key's name.
    place: String,
    pub(super) span: Range<usize>,
    entries: &'t DeTable<'i>,
    known: BTreeSet<&'static str>,
}

impl<'t, 'i> Table<'t, 'i> {
    /// The top of the file.
    pub(super) fn top(entries: &'t DeTable<'i>) -> Self {
        Self {
            title: "the top of the file".to_owned(),
            place: "at the top of the file".to_owned(),
            span: 0..0,
            entries,
            known: BTreeSet::new(),
        }
    }

    /// Any value.
    pub(super) fn value(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'i>>> {
        self.known.insert(key);
        self.entries.get(key)
    }

    /// A string that is not empty.
    pub(super) fn text(&mut self, reader: &mut Reader<'i>, key: &'static str) -> Option<Text> {
        let value = self.value(key)?;
        let text = one_text(reader, key, value);
        text.filter(|text| {
            let empty = text.value.is_empty();
            if empty {
                reader.mistake(value.span(), format!("`{key}` is empty"));
            }
            !empty
        })
    }

    /// A list of strings; a single string counts as a list of one.
    pub(super) fn texts(&mut self, reader: &mut Reader<'i>, key: &'static str) -> Vec<Text> {
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        match value.get_ref() {
            DeValue::Array(values) => values
                .iter()
                .filter_map(|value| one_text(reader, key, value))
                .collect(),
            _ => one_text(reader, key, value).into_iter().collect(),
        }
    }

    /// `true` or `false`; `false` if the key is missing.
    pub(super) fn flag(&mut self, reader: &mut Reader<'i>, key: &'static str) -> bool {
        let Some(value) = self.value(key) else {
            return false;
        };
        value.get_ref().as_bool().unwrap_or_else(|| {
            reader.mistake(value.span(), format!("`{key}` must be true or false"));
            false
        })
    }

    /// As [`Self::flag`], for the old name of a key: it is not listed among the known ones.
    pub(super) fn old_flag(&mut self, reader: &mut Reader<'i>, key: &'static str) -> bool {
        self.entries.contains_key(key) && self.flag(reader, key)
    }

    /// Reports that a key is missing.
    pub(super) fn missing(&self, reader: &mut Reader<'i>, key: &str) {
        reader.mistake(self.span.clone(), format!("{} has no `{key}`", self.title));
    }

    /// Reports every unknown key.
    pub(super) fn finish(self, reader: &mut Reader<'i>) {
        for key in self.entries.keys() {
            let name: &str = key.get_ref();
            if self.known.contains(name) {
                continue;
            }
            let near = match near_miss(name, self.known.iter().copied()) {
                Some(near) => format!("; did you mean `{near}`?"),
                None => {
                    let known: Vec<&str> = self.known.iter().copied().collect();
                    format!("; known are {}", known.join(", "))
                }
            };
            reader.mistake(
                key.span(),
                format!("unknown key `{name}` {}{near}", self.place),
            );
        }
    }
}

/// A string and its place in the file.
pub(super) struct Text {
    pub(super) value: String,
    pub(super) span: Range<usize>,
}

fn one_text(reader: &mut Reader<'_>, key: &str, value: &Spanned<DeValue<'_>>) -> Option<Text> {
    let Some(text) = value.get_ref().as_str() else {
        reader.mistake(
            value.span(),
            format!(
                "`{key}` must be text in quotes, not {}",
                value.get_ref().type_str()
            ),
        );
        return None;
    };
    if text.contains('\0') {
        reader.mistake(value.span(), format!("`{key}` holds a NUL character"));
        return None;
    }
    Some(Text {
        value: text.to_owned(),
        span: value.span(),
    })
}
