//! The system calls that the safe wrappers lack; all `unsafe` of the workspace.
