//! Punches holes in a file on a server, with a shell there if the account has one.
//!
//! SFTP has no request for that. `sh` gets the script below over its standard input, then one line
//! for each range. It answers in lines that begin with a random word, so that other output of the
//! login is recognised as such. Before every hole it checks that the session's own lock, identified
//! by its token, still exists beside the file, and that no later one follows. So a server that
//! carries out requests of a lost connection late does nothing once another session has begun. The
//! name alone would not be enough: if all leases were removed, numbers start again.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use super::let_inherit;
use super::program::Program;
use super::wire::{Dial, EndingKind, WireEnd};
use crate::text::printable;
use crate::token::Token;
use crate::{FileName, StoreError};

/// Ranges between two answers.
const BATCH_RANGES: usize = 256;
/// Batches that are sent ahead of their answers: enough to hide the round trip, few enough that
/// after a lost connection the server has little left to do.
const BATCHES_AHEAD: usize = 6;
/// A longer line is not an answer and is cut.
const LINE_BYTES_MAX: usize = 1000;
/// Lines of other programs that are skipped while waiting for one answer.
const FOREIGN_LINES_MAX: usize = 10_000;

/// A lock as a helper on the server sees it: `lock` exists and contains `token`, and `next`, the
/// name by which another session would take over, does not exist.
#[derive(Debug, Clone)]
pub struct Fence {
    /// The lock file's name.
    pub lock: FileName,
    /// The next lock file's name.
    pub next: FileName,
    /// A word in the lock file that no other program could know or have written.
    pub token: String,
}

/// How to reach a shell on the server.
#[derive(Debug)]
pub struct PuncherOptions {
    /// Program and arguments that provide a shell on their standard input and output. See
    /// [`SshTarget::shell_argv`](crate::SshTarget::shell_argv).
    pub program: Vec<OsString>,
    /// The server's name, for messages.
    pub host: String,
    /// The folder's path in SFTP: absolute, or relative to the account's home.
    pub folder: String,
    /// The file in it.
    pub file: FileName,
    /// Proves that the shell sees the same folder, and that the file is still ours.
    pub fence: Fence,
    /// Descriptors that stay open as long as the program runs (the write journal's flock).
    pub inherit_fds: Vec<OwnedFd>,
    /// How long one answer may take.
    pub answer_timeout: Duration,
}

/// A shell on the server that punches holes into one file. Dropping it ends the shell.
pub struct Puncher {
    object: String,
    word: String,
    writer: Option<Box<dyn Write + Send>>,
    lines: Receiver<String>,
    end: Box<dyn WireEnd>,
    answer_timeout: Duration,
    /// What the server last printed that was not an answer.
    heard: Vec<String>,
    _inherit_fds: Vec<OwnedFd>,
}

impl Puncher {
    /// Starts the shell and verifies that it sees the same file, not a symbolic link, and has a
    /// `fallocate` that can punch holes.
    ///
    /// # Errors
    ///
    /// `Unsupported`, with the reason, if this is not possible: no shell, no fallocate, or one that
    /// can only allocate (BusyBox).
    pub fn start(options: PuncherOptions) -> Result<Self, StoreError> {
        let_inherit(&options.inherit_fds, &options.host)?;
        let hold_fds = !options.inherit_fds.is_empty();
        let program = Program::new(options.program.clone(), &options.host, hold_fds);
        let wire = program.dial()?;
        let (sender, lines) = mpsc::sync_channel(64);
        let reader = wire.reader;
        let object = format!(
            "{}:{}/{}",
            printable(options.host.as_bytes()),
            printable(options.folder.as_bytes()),
            options.file
        );
        std::thread::Builder::new()
            .name("punch-answers".to_owned())
            .spawn(move || read_lines(reader, &sender))
            .map_err(|source| StoreError::Io {
                op: "punch",
                object: object.clone(),
                source,
            })?;
        let mut puncher = Self {
            object,
            word: random_word(),
            writer: Some(wire.writer),
            lines,
            end: wire.end,
            answer_timeout: options.answer_timeout,
            heard: Vec::new(),
            _inherit_fds: options.inherit_fds,
        };
        let script = script(
            &puncher.word,
            &options.folder,
            &options.file,
            &options.fence,
        );
        let ready = puncher.send(&script).and_then(|()| puncher.answer());
        match ready {
            Ok(answer) if answer == "ready" => Ok(puncher),
            Ok(answer) => Err(puncher.refused(&answer)),
            // The account's login ended, or the program is not a shell. Both happened before it was
            // asked for anything.
            Err(StoreError::Disconnected { reason, .. }) => match puncher.ending().0 {
                EndingKind::Lost | EndingKind::Protocol => {
                    Err(puncher.unsupported(&format!("the account gives no shell ({reason})")))
                }
                _ => Err(StoreError::Unreachable {
                    host: printable(options.host.as_bytes()),
                    reason,
                }),
            },
            Err(other) => Err(other),
        }
    }

