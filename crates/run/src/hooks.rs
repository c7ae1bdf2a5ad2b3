//! Hooks: programs that run before and after a copy.
