//! The text of the digest: what was backed up since the last one, room, checks, and what is open.
//!
//! It names copies and containers and has numbers; no path, so every channel may get it.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use sprat_session::text::{bytes, count, counted};

use crate::copy_name::CopyName;

/// What a digest reports.
#[derive(Debug, Clone)]
pub struct Digest {
    /// Since when; `None`: it is the first one.
    pub from: Option<Timestamp>,
    /// Until when.
    pub until: Timestamp,
    /// The copies of the config.
    pub copies: Vec<CopyDigest>,
    /// The containers of the config.
    pub containers: Vec<ContainerDigest>,
    /// Headlines of the open events ([`Sender::headline`](crate::notify::Sender::headline)).
    pub open: Vec<String>,
    /// Events that were dropped before every channel had reported them.
    pub dropped_events: u64,
}

/// One copy since the last digest.
#[derive(Debug, Clone)]
pub struct CopyDigest {
    /// Which.
    pub copy: CopyName,
    /// Attempts that left a snapshot.
    pub successes: u64,
    /// Those of them that are incomplete.
    pub incomplete: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Uploaded by them.
    pub sent_bytes: u64,
    /// Size of the newest snapshot, and of the last one before this time.
    pub size: Option<(u64, u64)>,
    /// Start of the last success ever.
    pub last_success: Option<Timestamp>,
    /// Whether it is overdue.
    pub is_overdue: bool,
    /// When its last backup was can't be read.
    pub is_state_unread: bool,
    /// Its attempts can't be read: the numbers say nothing.
    pub is_history_unread: bool,
    /// Files that `exclude_larger_than` left out for the first time.
    pub left_out_files: u64,
}

/// One container.
#[derive(Debug, Clone)]
pub struct ContainerDigest {
    /// Its name in the config.
    pub container: String,
    /// What this machine knows of it can't be read.
    pub is_unread: bool,
    /// Free in the volume.
    pub volume_free_bytes: Option<u64>,
    /// Free on the server.
    pub server_free_bytes: Option<u64>,
    /// When it is full, by the growth of the last 30 days.
    pub full_on: Option<Date>,
    /// The last check of all data, and whether it was clean.
    pub check: Option<(Timestamp, bool)>,
    /// It takes more than 1.5 times its period.
    pub is_check_late: bool,
    /// The last drill, and whether it passed.
    pub drill: Option<(Timestamp, bool)>,
    /// The recovery key was not rehearsed for a year.
    pub is_key_unrehearsed: bool,
}

impl Digest {
    /// The text, with times in this zone.
    #[must_use]
    pub fn text(&self, zone: &TimeZone) -> String {
        let mut lines = vec![match self.from {
            Some(from) => format!("From {} to {}", time(from, zone), time(self.until, zone)),
            None => format!("Until {}", time(self.until, zone)),
        }];
        lines.push(String::new());
        match self.open.as_slice() {
            [] => lines.push("No problem is open.".to_owned()),
            open => {
                lines.push(format!(
                    "{}:",
                    counted(len(open), "open problem", "open problems")
                ));
                lines.extend(open.iter().map(|line| format!("  {line}")));
            }
        }
        if self.dropped_events > 0 {
            let dropped = counted(self.dropped_events, "notice", "notices");
            lines.push(format!("Dropped without delivery: {dropped}."));
        }
        lines.push(String::new());
        lines.extend(self.copies.iter().flat_map(|copy| copy.lines(zone)));
        lines.push(String::new());
        lines.extend(
            self.containers
                .iter()
                .flat_map(|container| container.lines(zone)),
        );
        lines.join("\n")
    }
}

impl CopyDigest {
    fn lines(&self, zone: &TimeZone) -> Vec<String> {
        let mut parts = vec![counted(self.successes, "backup", "backups")];
        if self.incomplete > 0 {
            parts.push(format!("{} incomplete", count(self.incomplete)));
        }
        if self.failures > 0 {
            parts.push(format!("{} failed", count(self.failures)));
        }
        parts.push(format!("{} sent", bytes(self.sent_bytes)));
        match self.size {
            Some((now, before)) if now >= before => {
                parts.push(format!(
                    "{} in all ({} more)",
                    bytes(now),
                    bytes(now - before)
                ));
            }
            Some((now, before)) => {
                parts.push(format!(
                    "{} in all ({} less)",
                    bytes(now),
                    bytes(before - now)
                ));
            }
            None => {}
        }
        if self.is_history_unread {
            parts = vec!["the history of its backups can't be read".to_owned()];
        }
        let last = match self.last_success {
            Some(last) => format!("last backup {}", time(last, zone)),
            None if self.is_state_unread => "the time of the last backup can't be read".to_owned(),
            None => "no backup yet".to_owned(),
        };
        let overdue = if self.is_overdue { "OVERDUE, " } else { "" };
        let mut lines = vec![format!(
            "{}: {overdue}{}; {last}",
            self.copy,
            parts.join(", ")
        )];
        if self.left_out_files > 0 {
            let files = counted(self.left_out_files, "file", "files");
            lines.push(format!(
                "  exclude_larger_than left out {files} for the first time"
            ));
        }
        lines
    }
}

