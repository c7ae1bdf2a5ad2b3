//! When the clock is in doubt, and what ends that.

use super::*;

const HOUR: u64 = 3600;

/// A machine whose clocks the test sets.
struct Machine {
    moment: Moment,
    state: ClockState,
}

impl Machine {
    fn new(wall: &str) -> Self {
        let moment = Moment {
            wall: at(wall),
            monotonic: Duration::from_secs(100),
            boottime: Duration::from_secs(100),
            boot_id: "a".to_owned(),
        };
        let state = ClockState::default();
        let mut machine = Self { moment, state };
        assert!(!machine.tick(false));
        machine
    }

    fn runs(&mut self, seconds: u64) {
        let ran = Duration::from_secs(seconds);
        self.moment.wall += ran;
        self.moment.monotonic += ran;
        self.moment.boottime += ran;
    }

    fn sleeps(&mut self, seconds: u64) {
        self.moment.wall += Duration::from_secs(seconds);
        self.moment.boottime += Duration::from_secs(seconds);
    }

    fn boots(&mut self, boot_id: &str) {
        self.moment.boot_id = boot_id.to_owned();
        self.moment.monotonic = Duration::from_secs(60);
        self.moment.boottime = Duration::from_secs(60);
    }

    /// True: the clock is in doubt.
    fn tick(&mut self, synchronised: bool) -> bool {
        self.tick_with(synchronised, &[])
    }

    fn tick_with(&mut self, synchronised: bool, times: &[&str]) -> bool {
        // As it is read back from its file.
        let text = serde_json::to_vec(&self.state).unwrap();
        self.state = serde_json::from_slice(&text).unwrap();
        let times = times.iter().map(|time| at(time));
        self.state.tick(&self.moment, synchronised, times);
        self.state.doubt().is_some()
    }

    fn server(&mut self, ahead_seconds: i64) -> bool {
        let server = self.moment.wall + SignedDuration::from_secs(ahead_seconds);
        self.state.server(self.moment.wall, false, server);
        self.state.doubt().is_some()
    }
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

#[test]
fn clock_that_runs_and_machine_that_sleeps_or_boots_are_no_doubt() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    machine.runs(900);
    assert!(!machine.tick(false));
    machine.sleeps(30 * 24 * HOUR);
    assert!(!machine.tick(false));
    machine.moment.wall = at("2027-03-01T00:00Z");
    machine.boots("b");
    assert!(!machine.tick(false));
    // NTP corrects less than an hour, and a state of a few minutes ahead is no matter.
    machine.moment.wall -= Duration::from_secs(200);
    assert!(!machine.tick(false));
}

#[test]
fn a_clock_that_jumps_in_a_boot_is_in_doubt_both_ways() {
    for hours in [-2, 2, 24 * 365 * 5] {
        let mut machine = Machine::new("2026-11-28T09:00Z");
        machine.runs(900);
        machine.moment.wall += SignedDuration::from_hours(hours);
        assert!(machine.tick(false), "{hours}");
        let Some(Cause::Jumped { seconds }) = machine.state.doubt().map(|doubt| &doubt.cause)
        else {
            panic!("{:?}", machine.state.doubt())
        };
        assert_eq!(*seconds, hours * 3600);
        machine.runs(900);
        assert!(machine.tick(false), "{hours}");
        assert!(!machine.tick(true), "{hours}");
        machine.runs(900);
        assert!(!machine.tick(false), "{hours}");
    }
}

#[test]
fn a_clock_behind_the_newest_time_of_the_state_is_in_doubt() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    machine.boots("b");
    machine.moment.wall = at("2026-11-28T08:56Z");
    assert!(!machine.tick(false));
    machine.boots("c");
    machine.moment.wall = at("2026-11-28T08:54Z");
    assert!(machine.tick(false));
    let mut machine = Machine::new("2026-11-28T09:00Z");
    assert!(!machine.tick_with(false, &["2026-11-28T09:05Z", "2026-11-01T09:05Z"]));
    assert!(machine.tick_with(false, &["2026-11-28T09:06Z"]));
    // Time goes by: the clock is where the state was.
    machine.runs(10 * 60);
    assert!(machine.tick_with(false, &["2026-11-28T09:06Z"]));
}

