//! Passes on the name of each file whose content is copied into a snapshot.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::text::{escape_name, unescape_name};

/// Gets the path of each file.
type Receive = Arc<dyn Fn(&str) + Send + Sync>;

/// Whether the copied files are wanted, and who receives them. The default: they are not.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct FileListener {
    is_wanted: bool,
    #[serde(skip)]
    receive: Option<Receive>,
}

impl FileListener {
    /// The files are wanted if `is_wanted`, and nobody receives them yet.
    #[must_use]
    pub fn new(is_wanted: bool) -> Self {
        Self {
            is_wanted,
            receive: None,
        }
    }

    /// From now on `receive` gets each file, if they are wanted: its path, escaped, relative to the snapshot.
    pub fn send_to(&mut self, receive: impl Fn(&str) + Send + Sync + 'static) {
        self.receive = self.is_wanted.then(|| Arc::new(receive) as _);
    }

    /// The same, for names that `path_of` turns into paths in the snapshot.
    pub(crate) fn named(&self, path_of: impl Fn(&str) -> String + Send + Sync + 'static) -> Self {
        let receive = self.receive.clone().map(|receive| {
            let named = move |name: &str| receive(&path_of(name));
            Arc::new(named) as Receive
        });
        Self { receive, ..*self }
    }

    /// The content of this file is copied. rsync has escaped its name, which it does with all but ASCII.
    pub(crate) fn copied(&self, name: &str) {
        if let Some(receive) = &self.receive {
            receive(&escape_name(&unescape_name(name)));
        }
    }
}

impl fmt::Debug for FileListener {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("FileListener")
            .field("is_wanted", &self.is_wanted)
            .finish_non_exhaustive()
    }
}

impl PartialEq for FileListener {
    fn eq(&self, other: &Self) -> bool {
        self.is_wanted == other.is_wanted
    }
}

impl Eq for FileListener {}
