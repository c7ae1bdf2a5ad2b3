//! A year of a laptop, 2032: a real container on a server and one on a disk, the unmodified program, and a
//! clock of the test's own. What is made, kept and reported is compared with a model.
//!
//! The short form ticks some times a day. The long form (`make torture`) ticks as the timers do. Each file system is
//! on the server in one test, and on the disk in the other one. The short form of the second test is three weeks long.

mod found;
mod model;
mod world;

use std::collections::BTreeSet;
use std::ops::Range;

use jiff::{ToSpan, civil};
use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::dice::{self, Dice};
use sprat_testkit::{fake_clock, needs, requires};

use model::{DAY, HOUR, MINUTE};
use world::{Containers, World, moment};

/// What happens in the year.
#[derive(Debug, Clone, Copy)]
enum Happens {
    /// The server dies, or is there again.
    Server(bool),
    /// The lid is closed, or opened.
    Sleeps,
    Off,
    Wakes,
    Boots,
    /// A folder of the sources is away, or there again.
    Photos(bool),
    /// A file that is larger than the container, or no such file. rsync removes what it copied of it, so the
    /// volume is not full afterwards.
    Huge(bool),
    /// The machine's clock is ahead by so many seconds, and nothing keeps it.
    ClockIsWrong(i64),
    /// A time service sets the clock.
    ClockIsSet,
    /// The next run is killed.
    Kill,
    /// The disk lies somewhere else.
    NoDisk(bool),
    DiskNow,
    /// The web server that takes the notices is away, or there again.
    Web(bool),
    /// The machine ran for a day with a clock that nothing confirmed.
    ClockIsBelieved,
    Typo(bool),
    Accept,
    Pin,
    Unpin,
    Compare,
    /// Both containers release what is free.
    Trim,
}

use Happens::*;

/// Local times of 2032.
const YEAR: &[(&str, Happens)] = &[
    ("02-05 20:30", Kill),
    ("02-06 00:00", Compare),
    ("02-10 22:00", Pin),
    ("02-20 22:00", Pin),
    ("02-23 23:00", Sleeps),
    ("02-27 19:00", Wakes),
    ("03-01 12:00", Trim),
    ("03-05 22:00", Unpin),
    ("03-10 12:00", Photos(false)),
    ("03-12 12:00", Photos(true)),
    ("04-05 21:00", Server(false)),
    ("04-20 12:00", Server(true)),
    // An empty battery: the clock begins in 1970.
    ("05-03 23:00", Off),
    ("05-04 19:00", Boots),
    ("05-04 19:00", ClockIsWrong(-1_967_302_000)),
    ("05-05 07:00", ClockIsSet),
    ("05-06 00:00", Compare),
    ("05-20 12:00", Trim),
    ("06-01 00:00", NoDisk(true)),
    ("06-08 00:00", Web(false)),
    ("06-12 12:00", Web(true)),
    ("06-20 12:00", NoDisk(false)),
    ("07-03 08:00", Off),
    ("07-12 19:00", Boots),
    ("07-12 19:00", DiskNow),
    ("07-13 00:00", Compare),
    ("08-16 12:00", Trim),
    ("08-17 12:00", Huge(true)),
    ("08-18 12:00", Huge(false)),
    ("08-19 00:00", Compare),
    // Seven years ahead.
    ("09-07 10:00", ClockIsWrong(7 * 365 * 86_400)),
    ("09-08 06:00", ClockIsSet),
    ("09-09 00:00", Compare),
    ("10-12 08:00", Typo(true)),
    ("10-14 08:00", Typo(false)),
    ("10-14 08:01", Accept),
    ("10-15 00:00", Compare),
    ("10-20 12:00", Trim),
    ("11-15 20:30", Kill),
    ("11-15 20:45", Off),
    ("11-16 08:00", Boots),
    ("11-17 00:00", Compare),
    // Two hours ahead, for two days. In the meantime it sleeps.
    ("12-06 10:00", ClockIsWrong(2 * HOUR)),
    ("12-07 09:20", Sleeps),
    ("12-07 09:55", Wakes),
    ("12-07 10:45", ClockIsBelieved),
    ("12-08 12:00", ClockIsSet),
    ("12-09 00:00", Compare),
    // A hundred days behind, for one run.
    ("12-29 20:35", ClockIsWrong(-100 * 86_400)),
    ("12-29 20:45", ClockIsSet),
];

