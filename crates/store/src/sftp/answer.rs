//! A pending answer of a channel.

use std::sync::Mutex;
use std::sync::mpsc::Receiver;

use crate::IgnorePoison;

/// An answer's body, and its position among the channel's answers.
pub(crate) struct Arrived {
    pub number: u64,
    pub body: Vec<u8>,
}

/// A pending answer. Dropping it discards the answer; the request is still carried out.
pub(crate) struct Answer {
    pub(super) owed: Receiver<Arrived>,
    arrived: Mutex<Option<Arrived>>,
}

impl Answer {
    pub(super) fn new(owed: Receiver<Arrived>) -> Self {
        Self {
            owed,
            arrived: Mutex::default(),
        }
    }

    /// What [`arrived`](Self::arrived) has found.
    pub(super) fn take_arrived(&self) -> Option<Arrived> {
        self.arrived.lock().ignore_poison().take()
    }

    /// The answer's position among the channel's answers, if it has arrived.
    pub(super) fn arrived(&mut self) -> Option<u64> {
        let arrived = self.arrived.get_mut().ignore_poison();
        if arrived.is_none() {
            *arrived = self.owed.try_recv().ok();
        }
        arrived.as_ref().map(|arrived| arrived.number)
    }
}
