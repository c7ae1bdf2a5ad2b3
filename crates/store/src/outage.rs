//! How long a lost connection is sought again: for a volume and for a copy alike.

use std::time::Duration;

/// A connection that was up for this long is sought again without a pause once it is lost.
const UP_LONG_ENOUGH: Duration = Duration::from_secs(60);
/// Longest pause between two attempts: sshd's penalties for storms (PerSourcePenalties, sshd_config(5))
/// are not provoked, and a server that is back is noticed soon.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// From the loss of a connection until one is up and has answered what was owed. Losses before that
/// belong to the same outage. The clock runs only while somebody waits for the connection, and an
/// outage never ends the session before one attempt of its latest loss was made.
///
/// Times are those of any one clock that never goes back. It should stand still while the machine
/// sleeps: who wakes up gets the whole time.
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
    /// An attempt was begun behind the end of the time: the last chance.
    last_chance: bool,
}

impl Outage {
    /// None yet; with a connection that is up. An outage of more than `max` ends the session.
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

    /// The connection was lost at `now`.
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

    /// Nobody waits for the connection at `now`: the time begins again.
    pub fn nobody_waits(&mut self, now: Duration) {
        if self.since.is_some() {
            self.since = Some(now);
            self.last_chance = false;
        }
    }

    /// Begins an attempt to connect; false once the time is over.
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

    /// The pause before the attempt that was begun: none before the first, then `first`, doubled each
    /// time up to 30 s and the whole time.
    #[must_use]
    pub fn pause(&self, first: Duration) -> Duration {
        match self.pauses {
            0 | 1 => Duration::ZERO,
            more => (first * 2u32.saturating_pow((more - 2).min(10)))
                .min(PAUSE_MAX)
                .min(self.max),
        }
    }

    /// A connection is up again. With nothing owed on it this is the end of the outage.
    pub fn connected(&mut self, now: Duration, owed: bool) {
        self.up_since = Some(now);
        if !owed {
            self.since = None;
            self.last_chance = false;
        }
    }

    /// What was owed was answered: the outage is over, if the connection is up.
    pub fn answered(&mut self) {
        if self.up_since.is_some() {
            self.since = None;
            self.last_chance = false;
            self.pauses = 0;
        }
    }

    /// Whether there is an outage, on a connection that may be up by now.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.since.is_some()
    }

    /// How long it has lasted; zero without one.
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
    fn a_connection_that_never_answers_what_is_owed_is_given_up_after_one_last_chance() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(60));
        assert!(outage.begin_attempt(at(60)));
        outage.connected(at(61), true);
        // The same request was not answered again. The time is over, but not one attempt was made.
        outage.lost(at(121));
        assert!(outage.begin_attempt(at(121)));
        outage.connected(at(122), true);
        outage.lost(at(182));
        assert!(!outage.begin_attempt(at(182)));
    }

    #[test]
    fn attempts_end_with_the_time_and_not_before_the_first() {
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
        // As long as it took until the first attempt could be made.
        assert!(outage.begin_attempt(at(100)));
        assert!(!outage.begin_attempt(at(101)));
    }

    #[test]
    fn nobody_waiting_bears_any_outage() {
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
    fn a_connection_that_breaks_at_once_each_time_is_not_sought_in_a_storm() {
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
        // One that lived for long is sought at once.
        outage.lost(now + at(600));
        assert!(outage.begin_attempt(now + at(600)));
        assert_eq!(outage.pause(at(1)), Duration::ZERO);
    }

    #[test]
    fn an_answer_that_comes_after_the_loss_ends_no_outage() {
        let mut outage = Outage::new(at(30));
        outage.lost(at(60));
        // Of the connection that was lost.
        outage.answered();
        assert!(outage.is_on());
        assert!(outage.begin_attempt(at(60)));
        assert!(!outage.begin_attempt(at(95)));
    }

    #[test]
    fn who_waits_again_after_nobody_did_has_the_last_chance_again() {
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
