//! What people read of `sprat copy`, and the JSON of its result.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use sprat_session::address::Target;
use sprat_session::copy::{CopyPhase, CopyProgress, CopyReport, CopyStep};
use sprat_session::progress::{bytes_per_s, time_left};
use sprat_session::text;

/// What a copy did.
#[derive(Debug)]
pub struct CopyDone<'a> {
    /// Where the container was.
    pub source: &'a Target,
    /// Where the copy is.
    pub destination: &'a Target,
    /// What `copy` returned.
    pub report: &'a CopyReport,
    /// The destination has a volume key of its own.
    pub new_key: bool,
    /// The key file is still the one of the source, and the config would look for it elsewhere.
    pub old_key_file: Option<&'a Path>,
}

impl CopyDone<'_> {
    /// The result as text, and what is left to do.
    #[must_use]
    pub fn text(&self) -> String {
        let Self {
            source: from,
            destination: to,
            report,
            new_key,
            old_key_file,
        } = *self;
        let verb = if report.source_removed {
            "moved"
        } else {
            "copied"
        };
        let mut text = format!("{verb} {from} to {to}\n");
        match &report.figures {
            Some(figures) => text.push_str(&format!(
                "{} long, {} written, {} read back and equal\n",
                text::bytes(report.container_bytes),
                text::bytes(figures.written_bytes),
                text::bytes(figures.verified_bytes),
            )),
            None => text.push_str("an earlier run had copied the container and read it back\n"),
        }
        if !report.source_found {
            text.push_str(&format!(
            "{from} is not there: an earlier run removed it, or its disk is not mounted. This machine \
             keeps its notes about {from}\n"
        ));
        }
        if new_key {
            text.push_str(&format!(
            "{to} has a new volume key. It opens with the key that was used here and with the \
             recovery key of the sheet that was shown when the copy began, and with no other key of \
             {from}: add others with\n  sprat key add {to}\n\
             Without that sheet, make another one with\n  sprat key add {to} --new-recovery\n"
        ));
        }
        let gone = report.source_removed || !report.source_found;
        if gone && !new_key {
            text.push_str(&format!(
            "The recovery sheet shows the old location. Print a new one:\n  sprat key sheet {to}\n"
        ));
        }
        if gone {
            text.push_str(&format!("In the config, write\n  target = \"{to}\"\n"));
        }
        if let Some(path) = old_key_file {
            text.push_str(&format!(
                "The key file is {}: give it with --key-file, or set key_file in the config\n",
                path.display()
            ));
        }
        text
    }

    /// The result as JSON.
    #[must_use]
    pub fn json(&self, took: Duration) -> Value {
        let report = self.report;
        let figures = report.figures;
        json!({
            "source": self.source.to_string(),
            "destination": self.destination.to_string(),
            "uuid": report.pins.uuid,
            "fingerprint": report.pins.fingerprint(),
            "container_bytes": report.container_bytes,
            "resumed_bytes": report.resumed_bytes,
            "read_bytes": figures.map_or(0, |figures| figures.read_bytes),
            "written_bytes": figures.map_or(0, |figures| figures.written_bytes),
            "verified_bytes": figures.map_or(0, |figures| figures.verified_bytes),
            "holes_by": report.holes_by,
            "new_key": self.new_key,
            "source_removed": report.source_removed,
            "source_found": report.source_found,
            "seconds": took.as_secs_f64(),
        })
    }
}

/// The name of a phase in JSON, and its text.
#[must_use]
pub fn phase_text(phase: CopyPhase) -> (&'static str, &'static str) {
    match phase {
        CopyPhase::Opening => ("opening", "acquiring both locks"),
        CopyPhase::Mapping => ("mapping", "finding the data in the source"),
        CopyPhase::Copying => ("copying", "copying"),
        CopyPhase::Verifying => ("verifying", "reading back"),
        CopyPhase::Publishing => ("publishing", "renaming the copy to its final name"),
        CopyPhase::Removing => ("removing", "removing the source"),
    }
}

/// The progress of the running step, which took `took` so far: as text, and as JSON.
#[must_use]
pub fn progress(progress: &CopyProgress, took: Duration) -> (String, Value) {
    let rate = bytes_per_s(progress.done_bytes, took);
    let left_bytes = progress.total_bytes.saturating_sub(progress.done_bytes);
    let left = time_left(left_bytes, rate);
    let json = json!({
        "phase": match progress.step {
            CopyStep::Copying => "copying",
            CopyStep::Verifying => "verifying",
        },
        "done_bytes": progress.done_bytes,
        "total_bytes": progress.total_bytes,
        "read_bytes": progress.read_bytes,
        "written_bytes": progress.written_bytes,
        "verified_bytes": progress.verified_bytes,
        "bytes_per_s": rate,
        "seconds_left": left.map(|left| left.as_secs()),
    });
    (progress_text(progress, rate, left), json)
}

fn progress_text(progress: &CopyProgress, rate: Option<u64>, left: Option<Duration>) -> String {
    let doing = match progress.step {
        CopyStep::Copying => "copying",
        CopyStep::Verifying => "reading back",
    };
    let percent = progress.done_bytes * 100 / progress.total_bytes.max(1);
    let mut parts = vec![
        format!("{doing}, {percent}%"),
        format!(
            "{} of {}",
            text::bytes(progress.done_bytes),
            text::bytes(progress.total_bytes)
        ),
    ];
    if progress.step == CopyStep::Copying && progress.written_bytes < progress.done_bytes / 2 {
        parts.push(format!("{} sent", text::bytes(progress.written_bytes)));
    }
    parts.extend(rate.map(|rate| format!("{}/s", text::bytes(rate))));
    parts.extend(left.map(|left| format!("{} left", text::duration(left))));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_shows_rate_and_time_left_of_the_step() {
        let progress = CopyProgress {
            step: CopyStep::Copying,
            done_bytes: 300 << 20,
            total_bytes: 1 << 30,
            read_bytes: 300 << 20,
            written_bytes: 10 << 20,
            verified_bytes: 0,
        };
        insta::assert_snapshot!(
            progress_text(&progress, Some(10 << 20), Some(Duration::from_secs(72))),
            @"copying, 29%, 300 MiB of 1.0 GiB, 10.0 MiB sent, 10.0 MiB/s, 1 min 12 s left"
        );
    }
}
