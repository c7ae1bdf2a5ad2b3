//! Finds the program under test, and runs programs to their end.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::needs;

/// The `sprat` that cargo built for the running test program. nextest names it; plain `cargo test`
/// puts it into the folder above the test programs.
///
/// # Panics
/// Where it does not exist: only the integration tests of the package `sprat` have it.
#[must_use]
pub fn sprat() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let named = std::env::var_os("NEXTEST_BIN_EXE_sprat").map(PathBuf::from);
        let program = named.unwrap_or_else(|| {
            let test = std::env::current_exe().expect("a test program has a path");
            let folder = test.ancestors().nth(2).expect("target/debug/deps/test");
            folder.join("sprat")
        });
        assert!(program.is_file(), "there is no {}", program.display());
        program
    })
}

/// A command and its outcome, for the message of a failing test.
#[must_use]
pub fn shown(command: &Command, output: &Output) -> String {
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    format!(
        "{} {}\n{}\n--- stdout\n{}\n--- stderr\n{}",
        command.get_program().to_string_lossy(),
        words.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a command to its end and returns its output.
///
/// # Panics
/// When the command takes longer than `limit`; it is killed then.
pub fn run_within(command: &mut Command, limit: Duration) -> Output {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let until = Instant::now() + limit;
    let (status, in_time) = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break (status, true);
        }
        if Instant::now() > until {
            child.kill().expect("a child can be killed");
            break (child.wait().expect("a child can be waited for"), false);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = Output {
        status,
        stdout: stdout.join().expect("the reader ends"),
        stderr: stderr.join().expect("the reader ends"),
    };
    assert!(
        in_time,
        "took longer than {limit:?}: {}",
        shown(command, &output)
    );
    output
}

fn reader(pipe: Option<impl std::io::Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    let mut pipe = pipe.expect("the output is a pipe");
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// Runs one of the system's programs and returns its standard output.
///
/// # Panics
/// When its exit code is not 0.
pub fn system<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    let output = Command::new(needs::find_program(program).expect("checked by missing()"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// The processor time of all children that have ended, and of theirs.
///
/// # Panics
/// When the kernel does not say it.
#[must_use]
pub fn children_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").expect("proc(5)");
    // The name of the program can have spaces. The sixteenth and seventeenth field: `cutime` and `cstime`.
    let (_, behind_name) = text.rsplit_once(')').expect("proc(5)");
    let fields = behind_name.split_whitespace().skip(13).take(2);
    let ticks: u64 = fields
        .map(|field| field.parse::<u64>().expect("proc(5)"))
        .sum();
    Duration::from_millis(1000 * ticks / rustix::param::clock_ticks_per_second())
}
