//! The Prometheus text file: times, never ages, so that an old file is not taken for a new state.
//!
//! The text format, version 0.0.4. All values are gauges. What is not known has no line.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use jiff::{SignedDuration, Timestamp};

use crate::copy_name::CopyName;
use crate::notify::Kind;

/// All that the file says.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// When `sprat run` ended last.
    pub last_run: Option<Timestamp>,
    /// The copies of the config.
    pub copies: Vec<CopyMetrics>,
    /// The containers of the config.
    pub containers: Vec<ContainerMetrics>,
    /// Kinds without an open event too.
    pub open_events: BTreeMap<Kind, u64>,
}

/// One copy.
#[derive(Debug, Clone)]
pub struct CopyMetrics {
    /// Which.
    pub copy: CopyName,
    /// Start of the last attempt that left a snapshot.
    pub last_success: Option<Timestamp>,
    /// Start of the last attempt that left a complete one.
    pub last_complete: Option<Timestamp>,
    /// Exit code of the last attempt.
    pub last_attempt_code: Option<u8>,
    /// Attempts since the last success that ended with other than 0, 3 and 130.
    pub failures_since_success: u64,
    /// How long without a success is overdue; `None`: never.
    pub alert_after: Option<SignedDuration>,
    /// Snapshots in the container.
    pub snapshots: Option<u64>,
    /// What the last success uploaded.
    pub sent_bytes: Option<u64>,
}

/// One container.
#[derive(Debug, Clone)]
pub struct ContainerMetrics {
    /// Its name in the config.
    pub container: String,
    /// Free in the volume, at the end of the last session.
    pub volume_free_bytes: Option<u64>,
    /// Free on the server, likewise.
    pub server_free_bytes: Option<u64>,
    /// When all data was last checked.
    pub check: Option<Timestamp>,
    /// The last drill.
    pub drill: Option<Timestamp>,
    /// Whether it passed.
    pub drill_passed: Option<bool>,
}

impl Metrics {
    /// The text of the file.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = Text::default();
        let last_run = self
            .last_run
            .map(|time| (String::new(), time.as_second().to_string()));
        text.gauge(
            "sprat_last_run_timestamp_seconds",
            "End of the last run",
            last_run,
        );
        self.copies_to(&mut text);
        self.containers_to(&mut text);
        let open = self
            .open_events
            .iter()
            .map(|(kind, count)| (labels(&[("kind", kind.name())]), count.to_string()));
        text.gauge("sprat_open_events", "Open events", open);
        text.0
    }

    fn copies_to(&self, text: &mut Text) {
        let mut gauge = |name: &str, help: &str, value: fn(&CopyMetrics) -> Option<String>| {
            text.gauge(
                name,
                help,
                self.copies.iter().filter_map(|copy| {
                    let CopyName { job, container } = &copy.copy;
                    Some((
                        labels(&[("job", job), ("container", container)]),
                        value(copy)?,
                    ))
                }),
            );
        };
        gauge(
            "sprat_last_success_timestamp_seconds",
            "Start of the last attempt that left a snapshot",
            |copy| copy.last_success.map(seconds),
        );
        gauge(
            "sprat_last_complete_timestamp_seconds",
            "Start of the last attempt that left a complete snapshot",
            |copy| copy.last_complete.map(seconds),
        );
        gauge(
            "sprat_last_attempt_code",
            "Exit code of the last attempt",
            |copy| copy.last_attempt_code.map(|code| code.to_string()),
        );
        gauge(
            "sprat_failures_since_success",
            "Failed attempts since the last success",
            |copy| Some(copy.failures_since_success.to_string()),
        );
        gauge(
            "sprat_alert_after_seconds",
            "Time without a success after which the copy is overdue",
            |copy| copy.alert_after.map(|after| after.as_secs().to_string()),
        );
        gauge("sprat_snapshots", "Snapshots in the container", |copy| {
            copy.snapshots.map(|count| count.to_string())
        });
        gauge(
            "sprat_sent_bytes",
            "Bytes that the last success uploaded",
            |copy| copy.sent_bytes.map(|bytes| bytes.to_string()),
        );
    }

    fn containers_to(&self, text: &mut Text) {
        let mut gauge = |name: &str, help: &str, value: fn(&ContainerMetrics) -> Option<String>| {
            text.gauge(
                name,
                help,
                self.containers.iter().filter_map(|container| {
                    Some((
                        labels(&[("container", &container.container)]),
                        value(container)?,
                    ))
                }),
            );
        };
        gauge(
            "sprat_volume_free_bytes",
            "Free bytes in the volume",
            |container| container.volume_free_bytes.map(|bytes| bytes.to_string()),
        );
        gauge(
            "sprat_server_free_bytes",
            "Free bytes on the server",
            |container| container.server_free_bytes.map(|bytes| bytes.to_string()),
        );
        gauge(
            "sprat_check_timestamp_seconds",
            "Last check of all data",
            |container| container.check.map(seconds),
        );
        gauge("sprat_drill_timestamp_seconds", "Last drill", |container| {
            container.drill.map(seconds)
        });
        gauge(
            "sprat_drill_passed",
            "Whether the last drill passed",
            |container| {
                container
                    .drill_passed
                    .map(|passed| u8::from(passed).to_string())
            },
        );
    }

    /// Writes the file: aside, then renamed, mode 0644.
    ///
    /// # Errors
    /// The folder is not there or can't be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        publish(path, self.text().as_bytes())
    }
}

