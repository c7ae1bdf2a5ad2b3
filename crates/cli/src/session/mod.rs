//! The session that holds a container open, and the two processes that it consists of.

pub mod volume_process;
pub mod worker;
