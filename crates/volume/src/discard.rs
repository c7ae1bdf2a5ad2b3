//! Giving space back to the server, outside of all epochs.

use std::ops::Range;

use sprat_store::StoreErrorKind;

use crate::engine::{Engine, Meaning, meaning};
use crate::{BLOCK_BYTES, VolumeError};

impl Engine {
    /// Punches `blocks`; they may not be read or written meanwhile.
    pub(crate) fn discard(&self, blocks: Range<u64>) -> Result<(), VolumeError> {
        let mut state = self.state();
        state.check()?;
        let idle = state.plan.is_settled();
        let (true, Some(line)) = (idle, state.connection()) else {
            return Err(VolumeError::Discard {
                reason: "writes are waiting or the line is down",
            });
        };
        // Whatever is read from now on until the end is of unknown age.
        self.forget(&mut state, &blocks);
        drop(state);
        let offset = self.offset_of(blocks.start);
        let len = (blocks.end - blocks.start) * BLOCK_BYTES as u64;
        let range = offset..offset + len;
        let checked = self
            .session
            .before_epoch()
            .and_then(|()| self.session.before_send(std::slice::from_ref(&range)));
        if let Err(fenced) = checked {
            self.fenced(&mut self.state(), line.generation, fenced);
            return Err(VolumeError::Discard {
                reason: "the lock could not be checked",
            });
        }
        let answer = line
            .file
            .discard(offset, len)
            .and_then(|()| line.file.flush());
        let mut state = self.state();
        self.forget(&mut state, &blocks);
        let Err(source) = answer else {
            drop(state);
            self.session.settled();
            return Ok(());
        };
        if source.kind() == StoreErrorKind::Unsupported {
            drop(state);
            self.session.settled();
            return Err(VolumeError::Store {
                op: "discard",
                source,
            });
        }
        // Half of it may have happened, or may still: only a new session can settle that.
        let cause = match meaning("discard", source) {
            Meaning::LineLost(source) => VolumeError::Store {
                op: "discard",
                source,
            },
            Meaning::Fatal(cause) => cause,
        };
        self.fail(&mut state, cause);
        state.check()
    }

    fn forget(&self, state: &mut crate::engine::State, blocks: &Range<u64>) {
        for index in blocks.clone() {
            state.clean.remove(index);
            state.fetches.taint(index);
            if let Some(cache) = &mut state.cache {
                cache.forget(index);
            }
        }
    }
}