/// Writes a file that everybody may read: whole or not at all.
pub(crate) fn publish(path: &Path, content: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut part = tempfile::NamedTempFile::new_in(folder)?;
    part.write_all(content)?;
    part.as_file()
        .set_permissions(Permissions::from_mode(0o644))?;
    part.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn seconds(time: Timestamp) -> String {
    time.as_second().to_string()
}

fn labels(labels: &[(&str, &str)]) -> String {
    let escape = |value: &str| {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"");
        value.replace('\n', "\\n")
    };
    let labels: Vec<_> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    format!("{{{}}}", labels.join(","))
}

#[derive(Default)]
struct Text(String);

impl Text {
    /// One metric with its samples, each its labels and its value.
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (String, String)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}.\n# TYPE {name} gauge");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "{name}{labels} {value}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use sprat_testkit::notice_servers::{PYTHON, python_module_missing};
    use sprat_testkit::requires;

    use super::*;

    fn time(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp::from_second(seconds).unwrap())
    }

    fn metrics() -> Metrics {
        Metrics {
            last_run: time(1_795_874_400),
            copies: vec![
                CopyMetrics {
                    copy: CopyName::new("home", "nas"),
                    last_success: time(1_795_874_000),
                    last_complete: time(1_795_774_000),
                    last_attempt_code: Some(3),
                    failures_since_success: 0,
                    alert_after: Some(SignedDuration::from_hours(72)),
                    snapshots: Some(14),
                    sent_bytes: Some(u64::MAX),
                },
                CopyMetrics {
                    copy: CopyName::new("odd \"name\" \\ \n", "nas"),
                    last_success: None,
                    last_complete: None,
                    last_attempt_code: None,
                    failures_since_success: 2,
                    alert_after: None,
                    snapshots: None,
                    sent_bytes: None,
                },
            ],
            containers: vec![ContainerMetrics {
                container: "nas".to_owned(),
                volume_free_bytes: Some(1),
                server_free_bytes: Some(2),
                check: time(3),
                drill: time(4),
                drill_passed: Some(true),
            }],
            open_events: BTreeMap::from([(Kind::Failure, 0), (Kind::Overdue, 2)]),
        }
    }

    /// Prints what prometheus_client makes of a file: a line for each sample.
    const PARSER: &str = r#"
import sys
from prometheus_client.parser import text_string_to_metric_families as parse
for family in parse(open(sys.argv[1]).read()):
    for sample in family.samples:
        labels = ",".join(f"{k}={v!r}" for k, v in sorted(sample.labels.items()))
        print(family.type, sample.name, labels, f"{sample.value:.0f}")
"#;

    #[test]
    fn a_prometheus_parser_reads_every_metric() {
        requires!(python_module_missing("prometheus_client.parser"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprat.prom");
        metrics().write(&path).unwrap();
        let parsed = Command::new(PYTHON)
            .args(["-c", PARSER])
            .arg(&path)
            .output()
            .unwrap();
        assert!(parsed.status.success(), "{parsed:?}");
        let home = "container='nas',job='home'";
        let odd = r#"container='nas',job='odd "name" \\ \n'"#;
        let expected = [
            "sprat_last_run_timestamp_seconds  1795874400".to_owned(),
            format!("sprat_last_success_timestamp_seconds {home} 1795874000"),
            format!("sprat_last_complete_timestamp_seconds {home} 1795774000"),
            format!("sprat_last_attempt_code {home} 3"),
            format!("sprat_failures_since_success {home} 0"),
            format!("sprat_failures_since_success {odd} 2"),
            format!("sprat_alert_after_seconds {home} 259200"),
            format!("sprat_snapshots {home} 14"),
            format!("sprat_sent_bytes {home} 18446744073709551616"),
            "sprat_volume_free_bytes container='nas' 1".to_owned(),
            "sprat_server_free_bytes container='nas' 2".to_owned(),
            "sprat_check_timestamp_seconds container='nas' 3".to_owned(),
            "sprat_drill_timestamp_seconds container='nas' 4".to_owned(),
            "sprat_drill_passed container='nas' 1".to_owned(),
            "sprat_open_events kind='failure' 0".to_owned(),
            "sprat_open_events kind='overdue' 2".to_owned(),
        ];
        let parsed = String::from_utf8(parsed.stdout).unwrap();
        let lines: Vec<_> = parsed
            .lines()
            .map(|line| line.strip_prefix("gauge ").unwrap())
            .collect();
        assert_eq!(lines, expected);
    }

    #[test]
    fn file_is_replaced_whole_and_everybody_can_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sprat.prom");
        metrics().write(&path).unwrap();
        Metrics::default().write(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o644);
        // Nothing else is left there.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(
            metrics()
                .write(&folder.path().join("none/sprat.prom"))
                .is_err()
        );
    }
}
