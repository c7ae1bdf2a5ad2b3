//! What people read of snapshots: lists, versions of paths, differences.

use sprat_inside::{
    Change, DiffReport, Difference, FindReport, Found, Kind, Listing, PathHistory, Side, Sum,
    Version, VersionsReport,
};
use sprat_session::text;
use sprat_snapshot::EntryKind;

use crate::watch::Shown;

/// What a cell shows where there is nothing.
const NOTHING: &str = "-";

/// What to know of a snapshot that is no complete one.
#[must_use]
pub fn note(snapshot: &str, kind: EntryKind) -> Option<String> {
    let what = match kind {
        EntryKind::Complete | EntryKind::Adopted => return None,
        EntryKind::Incomplete => "is incomplete: some files could not be read during the backup",
        EntryKind::Partial | EntryKind::Inflight => {
            "is of an interrupted run: files can be missing or cut short"
        }
        _ => "has no record: sprat does not know whether it is complete",
    };
    Some(format!("{} {what}", text::harmless(snapshot)))
}

/// The entries of a folder, one a line. `colours`: names in the colours of `ls`.
#[must_use]
pub fn listing(listing: &Listing, colours: bool, shown: &Shown) -> String {
    let above = match &*listing.path {
        "/" => "/".to_owned(),
        path => format!("{path}/"),
    };
    let rows: Vec<Vec<String>> = listing
        .entries
        .iter()
        .map(|entry| {
            let found = &entry.found;
            let name = entry.path.strip_prefix(&above).unwrap_or(&entry.path);
            let mut last = coloured(&whole(name), found, colours);
            if let Some(link) = &found.link {
                last.push_str(&format!(" -> {}", whole(link)));
            }
            vec![
                mode(found),
                found.user.to_string(),
                found.group.to_string(),
                size(found),
                shown.time(found.modified),
                last,
            ]
        })
        .collect();
    text::table(&rows, &[1, 2, 3])
}

