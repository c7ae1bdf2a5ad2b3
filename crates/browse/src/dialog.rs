//! What is asked or shown above a list: a restore step by step, and texts.

use std::path::{Path, PathBuf};

use sprat_snapshot::{Existing, RestoreSpec};

use crate::rows::Rows;

#[derive(Debug)]
pub(crate) enum Dialog {
    /// Lines to read.
    Text {
        title: String,
        lines: Vec<String>,
        rows: Rows,
    },
    /// Where a restore shall go.
    Where {
        spec: Box<RestoreSpec>,
        /// What is restored.
        what: String,
        typed: String,
    },
    /// What the restore would do, and whether it shall do it.
    Confirm {
        spec: Box<RestoreSpec>,
        lines: Vec<String>,
        /// Files at the destination would be replaced.
        replaces: bool,
        rows: Rows,
    },
    /// The restore runs.
    Restoring { to: PathBuf },
}

impl Dialog {
    pub(crate) fn text(title: &str, lines: Vec<String>) -> Self {
        Self::Text {
            title: title.to_owned(),
            lines,
            rows: Rows::default(),
        }
    }
}

/// How files that are there already are treated, for a key; `None`: the key means nothing here. Where nothing was to be
/// replaced, what has appeared since is kept.
pub(crate) fn existing(key: char, replaces: bool) -> Option<Existing> {
    match (key, replaces) {
        ('y', false) => Some(Existing::Keep),
        ('o', true) => Some(Existing::Overwrite),
        ('k', true) => Some(Existing::Keep),
        ('n', true) => Some(Existing::KeepNewer),
        _ => None,
    }
}

/// The folder that was typed; a relative one starts from `current`, and `~` is `home`, as in a shell.
pub(crate) fn destination(typed: &str, current: &Path, home: Option<&Path>) -> Option<PathBuf> {
    let typed = typed.trim();
    if typed.is_empty() {
        return None;
    }
    match Path::new(typed).strip_prefix("~") {
        Ok(below) => Some(home?.join(below)),
        Err(_) => Some(current.join(typed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_overwritten_by_a_yes() {
        assert_eq!(existing('y', false), Some(Existing::Keep));
        assert_eq!(existing('y', true), None);
        assert_eq!(existing('o', true), Some(Existing::Overwrite));
        assert_eq!(existing('o', false), None);
        let to = |typed| destination(typed, Path::new("/root"), Some(Path::new("/home/ann")));
        assert_eq!(to(" "), None);
        assert_eq!(to("back"), Some(PathBuf::from("/root/back")));
        assert_eq!(to("~/back"), Some(PathBuf::from("/home/ann/back")));
        assert_eq!(to("~ann"), Some(PathBuf::from("/root/~ann")));
        assert_eq!(destination("~/back", Path::new("/root"), None), None);
    }
}
