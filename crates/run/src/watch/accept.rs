//! `sprat accept`: a person has checked the event, and what it held back passes.

use jiff::Timestamp;

use super::{Ended, Now, Watch};
use crate::copy_state::copy_file;
use crate::notify::{Event, Report, State, Subject};

/// What was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// Each event as it was, and a line about it.
    pub events: Vec<(String, Event)>,
    /// What could not be read or written.
    pub problems: Vec<String>,
}

impl Watch<'_> {
    /// Closes what is to be accepted of the subjects, and releases their copies.
    pub fn accept(&mut self, subjects: &[Subject], now: &Now) -> Accepted {
        let at = now.moment.wall;
        let mut problems = self.release(subjects, at);
        let sender = &self.delivery.sender;
        let mut accepted = Vec::new();
        self.notifier.events.change(|events| {
            for subject in subjects {
                let open = events.acceptable(subject).map(|event| {
                    let headline = sender.headline(&Report {
                        id: event.id.clone(),
                        state: State::Reminded,
                        event: event.clone(),
                    });
                    (headline, event.clone())
                });
                accepted.extend(open);
                events.accept(at, subject);
            }
        });
        let events = accepted;
        // The end of each is reported, too.
        problems.extend(self.ended(&Ended::default(), now).problems);
        Accepted { events, problems }
    }

    /// What held a copy does not hold its next attempt.
    fn release(&self, subjects: &[Subject], at: Timestamp) -> Vec<String> {
        let mut problems = Vec::new();
        for copy in self.watched.config.copies() {
            let name = copy.name();
            let is_meant = |subject: &Subject| match subject {
                Subject::Copy(copy) => *copy == name,
                other => other.container() == Some(&name.container),
            };
            if subjects.iter().any(is_meant) {
                let mut file = copy_file(&self.watched.state_dir, &name);
                file.change(|state| state.accept(at));
                problems.extend(file.take_problems());
            }
        }
        problems
    }
}
