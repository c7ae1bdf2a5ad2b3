//! Runs a program of the user: with a time limit, in a process group of its own, without a shell.

pub(crate) mod running;
pub(crate) mod start;
pub(crate) mod tail;

use std::ffi::OsStr;
use std::io::{self, Seek, SeekFrom, Write};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::MemfdFlags;

use running::{End, Outputs, Running};

/// How long a program has between SIGTERM and SIGKILL.
const TERMINATION: Duration = Duration::from_secs(1);

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// `None`: it was killed at the limit.
    pub status: Option<ExitStatus>,
    /// The last 64 KiB of its standard output.
    pub stdout: Vec<u8>,
    /// The last 64 KiB of its standard error.
    pub stderr: Vec<u8>,
}

/// Runs `words` with `input` on its standard input, in `/`, with nothing in its environment but `PATH`,
/// `HOME` and `LANG`. At the limit its process group gets SIGTERM, then SIGKILL. Only the exit of the
/// process counts, not whether a child of it keeps its output open.
///
/// # Errors
/// The program can't be started, or others than root can write to it.
pub fn run(words: &[impl AsRef<OsStr>], input: &[u8], limit: Duration) -> io::Result<Ended> {
    let words: Vec<_> = words.iter().map(|word| word.as_ref().to_owned()).collect();
    let input = in_memory(input)?;
    let mut running = start::prepare(&words, None, &[])
        .and_then(|command| Running::start(command, input, Outputs::Apart))
        .map_err(|why| match std::error::Error::source(&why) {
            Some(source) => io::Error::other(format!("{why}: {source}")),
            None => io::Error::other(why),
        })?;
    let status = match running.wait(limit, None, TERMINATION)? {
        End::Exited(status) => Some(status),
        End::TimedOut | End::Interrupted => None,
    };
    let mut outputs = running.into_outputs();
    let mut next = || outputs.next().unwrap_or_default();
    Ok(Ended {
        status,
        stdout: next(),
        stderr: next(),
    })
}

/// A file in memory, so that nobody has to write while the program reads.
fn in_memory(input: &[u8]) -> io::Result<Stdio> {
    let file = rustix::fs::memfd_create("sprat-input", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(file);
    file.write_all(input)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::start::PATH;
    use super::tail::TAIL_BYTES_MAX;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn shell(script: &str, limit: Duration) -> Ended {
        run(&["sh", "-c", script], b"input", limit).unwrap()
    }

    #[test]
    fn input_environment_and_status_arrive() {
        let ended = shell("cat; env | sort; pwd; echo bad >&2; exit 3", LIMIT);
        assert_eq!(ended.status.unwrap().code(), Some(3));
        let text = String::from_utf8(ended.stdout).unwrap();
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("PWD="))
            .collect();
        assert_eq!(lines[0].split('=').next(), Some("inputHOME"));
        assert_eq!(lines[1..], ["LANG=C.UTF-8", &format!("PATH={PATH}"), "/"]);
        assert_eq!(ended.stderr, b"bad\n");
    }

    #[test]
    fn program_that_hangs_is_killed_with_its_children() {
        let begun = Instant::now();
        let ended = shell(
            "trap '' TERM; sleep 1000 & wait; sleep 1000",
            Duration::from_millis(100),
        );
        assert!(ended.status.is_none());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_child_that_keeps_the_output_open_is_not_waited_for() {
        let begun = Instant::now();
        let ended = shell("sleep 20 & exit 0", LIMIT);
        assert!(ended.status.unwrap().success());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn only_the_end_of_much_output_is_kept() {
        let ended = shell("yes | head -c 1000000; echo end", LIMIT);
        assert_eq!(ended.stdout.len(), TAIL_BYTES_MAX);
        assert!(ended.stdout.ends_with(b"end\n"));
    }

    #[test]
    fn program_that_is_not_there_is_an_error() {
        assert!(run(&["/no/such/program"], b"", LIMIT).is_err());
        assert!(run(&[""; 0], b"", LIMIT).is_err());
    }
}
