//! Questions that are sent before somebody asks them.
//!
//! On a slow connection an opening waits for a few answers that depend on each other. Whatever does
//! not depend on them is asked ahead, on the first channel. A later question that is the same takes
//! the answer that is already under way.
//!
//! Always true:
//! - Only questions that change nothing on the server are asked ahead.
//! - An answer is used once. It is used only until something that changes the server is sent on the
//!   channel, or until the answers are forgotten. So a check that must come after a change is
//!   never answered from before it, unless it was sent behind that change on purpose.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::answer::Answer;
use super::codec::Request;
use crate::IgnorePoison;

/// The answers that are under way, by the packet of their question with the id 0.
#[derive(Default)]
pub(crate) struct Ahead {
    some: AtomicBool,
    answers: Mutex<HashMap<Vec<u8>, VecDeque<Answer>>>,
}

impl Ahead {
    /// The answer to `request`, if it was asked ahead. Drops all answers if the request changes
    /// something.
    pub(super) fn take(&self, request: &Request<'_>) -> Option<Answer> {
        if !self.some.load(Ordering::SeqCst) {
            return None;
        }
        if request.changes_something() {
            self.forget();
            return None;
        }
        let mut answers = self.answers.lock().ignore_poison();
        answers.get_mut(&request.encode(0))?.pop_front()
    }

    pub(super) fn forget(&self) {
        self.some.store(false, Ordering::SeqCst);
        self.answers.lock().ignore_poison().clear();
    }

    pub(super) fn keep(&self, request: &Request<'_>, answer: Answer) {
        let mut answers = self.answers.lock().ignore_poison();
        answers
            .entry(request.encode(0))
            .or_default()
            .push_back(answer);
        self.some.store(true, Ordering::SeqCst);
    }

    /// Whether no answer has arrived before the channel's answer with this number.
    pub(super) fn all_behind(&self, number: u64) -> bool {
        let mut answers = self.answers.lock().ignore_poison();
        let mut all = answers.values_mut().flatten();
        all.all(|answer| answer.arrived().is_none_or(|arrived| arrived > number))
    }
}
