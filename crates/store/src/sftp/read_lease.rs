//! Asks the server's kernel whether any process has a file open for writing.
//!
//! A read lease (`fcntl(F_SETLEASE, F_RDLCK)`, fcntl(2)) is granted only if no process has the file
//! open for writing, including processes that we can't see. It proves that no earlier session can
//! write any more. This holds on the server's own file systems: the kernel does not know another
//! machine's writes to a network file system.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::FileStat;

/// The answer is one line.
const ANSWER_BYTES_MAX: u64 = 1000;

/// The kernel's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writers {
    /// No process has the file open for writing.
    None,
    /// Some process has.
    Some,
    /// The kernel can't be asked: no shell, no Perl and no Python, a network file system, another
    /// file.
    Unknown {
        /// Why.
        reason: String,
    },
}

/// File systems of one machine, as GNU `stat -f` names them.
const LOCAL: &str = "ext2/ext3|ext4|xfs|btrfs|zfs|f2fs|jfs|tmpfs|bcachefs|nilfs|reiserfs";

const PERL: &str = r#"
open(my $f, "<", $ARGV[0]) or exit 3; my @s = stat($f);
my $said = fcntl($f, 1024, 0) ? "free" : $! + 0 == 11 ? "busy" : "no " . ($! + 0);
fcntl($f, 1024, 2); print "file $s[7] $s[9] $said\n";
"#;

const PYTHON: &str = r#"
import fcntl, os, sys
f = os.open(sys.argv[1], os.O_RDONLY); s = os.fstat(f); said = "free"
try:
    fcntl.fcntl(f, 1024, 0)
    fcntl.fcntl(f, 1024, 2)
except OSError as e: said = "busy" if e.errno == 11 else "no %d" % e.errno
print("file %d %d %s" % (s.st_size, int(s.st_mtime), said))
"#;

/// Asks about the file at `path`, which SFTP shows as `stat`. The last words of `argv` make the
/// server's login shell run `sh -s`. Gives up after `timeout`.
pub fn writers_of(argv: &[OsString], path: &str, stat: &FileStat, timeout: Duration) -> Writers {
    let unknown = |reason: &str| Writers::Unknown {
        reason: reason.to_owned(),
    };
    let spawned = Command::new(argv.first().cloned().unwrap_or_default())
        .args(argv.get(1..).unwrap_or_default())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = spawned else {
        return unknown("no shell can be started");
    };
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let script = script(path);
    let (answer_to, answer) = mpsc::channel();
    let reader = std::thread::Builder::new().spawn(move || {
        // A shell that ends early closes the pipe; its answer shows that.
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(script.as_bytes());
        }
        let mut said = String::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(ANSWER_BYTES_MAX).read_to_string(&mut said);
        }
        let _ = answer_to.send(said);
    });
    let heard = match reader {
        Ok(_) => answer.recv_timeout(timeout).ok(),
        Err(_) => None,
    };
    // It may hang in the middle of an answer.
    let _ = child.kill();
    let _ = child.wait();
    match heard {
        None => unknown("the server's shell does not answer"),
        Some(said) => parse(&said, stat),
    }
}

fn script(path: &str) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    format!(
        "LC_ALL=C; export LC_ALL\nf={}\ncase $f in /*) ;; *) f=./$f ;; esac\n\
         [ -f \"$f\" ] && [ ! -h \"$f\" ] || exit 3\n\
         case $(stat -f -c %T \"$f\" 2>/dev/null) in {LOCAL}) ;; *) echo network; exit ;; esac\n\
         if command -v perl >/dev/null 2>&1; then exec perl -e {} \"$f\" </dev/null\n\
         elif command -v python3 >/dev/null 2>&1; then exec python3 -c {} \"$f\" </dev/null\nfi\n",
        quoted(path),
        quoted(PERL),
        quoted(PYTHON)
    )
}

fn parse(said: &str, stat: &FileStat) -> Writers {
    let words: Vec<&str> = said.split_whitespace().collect();
    let unknown = |reason: &str| Writers::Unknown {
        reason: reason.to_owned(),
    };
    let same = |len: &str, modified_s: &str| {
        let modified = stat.modified_s.map(|modified_s| modified_s.to_string());
        len == stat.len.to_string() && modified.is_some_and(|modified| modified == modified_s)
    };
    match words[..] {
        ["file", len, modified_s, ..] if !same(len, modified_s) => {
            unknown("the server's shell sees another file")
        }
        ["file", _, _, "free"] => Writers::None,
        ["file", _, _, "busy"] => Writers::Some,
        ["file", _, _, "no", ..] => unknown("the server's kernel gives no lease on this file"),
        ["network"] => unknown("the file may lie on a network file system"),
        _ => unknown("the server's shell can't check it"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use sprat_testkit::requires;

    use super::*;

    fn asked(path: &std::path::Path) -> Writers {
        let about = path.metadata().unwrap();
        let stat = FileStat {
            len: about.len(),
            modified_s: u64::try_from(about.mtime()).ok(),
            regular: true,
            allocated_bytes: None,
        };
        let argv = ["sh".into(), "-s".into()];
        writers_of(
            &argv,
            path.to_str().unwrap(),
            &stat,
            Duration::from_secs(20),
        )
    }

    /// In memory: the script may not know the file system on which the test runs.
    #[test]
    fn kernel_reports_whether_any_process_may_write() {
        let folder = tempfile::tempdir_in("/dev/shm");
        requires!(
            folder
                .as_ref()
                .err()
                .map(|error| format!("/dev/shm: {error}"))
        );
        let folder = folder.unwrap();
        let path = folder.path().join("it's one");
        let writer = File::create(&path).unwrap();
        assert_eq!(asked(&path), Writers::Some);
        drop(writer);
        let _reader = File::open(&path).unwrap();
        assert_eq!(asked(&path), Writers::None);
    }

    #[test]
    fn only_a_clear_answer_about_the_same_file_proves_anything() {
        let stat = FileStat {
            len: 5,
            modified_s: Some(7),
            regular: true,
            allocated_bytes: None,
        };
        assert_eq!(parse("file 5 7 free\n", &stat), Writers::None);
        assert_eq!(parse("file 5 7 busy\n", &stat), Writers::Some);
        for said in [
            "",
            "free",
            "network",
            "file 5 8 free",
            "file 6 7 free",
            "file 5 7 no 22",
        ] {
            assert!(
                matches!(parse(said, &stat), Writers::Unknown { .. }),
                "{said}"
            );
        }
    }
}