    /// Punches ranges of the file, each of which then reads as zeros; not durable yet.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the server's file system can't; then nothing has changed. After
    /// `Disconnected` it is unknown what was done, and some of it may still be done later.
    pub fn punch(&mut self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        let mut owed = 0;
        for batch in ranges.chunks(BATCH_RANGES) {
            let mut text = String::new();
            for range in batch {
                let _ = writeln!(text, "{} {}", range.start, range.end - range.start);
            }
            text.push_str("tell -\n");
            self.send(&text)?;
            owed += 1;
            if owed > BATCHES_AHEAD {
                self.wait_for("told")?;
                owed -= 1;
            }
        }
        for _ in 0..owed {
            self.wait_for("told")?;
        }
        Ok(())
    }

    /// Bytes that the file uses on the server's disk, as `du` reports them there.
    pub fn allocated_bytes(&mut self) -> Result<u64, StoreError> {
        self.send("size -\n")?;
        let answer = self.wait_for("size")?;
        let kib: Result<u64, _> = answer.parse();
        kib.ok()
            .and_then(|kib| kib.checked_mul(1024))
            .ok_or_else(|| StoreError::Protocol {
                op: "measure",
                object: self.object.clone(),
                reason: format!("du printed {:?}", printable(answer.as_bytes())),
            })
    }

    /// Waits for an answer that starts with `expected`, and returns the rest of it.
    fn wait_for(&mut self, expected: &str) -> Result<String, StoreError> {
        let answer = self.answer()?;
        match answer.split_once(' ') {
            Some((first, rest)) if first == expected => Ok(rest.to_owned()),
            _ => Err(self.refused(&answer)),
        }
    }

    fn send(&mut self, text: &str) -> Result<(), StoreError> {
        let written = match &mut self.writer {
            Some(writer) => writer
                .write_all(text.as_bytes())
                .and_then(|()| writer.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        match written {
            Ok(()) => Ok(()),
            // The reason may have been printed already; otherwise the end shows it.
            Err(_) => match self.answer() {
                Ok(answer) => Err(self.refused(&answer)),
                Err(error) => Err(error),
            },
        }
    }

    /// Returns the next line that is an answer, without its first word.
    fn answer(&mut self) -> Result<String, StoreError> {
        for _ in 0..FOREIGN_LINES_MAX {
            let line = match self.lines.recv_timeout(self.answer_timeout) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    self.end.cut();
                    return Err(self.lost("no answer in time".to_owned()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let reason = self.ending().1;
                    return Err(self.lost(reason));
                }
            };
            match line.strip_prefix(&self.word) {
                Some(answer) => return Ok(answer.trim().to_owned()),
                None if self.heard.len() < 3 => self.heard.push(printable(line.as_bytes())),
                None => {
                    self.heard.remove(0);
                    self.heard.push(printable(line.as_bytes()));
                }
            }
        }
        self.end.cut();
        Err(self.lost("its output does not end".to_owned()))
    }

    fn lost(&self, reason: String) -> StoreError {
        StoreError::Disconnected {
            op: "punch",
            object: self.object.clone(),
            reason,
        }
    }

    fn ending(&self) -> (EndingKind, String) {
        let ending = self.end.ending(Duration::from_secs(5));
        let heard = self.heard.join("; ");
        match heard.is_empty() {
            true => (ending.kind, ending.reason),
            false => (ending.kind, format!("{heard}; {}", ending.reason)),
        }
    }

    fn unsupported(&self, reason: &str) -> StoreError {
        StoreError::Unsupported {
            op: "punch",
            object: self.object.clone(),
            reason: reason.to_owned(),
        }
    }

    /// The error for an unexpected answer.
    fn refused(&self, answer: &str) -> StoreError {
        let heard = self.heard.join("; ");
        let no = answer.strip_prefix("no ").unwrap_or(answer);
        match no {
            "folder" | "place" => {
                self.unsupported("the account's shell sees other folders than its SFTP")
            }
            "file" => StoreError::NotRegular {
                op: "punch",
                object: self.object.clone(),
            },
            "missing" => self.unsupported("the server has no fallocate"),
            "old" => self.unsupported("the server's fallocate can't punch holes (as BusyBox's)"),
            // The first hole failed. Programs word the cause differently ("not supported",
            // "unsupported"), so any failure counts as unsupported, except for temporary causes.
            "hole"
                if ![
                    "No space",
                    "Input/output",
                    "denied",
                    "not permitted",
                    "quota",
                ]
                .iter()
                .any(|cause| heard.contains(cause)) =>
            {
                self.unsupported(&format!(
                    "the server's file system can't punch holes ({heard})"
                ))
            }
            "hole" | "range" => StoreError::Refused {
                op: "punch",
                object: self.object.clone(),
                reason: heard,
            },
            "lock" => StoreError::Refused {
                op: "punch",
                object: self.object.clone(),
                reason: "the lock beside it is gone or belongs to another session".to_owned(),
            },
            other => StoreError::Protocol {
                op: "punch",
                object: self.object.clone(),
                reason: format!("the shell printed {:?}", printable(other.as_bytes())),
            },
        }
    }
}

impl Drop for Puncher {
    fn drop(&mut self) {
        self.writer = None;
        self.end.cut();
    }
}

impl std::fmt::Debug for Puncher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puncher")
            .field("object", &self.object)
            .finish_non_exhaustive()
    }
}

