//! Runs the administrator's program when what is wrong has changed. Only `tidy` does that, never `serve`.

use std::io::{self, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::disk::{self, bad};
use crate::root::Root;
use crate::status::Status;

/// A program that lasts longer is killed.
const TIME_MAX: Duration = Duration::from_secs(60);
const NAME: &str = "notified";

/// The program gets what `status --json` prints. If it fails, the next `tidy` runs it again.
pub fn run(root: &Root) -> io::Result<()> {
    let Some(program) = &root.policy.notify else {
        return Ok(());
    };
    let status = Status::of(root)?;
    let problems = status.problems().join("\n");
    let before = disk::text_in(&root.agent, NAME, 1 << 20)?.unwrap_or_default();
    if before == problems {
        return Ok(());
    }
    let failed = |what: &str| bad(format!("notify: {}: {what}", program.display()));
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| failed(&error.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        // It need not read it.
        match input.write_all(status.json().as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    let until = Instant::now() + TIME_MAX;
    let ended = loop {
        match child.try_wait()? {
            Some(ended) => break ended,
            None if Instant::now() > until => {
                child.kill()?;
                break child.wait()?;
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    if !ended.success() {
        return Err(failed(&ended.to_string()));
    }
    disk::replace_in(&root.agent, NAME, problems.as_bytes())
}