/// The paths that were found, each with when it came, changed and went.
#[must_use]
pub fn found(report: &FindReport) -> String {
    let title = ["CAME", "CHANGED", "GONE", "VERSIONS", "SIZE", "PATH"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    rows.extend(report.paths.iter().filter_map(found_row));
    match rows.len() {
        1 => String::new(),
        _ => text::table(&rows, &[3, 4]),
    }
}

fn found_row(path: &PathHistory) -> Option<Vec<String>> {
    let (first, newest) = (path.versions.first()?, path.versions.last()?);
    let changed = match path.versions.len() {
        1 => NOTHING.to_owned(),
        _ => newest.first.clone(),
    };
    let gone = newest.gone.as_ref();
    Some(vec![
        first.first.clone(),
        changed,
        gone.map_or_else(
            || NOTHING.to_owned(),
            |gone| match gone.complete {
                true => gone.snapshot.clone(),
                false => format!("{}?", gone.snapshot),
            },
        ),
        text::count(path.versions.len() as u64),
        size(&newest.found),
        format!("{}:{}", text::harmless(&path.job), whole(&path.path)),
    ])
}

/// The versions of a path, oldest first. `folder_times`: those of folders are known.
#[must_use]
pub fn versions(report: &VersionsReport, folder_times: bool, shown: &Shown) -> String {
    let title = ["FROM", "TO", "SNAPSHOTS", "SIZE", "MODIFIED", "CHANGE"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    for version in &report.versions {
        rows.push(vec![
            version.first.clone(),
            version.last.clone(),
            text::count(version.snapshots),
            size(&version.found),
            match version.found.kind {
                Kind::Folder if !folder_times => NOTHING.to_owned(),
                _ => shown.time(version.found.modified),
            },
            version_change(version),
        ]);
        if let Some(gone) = &version.gone {
            let what = match gone.complete {
                true => "gone",
                false => "not there, in an incomplete snapshot: it may be unread",
            };
            let nothing = || NOTHING.to_owned();
            rows.push(vec![
                gone.snapshot.clone(),
                nothing(),
                nothing(),
                nothing(),
                nothing(),
                what.to_owned(),
            ]);
        }
    }
    text::table(&rows, &[2, 3])
}

/// How a version differs from the one before.
#[must_use]
pub fn version_change(version: &Version) -> String {
    let found = &version.found;
    match version.change {
        Change::New => format!("new: {}", described(found)),
        Change::Kind => format!("now {}", described(found)),
        Change::Attributes => format!("attributes: {}", attributes(found)),
        Change::Content | Change::Gone => word(version.change).to_owned(),
    }
}

/// How two snapshots differ, and how much in all.
#[must_use]
pub fn differences(report: &DiffReport) -> String {
    let rows: Vec<Vec<String>> = report.differences.iter().map(difference).collect();
    let mut said = text::table(&rows, &[1, 2]);
    let sums = &report.sums;
    let counted = [
        ("new", sums.new, sums.new.after_bytes),
        ("changed", sums.content, sums.content.after_bytes),
        ("with new attributes", sums.attributes, 0),
        ("of another kind", sums.kind, sums.kind.after_bytes),
        ("gone", sums.gone, sums.gone.before_bytes),
    ];
    let parts: Vec<String> = counted
        .iter()
        .filter(|(_, sum, _)| sum.paths > 0)
        .map(|(what, sum, bytes)| part(what, *sum, *bytes))
        .collect();
    let sides = format!("{} and {}", side(&report.before), side(&report.after));
    match parts.is_empty() {
        true => said.push_str(&format!("no difference between {sides}\n")),
        false => said.push_str(&format!("{sides}: {}\n", parts.join(", "))),
    }
    said
}

fn part(what: &str, sum: Sum, bytes: u64) -> String {
    let mut part = format!("{} {what}", text::count(sum.paths));
    if bytes > 0 {
        part.push_str(&format!(" ({})", text::bytes(bytes)));
    }
    part
}

fn side(side: &Side) -> String {
    match (&side.job, &side.snapshot) {
        (Some(job), Some(snapshot)) => {
            format!("{}/{}", text::harmless(job), text::harmless(snapshot))
        }
        _ => "the source".to_owned(),
    }
}

fn difference(one: &Difference) -> Vec<String> {
    let owner_and_mode = |found: &Option<Found>| found.as_ref().map(attributes);
    let is_same = owner_and_mode(&one.before) == owner_and_mode(&one.after);
    let cell = |found: &Option<Found>| match (found, one.change) {
        (None, _) => String::new(),
        (Some(_), Change::Attributes) if is_same => String::new(),
        (Some(found), Change::Attributes) => attributes(found),
        (Some(found), _) if found.kind == Kind::File => size(found),
        (Some(found), _) => described(found).to_owned(),
    };
    let what = match (one.change, is_same) {
        // The mode bits of a group are those of the ACL's mask, so they may be equal.
        (Change::Attributes, true) => "ACL, xattr or time",
        (change, _) => word(change),
    };
    vec![
        what.to_owned(),
        cell(&one.before),
        cell(&one.after),
        whole(&one.path),
    ]
}

fn word(change: Change) -> &'static str {
    match change {
        Change::New => "new",
        Change::Gone => "gone",
        Change::Content => "changed",
        Change::Attributes => "attributes",
        Change::Kind => "kind",
    }
}

fn described(found: &Found) -> &'static str {
    match found.kind {
        Kind::File => "file",
        Kind::Folder => "folder",
        Kind::Link => "link",
        Kind::BlockDevice | Kind::CharacterDevice => "device",
        Kind::Fifo => "pipe",
        Kind::Socket => "socket",
    }
}

fn attributes(found: &Found) -> String {
    format!("{:04o} {}:{}", found.mode, found.user, found.group)
}

/// The size of a file, or the numbers of a device.
#[must_use]
pub fn size(found: &Found) -> String {
    match (&found.device, found.kind) {
        (Some(device), _) => device.clone(),
        (None, Kind::File) => text::bytes(found.bytes),
        _ => NOTHING.to_owned(),
    }
}

/// A path for a terminal. It is never cut: people copy it.
fn whole(path: &str) -> String {
    text::harmless_within(path, usize::MAX)
}

/// `drwxr-xr-x`, as `ls -l` shows it.
#[must_use]
pub fn mode(found: &Found) -> String {
    let kind = match found.kind {
        Kind::File => '-',
        Kind::Folder => 'd',
        Kind::Link => 'l',
        Kind::BlockDevice => 'b',
        Kind::CharacterDevice => 'c',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
    };
    let mut shown = String::from(kind);
    for (place, special, sign) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = found.mode >> place;
        shown.push(if bits & 4 == 0 { '-' } else { 'r' });
        shown.push(if bits & 2 == 0 { '-' } else { 'w' });
        shown.push(match (found.mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => sign,
            (true, false) => sign.to_ascii_uppercase(),
        });
    }
    shown
}

