//! Several threads for one job, or as many as this machine allows.

use std::io;
use std::thread::{Builder, Scope};

/// Starts `count` threads in `scope`. If the machine's limits on processes or memory allow no more,
/// it starts fewer, and the job takes longer. Fails only if no thread could be started. A scope's
/// own `spawn` would panic there, and a copy that panics leaves the leases on both its containers.
pub(super) fn start<'scope, 'env, F>(
    scope: &'scope Scope<'scope, 'env>,
    count: usize,
    body: impl Fn() -> F,
) -> io::Result<()>
where
    F: FnOnce() + Send + 'scope,
{
    start_by(count, || {
        Builder::new().spawn_scoped(scope, body()).map(drop)
    })
}

fn start_by(count: usize, mut start: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for started in 0..count {
        if let Err(error) = start() {
            return if started == 0 { Err(error) } else { Ok(()) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_threads_are_enough_and_none_is_an_error() {
        for allowed in 0..5 {
            let mut started = 0;
            let outcome = start_by(4, || {
                if started == allowed {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                started += 1;
                Ok(())
            });
            assert_eq!(outcome.is_ok(), allowed > 0);
            assert_eq!(started, allowed.min(4));
        }
    }
}
