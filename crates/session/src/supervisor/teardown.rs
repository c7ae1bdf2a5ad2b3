//! The end of a session that failed.

use std::time::{Duration, Instant};

use crate::Failure;
use crate::protocol::messages::{DRAIN_MAX, VolumeOrder, VolumeReply, WorkerOrder};
use crate::protocol::spawn::Role;
use crate::supervisor::{DEATH_LIMIT, Event, ORDERLY_LIMIT, Supervisor};

/// How long an abort may take before the volume process is killed. To remove what init made and to
/// release the lease takes a few round trips.
const ABORT_LIMIT: Duration = Duration::from_secs(10);

/// The abort is over by this time after the first interrupt.
const INTERRUPTED_LIMIT: Duration = Duration::from_secs(9);

impl Supervisor {
    /// Ends all processes without waiting for the server: first the volume, so that everything
    /// above it fails instead of waiting for it; then the worker, whose mounts go with it.
    pub(crate) fn tear_down(&mut self) {
        if self.over.is_some() {
            return;
        }
        self.over = Some(Failure::failed("the session has ended"));
        self.order(&VolumeOrder::Abort);
        let keeps_mount = self
            .worker
            .as_mut()
            .is_some_and(|worker| worker.role() == Role::Keeper);
        if keeps_mount {
            // Its mounts are in the caller's namespace, so it must unmount them itself.
            self.order(&WorkerOrder::Unmount);
        } else if let Some(worker) = &mut self.worker {
            worker.kill();
        }
        let limit = match &self.interrupted {
            Some(interrupt) => interrupt.time_left(INTERRUPTED_LIMIT),
            None => ABORT_LIMIT,
        };
        let mut deadline = Instant::now() + limit;
        let mut volume_done = self.volume_gone;
        let mut worker_done = self.worker_gone || self.worker.is_none();
        while !(volume_done && worker_done) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Volume(Some(VolumeReply::Aborted(report)))) => {
                    self.aborted = report;
                    volume_done = true;
                }
                Ok(Event::Volume(Some(VolumeReply::Naming(naming)))) => self.naming = naming,
                // If it were killed before, it would leave no list of what may arrive late.
                Ok(Event::Volume(Some(VolumeReply::Draining))) if self.interrupted.is_none() => {
                    deadline = Instant::now() + DRAIN_MAX + ABORT_LIMIT;
                }
                Ok(Event::Interrupt) => deadline = deadline.min(Instant::now() + ORDERLY_LIMIT),
                Ok(Event::Volume(None)) => volume_done = true,
                Ok(Event::Worker(number, None)) if number == self.worker_number => {
                    worker_done = true;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        if !volume_done || !self.volume.wait(Duration::from_secs(1)) {
            self.volume.kill();
        }
        self.volume.wait(DEATH_LIMIT);
        if let Some(worker) = &mut self.worker {
            worker.kill();
            worker.wait(DEATH_LIMIT);
        }
        self.worker = None;
    }
}
