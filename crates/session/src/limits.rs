//! Checks whether this process may use enough memory and open files for a session.

use crate::{Failure, text};

/// Fails if a limit of this process is too low for a session.
pub fn check_limits() -> Result<(), Failure> {
    if let Some(bytes) = sprat_attach::memory_limit_too_low() {
        return Err(Failure::failed(format!(
            "this process may use only {} of address space (ulimit -v), too little for a session",
            text::bytes(bytes)
        ))
        .with_hint("nothing was started. Remove the limit: `ulimit -v unlimited`"));
    }
    if let Some(files) = sprat_attach::open_files_limit_too_low() {
        return Err(Failure::failed(format!(
            "this process may open only {files} files (ulimit -n), too few for a session"
        ))
        .with_hint("nothing was started. Raise the limit: `ulimit -n 1024`"));
    }
    Ok(())
}
