//! Events and the channels that report them.