#[test]
fn times_of_a_clock_that_was_wrong_make_no_second_doubt() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    machine.moment.wall = at("2031-01-01T00:00Z");
    assert!(machine.tick(false));
    // A copy was made meanwhile, and its success is dated 2031.
    let made = ["2031-01-01T00:10Z"];
    machine.moment.wall = at("2026-11-28T09:30Z");
    assert!(machine.tick_with(false, &made));
    assert!(!machine.tick_with(true, &made));
    machine.runs(900);
    assert!(!machine.tick_with(false, &made));
    // But a clock that goes back once more is found.
    machine.boots("b");
    machine.moment.wall = at("2026-11-20T00:00Z");
    assert!(machine.tick_with(false, &made));
}

#[test]
fn a_server_that_differs_makes_a_doubt_and_one_that_agrees_ends_it() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    assert!(!machine.server(3500));
    machine.boots("b");
    assert!(!machine.tick(false));
    assert!(machine.server(-7200));
    machine.runs(900);
    assert!(machine.tick(false));
    assert!(!machine.server(3));
    // Another server is the one that is wrong, as long as nobody sets this machine's clock.
    assert!(!machine.server(7200));
    machine.moment.wall += Duration::from_secs(3 * HOUR);
    assert!(machine.tick(false));
    // A synchronised clock needs no server.
    assert!(!machine.tick(true));
    let far = machine.moment.wall + Duration::from_secs(90 * HOUR);
    machine.state.server(machine.moment.wall, true, far);
    assert_eq!(machine.state.doubt(), None);
}

#[test]
fn a_doubt_ends_after_a_day_of_running_and_stays_reported_until_confirmed() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    machine.boots("b");
    machine.moment.wall = at("2020-01-01T00:00Z");
    assert!(machine.tick(false));
    for hour in 0..24 {
        assert!(machine.tick(false), "{hour}");
        assert!(!machine.state.is_unconfirmed());
        machine.runs(HOUR);
        // Sleep and time that the machine was off don't count.
        machine.sleeps(HOUR);
        if hour == 12 {
            machine.boots("c");
        }
    }
    machine.runs(HOUR);
    assert!(!machine.tick(false));
    assert!(machine.state.is_unconfirmed());
    machine.runs(HOUR);
    // Servers had their say.
    assert!(!machine.tick(false) && !machine.server(24 * 3600 * 365));
    assert!(machine.state.is_unconfirmed());
    machine.moment.wall = at("2026-11-30T00:00Z");
    assert!(!machine.tick(true));
    assert!(!machine.state.is_unconfirmed());
}

#[test]
fn clocks_of_this_machine_are_read() {
    let first = Moment::now();
    let second = Moment::now();
    assert!(!first.boot_id.is_empty() && first.boot_id == second.boot_id);
    assert!(first.boottime >= first.monotonic && second.monotonic >= first.monotonic);
    assert!(!first.monotonic.is_zero());
}

#[test]
fn doubt_is_reported_once() {
    let mut machine = Machine::new("2026-11-28T09:00Z");
    assert_eq!(machine.state.take_unreported(), None);
    machine.moment.wall += Duration::from_secs(2 * HOUR);
    assert!(machine.tick(false));
    assert_eq!(
        machine.state.take_unreported(),
        Some(Cause::Jumped { seconds: 7200 })
    );
    machine.runs(900);
    assert!(machine.tick(false));
    assert_eq!(machine.state.take_unreported(), None);
    // Another doubt.
    assert!(!machine.tick(true));
    machine.moment.wall -= Duration::from_secs(3 * HOUR);
    assert!(machine.tick(false));
    assert!(machine.state.take_unreported().is_some());
}
