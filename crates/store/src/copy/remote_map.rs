//! Asks the server, with a shell there, where a file holds data: SFTP has no request for that.
//!
//! The login shell only gets `sh -s`; the script comes on its standard input. For
//! `lseek(SEEK_DATA)` it needs Perl or Python there. The answer can't be trusted. But a map of
//! another file, or none, only costs time, because the caller compares length and time.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::DataMap;
use crate::text::printable;

/// A line is two numbers.
const LINE_BYTES_MAX: u64 = 100;
/// The answer for a file with millions of extents; more is not read.
const ANSWER_BYTES_MAX: u64 = 1 << 30;

/// The server's shell did not report where the data are.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum RemoteMapError {
    /// The program could not be run.
    #[error("run {program}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    /// There is no shell, or no Perl and no Python, or no answer in time.
    #[error("the server's shell gave no map: {reason}")]
    NoAnswer { reason: String },
    /// The answer is about another file.
    #[error("the server's shell sees another file ({found} bytes, changed at {modified_s})")]
    OtherFile { found: u64, modified_s: u64 },
    /// The answer is not one that the script prints.
    #[error("the server's shell gave an invalid answer: {line:?}")]
    Nonsense { line: String },
}

/// What the file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub len: u64,
    pub modified_s: Option<u64>,
}

const PERL: &str = r#"
open(my $f, "<", $ARGV[0]) or exit 3; my @s = stat($f);
print "file $s[7] $s[9]\n"; my $at = 0;
while ($at < $s[7]) {
  my $data = sysseek($f, $at, 3);
  if (!defined $data) { $! + 0 == 6 or exit 4; last; }
  my $hole = sysseek($f, $data + 0, 4); defined $hole or exit 5;
  print $data + 0, " ", $hole + 0, "\n"; $at = $hole + 0;
}
print "end\n";
"#;

const PYTHON: &str = r#"
import os, sys
f = os.open(sys.argv[1], os.O_RDONLY); s = os.fstat(f)
print("file %d %d" % (s.st_size, int(s.st_mtime))); at = 0
while at < s.st_size:
    try: data = os.lseek(f, at, 3)
    except OSError as e:
        if e.errno == 6: break
        raise
    at = os.lseek(f, data, 4); print("%d %d" % (data, at))
print("end")
"#;

/// Runs `argv`, whose last words make the server's login shell run `sh -s`. The script there
/// reports where the file at `path` (absolute, or relative to the login's home folder) holds data.
/// The file must be `len` bytes long and last changed at `modified_s`, so that it is the file that
/// SFTP sees. Gives up after `timeout`.
pub fn read_remote_map(
    argv: &[OsString],
    path: &str,
    len: u64,
    modified_s: Option<u64>,
    timeout: Duration,
) -> Result<DataMap, RemoteMapError> {
    let program = argv.first().cloned().unwrap_or_default();
    let run = |source| RemoteMapError::Run {
        program: printable(program.as_encoded_bytes()),
        source,
    };
    let mut child = Command::new(&program)
        .args(argv.get(1..).unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(run)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let script = script(path);
    let (answer_to, answer) = mpsc::channel();
    let expected = Expected { len, modified_s };
    let started = std::thread::Builder::new().spawn(move || {
        // A shell that ends early closes the pipe; its answer shows that.
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(script.as_bytes());
        }
        let map = stdout.map(|stdout| parse(BufReader::new(stdout), expected));
        let _ = answer_to.send(map);
    });
    // Without the thread nothing is read, and its ends of the pipes are closed.
    let heard = match started {
        Ok(_) => answer.recv_timeout(timeout),
        Err(source) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(run(source));
        }
    };
    // It may be in the middle of an answer that is not needed.
    let _ = child.kill();
    let _ = child.wait();
    match heard {
        Ok(Some(map)) => map,
        Ok(None) | Err(_) => Err(RemoteMapError::NoAnswer {
            reason: format!("no answer within {} s", timeout.as_secs()),
        }),
    }
}

