//! `sprat copy`: brings a container to another store, and with `--move` away from its old one.

use std::time::{Duration, Instant};

use serde_json::json;
use sprat_store::StoreError;
use sprat_store::copy::{CopyProgress, CopyStep};

use super::context::{Context, Resolved};
use crate::args::CopyArgs;
use crate::output::{Reporter, exit_json, text};
use crate::secrets::SecretSource;
use crate::session::copy::{CopyObserver, CopyOptions, CopyPhase, CopyReport, copy};
use crate::session::{Access, PinPolicy};
use crate::{Exit, Failure, reach};

pub(super) fn run(context: &Context, args: &CopyArgs) -> Result<Exit, Failure> {
    let source = context.resolve(&args.source)?;
    let destination = context.resolve(&args.destination)?;
    let source_options = context.session_options(&source, Access::ReadOnly)?;
    // A copy needs no key: nobody is asked for one, and one that is only found comes near no header that
    // is not known.
    let source_key = if context.named_source()?.is_some() {
        Some(context.fetch(&source.secret)?)
    } else if source.secret == SecretSource::Terminal
        || matches!(source_options.pins, PinPolicy::TrustOnce)
    {
        None
    } else {
        context.fetch(&source.secret).ok()
    };
    let options = CopyOptions {
        source_key,
        source: source_options,
        destination: context.session_options(&destination, Access::ReadOnly)?,
        remove_source: args.remove_source,
    };
    let begun = Instant::now();
    let mut shown = Shown {
        reporter: Reporter::new(context.output, ""),
        step_begun: Instant::now(),
        step: None,
    };
    let report = copy(&options, &mut shown, &context.interrupt);
    shown.reporter.clear();
    let report = report.map_err(|mut failure| {
        // Where the copy was to go, a missing folder is no missing container.
        if failure.exit == Exit::NoContainer && has_no_folder(&destination) {
            failure.exit = Exit::Failed;
        }
        failure
    })?;
    let text = told(&source, &destination, &report);
    let figures = report.figures;
    let json = json!({
        "command": "copy",
        "result": exit_json(Exit::Done),
        "source": source.target.to_string(),
        "destination": destination.target.to_string(),
        "uuid": report.pins.uuid,
        "fingerprint": report.pins.fingerprint(),
        "container_bytes": report.container_bytes,
        "resumed_bytes": report.resumed_bytes,
        "read_bytes": figures.map_or(0, |figures| figures.read_bytes),
        "written_bytes": figures.map_or(0, |figures| figures.written_bytes),
        "verified_bytes": figures.map_or(0, |figures| figures.verified_bytes),
        "holes_by": report.holes_by,
        "source_removed": report.source_removed,
        "source_found": report.source_found,
        "seconds": begun.elapsed().as_secs_f64(),
    });
    context.output.result(&text, &json)?;
    Ok(Exit::Done)
}

fn has_no_folder(resolved: &Resolved) -> bool {
    matches!(
        reach::connect(&resolved.target, &resolved.ssh_command),
        Err(StoreError::NotFound { .. })
    )
}

/// The result for people, and what is left for them to do.
fn told(source: &Resolved, destination: &Resolved, report: &CopyReport) -> String {
    let (from, to) = (&source.target, &destination.target);
    let verb = if report.source_removed {
        "moved"
    } else {
        "copied"
    };
    let mut text = format!("{verb} {from} to {to}\n");
    match &report.figures {
        Some(figures) => text.push_str(&format!(
            "{} long, {} written, {} read back and found right\n",
            text::bytes(report.container_bytes),
            text::bytes(figures.written_bytes),
            text::bytes(figures.verified_bytes),
        )),
        None => text.push_str("an earlier run had copied it and read it back\n"),
    }
    if !report.source_found {
        text.push_str(&format!(
            "{from} is not there: it was removed before, or its disk isn't mounted. What this \
             machine knows of it is kept\n"
        ));
    }
    if report.source_removed || !report.source_found {
        text.push_str(&format!(
            "The recovery sheet names the old place: print a new one with\n  sprat key sheet {to}\n\
             In the config, put\n  target = \"{to}\"\n"
        ));
    }
    if source.default_key_file != destination.default_key_file
        && let (Some(old), Some(new)) = (&source.default_key_file, &destination.default_key_file)
        && old.exists()
        && !new.exists()
    {
        text.push_str(&format!(
            "The key file is {}: name it with --key-file, or in the config\n",
            old.display()
        ));
    }
    text
}

/// What the user sees of a copy.
struct Shown {
    reporter: Reporter,
    step_begun: Instant,
    step: Option<CopyStep>,
}

impl CopyObserver for Shown {
    fn phase(&mut self, phase: CopyPhase) {
        let (name, line) = phase_text(phase);
        self.reporter.step(line, &json!({ "phase": name }));
    }

    fn progress(&mut self, progress: &CopyProgress) {
        if self.step.replace(progress.step) != Some(progress.step) {
            self.step_begun = Instant::now();
        }
        let rate = rate(progress.done_bytes, self.step_begun.elapsed());
        let left = time_left(progress, rate);
        let event = json!({ "progress": {
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
        }});
        let line = progress_text(progress, rate, left);
        self.reporter.other_progress(&line, &event);
    }

    fn tell(&mut self, text: &str, matters: bool) {
        self.reporter.tell(text, matters);
    }
}

fn phase_text(phase: CopyPhase) -> (&'static str, &'static str) {
    match phase {
        CopyPhase::Opening => ("opening", "taking both locks"),
        CopyPhase::Mapping => ("mapping", "finding out where the source holds data"),
        CopyPhase::Copying => ("copying", "copying"),
        CopyPhase::Verifying => ("verifying", "reading back"),
        CopyPhase::Publishing => ("publishing", "giving the copy its name"),
        CopyPhase::Removing => ("removing", "removing the source"),
    }
}

/// Bytes per second; `None` before there is one to speak of.
fn rate(done_bytes: u64, elapsed: Duration) -> Option<u64> {
    let millis = u64::try_from(elapsed.as_millis())
        .ok()
        .filter(|ms| *ms >= 500)?;
    Some(u64::try_from(u128::from(done_bytes) * 1000 / u128::from(millis)).unwrap_or(u64::MAX))
}

fn time_left(progress: &CopyProgress, rate: Option<u64>) -> Option<Duration> {
    let left = progress.total_bytes.saturating_sub(progress.done_bytes);
    Some(Duration::from_secs(left / rate.filter(|rate| *rate > 0)?))
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
    fn progress_tells_rate_and_time_left_of_the_step() {
        let progress = CopyProgress {
            step: CopyStep::Copying,
            done_bytes: 300 << 20,
            total_bytes: 1 << 30,
            read_bytes: 300 << 20,
            written_bytes: 10 << 20,
            verified_bytes: 0,
        };
        let rate = rate(progress.done_bytes, Duration::from_secs(30));
        let left = time_left(&progress, rate);
        insta::assert_snapshot!(
            progress_text(&progress, rate, left),
            @"copying, 29%, 300 MiB of 1.0 GiB, 10.0 MiB sent, 10.0 MiB/s, 1 min 12 s left"
        );
        assert_eq!(super::rate(5, Duration::from_millis(100)), None);
    }
}
