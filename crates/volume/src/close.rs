//! Ends a volume in order: everything is durable, read back, and proven by the server.

use std::thread;

use crate::VolumeError;
use crate::cache_keeper::ClosedCache;
use crate::engine::{Engine, Meaning, meaning};
use crate::threads::named;

impl Engine {
    /// Waits until everything is durable and every in-doubt block read back, then ends the volume.
    /// Returns the cache, which is not yet marked as clean.
    pub(crate) fn close(&self) -> Result<Option<ClosedCache>, VolumeError> {
        let mut state = self.state();
        state.check()?;
        state.held_back = false;
        state.waiting += 1;
        drop(state);
        let resolved = self.resolve_and_prove();
        let mut state = self.state();
        state.waiting -= 1;
        state.check()?;
        if let Err(cause) = resolved {
            self.fail(&mut state, cause);
        }
        state.check()?;
        self.fail(&mut state, VolumeError::Closed);
        drop(state);
        if !self.read_only {
            self.session.resolved();
        }
        if self.read_only {
            self.drop_cache_that_differs();
            return Ok(None);
        }
        Ok(self.close_cache())
    }

    /// Makes everything durable and reads every in-doubt block back. At the same time as the last
    /// of it, so that it takes no extra round trip, the server proves that it still has what it
    /// reported as durable before.
    fn resolve_and_prove(&self) -> Result<(), VolumeError> {
        thread::scope(|scope| {
            let mut proving = Proving::NotBegun;
            let mut state = self.state();
            loop {
                state.check()?;
                // An in-doubt block that was found overwritten is in the open epoch again, so seal
                // each time.
                state.plan.seal();
                if matches!(proving, Proving::NotBegun) && state.plan.sealed_len() <= 1 {
                    let samples = self.samples_of(&state);
                    if let (Some(connection), false) = (state.connection(), samples.is_empty()) {
                        let prove = move || self.prove_patiently(&*connection.file, &samples);
                        let prover = named("prover").spawn_scoped(scope, prove);
                        proving = prover.map_or(Proving::Behind, Proving::Beside);
                    }
                }
                if state.plan.is_resolved() {
                    break;
                }
                self.step.notify_one();
                self.send.notify_one();
                state = self.wait(&self.durable, state);
            }
            let now = (state.connection(), self.samples_of(&state));
            drop(state);
            let proved = match (proving, now) {
                (Proving::Beside(prover), _) => prover.join().unwrap_or(Err(VolumeError::Bug)),
                (Proving::Behind, (Some(connection), samples)) => {
                    self.prove_patiently(&*connection.file, &samples)
                }
                _ => Ok(()),
            };
            match proved {
                // Everything is durable, as an fsync reported. A connection that is lost now does
                // not change that.
                Err(VolumeError::Store { op, source }) => match meaning(op, source) {
                    Meaning::ConnectionLost(_) => Ok(()),
                    Meaning::Fatal(cause) => Err(cause),
                },
                proved => proved,
            }
        })
    }
}

/// The comparison at the close.
enum Proving<'scope> {
    NotBegun,
    Beside(thread::ScopedJoinHandle<'scope, Result<(), VolumeError>>),
    /// No thread could be started (a limit on processes or memory). It takes one round trip more.
    Behind,
}
