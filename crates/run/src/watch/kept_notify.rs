//! The last `[notify]` that was right, in the state folder: a mistake in the config silences no alarm.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use sprat_snapshot::local_file;

use super::Watched;
use crate::config::{self, Mistake, Notify};

/// The `[notify]` by which notices go. A right one is kept for later.
pub(super) fn in_effect(watched: &Watched<'_>, problems: &mut Vec<String>) -> Notify {
    let own = &watched.config.notify;
    let path = path(watched);
    if !watched.mistakes.iter().any(Mistake::concerns_notices) {
        if let Err(error) = keep(&path, own) {
            problems.push(format!("can't write {}: {error}", path.display()));
        }
        return own.clone();
    }
    if !path.exists() {
        return own.clone();
    }
    let kept = config::load(&[path], &watched.places);
    match kept.mistakes.is_empty() {
        true => kept.config.notify,
        false => own.clone(),
    }
}

fn keep(path: &PathBuf, notify: &Notify) -> std::io::Result<()> {
    // It stands in the config itself, so nothing has to be waited for.
    let text = notify.toml.read(Duration::ZERO).unwrap_or_default();
    if std::fs::read(path).is_ok_and(|before| before == text.as_bytes()) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        local_file::make_private_folder(folder)?;
    }
    local_file::replace(path, |file| file.write_all(text.as_bytes()))
}

fn path(watched: &Watched<'_>) -> PathBuf {
    watched.state_dir.join("notify.toml")
}
