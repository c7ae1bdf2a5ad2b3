//! Builds the volume's threads.

use std::thread::Builder;

/// Small stacks: the process may lock all of its memory.
const STACK_BYTES: usize = 256 << 10;

/// Returns a builder for a named thread.
pub(crate) fn named(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK_BYTES)
}