/// Passes lines on until the end; a long line is cut, so that memory stays bounded.
fn read_lines(mut reader: Box<dyn Read + Send>, lines: &SyncSender<String>) {
    let mut chunk = [0; 4096];
    let mut line = Vec::new();
    loop {
        let read = match reader.read(&mut chunk) {
            Ok(0) => return,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        for byte in &chunk[..read] {
            if *byte == b'\n' {
                let text = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                if lines.send(text).is_err() {
                    return;
                }
            } else if line.len() < LINE_BYTES_MAX {
                line.push(*byte);
            }
        }
    }
}

/// The first word of each of our answers.
fn random_word() -> String {
    // Without randomness a server could forge answers; it can do that anyway.
    format!("sprat-{}", Token::random().unwrap_or(Token([0; 16])))
}

/// One word for a POSIX shell, whatever it contains.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// The script; POSIX, for dash, bash and BusyBox alike. All of it is in braces, so that the shell
/// has read it completely before it runs any of it: from then on its input is ranges.
fn script(word: &str, folder: &str, file: &FileName, fence: &Fence) -> String {
    let folder = match folder {
        "" => ".".to_owned(),
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        relative => format!("./{relative}"),
    };
    let beside = |name: &FileName| quoted(&format!("./{name}"));
    format!(
        "{{ t={word}; LC_ALL=C; export LC_ALL
no() {{ echo \"$t no $1\"; exit 1; }}
size() {{ set -- $(du -k \"$f\" 2>/dev/null); echo \"$t size $1\"; }}
cd {folder} 2>/dev/null || no folder
f={file}
l={lock}
n={next}
{{ [ -e \"$f\" ] || [ -L \"$f\" ]; }} || no place
{{ [ -f \"$f\" ] && [ ! -L \"$f\" ]; }} || no file
case \"$(cat \"$l\" 2>/dev/null)\" in *{token}*) ;; *) no place ;; esac
command -v fallocate >/dev/null 2>&1 || no missing
case \"$(fallocate --help 2>&1 </dev/null)\" in *punch-hole*) ;; *) no old ;; esac
failed=hole
echo \"$t ready\"
while read -r o s
do
case \"$o\" in
tell) echo \"$t told $s\"; continue ;;
size) size; continue ;;
esac
h=; IFS= read -r h 2>/dev/null <\"$l\"
case \"$h\" in *{token}*) ;; *) no lock ;; esac
[ ! -e \"$n\" ] || no lock
fallocate -n -p -o \"$o\" -l \"$s\" \"$f\" </dev/null 2>&1 || no \"$failed\"
failed=range
done
exit 0
}}
",
        folder = quoted(&folder),
        file = beside(file),
        lock = beside(&fence.lock),
        next = beside(&fence.next),
        token = quoted(&fence.token),
    )
}
