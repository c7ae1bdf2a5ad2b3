//! Releases an rsync that blocks in `open` because a pipe has no writer.
//!
//! A file may become a pipe after rsync has examined it. A writer that opens and closes the pipe ends
//! the wait. The search runs in a separate thread, because the file that rsync is opening may be on a
//! file system that doesn't answer.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::stillness::Stillness;

/// A search that may be running.
#[derive(Debug, Default)]
pub(super) struct PipeSearch(Option<Receiver<Option<PathBuf>>>);

impl PipeSearch {
    /// Adds the pipes that were found to `pipes`, and starts the next search unless one is running.
    pub(super) fn go_on(&mut self, stillness: &Stillness, pipes: &mut Vec<PathBuf>) {
        self.take(Duration::ZERO, pipes);
        if self.0.is_some() {
            return;
        }
        let process = stillness.process();
        let (to, found) = sync_channel(1);
        let search = move || {
            let pipe = Stillness::pipe_waited_for(process).filter(|pipe| {
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                // Fails only if rsync no longer waits.
                rustix::fs::open(pipe, flags, Mode::empty()).is_ok()
            });
            let _ = to.send(pipe);
        };
        let started = std::thread::Builder::new().spawn(search);
        self.0 = started.is_ok().then_some(found);
    }

    /// Adds the pipes that a running search finds within `limit` to `pipes`.
    pub(super) fn take(&mut self, limit: Duration, pipes: &mut Vec<PathBuf>) {
        let Some(found) = &self.0 else { return };
        match found.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => return,
            Ok(Some(pipe)) if !pipes.contains(&pipe) => pipes.push(pipe),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => {}
        }
        self.0 = None;
    }
}