fn script(path: &str) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    format!(
        "LC_ALL=C; export LC_ALL\nf={}\ncase $f in /*) ;; *) f=./$f ;; esac\n\
         [ -f \"$f\" ] && [ ! -h \"$f\" ] || exit 3\n\
         if command -v perl >/dev/null 2>&1; then exec perl -e {} \"$f\" </dev/null\n\
         elif command -v python3 >/dev/null 2>&1; then exec python3 -c {} \"$f\" </dev/null\nfi\n",
        quoted(path),
        quoted(PERL),
        quoted(PYTHON)
    )
}

fn parse(answer: impl BufRead, expected: Expected) -> Result<DataMap, RemoteMapError> {
    let mut answer = answer.take(ANSWER_BYTES_MAX);
    let mut line = String::new();
    let mut next = |line: &mut String| -> Result<bool, RemoteMapError> {
        line.clear();
        let read = (&mut answer).take(LINE_BYTES_MAX).read_line(line);
        let read = read.map_err(|error| RemoteMapError::NoAnswer {
            reason: error.to_string(),
        })?;
        Ok(read > 0)
    };
    let nonsense = |line: &str| RemoteMapError::Nonsense {
        line: printable(line.as_bytes()),
    };
    if !next(&mut line)? {
        return Err(RemoteMapError::NoAnswer {
            reason: "no shell, or neither perl nor python3".to_owned(),
        });
    }
    let told = line.strip_prefix("file ").and_then(two_numbers);
    let (found, modified_s) = told.ok_or_else(|| nonsense(&line))?;
    if found != expected.len || expected.modified_s.is_some_and(|then| then != modified_s) {
        return Err(RemoteMapError::OtherFile { found, modified_s });
    }
    let mut map = DataMap::empty(expected.len);
    let mut last = 0;
    while next(&mut line)? {
        if line == "end\n" {
            return Ok(map);
        }
        match two_numbers(&line) {
            Some((start, end)) if start >= last && end > start && end <= expected.len => {
                map.add(start..end);
                last = end;
            }
            _ => return Err(nonsense(&line)),
        }
    }
    Err(RemoteMapError::NoAnswer {
        reason: "the answer is incomplete".to_owned(),
    })
}

fn two_numbers(text: &str) -> Option<(u64, u64)> {
    let (first, second) = text.strip_suffix('\n')?.split_once(' ')?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<u64, String> {
        let expected = Expected {
            len: 1 << 30,
            modified_s: Some(5),
        };
        parse(text.as_bytes(), expected)
            .map(|map| map.data_bytes())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_complete_answer_about_the_same_file_counts() {
        assert_eq!(parsed("file 1073741824 5\nend\n"), Ok(0));
        assert_eq!(parsed("file 1073741824 5\n0 65536\nend\n"), Ok(65536));
        for bad in [
            "",
            "Welcome to the server!\n",
            "file 1073741824 6\nend\n",
            "file 1073741823 5\nend\n",
            "file 1073741824 5\n0 65536\n",
            "file 1073741824 5\n5 5\nend\n",
            "file 1073741824 5\n10 20\n15 30\nend\n",
            "file 1073741824 5\n0 1073741825\nend\n",
            "file 1073741824 5\n0 99999999999999999999999999999\nend\n",
        ] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
        assert!(parsed(&format!("file {}", "9".repeat(1 << 20))).is_err());
    }

    #[test]
    fn shell_reports_the_holes_of_a_file_with_an_odd_name() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it's $(odd) \"x\".luks");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&[1; 4096], 8 << 20).unwrap();
        file.sync_all().unwrap();
        let modified_s = u64::try_from(file.metadata().unwrap().mtime()).unwrap();
        let ask = |len| {
            let shell = ["sh".into(), "-s".into()];
            let path = path.to_str().unwrap();
            read_remote_map(&shell, path, len, Some(modified_s), Duration::from_secs(60))
        };
        let map = ask(64 << 20).unwrap();
        assert!(map.holds_any(8 << 20..(8 << 20) + 1));
        assert!(map.data_bytes() <= 1 << 20, "{}", map.data_bytes());
        assert!(matches!(
            ask(65 << 20),
            Err(RemoteMapError::OtherFile { .. })
        ));
    }
}
