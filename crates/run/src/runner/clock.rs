//! Whether a run believes this machine's clock. While it does not, nothing is pruned.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::{SignedDuration, Timestamp};
use sprat_session::Session;

use super::Runner;
use crate::clock::{Cause, ClockState, clock_file, is_synchronised};
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
    pub(super) fn compare_clock(&self, session: &Session) {
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
        self.clock.in_doubt.store(in_doubt, Ordering::Relaxed);
    }

    /// Why the clock is in doubt, in words, if that was not reported yet.
    #[must_use]
    pub fn take_clock_warning(&self) -> Option<String> {
        if !self.clock.is_in_doubt() {
            return None;
        }
        let mut file = clock_file(&self.state_dir);
        let cause = file.change(ClockState::take_unreported);
        self.report_problems(file.take_problems());
        Some(warning(&cause?))
    }
}

fn warning(cause: &Cause) -> String {
    let (what, until) = match cause {
        Cause::Jumped { seconds } => {
            let direction = match *seconds > 0 {
                true => "forward",
                false => "back",
            };
            let what = format!("was set {direction} by {}", hours(*seconds));
            (what, "a server's clock agrees")
        }
        Cause::BehindState { newest } => {
            let newest = newest.strftime("%Y-%m-%d %H:%M UTC");
            let what = format!("is behind {newest}, a time that it showed before");
            (what, "a server's clock agrees")
        }
        Cause::ServerDiffers { seconds } => {
            let direction = match *seconds > 0 {
                true => "behind",
                false => "ahead of",
            };
            let what = format!("is {} {direction} the server's", hours(*seconds));
            (what, "the clocks agree")
        }
    };
    format!(
        "this machine's clock {what}. Copies are made, but nothing is pruned until {until}, a time service sets \
         the clock, or this machine ran for 24 hours"
    )
}

fn hours(seconds: i64) -> String {
    let minutes = seconds.unsigned_abs() / 60;
    format!("{} h {} min", minutes / 60, minutes % 60)
}
