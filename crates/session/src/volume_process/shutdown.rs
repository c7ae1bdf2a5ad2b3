//! What the volume process's threads share: the request to stop, and the channel to the session
//! process.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sprat_store::{IgnorePoison, StoreError};
use sprat_volume::Volume;

use crate::Failure;
use crate::protocol::frames::Sender;
use crate::protocol::messages::VolumeReply;
use crate::protocol::reports::{Notice, Phase};
use crate::state::headers::Kept;

/// The session's request to stop. The thread that receives orders sets it; the others check it
/// between steps.
#[derive(Default)]
pub(crate) struct StopFlag {
    requested: AtomicBool,
    /// From here on the process has something to release or remove: a lease, an unfinished file.
    cleanup_duty: AtomicBool,
    volume: Mutex<Option<Arc<Volume>>>,
}

impl StopFlag {
    /// Stops sending at once. Everything above gets EIO.
    pub(crate) fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        self.abort_volume();
    }

    /// The process is about to acquire something that must be released. Fails if a request arrived
    /// before.
    pub(crate) fn begin_cleanup_duty(&self) -> Result<(), Failure> {
        self.cleanup_duty.store(true, Ordering::SeqCst);
        self.check()
    }

    /// Whether this process must clean up before it ends. Asked after a request: a process that
    /// begins to hold something later sees the request.
    pub(crate) fn cleanup_duty(&self) -> bool {
        self.cleanup_duty.load(Ordering::SeqCst)
    }

    /// Fails everything that waits for the volume, without a request to stop.
    pub(crate) fn abort_volume(&self) {
        let volume = self.volume.lock().ignore_poison();
        if let Some(volume) = &*volume {
            volume.abort();
        }
    }

    /// Another part found that the connection is lost. The volume reconnects although it has
    /// nothing to send.
    pub(crate) fn connection_lost(&self, cause: StoreError) {
        let volume = self.volume.lock().ignore_poison();
        if let Some(volume) = &*volume {
            volume.connection_lost(cause);
        }
    }

    /// From now on a request reaches `volume`, including a request that has already arrived.
    pub(crate) fn reaches(&self, volume: &Arc<Volume>) {
        let mut known = self.volume.lock().ignore_poison();
        *known = Some(Arc::clone(volume));
        if self.requested.load(Ordering::SeqCst) {
            volume.abort();
        }
    }

    /// Waits until `end`. Fails as soon as a request arrives.
    pub(crate) fn wait_until(&self, end: Instant) -> Result<(), Failure> {
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
    }

    /// Fails once a request has arrived.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.requested.load(Ordering::SeqCst) {
            return Err(Failure::interrupted());
        }
        Ok(())
    }
}

/// Sends events to the session process. If that is gone, this process ends in a moment, too.
#[derive(Clone)]
pub(crate) struct EventSender(pub Sender);

impl EventSender {
    pub(crate) fn reply(&self, reply: &VolumeReply) {
        if let Err(error) = self.0.send(reply)
            && error.kind() == std::io::ErrorKind::InvalidData
        {
            // The session process waits for this answer.
            let failure = Failure::failed("the volume process can't answer").caused_by(&error);
            let _ = self.0.send(&VolumeReply::Failed(failure));
        }
    }

    pub(crate) fn phase(&self, phase: Phase) {
        tracing::info!(?phase);
        self.reply(&VolumeReply::Phase(phase));
    }

    pub(crate) fn notice(&self, notice: Notice) {
        tracing::debug!(?notice);
        self.reply(&VolumeReply::Notice(notice));
    }

    /// Warns if the header that was kept has other slots than the previous one. Returns where it is kept.
    pub(crate) fn kept_header(&self, kept: Kept) -> PathBuf {
        if let Some(aside) = kept.aside {
            self.notice(Notice::SlotsDiffer {
                gone: aside.gone,
                slots: aside.differ,
                kept: aside.path,
                newest: kept.path.clone(),
            });
        }
        kept.path
    }
}
