//! A folder of a snapshot: what is in it, by name or by size.

use std::collections::HashMap;

use sprat_inside::{FolderSize, Kind, Listing, ListingEntry};
use sprat_run::inside_text;
use sprat_run::watch::Shown;
use sprat_session::text;

use crate::question::At;
use crate::rows::Rows;

/// How large the folders are that were summed up. `None`: it can't be read.
pub(crate) type Sizes = HashMap<At, Option<FolderSize>>;

/// What is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Name,
    Size,
}

#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) at: At,
    pub(crate) entries: Vec<ListingEntry>,
    /// How many more there are than the list can show.
    pub(crate) more: u64,
    pub(crate) rows: Rows,
    pub(crate) order: Order,
    /// The folders in it are summed up.
    pub(crate) sums_up: bool,
}

impl Folder {
    pub(crate) fn new(at: At, listing: Listing, order: Order, sizes: &Sizes) -> Self {
        let mut folder = Self {
            at,
            entries: listing.entries,
            more: listing.more,
            rows: Rows::default(),
            order,
            sums_up: order == Order::Size,
        };
        folder.sort(sizes);
        // The cursor was on what came first in the listing.
        folder.rows.cursor = 0;
        folder
    }

    /// Moves the cursor to a path, if it is here.
    pub(crate) fn find(&mut self, path: &str) {
        let place = self.entries.iter().position(|entry| entry.path == path);
        self.rows.cursor = place.unwrap_or(self.rows.cursor);
    }

    pub(crate) fn current(&self) -> Option<&ListingEntry> {
        self.entries.get(self.rows.cursor)
    }

    /// Sorts again. The cursor stays on its entry.
    pub(crate) fn sort(&mut self, sizes: &Sizes) {
        let here = self.current().map(|entry| entry.path.clone());
        match self.order {
            Order::Name => self.entries.sort_by(|one, other| one.path.cmp(&other.path)),
            Order::Size => {
                let at = &self.at;
                self.entries.sort_by_cached_key(|entry| {
                    let bytes = bytes(at, entry, sizes).unwrap_or(0);
                    (std::cmp::Reverse(bytes), entry.path.clone())
                });
            }
        }
        if let Some(path) = here {
            self.find(&path);
        }
    }

    /// The next folder that is not summed up yet.
    pub(crate) fn to_sum_up(&self, sizes: &Sizes) -> Option<At> {
        if !self.sums_up {
            return None;
        }
        let mut folders = self.folders();
        folders.find(|at| !sizes.contains_key(at))
    }

    /// How many folders there are, and how many are summed up.
    pub(crate) fn summed_up(&self, sizes: &Sizes) -> (usize, usize) {
        let known = self.folders().filter(|at| sizes.contains_key(at)).count();
        (known, self.folders().count())
    }

    fn folders(&self) -> impl Iterator<Item = At> + '_ {
        let folders = self
            .entries
            .iter()
            .filter(|entry| entry.found.kind == Kind::Folder);
        folders.map(|entry| self.at.path(&entry.path))
    }

    /// The cells of a row: mark, mode, size, time, name.
    pub(crate) fn cells(
        &self,
        row: usize,
        is_marked: bool,
        sizes: &Sizes,
        shown: &Shown,
    ) -> Vec<String> {
        let Some(entry) = self.entries.get(row) else {
            return Vec::new();
        };
        let found = &entry.found;
        let size = match (found.kind, sizes.get(&self.at.path(&entry.path))) {
            (Kind::Folder, Some(Some(size))) => text::bytes(size.bytes),
            (Kind::Folder, Some(None)) => "unread".to_owned(),
            (Kind::Folder, None) if self.sums_up => "…".to_owned(),
            _ => inside_text::size(found),
        };
        let mut name = self.name(entry).to_owned();
        match (&found.link, found.kind) {
            (Some(link), _) => name.push_str(&format!(" -> {link}")),
            (None, Kind::Folder) => name.push('/'),
            _ => {}
        }
        let mark = if is_marked { "*" } else { " " };
        vec![
            mark.to_owned(),
            inside_text::mode(found),
            size,
            shown.time(found.modified),
            name,
        ]
    }

    fn name<'e>(&self, entry: &'e ListingEntry) -> &'e str {
        let name = entry.path.strip_prefix(&self.at.path);
        name.map_or(&*entry.path, |name| name.trim_start_matches('/'))
    }
}

fn bytes(at: &At, entry: &ListingEntry, sizes: &Sizes) -> Option<u64> {
    match entry.found.kind {
        Kind::Folder => sizes.get(&at.path(&entry.path))?.map(|size| size.bytes),
        _ => Some(entry.found.bytes),
    }
}
