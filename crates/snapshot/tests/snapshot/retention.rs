//! A table of what `decide` keeps, beside what restic and borg keep of the same snapshots.

use std::collections::BTreeSet;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use sprat_snapshot::{Candidate, EntryKind, KeepBy, KeepRules, SnapshotName, decide};

const TABLE: &str = include_str!("retention.txt");
/// What the clock shows in a case that does not say it.
const NOW: &str = "2026-11-29 12:00";

/// One block of the table.
#[derive(Debug, Default)]
struct Case<'t> {
    title: &'t str,
    zone: &'t str,
    rules: &'t str,
    now: Option<&'t str>,
    differs: Option<&'t str>,
    lines: Vec<Line<'t>>,
}

/// One snapshot of a case.
#[derive(Debug)]
struct Line<'t> {
    name: SnapshotName,
    marks: Vec<&'t str>,
    kept_by: Vec<&'t str>,
}

fn name(text: &str) -> SnapshotName {
    let text = format!("{}-00Z", text.replace(' ', "T").replace(':', "-"));
    SnapshotName::parse(&text).unwrap()
}

fn cases() -> Vec<Case<'static>> {
    let blocks = TABLE.trim_end().split("\n\n").skip(1);
    blocks
        .map(|block| {
            let mut case = Case::default();
            for line in block.lines() {
                match line.split_once(": ") {
                    Some(("case", text)) => case.title = text,
                    Some(("zone", text)) => case.zone = text,
                    Some(("rules", text)) => case.rules = text,
                    Some(("now", text)) => case.now = Some(text),
                    Some(("differs", text)) => case.differs = Some(text),
                    _ => case.lines.push(snapshot(line)),
                }
            }
            case
        })
        .collect()
}

fn snapshot(line: &str) -> Line<'_> {
    let (time, rest) = line.split_at("2026-11-29 12:00".len());
    let (marks, kept_by) = rest.split_once(':').unwrap();
    Line {
        name: name(time),
        marks: marks.split_whitespace().collect(),
        kept_by: kept_by.split_whitespace().collect(),
    }
}

/// The zone without the system's database, which a machine may lack.
fn zone(name: &str) -> TimeZone {
    TimeZone::posix(match name {
        "Europe/Berlin" => "CET-1CEST,M3.5.0,M10.5.0/3",
        "America/New_York" => "EST5EDT,M3.2.0,M11.1.0",
        "Asia/Kolkata" => "IST-5:30",
        "UTC" => "UTC0",
        other => panic!("{other}"),
    })
    .unwrap()
}

fn rules(text: &str) -> KeepRules {
    let mut rules = KeepRules::default();
    for rule in text.split(", ") {
        let (rule, count) = rule.split_once(' ').unwrap();
        if rule == "within" {
            let time: SignedDuration = match count.split_at(count.len() - 1) {
                (days, "d") => SignedDuration::from_hours(24 * days.parse::<i64>().unwrap()),
                (weeks, _) => SignedDuration::from_hours(168 * weeks.parse::<i64>().unwrap()),
            };
            rules.within_s = time.as_secs().try_into().unwrap();
            continue;
        }
        let field = match rule {
            "last" => &mut rules.last,
            "hourly" => &mut rules.hourly,
            "daily" => &mut rules.daily,
            "weekly" => &mut rules.weekly,
            "monthly" => &mut rules.monthly,
            "yearly" => &mut rules.yearly,
            other => panic!("{other}"),
        };
        *field = count.parse().unwrap();
    }
    rules
}

fn candidate(line: &Line<'_>) -> Candidate {
    let has = |mark: &str| line.marks.contains(&mark);
    Candidate {
        name: line.name,
        kind: match () {
            () if has("incomplete") => EntryKind::Incomplete,
            () if has("unrecorded") => EntryKind::Unrecorded,
            () => EntryKind::Complete,
        },
        is_latest: has("latest"),
        pinned: has("pinned"),
        has_missing_disk: has("disk"),
        is_misdated: has("misdated"),
    }
}

fn kept(case: &Case<'_>) -> BTreeSet<SnapshotName> {
    let candidates: Vec<Candidate> = case.lines.iter().map(candidate).collect();
    let now: Timestamp = name(case.now.unwrap_or(NOW)).moment();
    let by = KeepBy {
        rules: &rules(case.rules),
        zone: &zone(case.zone),
        now,
        changed_at: None,
    };
    let decisions = decide(&candidates, &by).into_iter();
    decisions
        .filter(|one| !one.keep.is_empty())
        .map(|one| one.name)
        .collect()
}

fn kept_by(case: &Case<'_>, tool: &str) -> BTreeSet<SnapshotName> {
    let lines = case.lines.iter();
    let kept = lines.filter(|line| line.kept_by.contains(&tool));
    kept.map(|line| line.name).collect()
}

#[test]
fn retention_keeps_what_the_table_says() {
    let cases = cases();
    assert!(cases.len() >= 40, "{}", cases.len());
    for case in &cases {
        assert_eq!(kept(case), kept_by(case, "sprat"), "{}", case.title);
    }
}

/// So that no difference goes unnoticed, and none is claimed that is not there.
#[test]
fn retention_agrees_with_restic_and_borg_but_where_the_table_says_why() {
    for case in &cases() {
        let ours = kept_by(case, "sprat");
        let same = ["restic", "borg"].map(|tool| kept_by(case, tool) == ours);
        let agrees = same == [true, true];
        assert_eq!(agrees, case.differs.is_none(), "{}: {same:?}", case.title);
    }
}