/// A name in the colours that `ls` uses by default (coreutils, dircolors).
fn coloured(name: &str, found: &Found, colours: bool) -> String {
    let code = match found.kind {
        Kind::Folder => "01;34",
        Kind::Link => "01;36",
        Kind::BlockDevice | Kind::CharacterDevice => "01;33",
        Kind::Fifo => "33",
        Kind::Socket => "01;35",
        Kind::File if found.mode & 0o111 != 0 => "01;32",
        Kind::File => "",
    };
    match colours && !code.is_empty() {
        true => format!("\u{1b}[{code}m{name}\u{1b}[0m"),
        false => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;
    use sprat_inside::{Gone, ListingEntry, SearchedJob, Sums};

    fn shown() -> Shown {
        Shown {
            now: "2026-11-28T12:00:00Z".parse().unwrap(),
            zone: TimeZone::UTC,
        }
    }

    fn a(kind: Kind, bytes: u64, mode: u32) -> Found {
        Found {
            kind,
            bytes,
            mode,
            user: 0,
            group: 1000,
            modified: "2026-11-27T10:30:00Z".parse().unwrap(),
            link: (kind == Kind::Link).then(|| "etc/x".to_owned()),
            device: (kind == Kind::CharacterDevice).then(|| "1:3".to_owned()),
        }
    }

    fn entries() -> Listing {
        let entries = [
            ("/etc/a\\#012b", a(Kind::File, 1536, 0o4755)),
            ("/etc/folder", a(Kind::Folder, 0, 0o1777)),
            ("/etc/link", a(Kind::Link, 0, 0o777)),
            ("/etc/null", a(Kind::CharacterDevice, 0, 0o666)),
            ("/etc/\u{202e}odd", a(Kind::File, 0, 0o640)),
        ];
        Listing {
            job: "home".to_owned(),
            snapshot: "2026-11-28T01-30-00Z".to_owned(),
            kind: EntryKind::Complete,
            path: "/etc".to_owned(),
            entries: entries
                .map(|(path, found)| ListingEntry {
                    path: path.to_owned(),
                    found,
                })
                .to_vec(),
            more: 0,
        }
    }

    #[test]
    fn folder_is_listed_with_harmless_names() {
        insta::assert_snapshot!(listing(&entries(), false, &shown()), @r"
        -rwsr-xr-x  0  1000  1.5 KiB  2026-11-27 10:30  a\#012b
        drwxrwxrwt  0  1000        -  2026-11-27 10:30  folder
        lrwxrwxrwx  0  1000        -  2026-11-27 10:30  link -> etc/x
        crw-rw-rw-  0  1000      1:3  2026-11-27 10:30  null
        -rw-r-----  0  1000      0 B  2026-11-27 10:30  \u{202e}odd
        ");
    }

    #[test]
    fn colours_are_only_around_names() {
        let plain = listing(&entries(), false, &shown());
        let coloured = listing(&entries(), true, &shown());
        assert!(!plain.contains('\u{1b}'));
        assert!(coloured.contains("\u{1b}[01;34mfolder\u{1b}[0m\n"));
        assert!(coloured.contains("\u{1b}[01;36mlink\u{1b}[0m -> etc/x\n"));
        assert!(coloured.contains("\u{1b}[01;32ma\\#012b\u{1b}[0m\n"));
        let mut without = coloured;
        for code in ["01;34", "01;36", "01;32", "01;33", "0"] {
            without = without.replace(&format!("\u{1b}[{code}m"), "");
        }
        assert_eq!(without, plain);
    }

    fn history() -> Vec<Version> {
        let version = |first: &str, last: &str, change, bytes, mode| Version {
            first: first.to_owned(),
            last: last.to_owned(),
            snapshots: 2,
            change,
            found: a(Kind::File, bytes, mode),
            gone: None,
        };
        let mut versions = vec![
            version(
                "2026-11-20T01-30-00Z",
                "2026-11-21T01-30-00Z",
                Change::New,
                10,
                0o644,
            ),
            version(
                "2026-11-22T01-30-00Z",
                "2026-11-22T01-30-00Z",
                Change::Content,
                20,
                0o644,
            ),
            version(
                "2026-11-24T01-30-00Z",
                "2026-11-25T01-30-00Z",
                Change::New,
                20,
                0o644,
            ),
            version(
                "2026-11-26T01-30-00Z",
                "2026-11-26T01-30-00Z",
                Change::Attributes,
                20,
                0o600,
            ),
        ];
        versions[1].gone = Some(Gone {
            snapshot: "2026-11-23T01-30-00Z".to_owned(),
            complete: false,
        });
        versions[3].gone = Some(Gone {
            snapshot: "2026-11-27T01-30-00Z".to_owned(),
            complete: true,
        });
        versions
    }

    #[test]
    fn versions_show_when_a_path_came_changed_and_went() {
        let report = VersionsReport {
            job: "home".to_owned(),
            path: "/etc/fstab".to_owned(),
            snapshots: 8,
            versions: history(),
        };
        insta::assert_snapshot!(versions(&report, true, &shown()), @r"
        FROM                  TO                    SNAPSHOTS  SIZE  MODIFIED          CHANGE
        2026-11-20T01-30-00Z  2026-11-21T01-30-00Z          2  10 B  2026-11-27 10:30  new: file
        2026-11-22T01-30-00Z  2026-11-22T01-30-00Z          2  20 B  2026-11-27 10:30  changed
        2026-11-23T01-30-00Z  -                             -     -  -                 not there, in an incomplete snapshot: it may be unread
        2026-11-24T01-30-00Z  2026-11-25T01-30-00Z          2  20 B  2026-11-27 10:30  new: file
        2026-11-26T01-30-00Z  2026-11-26T01-30-00Z          2  20 B  2026-11-27 10:30  attributes: 0600 0:1000
        2026-11-27T01-30-00Z  -                             -     -  -                 gone
        ");
    }

    #[test]
    fn found_paths_are_one_line_each() {
        let path = |path: &str, versions: &[Version]| PathHistory {
            job: "home".to_owned(),
            path: path.to_owned(),
            versions: versions.to_vec(),
        };
        let mut report = FindReport {
            jobs: vec![SearchedJob {
                job: "home".to_owned(),
                snapshots: 8,
            }],
            paths: vec![
                path("/etc/fstab", &history()),
                path("/etc/x\\#012", &history()[..1]),
            ],
            more: 0,
        };
        insta::assert_snapshot!(found(&report), @r"
        CAME                  CHANGED               GONE                  VERSIONS  SIZE  PATH
        2026-11-20T01-30-00Z  2026-11-26T01-30-00Z  2026-11-27T01-30-00Z         4  20 B  home:/etc/fstab
        2026-11-20T01-30-00Z  -                     -                            1  10 B  home:/etc/x\#012
        ");
        // An incomplete snapshot may lack it only because it could not be read.
        report.paths = vec![path("/etc/fstab", &history()[..2])];
        assert!(found(&report).contains("2026-11-23T01-30-00Z? "));
        report.paths.clear();
        assert_eq!(found(&report), "");
    }

    #[test]
    fn differences_are_listed_and_counted() {
        let side = |snapshot: &str| Side {
            job: Some("home".to_owned()),
            snapshot: Some(snapshot.to_owned()),
            kind: Some(EntryKind::Complete),
            path: "/".to_owned(),
        };
        let one = |path: &str, change, before, after| Difference {
            path: path.to_owned(),
            change,
            before,
            after,
        };
        let file = |bytes, mode| Some(a(Kind::File, bytes, mode));
        let sum = |before_bytes, after_bytes| Sum {
            paths: 1,
            before_bytes,
            after_bytes,
        };
        let mut report = DiffReport {
            before: side("2026-11-27T01-30-00Z"),
            after: side("2026-11-28T01-30-00Z"),
            differences: vec![
                one("/new", Change::New, None, file(3000, 0o644)),
                one(
                    "/folder",
                    Change::New,
                    None,
                    Some(a(Kind::Folder, 0, 0o755)),
                ),
                one("/gone", Change::Gone, file(5, 0o644), None),
                one("/text", Change::Content, file(5, 0o644), file(7, 0o644)),
                one("/mode", Change::Attributes, file(5, 0o644), file(5, 0o600)),
                one("/acl", Change::Attributes, file(5, 0o644), file(5, 0o644)),
                one(
                    "/kind",
                    Change::Kind,
                    file(5, 0o644),
                    Some(a(Kind::Link, 0, 0o777)),
                ),
            ],
            more: 0,
            sums: Sums {
                new: Sum {
                    paths: 2,
                    ..sum(0, 3000)
                },
                gone: sum(5, 0),
                content: sum(5, 7),
                attributes: Sum {
                    paths: 2,
                    ..sum(5, 5)
                },
                kind: sum(5, 0),
            },
        };
        insta::assert_snapshot!(differences(&report), @r"
        new                                  2.9 KiB  /new
        new                                   folder  /folder
        gone                        5 B               /gone
        changed                     5 B          7 B  /text
        attributes          0644 0:1000  0600 0:1000  /mode
        ACL, xattr or time                            /acl
        kind                        5 B         link  /kind
        home/2026-11-27T01-30-00Z and home/2026-11-28T01-30-00Z: 2 new (2.9 KiB), 1 changed (7 B), 2 with new attributes, 1 of another kind, 1 gone (5 B)
        ");
        report.differences.clear();
        report.sums = Sums::default();
        insta::assert_snapshot!(differences(&report), @r"
        no difference between home/2026-11-27T01-30-00Z and home/2026-11-28T01-30-00Z
        ");
    }
}
