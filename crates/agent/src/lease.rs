//! The lease of a container, as sprat writes it: so far that the administrator can release one.
//!
//! A lease is a file of 4,096 bytes: one JSON object, blanks, then its CRC-32 as 8 hex digits and a newline. The
//! highest number decides. Nobody changes or removes the lease of another one: to release it, the next number is
//! made, which is free. The format is that of `crates/store/src/lock/content.rs`; this crate stands alone, so tests of
//! both keep it the same. `doors` are earlier leases from which writes may still arrive, `watch` are sessions whose
//! writes have not been compared yet. Both are passed on.

use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::OFlags;

use crate::disk::{self, bad, open_in};
use crate::keeper::By;
use crate::names::{self, Name};
use crate::root::Root;

const BYTES: usize = 4096;
const CHECKED_BYTES: usize = BYTES - 9;
/// For so long writes may arrive of a session that did not use the agent: as in sprat.
const LATE_WRITE_S: i64 = (2 * 60 + 15) * 60;
/// A session renews its lease every 10 seconds.
const ALIVE_S: i64 = 60;
const ENTRIES_MAX: usize = 15;
/// A file that becomes the next lease, so that a full disk stops no [`unlock`].
const SPARE: &str = "lease.spare";

/// An earlier lease from which writes may still arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Door {
    number: u64,
    /// `None`: the end is not known.
    until_s: Option<i64>,
    all_before: bool,
}

/// A session whose writes have not been compared yet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Watch {
    host: String,
    token: String,
    until_s: i64,
}

/// What a lease says, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Lease {
    free: bool,
    host: String,
    /// The agent through which it is used.
    agent: String,
    doors: Vec<Door>,
    watch: Vec<Watch>,
}

/// The value of a key in the text of a JSON object without nesting.
fn value<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let (_, rest) = text.split_once(&format!("\"{key}\":"))?;
    let end = rest.find([',', '}']).unwrap_or(rest.len());
    Some(rest[..end].trim_matches('"'))
}

/// The objects of an array.
fn objects<'t>(text: &'t str, key: &str) -> Vec<&'t str> {
    let list = text.split_once(&format!("\"{key}\":["));
    let list = list.and_then(|(_, rest)| rest.split_once(']'));
    let list = list.map_or("", |(list, _)| list);
    list.split_inclusive('}')
        .filter(|one| one.contains('{'))
        .collect()
}

fn plain(text: &str) -> String {
    let is_plain = |c: &char| c.is_ascii_alphanumeric() || "._+-".contains(*c);
    text.chars().filter(is_plain).take(32).collect()
}

impl Lease {
    /// `None`: no sprat wrote this, or it is of an old one.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (checked, crc) = bytes.split_at_checked(CHECKED_BYTES)?;
        if format!("{:08x}\n", crc32fast::hash(checked)).as_bytes() != crc {
            return None;
        }
        let text = std::str::from_utf8(checked).ok()?;
        let door = |text: &&str| {
            Some(Door {
                number: value(text, "number")?.parse().ok()?,
                until_s: match value(text, "until_s")? {
                    "null" => None,
                    time => Some(time.parse().ok()?),
                },
                all_before: value(text, "all_before") == Some("true"),
            })
        };
        let watch = |text: &&str| {
            Some(Watch {
                host: plain(value(text, "host")?),
                token: plain(value(text, "token")?),
                until_s: value(text, "until_s")?.parse().ok()?,
            })
        };
        let (doors, watches) = (objects(text, "doors"), objects(text, "watch"));
        let head = text.split("\"doors\":").next()?;
        let tail = text.rsplit(']').next()?;
        Some(Self {
            free: value(head, "free")? == "true",
            host: plain(value(head, "host")?),
            agent: value(tail, "agent").unwrap_or_default().to_owned(),
            doors: doors.iter().map(door).collect::<Option<_>>()?,
            watch: watches.iter().map(watch).collect::<Option<_>>()?,
        })
    }

    /// The bytes of a free lease with these entries.
    fn free(doors: &[Door], watch: &[Watch], now_s: i64) -> io::Result<Vec<u8>> {
        let token = || -> io::Result<String> {
            let [a, b] = [disk::random_u64()?, disk::random_u64()?];
            Ok(format!("{a:016x}{b:016x}"))
        };
        let doors = doors.iter().map(|door| {
            let until = door.until_s.map_or("null".to_owned(), |s| s.to_string());
            format!(
                "{{\"number\":{},\"until_s\":{until},\"all_before\":{}}}",
                door.number, door.all_before
            )
        });
        let watch = watch.iter().map(|watch| {
            format!(
                "{{\"host\":\"{}\",\"token\":\"{}\",\"until_s\":{}}}",
                watch.host, watch.token, watch.until_s
            )
        });
        sealed(format!(
            "{{\"token\":\"{}\",\"free\":true,\"attempt\":\"{}\",\"renewed\":0,\"host\":\"sprat-agent\",\
             \"started_s\":{now_s},\"version\":\"{}\",\"doors\":[{}],\"watch\":[{}],\"agent\":null,\"flight\":false}}",
            token()?,
            token()?,
            env!("CARGO_PKG_VERSION"),
            doors.collect::<Vec<_>>().join(","),
            watch.collect::<Vec<_>>().join(",")
        ))
    }
}

