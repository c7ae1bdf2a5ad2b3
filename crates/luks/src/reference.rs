//! Runs libcryptsetup on a header in memory.
