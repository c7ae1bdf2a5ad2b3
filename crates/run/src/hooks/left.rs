//! The hook that runs now is noted in a file. `kill -9` ends sprat and not the hook, which may go on for long: the next
//! run ends it before it runs other hooks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use sprat_session::child_tree::end_tree;

/// Names a process, as long as this exists.
pub(super) struct Note(PathBuf);

impl Note {
    /// `None`: the process has ended, or the note can't be written.
    pub(super) fn write(path: &Path, pid: Pid) -> Option<Self> {
        let began = began(pid)?;
        let text = format!("{} {began}\n", pid.as_raw_nonzero());
        if let Err(error) = fs::write(path, text) {
            tracing::warn!(%error, path = %path.display(), "the running hook can't be noted");
            return None;
        }
        Some(Self(path.to_owned()))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Ends the process that the note at `path` names, with all that it started. What a hook that has ended left behind
/// stays.
pub(super) fn end(path: &Path, limit: Duration) {
    let Ok(text) = fs::read_to_string(path) else {
        return;
    };
    if let Some((pid, noted)) = parse(&text)
        && began(pid) == Some(noted)
    {
        tracing::warn!(
            pid = pid.as_raw_nonzero(),
            "a hook outlived its run, which was killed, and is ended"
        );
        end_tree(pid, true, limit, &mut || began(pid) != Some(noted));
    }
    let _ = fs::remove_file(path);
}

fn parse(text: &str) -> Option<(Pid, u64)> {
    let (pid, began) = text.trim().split_once(' ')?;
    Some((Pid::from_raw(pid.parse().ok()?)?, began.parse().ok()?))
}

/// When a process began, in the clock ticks of proc_pid_stat(5), which no later process with its number has. `None`: it
/// has ended, or leads no process group.
fn began(pid: Pid) -> Option<u64> {
    let number = pid.as_raw_nonzero().to_string();
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // `PID (NAME) STATE PARENT GROUP …`, and NAME may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let has_ended = matches!(*fields.first()?, "Z" | "X");
    if has_ended || *fields.get(2)? != number {
        return None;
    }
    fields.get(19)?.parse().ok()
}