/// The bytes of a lease's file.
fn sealed(json: String) -> io::Result<Vec<u8>> {
    let mut bytes = json.into_bytes();
    if bytes.len() > CHECKED_BYTES {
        return Err(bad("the lease has too many entries"));
    }
    bytes.resize(CHECKED_BYTES, b' ');
    let crc = format!("{:08x}\n", crc32fast::hash(&bytes));
    bytes.extend(crc.as_bytes());
    Ok(bytes)
}

/// A lease with its number and the time of its last change. Its content is `None` if it can't be read.
struct Found {
    number: u64,
    changed_s: i64,
    empty: bool,
    lease: Option<Lease>,
}

fn lease_name(container: &str, number: u64) -> String {
    format!("{container}.lock.{number}")
}

fn read(root: &Root, container: &str, number: u64) -> io::Result<Option<Found>> {
    let text = lease_name(container, number);
    let Some(name) = Name::parse(&text) else {
        return Ok(None);
    };
    let Some(file) = disk::if_there(root.open_file(&name, OFlags::RDONLY))? else {
        return Ok(None);
    };
    let mut bytes = vec![0; BYTES];
    let found = file.metadata()?;
    disk::read_padded(&file, &mut bytes, 0)?;
    Ok(Some(Found {
        number,
        changed_s: found.mtime(),
        empty: found.size() == 0,
        lease: Lease::parse(&bytes).filter(|_| found.size() == BYTES as u64),
    }))
}

/// Releases the lease of a container. Every process that may write the container is refused first. `surely`: also
/// if its session still renews it.
pub fn unlock(root: &Root, container: &str, surely: bool) -> io::Result<String> {
    if !names::is_container(container) {
        return Err(bad(format!("{container} is not a container's name")));
    }
    let not_locked = Ok(format!("{container} is not locked\n"));
    let numbers = root.leases(container)?;
    let Some(highest) = numbers.last().copied() else {
        return not_locked;
    };
    // Nothing was written under one that is empty: its session checks the leases once more before it writes, and finds ours.
    let mut found = None;
    for number in numbers.into_iter().rev() {
        found = read(root, container, number)?.filter(|found| !found.empty);
        if found.is_some() {
            break;
        }
    }
    let now_s = crate::clock::reading("").wall_s;
    let lease = found.as_ref().and_then(|found| found.lease.as_ref());
    let is_held = found.is_some() && lease.is_none_or(|lease| !lease.free);
    let is_open = |lease: &Lease| lease.doors.iter().any(|door| door.until_s.is_none());
    let is_highest = found.as_ref().is_some_and(|found| found.number == highest);
    if is_highest && !is_held && !lease.is_some_and(is_open) {
        return not_locked;
    }
    let age_s = found
        .as_ref()
        .map_or(i64::MAX, |found| now_s - found.changed_s);
    if age_s < ALIVE_S && is_held && !surely {
        return Err(bad(format!(
            "the session that has the lock was active {} seconds ago. If it must end, say --yes: what it writes then \
             is refused",
            age_s.max(0)
        )));
    }

    let is_fenced = refuse_writers(root, container)?;
    let used_agent = |number| -> io::Result<bool> {
        let seen = read(root, container, number)?.and_then(|found| found.lease);
        Ok(is_fenced && seen.is_some_and(|lease| lease.agent == root.id))
    };
    let own = found.as_ref().filter(|_| is_held).map(|found| Door {
        number: found.number,
        until_s: None,
        // Nobody knows what an unreadable one would say of those before it.
        all_before: lease.is_none(),
    });
    let mut doors = Vec::new();
    let others = lease.map_or(&[][..], |lease| &lease.doors);
    for door in others.iter().chain(&own) {
        let until_s = match !door.all_before && used_agent(door.number)? {
            true => now_s,
            false => door.until_s.unwrap_or(now_s + LATE_WRITE_S),
        };
        // The one below stays named, as in sprat: its session finds by that that it was passed.
        if until_s > now_s || Some(door) == own.as_ref() {
            doors.push(Door {
                until_s: Some(until_s),
                ..door.clone()
            });
        }
    }
    let is_late = doors.iter().any(|door| door.until_s > Some(now_s));
    if doors.len() > ENTRIES_MAX {
        let last = doors.split_off(doors.len() - ENTRIES_MAX + 1);
        let until_s = doors.iter().filter_map(|door| door.until_s).max();
        let number = doors.iter().map(|door| door.number).max().unwrap_or(0);
        let joined = Door {
            number,
            until_s,
            all_before: true,
        };
        doors = std::iter::once(joined).chain(last).collect();
    }
    let watch = lease.map_or(&[][..], |lease| &lease.watch);
    let [next, _] = names::next_lease(Some(highest));
    let bytes = Lease::free(&doors, watch, now_s)?;
    let spare = open_in(&root.agent, SPARE, OFlags::WRONLY | OFlags::CREATE)?;
    spare.write_all_at(&bytes, 0)?;
    spare.sync_all()?;
    let name = lease_name(container, next);
    disk::rename_new(&root.agent, SPARE, &root.folder, &name).map_err(|error| {
        match error.kind() {
            io::ErrorKind::AlreadyExists => bad("another session has the lock meanwhile"),
            _ => error,
        }
    })?;
    disk::sync_folder(&root.folder)?;
    let host = lease.map_or("an unknown machine", |lease| lease.host.as_str());
    let mut text = format!("{container}: the lock of {host} is released\n");
    if is_late {
        text += "Its session did not use this agent: its writes may arrive for 2 h 15 min. Make sure that no \
                 process of it runs. sprat checks until then that nothing was overwritten\n";
    }
    Ok(text)
}

