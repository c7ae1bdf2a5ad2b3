//! The worker of a session.

use crate::Exit;

/// Runs this process of a session; its control socket is standard input.
pub fn run() -> Exit {
    Exit::Failed
}