/// Every alarm of the year: it comes once, between these times, and no other comes.
const ALARMS: &[(&str, &str, &str)] = &[
    ("03-10 20:30", "03-10 23:59", "incomplete opened home@nas"),
    ("03-12 12:00", "03-12 23:59", "recovered closed home@nas"),
    ("04-08 20:30", "04-10 00:00", "overdue opened mail@nas"),
    ("04-15 20:30", "04-17 00:00", "overdue opened home@nas"),
    ("04-15 20:30", "04-18 00:00", "overdue reminded mail@nas"),
    ("04-20 12:00", "04-20 23:59", "recovered closed home@nas"),
    ("04-20 12:00", "04-20 23:59", "recovered closed mail@nas"),
    ("06-12 12:00", "06-12 23:59", "overdue opened home@usb"),
    ("06-19 12:00", "06-20 12:00", "overdue reminded home@usb"),
    ("06-20 12:00", "06-20 23:59", "recovered closed home@usb"),
    ("08-17 20:30", "08-17 23:59", "failure opened home@nas"),
    ("08-18 12:00", "08-18 23:59", "recovered closed home@nas"),
    ("10-12 20:30", "10-12 23:59", "held opened home@nas"),
    ("10-14 08:00", "10-14 23:59", "recovered closed home@nas"),
    ("12-07 10:45", "12-07 23:59", "clock opened -"),
    ("12-08 12:00", "12-08 23:59", "recovered closed -"),
];

/// Days with a tick each hour of the day, or of the night, too.
const BUSY: &[&str] = &[
    "02-02", "02-03", "02-04", "02-05", "02-06", "08-17", "08-18", "12-06", "12-07",
];
const BUSY_NIGHTS: &[&str] = &["03-27", "03-28", "10-30", "10-31"];

/// Days on which the short form checks for alarms, too, beside Sundays.
const WATCHED: &[(&str, &str)] = &[
    ("04-05", "04-20"),
    ("06-08", "06-20"),
    ("07-12", "07-14"),
    ("09-07", "09-10"),
    ("10-12", "10-14"),
];

/// A time of the year.
fn time(text: &str) -> civil::DateTime {
    format!("2032-{}", text.replace(' ', "T")).parse().unwrap()
}

fn day(date: civil::Date) -> String {
    date.strftime("%m-%d").to_string()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Run,
    Alert,
}

/// When the timers tick on a day.
fn ticks(date: civil::Date, world: &World, long: bool) -> Vec<(i64, Timer)> {
    let at = |hour, minute| moment(date.at(hour, minute, 0, 0), &world.zone);
    let begin = moment(date.at(0, 0, 0, 0), &world.zone);
    let end = moment((date + 1.day()).at(0, 0, 0, 0), &world.zone);
    let each = |first: i64, every: i64, timer| {
        let ticks = (0..).map(move |number| begin + first + number * every);
        ticks
            .take_while(move |at| *at < end)
            .map(move |at| (at, timer))
    };
    if long {
        let runs = each(7 * MINUTE, 15 * MINUTE, Timer::Run);
        let mut all: Vec<_> = runs.chain(each(40 * MINUTE, HOUR, Timer::Alert)).collect();
        all.sort_unstable();
        return all;
    }
    let name = day(date);
    let mut all = vec![(at(20, 37), Timer::Run)];
    let is_sunday = date.weekday() == civil::Weekday::Sunday;
    let is_watched = WATCHED
        .iter()
        .any(|(from, to)| (*from..=*to).contains(&&*name));
    if is_sunday || is_watched {
        all.push((at(21, 22), Timer::Alert));
    }
    let hourly = each(7 * MINUTE, HOUR, Timer::Run);
    if BUSY_NIGHTS.contains(&&*name) {
        all.extend(hourly);
    } else if BUSY.contains(&&*name) {
        all.extend(hourly.filter(|(tick, _)| *tick >= at(8, 0)));
    }
    all.sort_unstable();
    all
}

/// What happens on its own each week: the disk is plugged in on Sunday evenings.
fn plug(world: &mut World, date: civil::Date, tick: i64, away: bool, now_until: i64) {
    let at = |hour| moment(date.at(hour, 0, 0, 0), &world.zone);
    let is_sunday = date.weekday() == civil::Weekday::Sunday;
    let evening = is_sunday && (at(18)..at(23)).contains(&tick) && !away;
    if evening || tick < now_until {
        world.plug_in();
    } else {
        world.unplug();
    }
}

#[test]
fn a_year_leaves_exactly_the_expected_snapshots_and_alarms() {
    let year = civil::date(2032, 1, 1)..civil::date(2033, 1, 1);
    let [server, disk] = [FileSystem::Ext4, FileSystem::Btrfs];
    live(Containers { server, disk }, year);
}

#[test]
fn a_year_with_btrfs_on_the_server_leaves_exactly_the_expected_snapshots_and_alarms() {
    let days = match is_long() {
        true => civil::date(2032, 1, 1)..civil::date(2033, 1, 1),
        // A container is full, and there are hours with a copy each.
        false => civil::date(2032, 8, 3)..civil::date(2032, 8, 23),
    };
    let [server, disk] = [FileSystem::Btrfs, FileSystem::Ext4];
    live(Containers { server, disk }, days);
}

fn is_long() -> bool {
    dice::number("SPRAT_TORTURE_ROUNDS").is_some()
}