/// Makes the spare file.
pub fn keep_spare(root: &Root) -> io::Result<()> {
    let spare = open_in(&root.agent, SPARE, OFlags::WRONLY | OFlags::CREATE)?;
    if spare.metadata()?.size() < BYTES as u64 {
        spare.write_all_at(&[b' '; BYTES], 0)?;
    }
    Ok(())
}

/// Begins a session, so that all others are refused. False: there is no container, so nobody is.
fn refuse_writers(root: &Root, container: &str) -> io::Result<bool> {
    let Some(file) = disk::if_there(root.writable(container))? else {
        return Ok(false);
    };
    let mut keeper = root.keeper(container)?;
    keeper.begin_session(&file, By::Client)?;
    keeper.end(&file)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use sprat_testkit::leases::{self, RELEASED_BY_AGENT, WRITTEN_BY_SPRAT};

    use super::*;

    /// The crate `store` has a test with the same texts.
    #[test]
    fn the_agent_and_sprat_read_and_write_the_same_leases() {
        let entry = |number, until_s, all_before| Door {
            number,
            until_s,
            all_before,
        };
        let watch = vec![Watch {
            host: "desk.home".to_owned(),
            token: "2021222324252627".to_owned(),
            until_s: 1_795_839_612,
        }];
        let read = Lease::parse(&sealed(WRITTEN_BY_SPRAT.to_owned()).unwrap()).unwrap();
        let expected = Lease {
            free: false,
            host: "laptop".to_owned(),
            agent: "0123456789abcdef".to_owned(),
            doors: vec![
                entry(7, Some(1_795_839_611), true),
                entry(1_000_004, None, false),
            ],
            watch: watch.clone(),
        };
        assert_eq!(read, expected);

        let doors = [
            entry(7, Some(1_795_839_611), true),
            entry(1_000_004, Some(1_795_839_613), false),
        ];
        let bytes = Lease::free(&doors, &watch, 1_795_831_511).unwrap();
        let text = std::str::from_utf8(&bytes[..CHECKED_BYTES]).unwrap();
        let mut written = text.trim_end_matches(' ').to_owned();
        // These differ each time, or in each version.
        for key in ["token", "attempt", "version"] {
            let [own, shown] = [&written, RELEASED_BY_AGENT]
                .map(|text| format!("\"{key}\":\"{}\"", value(text, key).unwrap()));
            assert!(key == "version" || own.len() == shown.len(), "{own}");
            written = written.replacen(&own, &shown, 1);
        }
        assert_eq!(written, RELEASED_BY_AGENT);
        assert_eq!(u64::try_from(LATE_WRITE_S), Ok(leases::LATE_WRITE_S));
    }

    fn doors() -> Vec<Door> {
        [(7, None, true), (1_000_004, Some(1_795_831_511), false)]
            .map(|(number, until_s, all_before)| Door {
                number,
                until_s,
                all_before,
            })
            .to_vec()
    }

    #[test]
    fn what_is_written_is_read() {
        let watch = [1, 2].map(|until_s| Watch {
            host: "a-b.c".to_owned(),
            token: "0123456789abcdef".to_owned(),
            until_s,
        });
        for (doors, watch) in [(doors(), &watch[..]), (Vec::new(), &[])] {
            let mut bytes = Lease::free(&doors, watch, 5).unwrap();
            let read = Lease::parse(&bytes).unwrap();
            assert!(read.free && read.host == "sprat-agent" && read.agent == "null");
            assert!(read.doors == doors && read.watch == watch);
            bytes[100] ^= 1;
            assert_eq!(Lease::parse(&bytes), None);
        }
        assert_eq!(Lease::parse(&[b' '; BYTES]), None);
        assert_eq!(Lease::parse(b""), None);
    }

    #[test]
    fn the_largest_lease_fits() {
        let door = Door {
            number: u64::MAX,
            until_s: Some(i64::MAX),
            all_before: false,
        };
        let watch = Watch {
            host: "h".repeat(32),
            token: "t".repeat(32),
            until_s: i64::MAX,
        };
        let (doors, watch) = (vec![door; ENTRIES_MAX], vec![watch; 16]);
        assert_eq!(Lease::free(&doors, &watch, 5).unwrap().len(), BYTES);
    }
}
