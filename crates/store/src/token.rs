//! Random tokens that identify a lock's owner.

use std::fmt;

use crate::LockError;
use crate::text::hex;

/// A lock's token: 128 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token(pub [u8; 16]);

impl Token {
    /// Gets a token from the kernel's random numbers.
    pub(crate) fn random() -> Result<Self, LockError> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            match rustix::rand::getrandom(&mut bytes[filled..], flags) {
                Ok(more) => filled += more,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(LockError::Invalid {
                        op: "create a token",
                        reason: errno.to_string(),
                    });
                }
            }
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}
