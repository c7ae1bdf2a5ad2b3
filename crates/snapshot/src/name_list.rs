//! A bounded list of names or messages: the first of them, and how many there were.

use serde::{Deserialize, Serialize};

/// How many names a list in a record keeps. Further ones are only counted.
pub const NAMES_MAX: usize = 1000;

/// Some names or messages, as escaped text, and how many there were in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NameList {
    /// How many there were.
    pub count: u64,
    /// The first of them.
    pub names: Vec<String>,
}

impl FromIterator<String> for NameList {
    fn from_iter<I: IntoIterator<Item = String>>(names: I) -> Self {
        let mut list = Self::default();
        names.into_iter().for_each(|name| list.push(name));
        list
    }
}

impl NameList {
    /// Counts `name`, and keeps it if the list is not full.
    pub(crate) fn push(&mut self, name: String) {
        self.push_within(name, NAMES_MAX);
    }

    /// As [`NameList::push_within`], unless `name` is the last one in the list. rsync has one message for each
    /// attribute of a file, in succession.
    pub(crate) fn push_new_within(&mut self, name: String, names_max: usize) {
        if self.names.last() != Some(&name) {
            self.push_within(name, names_max);
        }
    }

    pub(crate) fn push_within(&mut self, name: String, names_max: usize) {
        self.count = self.count.saturating_add(1);
        if self.names.len() < names_max {
            self.names.push(name);
        }
    }

    /// The same list with each name converted.
    pub(crate) fn map(&self, change: impl FnMut(&String) -> String) -> Self {
        Self {
            count: self.count,
            names: self.names.iter().map(change).collect(),
        }
    }

    /// As much of it as a record keeps.
    pub(crate) fn shortened(&self) -> Self {
        let mut short = Self::default();
        short.append(self);
        short
    }

    /// Appends `other`, up to `names_max` names in all.
    pub(crate) fn append_within(&mut self, other: &Self, names_max: usize) {
        let count = self.count.saturating_add(other.count);
        for name in &other.names {
            self.push_within(name.clone(), names_max);
        }
        self.count = count;
    }

    /// Appends `other`.
    pub(crate) fn append(&mut self, other: &Self) {
        self.append_within(other, NAMES_MAX);
    }

    /// Whether nothing was counted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}
