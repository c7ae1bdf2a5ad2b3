//! `status --history`: the attempts at a copy.

use std::io;
use std::time::Duration;

use serde_json::{Value, json};
use sprat_session::text;

use super::Shown;
use crate::copy_name::CopyName;
use crate::run_history::{RunHistory, RunLine};

/// So many attempts are shown as text. JSON has all.
const LINES_MAX: usize = 40;

/// The attempts at one copy, oldest first.
#[derive(Debug)]
pub struct HistoryOfCopy {
    copy: CopyName,
    lines: Vec<RunLine>,
}

impl HistoryOfCopy {
    /// Reads it.
    ///
    /// # Errors
    /// It can't be read.
    pub fn load(history: &RunHistory, job: &str, container: &str) -> io::Result<Self> {
        let copy = CopyName::new(job, container);
        let lines = history.load(&copy)?;
        Ok(Self { copy, lines })
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "job": self.copy.job,
            "container": self.copy.container,
            "attempts": self.lines,
        })
    }

    /// As a table: the newest attempts, newest last.
    #[must_use]
    pub fn text(&self, shown: &Shown) -> String {
        if self.lines.is_empty() {
            return format!("{}: no attempt yet\n", self.copy);
        }
        let older = self.lines.len().saturating_sub(LINES_MAX);
        let heads = ["started", "took", "code", "copied", "sent", "snapshot"];
        let mut rows = vec![heads.map(|head| format!("  {head}")).to_vec()];
        rows[0]
            .iter_mut()
            .skip(1)
            .for_each(|head| *head = head.trim().to_owned());
        for line in &self.lines[older..] {
            let took = Duration::try_from(line.ended.duration_since(line.started));
            let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), text::bytes);
            let what = line.snapshot.as_ref().or(line.reason.as_ref());
            rows.push(vec![
                format!("  {}", shown.time(line.started)),
                took.map_or_else(|_| "-".to_owned(), text::duration),
                line.code.to_string(),
                bytes(line.copied_bytes),
                bytes(line.sent_bytes),
                text::harmless(what.map_or("-", String::as_str)),
            ]);
        }
        let more = match older {
            0 => String::new(),
            older => format!(
                "  {} with --json\n",
                text::counted(older as u64, "older one", "older ones")
            ),
        };
        format!(
            "{}:\n{}{more}",
            self.copy,
            text::table(&rows, &[1, 2, 3, 4])
        )
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use jiff::tz::TimeZone;

    use super::*;

    #[test]
    fn newest_attempts_are_shown_and_the_others_are_counted() {
        let at = |minutes: i64| Timestamp::from_second(1_795_874_400 + minutes * 60).unwrap();
        let line = |number: i64| RunLine {
            started: at(number),
            ended: at(number + 2),
            code: 0,
            snapshot: Some("2026-11-28T14-00-00Z".to_owned()),
            sent_bytes: Some(5 << 20),
            ..RunLine::default()
        };
        let mut history = HistoryOfCopy {
            copy: CopyName::new("home", "nas"),
            lines: (0..45).map(line).collect(),
        };
        history.lines.push(RunLine {
            started: at(60),
            ended: at(60),
            code: 14,
            reason: Some("the server was not reached".to_owned()),
            ..RunLine::default()
        });
        let shown = Shown {
            now: at(100),
            zone: TimeZone::UTC,
        };
        let text = history.text(&shown);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), LINES_MAX + 3);
        assert_eq!(lines[0], "home@nas:");
        assert_eq!(
            lines[2],
            "  2026-11-28 14:06  2 min 0 s     0       -  5.0 MiB  2026-11-28T14-00-00Z"
        );
        assert_eq!(
            lines[LINES_MAX + 1],
            "  2026-11-28 15:00        0 s    14       -        -  the server was not reached"
        );
        assert_eq!(lines[LINES_MAX + 2], "  6 older ones with --json");
        assert_eq!(history.json()["attempts"].as_array().unwrap().len(), 46);
        history.lines.clear();
        assert_eq!(history.text(&shown), "home@nas: no attempt yet\n");
    }
}
