//! Ends a volume in order: everything durable, read back, and shown once more by the server.

use std::thread;

use crate::VolumeError;
use crate::engine::{Engine, Meaning, meaning};
use crate::threads::named;

impl Engine {
    /// Waits until everything is durable and every suspect read back, and ends the volume.
    pub(crate) fn close(&self) -> Result<(), VolumeError> {
        let mut state = self.state();
        state.check()?;
        state.held_back = false;
        state.waiting += 1;
        drop(state);
        let settled = self.settle_and_prove();
        let mut state = self.state();
        state.waiting -= 1;
        state.check()?;
        if let Err(cause) = settled {
            self.fail(&mut state, cause);
        }
        state.check()?;
        self.fail(&mut state, VolumeError::Closed);
        drop(state);
        if !self.read_only {
            self.session.settled();
        }
        if self.read_only {
            self.drop_cache_that_differs();
        } else {
            self.keep_cache();
        }
        Ok(())
    }

    /// Makes everything durable and reads every suspect back. Beside the last of it, so that it takes
    /// no round trip more, the server shows that it still has what it called durable before.
    fn settle_and_prove(&self) -> Result<(), VolumeError> {
        thread::scope(|scope| {
            let mut proving = Proving::NotBegun;
            let mut state = self.state();
            loop {
                state.check()?;
                // A suspect that was found overwritten is in the open epoch again: seal each time.
                state.plan.seal();
                if matches!(proving, Proving::NotBegun) && state.plan.sealed_len() <= 1 {
                    let samples = self.samples_of(&state);
                    if let (Some(line), false) = (state.connection(), samples.is_empty()) {
                        let prove = move || self.prove_patiently(&*line.file, &samples);
                        let prover = named("prover").spawn_scoped(scope, prove);
                        proving = prover.map_or(Proving::Behind, Proving::Beside);
                    }
                }
                if state.plan.is_settled() {
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
                (Proving::Behind, (Some(line), samples)) => {
                    self.prove_patiently(&*line.file, &samples)
                }
                _ => Ok(()),
            };
            match proved {
                // All is durable by the word of an fsync; a connection that is lost now takes
                // nothing from it.
                Err(VolumeError::Store { op, source }) => match meaning(op, source) {
                    Meaning::LineLost(_) => Ok(()),
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
    /// No thread could be made (a limit on processes or memory): it takes a round trip more.
    Behind,
}
