//! How long an answer of the server is waited for.

use std::time::Duration;

/// How long a server may leave a request unanswered, in seconds: for servers on slow disks, and for tests.
/// The processes of a session inherit it.
const ANSWER_TIMEOUT: &str = "SPRAT_ANSWER_TIMEOUT";

/// How long an answer is waited for, where [`ANSWER_TIMEOUT`] says so. What is no number from 1 to 3600
/// counts as not set.
pub fn answer_timeout() -> Option<Duration> {
    let set = std::env::var(ANSWER_TIMEOUT).ok()?;
    let seconds = set.parse::<u64>().ok()?;
    (1..=3600)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

/// Sets how long an answer is waited for, where that is set, and an fsync ten times as long.
pub fn set_patience(options: &mut sprat_store::SftpOptions) {
    if let Some(timeout) = answer_timeout() {
        options.answer_timeout = timeout;
        options.flush_timeout = timeout * 10;
    }
}
