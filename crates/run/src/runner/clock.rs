//! Whether a run believes this machine's clock. While it does not, nothing is pruned.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::{SignedDuration, Timestamp};
use sprat_session::Session;

use super::Runner;
use super::container::Draft;
use crate::clock::{clock_file, is_synchronised};
use crate::notify::By;

/// What a run knows of the clock. The default: it is right.
#[derive(Debug, Default)]
pub(super) struct RunClock {
    in_doubt: AtomicBool,
    /// It is right, whatever it shows.
    trusted: bool,
}

impl RunClock {
    pub(super) fn new(in_doubt: bool, trusted: bool) -> Self {
        Self {
            in_doubt: (in_doubt && !trusted).into(),
            trusted,
        }
    }

    pub(super) fn is_in_doubt(&self) -> bool {
        self.in_doubt.load(Ordering::Relaxed)
    }
}

impl Runner<'_> {
    /// Compares this machine's clock with that of the server, by the date of the lease that the session just
    /// wrote. This begins a doubt, or ends one.
    pub(super) fn compare_clock(&self, session: &Session, drafts: &mut [Draft<'_>]) {
        let ahead_s = session.facts().server_ahead_s;
        let Some(ahead_s) = ahead_s.filter(|_| self.by == By::Run && !self.clock.trusted) else {
            return;
        };
        let now = Timestamp::now();
        // A date that no clock shows is as far away as can be.
        let ahead = SignedDuration::from_secs(ahead_s);
        let server = now.checked_add(ahead).unwrap_or(match ahead_s > 0 {
            true => Timestamp::MAX,
            false => Timestamp::MIN,
        });
        let mut file = clock_file(&self.state_dir);
        let in_doubt = file.change(|clock| {
            clock.server(now, is_synchronised(), server);
            clock.doubt().is_some()
        });
        self.report_problems(file.take_problems());
        let was_in_doubt = self.clock.in_doubt.swap(in_doubt, Ordering::Relaxed);
        let first = drafts.first_mut().filter(|_| in_doubt && !was_in_doubt);
        if let Some(draft) = first {
            draft.outcome.notes.push(note(ahead_s));
        }
    }
}

fn note(ahead_s: i64) -> String {
    let minutes = ahead_s.unsigned_abs() / 60;
    let (hours, minutes) = (minutes / 60, minutes % 60);
    let direction = match ahead_s > 0 {
        true => "behind",
        false => "ahead of",
    };
    format!(
        "this machine's clock is {hours} h {minutes} min {direction} the server's. Copies are made, but \
         nothing is pruned until the clocks agree, a time service sets the clock, or this machine ran for 24 \
         hours"
    )
}
