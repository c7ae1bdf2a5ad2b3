//! How long a lost connection is retried, for a volume and for a copy.

use std::time::Duration;

/// A connection that was up for this long is retried without a pause once it is lost.
const UP_LONG_ENOUGH: Duration = Duration::from_secs(60);
/// Longest pause between two attempts. Long enough not to trigger sshd's penalties
/// (PerSourcePenalties, sshd_config(5)), short enough to notice soon that a server is back.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// An outage: from the loss of a connection until one is up and has answered what was waited for.
/// Losses before that belong to the same outage. The clock runs only while a caller waits for the
/// connection. An outage never ends the session before one attempt was made for its latest loss.
///
/// All times must come from one clock that never goes back. It should stand still while the machine
/// sleeps: after a sleep the full time is left.
#[derive(Debug, Clone)]
pub struct Outage {
    max: Duration,
    /// `None`: no outage.
    since: Option<Duration>,
    /// `None`: the connection is down.
    up_since: Option<Duration>,
    /// Attempts since the latest loss.
    attempts: u32,
    /// Attempts that determine the next pause.
    pauses: u32,
    /// An attempt was started after the time was over: the last one.
    last_chance: bool,
}

impl Outage {
    /// Starts without an outage, with a connection that is up. An outage of more than `max` ends
    /// the session.
    #[must_use]
    pub fn new(max: Duration) -> Self {
        Self {
            max,
            since: None,
            up_since: Some(Duration::ZERO),
            attempts: 0,
            pauses: 0,
            last_chance: false,
        }
    }

    /// Records that the connection was lost at `now`.
    pub fn lost(&mut self, now: Duration) {
        let Some(up_since) = self.up_since.take() else {
            return;
        };
        if now.saturating_sub(up_since) >= UP_LONG_ENOUGH {
            self.pauses = 0;
        }
        self.attempts = 0;
        self.since.get_or_insert(now);
    }

    /// Records that no caller waits for the connection at `now`: the time starts again.
    pub fn nobody_waits(&mut self, now: Duration) {
        if self.since.is_some() {
            self.since = Some(now);
            self.last_chance = false;
        }
    }

    /// Starts an attempt to connect; false if the time is over.
    pub fn begin_attempt(&mut self, now: Duration) -> bool {
        if self.waited(now) >= self.max {
            if self.attempts > 0 || self.last_chance {
                return false;
            }
            self.last_chance = true;
        }
        self.attempts += 1;
        self.pauses = self.pauses.saturating_add(1);
        true
    }

    /// The pause before the attempt that was started: none before the first, then `first`, doubled
    /// each time up to 30 s and to the full time.
    #[must_use]
    pub fn pause(&self, first: Duration) -> Duration {
        match self.pauses {
            0 | 1 => Duration::ZERO,
            more => (first * 2u32.saturating_pow((more - 2).min(10)))
                .min(PAUSE_MAX)
                .min(self.max),
        }
    }

    /// Records that a connection is up again. If nothing is waited for (`owed`), this ends the
    /// outage.
    pub fn connected(&mut self, now: Duration, owed: bool) {
        self.up_since = Some(now);
        if !owed {
            self.since = None;
            self.last_chance = false;
        }
    }

    /// Records that everything that was waited for was answered. This ends the outage if the
    /// connection is up.
    pub fn answered(&mut self) {
        if self.up_since.is_some() {
            self.since = None;
            self.last_chance = false;
            self.pauses = 0;
        }
    }

    /// Whether there is an outage. Its connection may be up by now.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.since.is_some()
    }

    /// How long the outage has lasted; zero without one.
    #[must_use]
    pub fn waited(&self, now: Duration) -> Duration {
        self.since
            .map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_secs(15 * 60);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn two_short_losses_far_apart_are_two_outages() {
        for owed in [false, true] {
            let mut outage = Outage::new(MAX);
            outage.lost(at(100));
            assert!(outage.begin_attempt(at(100)));
            assert_eq!(outage.pause(at(1)), Duration::ZERO);
            outage.connected(at(101), owed);
            if owed {
                assert!(outage.is_on());
                outage.answered();
            }
            assert!(!outage.is_on());
            outage.lost(at(100 + 16 * 60));
            assert_eq!(outage.waited(at(100 + 16 * 60)), Duration::ZERO);
            assert!(outage.begin_attempt(at(100 + 16 * 60)));
        }
    }

    #[test]
    fn connection_that_never_answers_is_given_up_after_a_last_attempt() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(60));
        assert!(outage.begin_attempt(at(60)));
        outage.connected(at(61), true);
        // The same request was not answered again. The time is over, but no attempt was made yet.
        outage.lost(at(121));
        assert!(outage.begin_attempt(at(121)));
        outage.connected(at(122), true);
        outage.lost(at(182));
        assert!(!outage.begin_attempt(at(182)));
    }

    #[test]
    fn attempts_end_with_the_time_but_not_before_the_first() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(0));
        let mut now = at(0);
        let mut attempts = 0;
        while outage.begin_attempt(now) {
            attempts += 1;
            now += outage.pause(at(1)) + at(1);
        }
        assert!(
            (5..9).contains(&attempts) && now >= at(30),
            "{attempts} {now:?}"
        );
        let mut outage = Outage::new(at(30));
        outage.lost(at(0));
        // Even if it took this long until the first attempt could be made.
        assert!(outage.begin_attempt(at(100)));
        assert!(!outage.begin_attempt(at(101)));
    }

    #[test]
    fn outage_without_waiting_callers_never_ends_the_session() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(0));
        for hours in 1..100 {
            outage.nobody_waits(at(hours * 3600));
            assert!(outage.begin_attempt(at(hours * 3600)));
        }
        assert_eq!(outage.pause(at(1)), at(30));
        outage.connected(at(400_000), false);
        assert!(!outage.is_on());
    }

    #[test]
    fn connection_that_breaks_at_once_is_retried_with_pauses() {
        let mut outage = Outage::new(MAX);
        let mut now = at(0);
        let mut attempts = 0;
        while now < at(3600) {
            outage.lost(now);
            assert!(outage.begin_attempt(now));
            attempts += 1;
            now += outage.pause(at(1)) + Duration::from_millis(100);
            outage.connected(now, false);
        }
        assert!(attempts < 150, "{attempts}");
        // A connection that was up for long is retried at once.
        outage.lost(now + at(600));
        assert!(outage.begin_attempt(now + at(600)));
        assert_eq!(outage.pause(at(1)), Duration::ZERO);
    }

    #[test]
    fn answer_of_the_lost_connection_does_not_end_the_outage() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(60));
        // An answer of the connection that was lost.
        outage.answered();
        assert!(outage.is_on());
        assert!(outage.begin_attempt(at(60)));
        assert!(!outage.begin_attempt(at(95)));
    }

    #[test]
    fn new_waiting_caller_gets_the_last_attempt_again() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(0));
        assert!(outage.begin_attempt(at(100)));
        outage.connected(at(101), true);
        outage.nobody_waits(at(150));
        outage.lost(at(160));
        assert!(outage.begin_attempt(at(181)));
        outage.connected(at(182), true);
        outage.lost(at(183));
        assert!(!outage.begin_attempt(at(183)));
    }
}
