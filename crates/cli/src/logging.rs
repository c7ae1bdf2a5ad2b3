//! The log for finding a fault. `SPRAT_LOG` names the level. The log goes to stderr, and from there to
//! journald under systemd. Without the variable nothing is logged.
//!
//! Every process of a session inherits the variable and logs on its own. Secrets are logged at no level.
//! Names of backed-up files are logged at `debug` and `trace` only.

use std::io::{self, Write};

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::Failure;

/// Starts the log at `level`, as `SPRAT_LOG` gives it. Each span is logged when it closes, with the time that
/// it took.
///
/// # Errors
/// What is no level.
pub(crate) fn begin(level: Option<&str>) -> Result<(), Failure> {
    let Some(level) = level.filter(|level| !level.is_empty()) else {
        return Ok(());
    };
    let level: LevelFilter = level.parse().map_err(|_| {
        Failure::usage(format!("SPRAT_LOG={level:?} is not a log level"))
            .with_hint("nothing was started. Use error, warn, info, debug or trace")
    })?;
    // A second call in one process (tests) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_span_events(FmtSpan::CLOSE)
        .with_ansi(false)
        .with_target(false)
        .with_writer(|| Log)
        .try_init();
    Ok(())
}

/// Writes to stderr unless that would block: the volume process must never wait for a reader of its log.
/// A line that finds the pipe full is dropped.
struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        sprat_session::interrupt::write_if_ready(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