impl ContainerDigest {
    fn lines(&self, zone: &TimeZone) -> Vec<String> {
        let free = |bytes_free: Option<u64>, place: &str| {
            bytes_free.map(|free| format!("{} free {place}", bytes(free)))
        };
        if self.is_unread {
            let what = "what this machine knows of it can't be read: run `sprat status`";
            return vec![format!("{}: {what}", self.container)];
        }
        let mut parts = Vec::new();
        parts.extend(free(self.volume_free_bytes, "in the volume"));
        parts.extend(free(self.server_free_bytes, "on the server"));
        parts.extend(self.full_on.map(|date| format!("full on about {date}")));
        let done = |what: &str, last: Option<(Timestamp, bool)>, good: &str, bad: &str| match last {
            Some((at, is_good)) => {
                let result = if is_good { good } else { bad };
                format!("{what} {result} on {}", date(at, zone))
            }
            None => format!("no {what} yet"),
        };
        parts.push(done("check", self.check, "clean", "FOUND DAMAGE"));
        parts.push(done("drill", self.drill, "passed", "FAILED"));
        let mut lines = vec![format!("{}: {}", self.container, parts.join(", "))];
        if self.is_check_late {
            lines.push("  The check is late: set a longer check_budget.".to_owned());
        }
        if self.is_key_unrehearsed {
            lines.push(
                "  The recovery key was not rehearsed for a year: run `sprat key rehearse`."
                    .to_owned(),
            );
        }
        lines
    }
}

fn len<T>(items: &[T]) -> u64 {
    u64::try_from(items.len()).unwrap_or(u64::MAX)
}

fn time(time: Timestamp, zone: &TimeZone) -> String {
    let local = time.to_zoned_datetime(zone.clone());
    local.strftime("%Y-%m-%d %H:%M").to_string()
}

fn date(time: Timestamp, zone: &TimeZone) -> String {
    let local = time.to_zoned_datetime(zone.clone());
    local.strftime("%Y-%m-%d").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_795_874_400 + hours * 3600).unwrap()
    }

    fn copy(job: &str) -> CopyDigest {
        CopyDigest {
            copy: CopyName::new(job, "nas"),
            successes: 7,
            incomplete: 0,
            failures: 0,
            sent_bytes: GIB,
            size: None,
            last_success: Some(at(-5)),
            is_overdue: false,
            is_state_unread: false,
            is_history_unread: false,
            left_out_files: 0,
        }
    }

    fn container() -> ContainerDigest {
        ContainerDigest {
            container: "nas".to_owned(),
            is_unread: false,
            volume_free_bytes: Some(30 * GIB),
            server_free_bytes: None,
            full_on: None,
            check: Some((at(-100), true)),
            is_check_late: false,
            drill: None,
            is_key_unrehearsed: false,
        }
    }

    #[test]
    fn quiet_week_is_short() {
        let digest = Digest {
            from: Some(at(-7 * 24)),
            until: at(0),
            copies: vec![copy("home")],
            containers: vec![container()],
            open: Vec::new(),
            dropped_events: 0,
        };
        insta::assert_snapshot!(digest.text(&TimeZone::UTC), @r"
        From 2026-11-21 14:00 to 2026-11-28 14:00

        No problem is open.

        home@nas: 7 backups, 1.0 GiB sent; last backup 2026-11-28 09:00

        nas: 30.0 GiB free in the volume, check clean on 2026-11-24, no drill yet
        ");
    }

    #[test]
    fn bad_week_says_all_that_is_wrong() {
        let home = CopyDigest {
            incomplete: 1,
            failures: 2,
            size: Some((12 * GIB, 10 * GIB)),
            left_out_files: 3,
            ..copy("home")
        };
        let db = CopyDigest {
            successes: 0,
            failures: 1234,
            sent_bytes: 0,
            size: Some((GIB, 2 * GIB)),
            last_success: None,
            is_overdue: true,
            ..copy("db")
        };
        let nas = ContainerDigest {
            server_free_bytes: Some(GIB / 2),
            full_on: Some(jiff::civil::date(2026, 12, 24)),
            check: Some((at(-100), false)),
            is_check_late: true,
            drill: Some((at(-200), false)),
            is_key_unrehearsed: true,
            ..container()
        };
        let digest = Digest {
            from: None,
            until: at(0),
            copies: vec![home, db],
            containers: vec![nas],
            open: vec!["db@nas: the backup is overdue (code 4)".to_owned()],
            dropped_events: 1,
        };
        let text = digest.text(&TimeZone::UTC);
        assert!(!text.contains('/'), "{text}");
        insta::assert_snapshot!(text, @r"
        Until 2026-11-28 14:00

        1 open problem:
          db@nas: the backup is overdue (code 4)
        Dropped without delivery: 1 notice.

        home@nas: 7 backups, 1 incomplete, 2 failed, 1.0 GiB sent, 12.0 GiB in all (2.0 GiB more); last backup 2026-11-28 09:00
          exclude_larger_than left out 3 files for the first time
        db@nas: OVERDUE, 0 backups, 1,234 failed, 0 B sent, 1.0 GiB in all (1.0 GiB less); no backup yet

        nas: 30.0 GiB free in the volume, 512 MiB free on the server, full on about 2026-12-24, check FOUND DAMAGE on 2026-11-24, drill FAILED on 2026-11-20
          The check is late: set a longer check_budget.
          The recovery key was not rehearsed for a year: run `sprat key rehearse`.
        ");
    }

    #[test]
    fn what_can_not_be_read_is_not_called_missing() {
        let home = CopyDigest {
            last_success: None,
            is_state_unread: true,
            is_history_unread: true,
            ..copy("home")
        };
        let nas = ContainerDigest {
            is_unread: true,
            ..container()
        };
        let digest = Digest {
            from: None,
            until: at(0),
            copies: vec![home],
            containers: vec![nas],
            open: Vec::new(),
            dropped_events: 0,
        };
        insta::assert_snapshot!(digest.text(&TimeZone::UTC), @r"
        Until 2026-11-28 14:00

        No problem is open.

        home@nas: the history of its backups can't be read; the time of the last backup can't be read

        nas: what this machine knows of it can't be read: run `sprat status`
        ");
    }
}
