//! Writes the LUKS2 header: of a new container, for changed keys, and from a kept copy.

pub(crate) mod create;
pub(crate) mod edit;
pub(crate) mod restore;