fn live(containers: Containers, days: Range<civil::Date>) {
    requires!(
        fake_clock::missing(),
        FileSystem::Btrfs.missing(),
        needs::devices(),
        needs::sftp_server_missing(),
        needs::program("rsync"),
        needs::program("mkfs.ext4"),
    );
    let begin = days.start.at(0, 0, 0, 0);
    let mut world = World::new(begin, containers, Dice::new(dice::seed()));
    let mut to_come = YEAR
        .iter()
        .filter(|(text, _)| time(text) >= begin)
        .peekable();
    // The first copy is made with the disk: before it, nothing knows the disk.
    let first_day = world.clock.now_s() + DAY;
    let (mut is_on, mut disk_is_away, mut disk_until) = (true, false, first_day);
    let mut pinned = Vec::new();
    let mut date = days.start;
    while date < days.end {
        for (tick, timer) in ticks(date, &world, is_long()) {
            while let Some((text, happens)) =
                to_come.next_if(|(text, _)| moment(time(text), &world.zone) <= tick)
            {
                let at = moment(time(text), &world.zone);
                if is_on {
                    world.clock.awake_until(at);
                }
                match happens {
                    Server(is_there) => world.set_server(*is_there),
                    Sleeps | Off => is_on = false,
                    Wakes => {
                        world.clock.asleep_until(at);
                        is_on = true;
                    }
                    Boots if is_on => {}
                    Boots => {
                        world.clock.off_until(at);
                        is_on = true;
                    }
                    Photos(there) => world.photos_are_there(*there),
                    Huge(there) => world.fill(*there),
                    ClockIsWrong(seconds) => {
                        world.clock.error_s = *seconds;
                        world.clock.synchronised = false;
                        world.clock_in_doubt = true;
                    }
                    ClockIsSet => {
                        world.clock.error_s = 0;
                        world.clock.synchronised = true;
                        world.clock_in_doubt = false;
                    }
                    Kill => world.kill_next = true,
                    NoDisk(away) => disk_is_away = *away,
                    DiskNow => disk_until = at + 4 * HOUR,
                    Web(is_there) => world.set_web(*is_there),
                    ClockIsBelieved => world.clock_in_doubt = false,
                    Typo(mistyped) => world.mistype(*mistyped),
                    Accept => {
                        world.ok(&["accept", "home@nas"]);
                        world.copy("home@nas").held = false;
                    }
                    Pin => pinned.push(world.pin("home@nas")),
                    Unpin => world.unpin("home@nas", pinned.pop().unwrap()),
                    Compare => world.compare_names(),
                    Trim => world.trim(),
                }
            }
            if !is_on {
                continue;
            }
            plug(&mut world, date, tick, disk_is_away, disk_until);
            world.clock.awake_until(tick);
            match timer {
                Timer::Run => {
                    world.change_files();
                    world.run();
                }
                Timer::Alert => world.alert(),
            }
        }
        date += 1.day();
    }
    world.plug_in();
    world.compare_names();
    let compared = world.compare_contents();
    println!(
        "{} runs, {} snapshots made, {compared} compared",
        world.runs, world.sessions
    );
    world.check_containers();
    compare_alarms(&world, &days);
    world.unplug();
    world.machine.nothing_is_left();
}

/// Every alarm came once, in its time, and no other; and every hook that was owed.
fn compare_alarms(world: &World, days: &Range<civil::Date>) {
    let is_digest = |text: &str| text == "digest digest -";
    let mut came: Vec<&(i64, String)> = world
        .alarms
        .iter()
        .filter(|(_, text)| !is_digest(text))
        .collect();
    let mut missing = Vec::new();
    let is_within = |at: &str| days.contains(&time(at).date());
    for (from, to, text) in ALARMS.iter().filter(|(from, ..)| is_within(from)) {
        let within = moment(time(from), &world.zone)..=moment(time(to), &world.zone);
        match came
            .iter()
            .position(|(at, came)| came == text && within.contains(at))
        {
            Some(number) => drop(came.remove(number)),
            None => missing.push(format!("{from} to {to}: {text}")),
        }
    }
    assert!(
        came.is_empty() && missing.is_empty(),
        "missing: {missing:#?}, too many: {came:#?}"
    );
    // One for each Monday but that of the journey.
    let is_at_home = |date: &civil::Date| *date != civil::date(2032, 7, 5);
    let mondays = days.start.series(1.day());
    let mondays = mondays
        .take_while(|date| *date < days.end)
        .filter(|date| date.weekday() == civil::Weekday::Monday && is_at_home(date))
        .count();
    let digests = world.alarms.iter().filter(|(_, text)| is_digest(text));
    let weeks: Vec<String> = digests.map(|(at, _)| world.week(*at)).collect();
    let different: BTreeSet<&String> = weeks.iter().collect();
    assert_eq!(
        (weeks.len(), different.len()),
        (mondays, mondays),
        "{weeks:?}"
    );
    // Runs that were killed while hooks ran.
    let kills = YEAR
        .iter()
        .filter(|(at, happens)| matches!(happens, Kill) && is_within(at))
        .count();
    for hook in ["after", "finally"] {
        let owed = world
            .hooks()
            .iter()
            .filter(|line| **line == format!("{hook} home@nas 137"))
            .count();
        assert_eq!(owed, kills, "{hook}");
    }
}
