//! What the volume process's threads share: the wish to stop, and the line to the session process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sprat_store::{IgnorePoison, StoreError};
use sprat_volume::Volume;

use crate::Failure;
use crate::protocol::frames::Sender;
use crate::protocol::messages::VolumeReply;
use crate::settings::{Notice, Phase};

/// The session wants no more; set from the thread that hears it, looked at between steps.
#[derive(Default)]
pub(crate) struct StopFlag {
    requested: AtomicBool,
    /// From here on there is something to give back in order: a lock, a file that was begun.
    holding: AtomicBool,
    volume: Mutex<Option<Arc<Volume>>>,
}

impl StopFlag {
    /// Stops sending at once; everything above gets EIO.
    pub(crate) fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        self.abort_volume();
    }

    /// Something is about to be taken that must be given back; fails if a request came already.
    pub(crate) fn begin_holding(&self) -> Result<(), Failure> {
        self.holding.store(true, Ordering::SeqCst);
        self.check()
    }

    /// Whether this process must end in order. Asked after a request: a process that begins to
    /// hold later sees the request.
    pub(crate) fn holding(&self) -> bool {
        self.holding.load(Ordering::SeqCst)
    }

    /// Fails everything that waits for the volume, without anybody having asked to stop.
    pub(crate) fn abort_volume(&self) {
        let volume = self.volume.lock().ignore_poison();
        if let Some(volume) = &*volume {
            volume.abort();
        }
    }

    /// Somebody else found the line lost: the volume seeks it again, though it has nothing to do.
    pub(crate) fn line_lost(&self, cause: StoreError) {
        let volume = self.volume.lock().ignore_poison();
        if let Some(volume) = &*volume {
            volume.connection_lost(cause);
        }
    }

    /// From now on a request reaches `volume`, also one that has come already.
    pub(crate) fn reaches(&self, volume: &Arc<Volume>) {
        let mut known = self.volume.lock().ignore_poison();
        *known = Some(Arc::clone(volume));
        if self.requested.load(Ordering::SeqCst) {
            volume.abort();
        }
    }

    /// Fails once a request has come.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.requested.load(Ordering::SeqCst) {
            return Err(Failure::interrupted());
        }
        Ok(())
    }
}

/// Tells the session process. If it is gone, so is this one in a moment.
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
}
