//! The last part of a program's output.

/// How much of it is kept.
pub(crate) const TAIL_BYTES_MAX: usize = 64 << 10;

/// Keeps the last [`TAIL_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub(crate) struct Tail(Vec<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        // Not at each write, or each one would move all of it.
        if self.0.len() > 2 * TAIL_BYTES_MAX {
            self.shorten();
        }
    }

    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        self.shorten();
        self.0
    }

    fn shorten(&mut self) {
        let over = self.0.len().saturating_sub(TAIL_BYTES_MAX);
        self.0.drain(..over);
    }
}
