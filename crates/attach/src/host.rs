//! Looks whether this machine can attach volumes, for `sprat doctor`.

/// How a finding bears on attaching volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// All is well.
    Fine,
    /// It works, with less speed or less safety against rare trouble.
    Weak,
    /// No volume can be attached here.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostFinding {
    /// What was looked at, a short stable name such as `fuse`.
    pub what: &'static str,
    /// How it bears on attaching volumes.
    pub verdict: Verdict,
    /// What was seen.
    pub detail: String,
    /// What to do about it, if anything.
    pub hint: Option<String>,
}

/// Looks at everything that attaching needs. Takes well under a second and leaves nothing behind.
#[must_use]
pub fn check_host() -> Vec<HostFinding> {
    Vec::new()
}
